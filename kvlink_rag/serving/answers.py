"""A request's messages to an answer as it comes: over one collection, or by the bare reader.

    messages → hits → prompt over passages                     (`from_collection`)
    messages → passages recognised in them, of several collections  (`from_reader`)

Kept runs are shared among the questions of one key and no other's, since the time of an answer and
its `cached_tokens` would tell what others asked. Knows collections; knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvlink_rag.collection.answering import AnswerStream, Found
from kvlink_rag.collection.conversation import hits_for
from kvlink_rag.collection.parts import Once, Parts
from kvlink_rag.collection.rag import PREFIX_BUDGET, KVLinkRAG
from kvlink_rag.documents import Hit, Part, Passage, Text
from kvlink_rag.errors import PromptTooLong
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.model.text_stream import TextStream
from kvlink_rag.prompt.fitting import fit
from kvlink_rag.retrieval.rounds import in_order
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.snapshot import Source
from kvlink_rag.snapshots.sources import EncodeNow, Reuse, SnapshotSource, TokenIds
from kvlink_rag.trace import Trace

from .keys import Asker

Message = Mapping[str, Any]


def from_collection(
    rag: KVLinkRAG,
    messages: Sequence[Message],
    asker: Asker,
    *,
    k: int,
    rounds: int = 1,
    **arguments: Any,
) -> AnswerStream:
    """Retrieve for the last message, the user's question, then answer.

    A question alone gets the prompt that the model was tuned to; what stands before it, system
    texts and earlier turns, is kept, and the passages come with the question. Fewer passages than
    `k` where the model has no slots or no room for more. Other arguments as in
    `KVLinkModel.stream`.
    """
    question = str(messages[-1]["content"])
    before = [m["content"] for m in messages[:-1] if m["role"] == "user"][-1:]
    parts = _apart(rag.parts, asker)

    def find(trace: Trace) -> Found:
        model = parts.loaded().model
        most = k if model.spec.max_passages is None else min(k, model.spec.max_passages)
        with trace.stage("retrieval"):
            hits = hits_for(parts, question, before, k=most, rounds=rounds)[:most]
        room = min(arguments["max_new_tokens"], model.window // 4)
        with trace.stage("layout"):
            return _fitted(model, messages, question, hits, room, rag.order())

    return AnswerStream(parts, find, arguments)


def _fitted(
    model: KVLinkModel,
    messages: Sequence[Message],
    question: str,
    hits: list[Hit],
    room: int,
    order: str,
) -> Found:
    """The prompt over as many of `hits` as leave the answer its room. Raises `PromptTooLong`."""
    while True:
        documents = [hit.document for hit in in_order(hits, order)]
        if len(messages) == 1:
            prompt = model.prompt(documents, question)
        else:
            content: list[Part] = [*map(Passage, documents), Text(question)]
            prompt = model.chat([*messages[:-1], {"role": "user", "content": content}])
        try:
            if not hits or len(model.layout(prompt)) <= model.window - room:
                return Found(prompt, hits)
        except PromptTooLong:
            if not hits:
                raise
        hits = hits[: len(hits) // 2]


def _apart(parts: Parts, asker: Asker) -> Parts:
    """The same collection, with kept runs that are this asker's."""

    def load() -> Any:
        loaded = parts.loaded()
        scope = f"{loaded.reuse.scope} {asker.id}"
        return replace(loaded, reuse=replace(loaded.reuse, scope=scope))

    return replace(parts, loaded=Once(load)) if asker.id else parts


class BareReader:
    """Answers to prompts that a client built; passages of some collections are recognised."""

    def __init__(self, model: KVLinkModel) -> None:
        self._model, self._kept = model, PrefixCache(PREFIX_BUDGET)

    def stream(
        self,
        rags: Sequence[KVLinkRAG],
        messages: Sequence[Message],
        asker: Asker,
        **arguments: Any,
    ) -> TextStream:
        """The answer. rags: the collections that `asker` may read, always in the same order."""
        trace, model = Trace(), self._model
        trace.restart()
        with trace.stage("retrieval"):
            known: Sequence[Message] = messages
            for rag in rags:
                known = rag.parts.loaded().recogniser.recognise_contents(known, trace=trace)
            prompt = model.chat(known)
        with trace.stage("layout"):
            parts = fit(model.format, prompt, arguments["max_new_tokens"])
        return model.stream(parts, reuse=self._reuse(rags, asker), trace=trace, **arguments)

    def _reuse(self, rags: Sequence[KVLinkRAG], asker: Asker) -> Reuse:
        if not rags:
            return Reuse(EncodeNow(self._model.encoder), self._kept, asker.id)
        scopes = " ".join(rag.reuse.scope for rag in rags)
        first = rags[0].reuse
        sources = SeveralSnapshots(rags)
        return replace(first, snapshots=sources, prefix=self._kept, scope=f"{scopes} {asker.id}")


class SeveralSnapshots:
    """The `SnapshotSource` of several collections: each passage from the first that has it."""

    def __init__(self, rags: Sequence[KVLinkRAG]) -> None:
        self._rags = rags

    def fetch(self, passages: Sequence[TokenIds], trace: Trace) -> Sequence[Source]:
        """See `SnapshotSource`."""
        places: dict[int, list[TokenIds]] = {}
        for ids in dict.fromkeys(passages):
            places.setdefault(self._place(ids), []).append(ids)
        found: dict[TokenIds, Source] = {}
        for place, wanted in places.items():
            source: SnapshotSource = self._rags[place].snapshots
            found.update(zip(wanted, source.fetch(wanted, trace), strict=True))
        return [found[ids] for ids in passages]

    def _place(self, ids: TokenIds) -> int:
        """By the catalogs alone, so that the same prompt always reads the same snapshots."""
        for place, rag in enumerate(self._rags):
            if rag.catalog.snapshot_users(rag.snapshots.key(ids)):
                return place
        return 0
