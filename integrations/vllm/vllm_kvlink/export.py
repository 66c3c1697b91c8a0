"""The directory that vLLM serves: the collection's model, its adapter merged.

Link tokens and markers are never said, and vLLM never computes them, so their rows are left out.
Beside the weights lies the fingerprint of the model they were written from.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvlink_rag import KVLinkModel
from kvlink_rag.errors import ConfigError

ABOUT = "kvlink_vllm.json"


def export(model: KVLinkModel, directory: str | Path) -> Path:
    """Write `model` into a new or empty `directory`, in the dtype it computes in.

    Raises `ConfigError` where something lies there already.
    """
    path = Path(directory).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"found something at {path}, expected an empty or new directory")
    path.mkdir(parents=True, exist_ok=True)
    kept = kept_rows(model)
    _cut(model.backbone.model, kept).save_pretrained(path)
    model.tokenizer.hf.save_pretrained(path)
    about = {"fingerprint": model.fingerprint, "vocabulary": kept}
    (path / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return path


def kept_rows(model: KVLinkModel) -> int:
    """Rows of the vocabulary, but those at its end that are never said."""
    never, rows = set(model.never_ids), model.backbone.vocabulary
    while rows - 1 in never:
        rows -= 1
    return rows


def _cut(whole: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The same model with so many rows of the vocabulary; its other tensors are shared."""
    embeddings = (whole.get_input_embeddings(), whole.get_output_embeddings())
    of_tokens = [module.weight for module in embeddings if module is not None]
    state = {
        name: tensor.detach()[:rows].clone() if any(tensor is w for w in of_tokens) else tensor
        for name, tensor in whole.state_dict(keep_vars=True).items()
    }
    config = copy.deepcopy(whole.config)
    config.vocab_size, config.dtype, config._attn_implementation = rows, whole.dtype, "sdpa"
    with torch.device("meta"):
        made = type(whole)(config)
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    made.generation_config = copy.deepcopy(whole.generation_config)
    return made


def exported_fingerprint(directory: Path) -> str:
    """Of the model that `directory` was written from, or "" where it was not."""
    return str(_about(directory).get("fingerprint", ""))


def vocabulary_of(directory: Path) -> int:
    """Token ids of the model in `directory`. Raises `ConfigError`."""
    found = _about(directory).get("vocabulary")
    if not isinstance(found, int):
        raise ConfigError(
            f"{directory} was not written for vLLM; write it with: python -m vllm_kvlink export "
            "COLLECTION DIRECTORY"
        )
    return found


def _about(directory: Path) -> dict[str, object]:
    try:
        found = json.loads((directory / ABOUT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
