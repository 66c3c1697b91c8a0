"""`KVLinkModel`: one language model that answers from snapshots.

    parts → layout → snapshots → assembly → prefill → first token → text

The face of the engine: it lays prompts out and hands them to `answering`. Knows no collection;
without one, passages are encoded on the spot.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlink_rag.arguments import check_mode
from kvlink_rag.documents import Document, Part, Passage, Text
from kvlink_rag.engine.backbone import Backbone, check_supported
from kvlink_rag.engine.workspaces import Workspaces
from kvlink_rag.errors import PromptError, PromptTooLong, SpecError
from kvlink_rag.prompt.layout import Layout, layout
from kvlink_rag.prompt.spec import PLAIN_PRESET, PromptPreset, Spec
from kvlink_rag.prompt.tokenizer import PartTokenizer
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.snapshot import EXACT, Source
from kvlink_rag.trace import Trace

from .adapter import find_adapter
from .generation import Sampling
from .loading import (
    BUNDLED,
    find_device,
    find_dtype,
    find_spec,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
)
from .prompt_run import EncodeNow, Mode, PromptRun, Reuse, TextStream

# The largest relative difference of logits that rounding explains; see docs/architecture.md.
TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}


@dataclass(frozen=True, slots=True)
class Prefill:
    """The state after the prompt. logits: float32 [vocab], of the next token, on the CPU."""

    logits: Tensor
    trace: Trace


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether reuse equals the masked full prefill on this model and prompt.

    difference: largest difference of logits over the largest logit of the masked run. margin: how
    far apart the two best logits of the masked run lie, on the same scale. Where the snapshots are
    quantised, the masked run has their keys and values, and `price` is what the codec costs.
    """

    holds: bool
    difference: float
    tolerance: float
    same_top_token: bool
    margin: float
    message: str
    price: CodecPrice | None = None


@dataclass(frozen=True, slots=True)
class CodecPrice:
    """How far reuse of quantised snapshots is from the masked prefill without quantisation.

    difference: largest difference of logits over the largest logit. divergence: Kullback-Leibler,
    in nats, from the exact distribution of the next token. same_top_token: whether the best token
    is the same.
    """

    codec: str
    difference: float
    divergence: float
    same_top_token: bool


