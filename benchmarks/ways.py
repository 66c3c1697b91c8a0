"""Snapshots in one place or another, and reuse of them, checked."""

from __future__ import annotations

import gc
import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from measuring import make_cold, refuse, resident_pages
from shapes import words

from kvlink_rag import Document, KVLinkModel, Part, Trace
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.quantised import Quantised
from kvlink_rag.snapshots.snapshot import EXACT, AnySnapshot, Snapshot
from kvlink_rag.snapshots.sources import Reuse, StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

PLACES = ("cold", "cached", "ram")
TokenIds = tuple[int, ...]


class InMemory:
    """A `SnapshotSource` of snapshots whose tensors are in this process's own memory."""

    def __init__(self, source: StoredSnapshots, passages: Sequence[TokenIds]) -> None:
        found = source.fetch(passages, Trace())
        self._held = {ids: _own(s) for ids, s in zip(passages, found, strict=True)}

    def fetch(self, passages: Sequence[TokenIds], trace: Trace) -> list[AnySnapshot]:
        """See `SnapshotSource`."""
        with trace.stage("read"):
            found = [self._held[ids] for ids in passages]
        trace.snapshots_found += len(set(passages))
        return found


def _own(snapshot: AnySnapshot) -> AnySnapshot:
    copies = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    if isinstance(snapshot, Quantised):
        return Quantised(snapshot.codec, copies)
    return Snapshot(copies["keys"], copies["values"], copies["token_ids"])


class Laid:
    """Passages kept in one codec, and read from one place or another.

    cold: from files whose pages were dropped before each question, which mincore confirms.
    cached: from files that are in the page cache. ram: from tensors of this process.
    """

    def __init__(
        self, model: KVLinkModel, directory: Path, documents: Sequence[Document], codec: str
    ) -> None:
        self.model, self.codec = model, codec
        self.store = SnapshotStore(directory)
        self.source = StoredSnapshots(self.store, model.encoder, codec=codec)
        self.passages = [model.passage_tokens(document) for document in documents]
        unique = list(dict.fromkeys(self.passages))
        for index, snapshot in model.encoder.many(unique):
            self.source.put(self.source.key(unique[index]), snapshot)
        self._memory: InMemory | None = None
        self.files = [self._file(ids) for ids in unique]

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshot files."""
        return sum(path.stat().st_size for path in self.files)

    def at(self, place: str, *, system_prompt: bool = True) -> Reuse:
        """What reads these snapshots from `place`, now in the state that the place means.

        system_prompt: whether the system prompt's run is kept, as an earlier question over other
        passages leaves it. With the same passages in the same order their link tokens would be
        kept too: exact, and faster than what is timed here.
        """
        reuse = Reuse(self.source, PrefixCache() if system_prompt else None, scope=self.codec)
        if system_prompt:
            self.model.prefill(self.model.prompt([Document("w1 w2 w3")], "w4"), reuse=reuse)
        if place == "ram":
            self._memory = self._memory or InMemory(self.source, self.passages)
            reuse = replace(reuse, snapshots=self._memory)
        elif place == "cold":
            gc.collect()  # mappings of the question before
            make_cold(self.files)
        elif place == "cached":
            for path in self.files:
                path.read_bytes()
            if not all(map(resident_pages, self.files)):
                refuse("a file that was just read is not in the page cache")
        return reuse

    def close(self) -> None:
        self._memory = None
        self.store.close()

    def _file(self, ids: TokenIds) -> Path:
        key = self.source.key(ids)
        return Path(glob.glob(f"{self.store.directory}/{key[:2]}/{key}-*")[0])


def laid_out(model: KVLinkModel, directory: Path, size: str) -> tuple[Laid, list[Part]]:
    """PxT passages of random words on the disk, and a prompt over all of them, checked."""
    passages, tokens = (int(n) for n in size.split("x"))
    generator = torch.Generator().manual_seed(passages * tokens)
    encode = model.tokenizer.encode
    documents = [Document(words(tokens, generator, encode)) for _ in range(passages)]
    prompt = model.prompt(documents, words(12, generator, encode))
    laid = Laid(model, directory, documents, EXACT)
    check(model, prompt, laid.at("cached"))
    return laid, prompt


def check(model: KVLinkModel, prompt: list[Part], reuse: Reuse) -> None:
    """Warm up, and refuse to time a path that does not give the masked prefill's answer.

    Of quantised snapshots: the answer of the masked prefill over their keys and values.
    """
    verdict = model.verify(prompt, reuse=reuse)
    if not verdict.holds:
        refuse(verdict.message)
    print(f"# {verdict.message}", flush=True)


def first_token(model: KVLinkModel, prompt: list[Part], reuse: Reuse) -> Trace:
    """The public stream up to its first token, and whether it took the path it claims."""
    stream = model.stream(prompt, max_new_tokens=1, reuse=reuse)
    for _ in stream:
        pass
    trace, laid = stream.trace, model.layout(prompt)
    kept = laid.passages[0].start if reuse.prefix is not None else 0
    expected = len(laid) - laid.reused_tokens - kept
    if trace.snapshots_found != len(set(map(laid.passage_ids, laid.passages))):
        refuse(f"a snapshot was encoded, not read ({trace})")
    if (trace.reused_tokens, trace.computed_tokens) != (laid.reused_tokens, expected):
        refuse(f"reuse did not take the path it claims ({trace})")
    return trace
