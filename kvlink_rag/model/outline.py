"""What can be known of a model without its weights: its window, its tokenizer, its spec.

For callers that count tokens or size prompts before the first question, in frameworks whose
event loop must not wait for weights. Knows model files and loaded models; no prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvlink_rag.engine.backbone import check_supported
from kvlink_rag.prompt.spec import Spec
from kvlink_rag.prompt.tokenizer import PartTokenizer

from .adapter import find_adapter
from .loading import find_spec, load_config, load_tokenizer, resolve
from .model import KVLinkModel, default_spec


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """A model's name, window (tokens a prompt and its answer may have), tokenizer and spec."""

    name: str
    window: int
    tokenizer: PartTokenizer
    spec: Spec

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer renders conversations itself."""
        return bool(getattr(self.tokenizer.hf, "chat_template", None))

    @property
    def link_tokens(self) -> int:
        """The most link tokens and markers that the passages of one message can take."""
        markers = 0 if self.spec.mem_start is None else 2
        return self.spec.links_per_passage * (self.spec.max_passages or 0) + markers


def outline(model: KVLinkModel | str | Path, *, spec: Spec | None = None) -> ModelOutline:
    """The outline of a loaded model, or of the one that `KVLinkModel.from_pretrained` would load.

    Raises `ConfigError` (nothing to load), `ModelNotSupported`, `SpecError`.
    """
    if isinstance(model, KVLinkModel):
        return ModelOutline(model.name, model.window, model.tokenizer, model.spec)
    base, adapter = find_adapter(model, None)
    directory = resolve(base, bundled="lm")
    config = load_config(directory)
    check_supported(config)
    spec = spec or (adapter.spec if adapter else find_spec(str(base), directory))
    tokenizer = load_tokenizer(directory, spec)
    window = int(config.max_position_embeddings)
    return ModelOutline(
        str(model), window, PartTokenizer(tokenizer), spec or default_spec(tokenizer)
    )
