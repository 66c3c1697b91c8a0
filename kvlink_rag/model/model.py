"""`KVLinkModel`: one language model that answers from snapshots.

    parts → layout → snapshots → assembly → prefill → first token → text

A face: `prompt.format` writes and lays prompts out, `text_stream` and `prompt_run` answer, `verify`
compares. Knows no collection; without one, passages are encoded on the spot.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlink_rag.arguments import Mode, check_mode, check_weights, parse_repair
from kvlink_rag.disk.digests import weight_states
from kvlink_rag.documents import Document, Part
from kvlink_rag.engine.backbone import Backbone
from kvlink_rag.engine.quick_weights import QuickWeights
from kvlink_rag.engine.sampling import Sampling
from kvlink_rag.engine.workspaces import Workspaces
from kvlink_rag.errors import SpecError
from kvlink_rag.pretrained.known import DEFAULT
from kvlink_rag.pretrained.model_files import find_device, find_dtype
from kvlink_rag.prompt.format import PromptFormat
from kvlink_rag.prompt.layout import Layout
from kvlink_rag.prompt.spec import Spec
from kvlink_rag.prompt.tokenizer import PartTokenizer
from kvlink_rag.snapshots.codecs import default_codec
from kvlink_rag.snapshots.encode import PassageEncoder
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.snapshot import EXACT
from kvlink_rag.snapshots.sources import EncodeNow, Reuse
from kvlink_rag.trace import Trace

from .loading import find_model, load_model
from .prompt_states import PromptStates, prompt_states
from .text_stream import TextStream
from .verify import Verification, first_logits, verify

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prefill:
    """The state after the prompt. logits: float32 [vocab], of the next token, on the CPU."""

    logits: Tensor
    trace: Trace


class KVLinkModel:
    """A causal LM, its tokenizer and its spec, ready to answer from snapshots.

    model, tokenizer: as transformers loads them. spec: see `Spec`; None means no link tokens.
    name: shown to people. source: the directory of the weights, if any. adapter: the digest of what
    was merged into them. graphs: whether forwards of fixed shape are used (`engine.workspace`), on
    CUDA as recorded graphs; None: on CUDA only. notice: said by every trace. The attribute `codec`
    is how a new collection keeps its snapshots where nobody says (`snapshots.codecs`).
    Safe to share between threads. Raises `ModelNotSupported`, `SpecError`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        spec: Spec | None = None,
        *,
        name: str = "model",
        source: Path | None = None,
        adapter: str = "",
        graphs: bool | None = None,
        notice: str = "",
    ) -> None:
        backbone = Backbone(model, source, adapter=adapter)
        format = PromptFormat.of(name, backbone.window, tokenizer, spec)
        self._start(backbone, format, graphs, notice, EXACT)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path = DEFAULT,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        spec: Spec | None = None,
        adapter: str | Path | None = None,
        adapter_base: str | None = None,
        graphs: bool | None = None,
        weights: str = "own",
    ) -> KVLinkModel:
        """Load a directory, a GGUF file, a hub id, a pair's reader, or an adapter with its base.

        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ... dtype: to compute in;
        "auto" is the checkpoint's own, but on a CPU float32 for float16, and for bfloat16 where the
        processor does not multiply that. spec: None takes the `kvlink.json` beside the weights,
        else the built-in one of a published checkpoint, else a spec without link tokens. adapter:
        the directory of an adapter, merged in memory; adapter_base: "any" takes it on another base
        than it was trained on, which every trace then says. graphs: False keeps CUDA graphs off,
        see `KVLinkModel`. weights: "int8" keeps a second copy of them in 8 bits for generated
        tokens, on a CPU; see `engine.quick_weights`.
        Raises `ConfigError` (nothing to load), `ModelNotSupported`, `SpecError`.
        """
        check_weights(weights)
        target, precision = find_device(device), find_dtype(dtype)
        # 1. a name → files, tokenizer, spec
        files = find_model(path_or_id, spec, adapter)
        notice = files.check_base(adapter_base)
        # 2. files → weights in memory, the adapter merged
        states = weight_states(files.directory)  # before: a file replaced meanwhile is noticed
        model = load_model(files.directory, precision, target)
        if files.adapter is not None:
            files.adapter.merge_into(model)
        # 3. weights → engine
        backbone = Backbone(model.to(target), files.directory, states, files.merged, files.links)
        logger.info("%s computes in %s on %s", path_or_id, backbone.dtype_name, target)
        made = cls.__new__(cls)
        made._start(backbone, files.format, graphs, notice, default_codec(dtype, target))
        if weights == "int8":
            backbone.quick = QuickWeights(backbone.model)
        return made

    def _start(
        self,
        backbone: Backbone,
        format: PromptFormat,
        graphs: bool | None,
        notice: str,
        codec: str,
    ) -> None:
        _check_ids(format.spec, backbone)
        self.backbone, self.format, self.notice, self.codec = backbone, format, notice, codec
        if backbone.device.type == "cuda" if graphs is None else graphs:
            backbone.workspaces = Workspaces.of(backbone)
        self.reuse = Reuse(EncodeNow(self.encoder), PrefixCache())

    def with_spec(self, spec: Spec) -> KVLinkModel:
        """The same weights and tokenizer under another spec. Raises `SpecError`."""
        _check_ids(spec, self.backbone)
        other = copy.copy(self)
        other.format = replace(self.format, spec=spec)
        other.never_ids = sorted({*self.never_ids, *spec.special_ids()})  # whatever it leaves out
        other.reuse = Reuse(EncodeNow(other.encoder), PrefixCache())
        return other

    @property
    def name(self) -> str:
        """Shown to people."""
        return self.format.name

    @property
    def tokenizer(self) -> PartTokenizer:
        """Text to token ids and back."""
        return self.format.tokenizer

    @property
    def spec(self) -> Spec:
        """Link tokens, markers and templates."""
        return self.format.spec

    @property
    def window(self) -> int:
        """The most tokens a prompt and its answer may have."""
        return self.format.window

    @property
    def encoder(self) -> PassageEncoder:
        """What makes snapshots of passages."""
        return PassageEncoder(self.backbone, self.spec.header)

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the weights or anything that shapes a snapshot."""
        return self.encoder.fingerprint

    # Prompts

    def prompt(self, documents: Sequence[Document], question: str) -> list[Part]:
        """The spec's one-question prompt over `documents`."""
        return self.format.prompt(documents, question)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[Part]:
        """Parts of a conversation; see `PromptFormat.chat`."""
        return self.format.chat(messages)

    def layout(self, parts: Iterable[Part]) -> Layout:
        """Token ids, positions and segments of a prompt. Raises `PromptError` and its kin."""
        return self.format.layout(parts)

    def passage_tokens(self, document: Document, slot: int = 0) -> tuple[int, ...]:
        """Token ids that are encoded for `document`: all its snapshot depends on, but the model."""
        return self.format.passage_tokens(document, slot)

    # Answers

    def prefill(
        self,
        parts: Iterable[Part],
        mode: Mode = "reuse",
        *,
        reuse: Reuse | None = None,
        repair: str | None = None,
    ) -> Prefill:
        """Run the prompt and return the next token's logits.

        mode: "reuse" assembles snapshots and computes the rest; "masked" is the oracle, one full
        prefill with the same visibility; "full" is ordinary causal attention over the same tokens.
        repair: of reused passages, "none", "first:N" or "select:P%" (see `model.repair`); None: as
        `reuse` says, which is the collection's.
        """
        trace = Trace(mode=check_mode(mode), notice=self.notice)
        reuse = _with_repair(reuse or self.reuse, repair)
        logits = first_logits(self.backbone, self.layout(parts), mode, reuse, trace)
        return Prefill(logits, trace)

    def states(
        self, prompt: Layout, mode: Mode = "reuse", *, reuse: Reuse | None = None
    ) -> PromptStates:
        """Run a prompt for another engine to go on from: keys and values of all its tokens.

        prompt: of `layout`. mode, reuse: as in `prefill`; without `reuse` passages are encoded now.
        """
        trace = Trace(mode=check_mode(mode), notice=self.notice)
        return prompt_states(self.backbone, prompt, reuse or self.reuse, trace)

    def stream(
        self,
        parts: Iterable[Part],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] | str = (),
        seed: int | None = None,
        mode: Mode = "reuse",
        repair: str | None = None,
        reuse: Reuse | None = None,
        trace: Trace | None = None,
    ) -> TextStream:
        """Stream the answer: pieces of valid Unicode that never hold part of a stop string.

        Nothing is computed, nor an iterator of parts read, before the first `next()`. Arguments as
        in `Sampling` and `prefill`.
        """
        check_mode(mode)
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        return TextStream(
            self.format,
            self.backbone,
            parts,
            end_ids=self.end_ids,
            never=self.never_ids,
            notice=self.notice,
            sampling=Sampling(
                *(max_new_tokens, temperature, top_p, strings, seed),
                *(top_k, min_p, repetition_penalty),
            ),
            mode=mode,
            reuse=_with_repair(reuse or self.reuse, repair),
            trace=trace,
        )

    def generate(self, parts: Iterable[Part], **arguments: Any) -> str:
        """The whole answer. Arguments as in `stream`."""
        return "".join(self.stream(parts, **arguments))

    def verify(self, parts: Iterable[Part], *, reuse: Reuse | None = None) -> Verification:
        """Compare reuse with the masked full prefill on this prompt; see `model.verify`."""
        return verify(self.backbone, self.layout(parts), reuse or self.reuse)

    @cached_property
    def never_ids(self) -> list[int]:
        """Ids that are never said: link tokens, markers, and rows that no token stands for."""
        known = set(self.tokenizer.hf.get_vocab().values())
        unknown = (i for i in range(self.backbone.vocabulary) if i not in known)
        return sorted({*self.spec.special_ids(), *unknown})

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        configs = (self.backbone.model.generation_config, self.backbone.config)
        found = [getattr(config, "eos_token_id", None) for config in configs if config is not None]
        found.append(self.tokenizer.hf.eos_token_id)
        lists = [ids if isinstance(ids, list) else [ids] for ids in found]
        return frozenset(i for ids in lists for i in ids if i is not None)


def _with_repair(reuse: Reuse, repair: str | None) -> Reuse:
    """`reuse` with the repair that was asked for, if one was."""
    return reuse if repair is None else replace(reuse, repair=parse_repair(repair))


def _check_ids(spec: Spec, backbone: Backbone) -> None:
    """Raise `SpecError` where the spec names a token that the model does not have."""
    ids = [*spec.special_ids(), *spec.header]
    if ids and max(ids) >= backbone.vocabulary:
        raise SpecError(
            f"the spec names token id {max(ids)}, but the model has only "
            f"{backbone.vocabulary} tokens; the spec belongs to another model"
        )