class KVLinkModel:
    """A causal LM, its tokenizer and its spec, ready to answer from snapshots.

    model, tokenizer: as transformers loads them. spec: see `Spec`; None means no link tokens.
    name: shown to people. source: the directory of the weights, if any. adapter: the digest of what
    was merged into them. graphs: whether forwards of fixed shape are used (`static`), on CUDA as
    recorded graphs; None: on CUDA only. notice: said by every trace.
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
        self.backbone = Backbone(model, source, adapter)
        self.notice = notice
        if self.backbone.device.type == "cuda" if graphs is None else graphs:
            self.backbone.workspaces = Workspaces.of(self.backbone)
        self.tokenizer = PartTokenizer(tokenizer)
        self.spec = spec if spec is not None else default_spec(tokenizer)
        self.name = name
        self._check_spec()
        # never said, link tokens and markers, whatever spec a prompt is laid out by later
        self.added_ids = sorted(self.spec.special_ids())
        self.reuse = Reuse(EncodeNow(self.backbone), PrefixCache())

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path = BUNDLED,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        spec: Spec | None = None,
        adapter: str | Path | None = None,
        adapter_base: str | None = None,
        graphs: bool | None = None,
    ) -> KVLinkModel:
        """Load a directory, a hub id or "bundled", or an adapter with the base it names.

        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ... dtype: "auto" is the
        checkpoint's own. spec: None takes the `kvlink.json` beside the weights, else the built-in
        one of a published checkpoint, else a spec without link tokens. adapter: the directory of an
        adapter, merged in memory; adapter_base: "any" takes it on another base than it was trained
        on, which every trace then says. graphs: False keeps CUDA graphs off, see `KVLinkModel`.
        Raises `ConfigError` (nothing to load), `ModelNotSupported`, `SpecError`.
        """
        target, precision = find_device(device), find_dtype(dtype)
        base, found = find_adapter(path_or_id, adapter)
        directory = resolve(base, bundled="lm")
        check_supported(load_config(directory))
        spec = spec or (found.spec if found else find_spec(str(base), directory))
        model = load_model(directory, precision)
        tokenizer = load_tokenizer(directory, spec)
        notice = ""
        if found is not None:
            notice = found.check(directory, tokenizer, adapter_base=adapter_base)
            found.merge_into(model)
        return cls(
            model.to(target),
            tokenizer,
            spec,
            name=str(path_or_id),
            source=directory,
            adapter=found.digest if found else "",
            graphs=graphs,
            notice=notice,
        )

    @property
    def window(self) -> int:
        """The most tokens a prompt and its answer may have."""
        return self.backbone.window

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the weights or anything that shapes a snapshot."""
        return self.backbone.fingerprint

    # Prompts

    def prompt(self, documents: Sequence[Document], question: str) -> list[Part]:
        """The spec's one-question prompt over `documents`."""
        return self.spec.prompt(documents, question)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[Part]:
        """Parts of a conversation, through the tokenizer's chat template.

        messages: `{"role", "content"}`; content is a string or a list of `Text` and `Passage`.
        Without a chat template the spec's preset wraps all contents as one question.
        Raises `PromptError` where the template drops or repeats a content.
        """
        contents = [_as_parts(message["content"]) for message in messages]
        roles = [_checked_role(message["role"]) for message in messages]
        if not getattr(self.tokenizer.hf, "chat_template", None):
            preset = self.spec.prompt_preset
            inner = [part for parts in contents for part in parts]
            return [Text(preset.before, special=True), *inner, Text(preset.after, special=True)]
        marks = [f"\ue000{uuid.uuid4().hex}\ue001" for _ in messages]
        rendered = self.tokenizer.hf.apply_chat_template(
            [{"role": r, "content": mark} for r, mark in zip(roles, marks, strict=True)],
            tokenize=False,
            add_generation_prompt=True,
        )
        return _split_at(rendered, marks, contents)

    def layout(self, parts: Iterable[Part]) -> Layout:
        """Token ids, positions and segments of a prompt. Raises `PromptError` and its kin."""
        prompt = layout(parts, self.tokenizer, self.spec)
        if len(prompt) >= self.window:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the model's window is {self.window} and "
                "must hold the answer too; use fewer or shorter passages (kvlink-rag: a smaller -k)"
            )
        return prompt

    def passage_tokens(self, document: Document, slot: int = 0) -> tuple[int, ...]:
        """Token ids that are encoded for `document`: all its snapshot depends on, but the model."""
        return tuple(self.tokenizer.encode(self.spec.render_passage(document, slot)))

    # Answers

    def prefill(
        self, parts: Iterable[Part], mode: Mode = "reuse", *, reuse: Reuse | None = None
    ) -> Prefill:
        """Run the prompt and return the next token's logits.

        mode: "reuse" assembles snapshots and computes the rest; "masked" is the oracle, one full
        prefill with the same visibility; "full" is ordinary causal attention over the same tokens.
        """
        trace = Trace(mode=check_mode(mode), notice=self.notice)
        run = PromptRun(self.backbone, self.layout(parts), trace, reuse or self.reuse)
        logits = run.start(room=0)
        run.keep()
        return Prefill(logits.cpu(), trace)

    def stream(
        self,
        parts: Iterable[Part],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] | str = (),
        seed: int | None = None,
        mode: Mode = "reuse",
        reuse: Reuse | None = None,
        trace: Trace | None = None,
    ) -> TextStream:
        """Stream the answer: pieces of valid Unicode that never hold part of a stop string.

        Nothing is computed, nor an iterator of parts read, before the first `next()`. Arguments as
        in `Sampling` and `prefill`.
        """
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(max_new_tokens, temperature, top_p, strings, seed)
        check_mode(mode)
        return TextStream(self, parts, sampling, mode, reuse or self.reuse, trace)

    def generate(self, parts: Iterable[Part], **arguments: Any) -> str:
        """The whole answer. Arguments as in `stream`."""
        return "".join(self.stream(parts, **arguments))

    def verify(self, parts: Iterable[Part], *, reuse: Reuse | None = None) -> Verification:
        """Compare reuse with the masked full prefill on this model and this prompt.

        Quantised snapshots are compared with the masked prefill over their own keys and values,
        which must be equal, and with the exact one, which says what the codec costs.
        """
        parts = list(parts)
        fresh = replace(reuse or self.reuse, prefix=None)
        logits = self.prefill(parts, "reuse", reuse=fresh).logits
        masked = self.prefill(parts, "masked").logits
        tolerance = TOLERANCE.get(self.backbone.dtype, 6e-2)
        prompt = self.layout(parts)
        passages = [prompt.passage_ids(span) for span in prompt.passages]
        snapshots = fresh.snapshots.fetch(passages, Trace()) if passages else []
        codec = next((s.codec for s in snapshots if s.codec != EXACT), None)
        if codec is None:
            return compare(logits, masked, tolerance)
        given = self._masked_over(prompt, snapshots)
        return _with_price(compare(logits, given, tolerance), codec_price(codec, logits, masked))

    def _masked_over(self, prompt: Layout, snapshots: Sequence[Source]) -> Tensor:
        """Logits of the masked prefill whose passages have the keys and values of `snapshots`."""
        states = [snapshot.exact(self.backbone.dtype) for snapshot in snapshots]
        keys, values = (torch.cat(each, dim=2) for each in zip(*states, strict=True))
        run = PromptRun(self.backbone, prompt, Trace(mode="masked"), self.reuse)
        with self.backbone.giving(prompt.segments.nonzero()[:, 0], keys, values):
            return run.start(room=0).cpu()

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        configs = (self.backbone.model.generation_config, self.backbone.config)
        found = [getattr(config, "eos_token_id", None) for config in configs if config is not None]
        found.append(self.tokenizer.hf.eos_token_id)
        lists = [ids if isinstance(ids, list) else [ids] for ids in found]
        return frozenset(i for ids in lists for i in ids if i is not None)

    def _check_spec(self) -> None:
        ids = self.spec.special_ids()
        if ids and max(ids) >= self.backbone.vocabulary:
            raise SpecError(
                f"the spec names token id {max(ids)}, but the model has only "
                f"{self.backbone.vocabulary} tokens; the spec belongs to another model"
            )


