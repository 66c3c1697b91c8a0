"""The ways to answer that are compared, each from a prompt's parts to its first logits.

    full        ordinary causal attention; no link tokens, no memory markers
    closed      as full, without any document: what the model knows by itself
    reuse       the engine's reuse of snapshots; reuse:0 without the link tokens
    masked      the oracle of reuse: one full prefill with the same visibility
    unmasked    causal attention over the very tokens of reuse
    naive, cacheblend, epic   the published baselines (`kvlink_rag.baselines`)

Knows one model; knows no data set and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kvlink_rag.compare.baselines import Baselines, Method
from kvlink_rag.datasets.schemas import Example
from kvlink_rag.documents import Part
from kvlink_rag.engine.live_cache import LiveCache
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.prompt.spec import Spec
from kvlink_rag.snapshots.snapshot import AnySnapshot
from kvlink_rag.snapshots.sources import EncodeNow, Reuse
from kvlink_rag.trace import Trace


@dataclass(frozen=True, slots=True)
class Started:
    """A prompt after its prefill.

    logits: float32 [vocab] of the first token. cache: all entries of the prompt, in any order.
    position: of the first generated token. trace: its times up to the first token.
    """

    logits: Tensor
    cache: LiveCache
    position: int
    trace: Trace


Start = Callable[[KVLinkModel, Sequence[Part], "InMemory"], Started]


class InMemory:
    """Snapshots of one prompt's passages, encoded before the clock starts."""

    def __init__(self, model: KVLinkModel) -> None:
        self._encoder = EncodeNow(model.encoder)
        self._known: dict[tuple[int, ...], AnySnapshot] = {}

    def prepare(self, passages: Sequence[tuple[int, ...]]) -> None:
        """Keep the snapshots of these passages (token ids), and no others."""
        missing = [ids for ids in dict.fromkeys(passages) if ids not in self._known]
        found = dict(zip(missing, self._encoder.fetch(missing, Trace()), strict=True))
        known = self._known | found
        self._known = {ids: known[ids] for ids in passages}

    def fetch(self, passages: Sequence[tuple[int, ...]], trace: Trace) -> list[AnySnapshot]:
        """See `SnapshotSource`."""
        with trace.stage("read"):
            found = [self._known[ids] for ids in passages]
        trace.snapshots_found += len(found)
        return found


def _engine(mode: str) -> Start:
    """A mode of the engine itself. Snapshots, where it uses any, lie in memory when it starts."""

    def start(model: KVLinkModel, parts: Sequence[Part], snapshots: InMemory) -> Started:
        if mode == "reuse":
            prompt = model.layout(parts)
            snapshots.prepare([prompt.passage_ids(span) for span in prompt.passages])
        model.backbone.synchronize()
        trace = Trace(mode=mode)
        with trace.stage("layout"):
            prompt = model.layout(parts)
        run = PromptRun(model.backbone, prompt, trace, Reuse(snapshots))
        logits = run.start(room=0)
        trace.first_token_ms = trace.elapsed_ms()
        if run.cache is None:
            raise RuntimeError("a started run has a cache")
        return Started(logits, run.cache, len(prompt), trace)

    return start


def _baseline(method: Method) -> Start:
    """A method of `kvlink_rag.baselines`, its snapshots in memory when it starts."""

    def start(model: KVLinkModel, parts: Sequence[Part], snapshots: InMemory) -> Started:
        ways = Baselines(model, snapshots)
        prompt = model.layout(parts)
        snapshots.prepare([prompt.passage_ids(span) for span in prompt.passages])
        model.backbone.synchronize()
        trace = Trace(mode=method)
        found = ways.start(method, parts)
        model.backbone.synchronize()
        trace.first_token_ms = trace.elapsed_ms()
        trace.passages, trace.computed_tokens = len(prompt.passages), found.computed_tokens
        trace.reused_tokens = len(prompt) - found.computed_tokens
        return Started(found.logits, found.cache, len(prompt), trace)

    return start


CLOSED = "closed"
MODES: dict[str, Start] = {
    "full": _engine("full"),
    CLOSED: _engine("full"),
    "reuse": _engine("reuse"),
    "masked": _engine("masked"),
    "unmasked": _engine("full"),
    "naive": _baseline("naive"),
    "cacheblend": _baseline("cacheblend"),
    "epic": _baseline("epic"),
}
LINKED = ("reuse", "masked", "unmasked")  # all others take a prompt without links and markers


@dataclass(frozen=True, slots=True)
class Contender:
    """One mode on one model, with the spec it uses."""

    name: str
    model: KVLinkModel
    start: Start

    def prompt(self, example: Example) -> list[Part]:
        """The spec's prompt over the example's documents."""
        documents = () if self.name == CLOSED else example.documents
        return self.model.prompt(documents, example.question)

    def __call__(self, parts: Sequence[Part], snapshots: InMemory) -> Started:
        return self.start(self.model, parts, snapshots)


def contenders(model: KVLinkModel, names: Sequence[str]) -> Iterator[Contender]:
    """The modes called `names` on `model`. Raises `ConfigError` for one that is not known."""
    for name in names:
        base, _, links = name.partition(":")
        if base not in MODES or (links and not (links.isdecimal() and base in LINKED)):
            raise ConfigError(
                f"found mode {name!r}, expected one of {', '.join(MODES)}; :0 after one of "
                f"{', '.join(LINKED)} leaves the link tokens out"
            )
        yield Contender(name, model.with_spec(_spec_of(model.spec, base, links)), MODES[base])


def _spec_of(spec: Spec, mode: str, links: str) -> Spec:
    """What `mode` lays out with: the model's own spec, one without links, or a plain one.

    Raises `ConfigError` for other link tokens than all or none: a model has no other number.
    """
    if mode not in LINKED:
        return replace(spec, links_per_passage=0, mem_start=None, mem_end=None, max_passages=None)
    if links and int(links) not in (0, spec.links_per_passage):
        raise ConfigError(
            f"found {links} link tokens a passage, expected 0 or {spec.links_per_passage}, the "
            "model's own; a model with another number is another checkpoint"
        )
    return replace(spec, links_per_passage=int(links)) if links else spec