def compare(logits: Tensor, expected: Tensor, tolerance: float) -> Verification:
    """Say whether float32 `logits` [vocab] equal `expected` within `tolerance` (relative)."""
    scale = float(expected.abs().max()) or 1.0
    difference = float((logits - expected).abs().max()) / scale
    best = expected.topk(2).values
    margin = float(best[0] - best[1]) / scale
    same = bool(logits.argmax() == expected.argmax())
    holds = difference <= tolerance and (same or margin <= 2 * tolerance)
    verdict = (
        "reuse equals the masked full prefill: answers from snapshots are the model's own"
        if holds
        else "reuse does NOT equal the masked full prefill: do not use this model with snapshots"
    )
    message = f"{verdict} (largest difference {difference:.2e}, tolerance {tolerance:.0e})"
    return Verification(holds, difference, tolerance, same, margin, message)


def codec_price(codec: str, logits: Tensor, exact: Tensor) -> CodecPrice:
    """What float32 `logits` [vocab] from snapshots of `codec` lose against the `exact` ones."""
    found = compare(logits, exact, 0.0)
    exact_log, log = exact.log_softmax(-1), logits.log_softmax(-1)
    divergence = float((exact_log.exp() * (exact_log - log)).sum())
    return CodecPrice(codec, found.difference, max(0.0, divergence), found.same_top_token)


def _with_price(found: Verification, price: CodecPrice) -> Verification:
    """`found` over the quantised keys and values, with what quantising them costs."""
    over = f"masked full prefill over the same {price.codec} keys and values"
    message = found.message.replace("masked full prefill", over)
    same = "the same" if price.same_top_token else "ANOTHER"
    message += (
        f"; against exact ones {price.codec} moves the logits by {price.difference:.2e} of the "
        f"largest, the distribution by {price.divergence:.2e} nats, and gives {same} first token"
    )
    if found.holds:
        message = message.replace(
            "answers from snapshots are the model's own", "what differs from them is the codec's"
        )
    return replace(found, message=message, price=price)


def default_spec(tokenizer: Any) -> Spec:
    """A spec without link tokens; its preset is the tokenizer's own chat template, if any."""
    if not getattr(tokenizer, "chat_template", None):
        bos = getattr(tokenizer, "bos_token", None) or ""
        return Spec(presets={"plain": replace(PLAIN_PRESET, before=bos)})
    mark = f"\ue000{uuid.uuid4().hex}\ue001"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = rendered.partition(mark)
    if not found:
        raise PromptError("the tokenizer's chat template drops the user's message; give a spec")
    return Spec(presets={"chat": PromptPreset(before=before, after=after)}, preset="chat")


def _split_at(
    rendered: str, marks: Sequence[str], contents: Sequence[Sequence[Part]]
) -> list[Part]:
    """The template's stretches as special text, with the contents where their marks stand."""
    parts: list[Part] = []
    for mark, content in zip(marks, contents, strict=True):
        if rendered.count(mark) != 1:
            raise PromptError(
                "the chat template drops, repeats or reorders a message; give messages in an order "
                "that it accepts, usually system, then user and assistant in turn"
            )
        before, _, rendered = rendered.partition(mark)
        parts += [Text(before, special=True), *content]
    return [*parts, Text(rendered, special=True)]


def _checked_role(role: object) -> str:
    """A role stands in the template's own text, so it must not hold a special token."""
    if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,31}", role):
        raise PromptError(f"a message's role is {role!r}, expected a word such as user")
    return role


def _as_parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)]
    if isinstance(content, Sequence) and all(isinstance(p, Text | Passage) for p in content):
        return list(content)
    raise PromptError(
        f"a message's content is {type(content).__name__}, expected str or Text and Passage parts"
    )
