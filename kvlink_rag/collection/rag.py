"""`KVLinkRAG`: a collection in a directory, and the questions asked of it.

    directory/
      catalog.sqlite   documents, metadata, embeddings, settings: the truth
      index.faiss      vectors, derived
      snapshots/       keys and values of each passage, derived

Puts the parts together. The life of a document stands in `indexing`, that of a question in
`AnswerStream` below and in `answering`. Model and embedder are loaded when first needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np
import torch
from tqdm.auto import tqdm

from kvlink_rag.arguments import check_count, check_order, check_question, check_search, parse_size
from kvlink_rag.disk import atomic_files
from kvlink_rag.disk.checked_file import check_compression
from kvlink_rag.documents import Document, Hit, Part, Passage, Text
from kvlink_rag.engine.device import DeviceMemory, default_budget
from kvlink_rag.errors import (
    CatalogError,
    ConfigError,
    DocumentNotFound,
    IndexCorrupt,
    PromptError,
    StorageError,
)
from kvlink_rag.model.fitting import fit
from kvlink_rag.model.model import KVLinkModel, Verification
from kvlink_rag.model.outline import ModelOutline
from kvlink_rag.model.prompt_run import Reuse, TextStream
from kvlink_rag.prompt.recognition import MIN_TOKENS, Recogniser, count_passages
from kvlink_rag.prompt.spec import Spec
from kvlink_rag.retrieval.embedder import Embedder, Vectors
from kvlink_rag.retrieval.framework_embedders import AnyEmbedder, as_embedder
from kvlink_rag.retrieval.rounds import (
    Where,
    in_order,
    retrieve,
)
from kvlink_rag.retrieval.vector_index import VectorIndex
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.sources import StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore
from kvlink_rag.trace import Trace

from .adding import AddReport, index_documents, remove_unused
from .catalog import Catalog, Entry
from .checking import check_collection, reembed, reencode
from .settings import Settings

CATALOG, INDEX, SNAPSHOTS, LOCK = "catalog.sqlite", "index.faiss", "snapshots", "write.lock"
PREFIX_BUDGET = 256 << 20  # bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, the hits it was read from (best first) and what it cost."""

    text: str
    hits: list[Hit]
    trace: Trace


@dataclass(frozen=True, slots=True)
class Stats:
    """What a collection holds, and what its store has seen since it was opened.

    tokens: of all passages. bytes_per_token: of the stored snapshots; 0.0 where there are none.
    hits, misses: snapshots asked for and found, or not; corrupt: those refused, which are misses
    too. encoded: those made for questions because they were missing. evicted: to keep the limit.
    """

    documents: int
    embedded: int
    tokens: int
    snapshots: int
    snapshot_bytes: int
    bytes_per_token: float
    hits: int
    misses: int
    corrupt: int
    evicted: int
    encoded: int
    prefix_bytes: int
    prefix_hits: int
    prefix_misses: int
    model: str
    embedder: str
    codec: str

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


class KVLinkRAG:
    """A collection of documents that answers questions. Open it with `KVLinkRAG.open`.

    For any number of threads; other processes may read and write the same directory.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        catalog: Catalog,
        store: SnapshotStore,
        *,
        prefix_budget: int,
        min_tokens: int = MIN_TOKENS,
        device_budget: int | None = None,
        pinned_budget: int = 0,
    ) -> None:
        self.directory, self.catalog, self.store = directory, catalog, store
        self._settings = settings
        self._prefix = PrefixCache(prefix_budget) if prefix_budget else None
        self._lock = threading.RLock()  # parts and index, held briefly
        self._locks = self._new_locks()
        self._index: VectorIndex | None = None
        self._index_version = self._saved_version = 0
        self._parts: tuple[KVLinkModel, StoredSnapshots, Reuse, Recogniser] | None = None
        self._min_tokens = min_tokens
        self._budgets = device_budget, pinned_budget
        self._system_prompts: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        model: KVLinkModel | str | Path | None = None,
        embedder: AnyEmbedder | str | Path | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        spec: Spec | None = None,
        codec: str | None = None,
        compression: str | None = None,
        search: str | None = None,
        order: str | None = None,
        size_limit: int | str | None = None,
        prefix_budget: int | str = PREFIX_BUDGET,
        min_tokens: int = MIN_TOKENS,
        device_budget: int | str | None = None,
        pinned_budget: int | str = 0,
        reencode: bool = False,
        create: bool = True,
    ) -> KVLinkRAG:
        """Open the collection in `directory`, or make one there.

        model, embedder: names, directories or loaded objects (an embedder may be LangChain's or
        LlamaIndex's, see `foreign`); None: what the directory remembers, else the bundled small
        pair. codec: how snapshots are kept, "exact" (the model's dtype; for a bfloat16 model also
        "bf16"), "int8", "int4" or "fp8" (smaller, see docs/architecture.md for the price); None: as
        the directory remembers, else exact. compression: "zstd" compresses snapshots on top of the
        codec, without loss; "none"; None: as the directory remembers, else none. search: how the
        nearest passages are found, "exact", "ivf" or "auto", which goes by size (see
        `VectorIndex`); None: as the directory remembers, else auto. order: of the hits in the
        prompt, "score" or "id" (see `stream`); None: as the directory remembers, else score.
        size_limit: bytes of snapshots to keep at most, as a number or text such as "20GB"; what is
        over it goes at once. prefix_budget: likewise, of computed runs to keep in memory; 0 keeps
        none. min_tokens: the shortest stretch that `recognise` takes for a passage. device_budget:
        bytes of snapshots to keep in the device's memory; None: a quarter of what a GPU has free,
        none on a CPU. pinned_budget: bytes of them to keep in pinned host memory as well, which is
        for GPUs and taken from all other programs. reencode: where the directory remembers another
        model, embedder or codec, take the new one and encode again.
        Raises `SettingsMismatch` (another of these, without `reencode`), `ConfigError` (no such
        codec), `StorageError`.
        """
        limit = None if size_limit is None else parse_size(size_limit, "size_limit")
        budget = parse_size(prefix_budget, "prefix_budget")
        resident = None if device_budget is None else parse_size(device_budget, "device_budget")
        pinned = parse_size(pinned_budget, "pinned_budget")
        if not isinstance(embedder, str | Path | None):
            embedder = as_embedder(embedder)
        try:
            path = Path(directory).expanduser()
            if path.is_file():
                raise StorageError(f"found a file at {path}, expected a directory; give another")
            if create:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = path.resolve(strict=True)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"the directory {directory} cannot be opened: {error}") from error
        _refuse_links(path)
        catalog = Catalog.open(path / CATALOG, create=create, siblings=[INDEX, SNAPSHOTS])
        settings = Settings(
            catalog, model, embedder, device=device, dtype=dtype, spec=spec, codec=codec
        )
        if compression is not None:
            catalog.set_settings({"compression": check_compression(compression)})
        compress = catalog.settings().get("compression", "none") != "none"
        store = SnapshotStore(path / SNAPSHOTS, size_limit=limit, compress=compress)
        rag = cls(
            *(path, settings, catalog, store),
            prefix_budget=budget,
            min_tokens=min_tokens,
            device_budget=resident,
            pinned_budget=pinned,
        )
        if search is not None:
            catalog.set_settings({"search": check_search(search)})
        if order is not None:
            catalog.set_settings({"order": check_order(order)})
        try:
            rag._settle(reencode)
        except BaseException:
            rag.close()
            raise
        return rag

    # Documents

    def add(self, documents: Iterable[Document], *, show_progress: bool = False) -> AddReport:
        """Embed, index and encode `documents`; see `indexing` for the steps.

        What is there already costs nothing; an existing id with other content is replaced. Each
        batch is durable before the next begins, so an interrupted call resumes when repeated.
        Raises `DocumentError` (and `PassageTooLong`): the batches before are kept, the one with
        the bad document is not.
        """
        return self._take(documents, embed=True, show_progress=show_progress)

    def register(self, documents: Iterable[Document], *, show_progress: bool = False) -> AddReport:
        """Encode `documents` without embedding them: for applications with their own retriever.

        A document that was added and is registered with other content is replaced: search no longer
        finds it, and a warning says so.
        """
        embedded = self.catalog.embedded()
        report = self._take(documents, embed=False, show_progress=show_progress)
        if (lost := embedded - self.catalog.embedded()) > 0:
            logger.warning(
                "registering replaced %d documents that search could find; it finds them again "
                "when they are added",
                lost,
            )
        return report

    def update(self, documents: Iterable[Document], *, show_progress: bool = False) -> AddReport:
        """Replace documents by id. Raises `DocumentNotFound` before anything is changed."""
        batch = list(documents)
        self._require([document.identified().id or "" for document in batch])
        return self.add(batch, show_progress=show_progress)

    def delete(self, ids: Iterable[str], *, missing_ok: bool = False) -> int:
        """Delete documents by id and return how many.

        Raises `DocumentNotFound`, and deletes none, where one of them is not there, unless
        `missing_ok`.
        """
        wanted = [ids] if isinstance(ids, str) else list(ids)
        with self.writing():
            if not missing_ok:
                self._require(wanted)
            gone = self.catalog.delete(wanted)
            self.refresh_index()
            remove_unused(self, gone)
        return len(gone)

    def get(self, ids: Iterable[str], *, missing_ok: bool = False) -> list[Document]:
        """Documents by id, in order.

        Raises `DocumentNotFound` where one is not there; with `missing_ok` it is left out.
        """
        wanted = [ids] if isinstance(ids, str) else list(ids)
        if not missing_ok:
            self._require(wanted)
        found = {entry.id: entry for entry in self.catalog.get(wanted)}
        return [found[id].document for id in wanted if id in found]

    def _require(self, ids: Sequence[str]) -> None:
        """Raise `DocumentNotFound` where one of `ids` is not there."""
        if missing := self.catalog.missing(ids):
            raise DocumentNotFound(f"no document with id {missing[0]!r} in {self.directory}")

    def documents(self) -> Iterator[Document]:
        """All documents, in the order they were first added."""
        return (entry.document for entry in self.catalog.iterate())

    def __len__(self) -> int:
        return self.catalog.count()

    # Questions

    def search(
        self, query: str, k: int = 10, *, rounds: int = 1, where: Where | None = None
    ) -> list[Hit]:
        """The best `k` documents for `query`; fewer where there are fewer. See `retrieve`.

        where: takes a document, says whether it may be a hit.
        """
        return retrieve(partial(self._search_many, where=where), query, k, rounds)

    def search_vector(
        self, vector: Vectors, k: int = 10, *, where: Where | None = None
    ) -> list[Hit]:
        """The best `k` documents for a vector (float32 [dimension]) of this embedder."""
        check_count(k)
        return self._nearest(vector, k, where) if len(self.refresh_index()) else []

    def vectors(self, ids: Iterable[str]) -> Vectors:
        """The vectors of documents, float32 [ids, dimension], in order.

        Raises `DocumentNotFound` where one is not there or was registered without a vector.
        """
        wanted = [ids] if isinstance(ids, str) else list(ids)
        index = self.refresh_index()
        rows = {entry.id: entry.row for entry in self.catalog.get(wanted) if entry.row in index}
        if missing := [id for id in wanted if id not in rows]:
            raise DocumentNotFound(f"no vector of id {missing[0]!r} in {self.directory}")
        return index.vectors([rows[id] for id in wanted])

    def stream(
        self,
        question: str,
        *,
        k: int = 10,
        rounds: int = 1,
        order: str | None = None,
        **arguments: Any,
    ) -> AnswerStream:
        """Stream the answer to `question`. Other arguments as in `KVLinkModel.stream`.

        order: of the hits in the prompt, "score" (best first) or "id", by which questions that find
        the same documents reuse more kept runs; None: the collection's. The hits that are listed
        stay best first. Raises `ConfigError` for another order, `PromptError` for a question
        without text; the rest is told by the first `next()`.
        """
        check_question(question)
        return AnswerStream(self, question, k, rounds, self.order(order), arguments)

    def ask(self, question: str, *, k: int = 10, rounds: int = 1, **arguments: Any) -> Answer:
        """The whole answer, its hits and its trace. Arguments as in `stream`."""
        stream = self.stream(question, k=k, rounds=rounds, **arguments)
        for _ in stream:
            pass
        return stream.answer

    def verify(self, question: str = "What is this about?", *, k: int = 4) -> Verification:
        """Compare reuse of this collection's snapshots with the masked full prefill.

        Raises `ConfigError` where it holds no documents.
        """
        check_count(k)
        documents = [entry.document for entry in islice(self.catalog.iterate(k), k)]
        if not documents:
            raise ConfigError(
                f"{self.directory} holds no documents, so there is nothing to verify; add some "
                "(kvlink-rag: index PATH)"
            )
        return self.model.verify(self.model.prompt(documents, question), reuse=self.reuse)

    # Prompts that someone else wrote

    def recognise(
        self, prompt: str, *, question: str | None = None, system: Sequence[str] = ()
    ) -> list[Part]:
        """`prompt` as parts: what is verbatim the text of a document here becomes a `Passage`.

        question: the question as it stands in the prompt, which is never a passage; None finds it
        (`recognition.find_question`). system: more prompts of the application, besides those
        registered. Passages beyond the model's slots stay text.
        """
        known = (*self._system_prompts, *system)
        return self._loaded()[3].recognise(prompt, question=question, system=known)

    def recognise_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        system: Sequence[str] = (),
        trace: Trace | None = None,
    ) -> list[Part]:
        """A conversation as parts: contents as in `recognise`, then `KVLinkModel.chat`.

        The question of every user message and all that the assistant said stay text. trace: counts
        the passages beyond the model's slots in `passages_as_text`.
        """
        known = (*self._system_prompts, *system)
        recogniser = self._loaded()[3]
        return self.model.chat(recogniser.recognise_contents(messages, system=known, trace=trace))

    def register_system_prompt(self, text: str) -> None:
        """Never take `text`, the application's own prompt, for a passage."""
        if text.strip() and text not in self._system_prompts:
            self._system_prompts += (text,)

    def complete(self, prompt: str | Sequence[Mapping[str, Any]], **arguments: Any) -> TextStream:
        """Stream the answer to a prompt or to messages, reusing every passage recognised in it.

        A string is one user message; without a chat template the spec's preset stands around it.
        Logs a warning where the collection has documents and none was recognised. What fits as
        text is never too long for being recognised (`fitting`); passages beyond the model's slots
        are computed as text. Either logs a warning and counts in the trace's `passages_as_text`.
        Arguments as in `KVLinkModel.stream`. Raises `PromptError` for an empty prompt, and where
        the last message is the user's and empty.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        _check_says_something(messages)
        trace = Trace()
        parts = self._recognised(messages, trace, arguments.get("max_new_tokens", 256))
        return self.model.stream(parts, reuse=self.reuse, trace=trace, **arguments)

    # Care

    def stats(self) -> Stats:
        """Counts, bytes and counters."""
        seen = self.store.stats()
        tokens, stored = self._tokens()
        prefix = self._prefix or PrefixCache(0)
        return Stats(
            documents=len(self),
            embedded=self.catalog.embedded(),
            tokens=tokens,
            snapshots=seen.count,
            snapshot_bytes=seen.bytes,
            bytes_per_token=seen.bytes / stored if stored else 0.0,
            hits=seen.hits,
            misses=seen.misses,
            corrupt=seen.corrupt,
            evicted=seen.evicted,
            encoded=self._parts[1].encoded if self._parts else 0,
            prefix_bytes=prefix.nbytes,
            prefix_hits=prefix.hits,
            prefix_misses=prefix.misses,
            model=self._settings.model_name,
            embedder=self._settings.embedder_name,
            codec=self._settings.codec,
        )

    def check(self, fix: bool = False) -> list[str]:
        """What is wrong in the directory, one line each; with `fix`, mend all that can be."""
        frozen = atomic_files.is_read_only(self.directory)  # then nobody writes
        with contextlib.nullcontext() if frozen and not fix else self.writing():
            try:
                return check_collection(self, fix)
            except StorageError:
                raise
            except OSError as error:
                raise StorageError(f"{self.directory} cannot be checked: {error}") from error

    def close(self) -> None:
        """Save the index and release the directory. Nothing is lost without it."""
        with self._lock:
            if self._index is not None and self._index_version != self._saved_version:
                self.save_index()
            self.store.close()
            self.catalog.close()

    def __enter__(self) -> KVLinkRAG:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Parts, loaded when first needed

    @property
    def model(self) -> KVLinkModel:
        """The language model."""
        return self._loaded()[0]

    def outline(self) -> ModelOutline:
        """The model's name, window, tokenizer and spec, without loading its weights."""
        return self._settings.outline()

    def uses(
        self,
        model: KVLinkModel | str | Path | None = None,
        embedder: AnyEmbedder | str | Path | None = None,
        device: str = "auto",
        codec: str | None = None,
    ) -> bool:
        """Whether these arguments of `open` ask for what is open here."""
        return self._settings.uses(model, embedder, device, codec)

    @property
    def model_name(self) -> str:
        """The language model's name, without loading it."""
        return self._settings.model_name

    @property
    def embedder_name(self) -> str:
        """The embedder's name, without loading it."""
        return self._settings.embedder_name

    @property
    def codec(self) -> str:
        """How snapshots are kept."""
        return self._settings.codec

    @property
    def compression(self) -> str:
        """What compresses new snapshots, "zstd" or "none"."""
        return "zstd" if self.store.compress else "none"

    def order(self, asked: str | None = None) -> str:
        """How hits follow each other in a prompt: `asked`, else as the collection remembers."""
        return check_order(asked or str(self.catalog.settings().get("order", "score")))

    @property
    def snapshots(self) -> StoredSnapshots:
        """Where this collection's snapshots come from."""
        return self._loaded()[1]

    @property
    def reuse(self) -> Reuse:
        """What this collection brings to `KVLinkModel.stream`, `prefill` and `verify`."""
        return self._loaded()[2]

    @property
    def embedder(self) -> Embedder:
        """The embedder."""
        with self._lock:
            return self._settings.embedder()

    @property
    def index(self) -> VectorIndex:
        """The vector index, up to date with the catalog."""
        return self.refresh_index()

    def refresh_index(self) -> VectorIndex:
        """Bring the index up to the catalog's version, whoever changed it."""
        with self._lock:
            dimension = self._dimension()
            if self._index is None or self._index.dimension != dimension:
                self._index, self._index_version = self._load_index(dimension)
                self._saved_version = self._index_version
            if self._index_version != self.catalog.version():
                changes = self.catalog.changes_since(self._index_version)
                self._index.remove(changes.removed)
                if len(changes.rows):
                    self._index.add(changes.rows, changes.vectors)
                self._index_version = changes.version
            return self._index

    def save_index(self) -> None:
        """Write the index file. A failure is logged: the file is made again from the catalog."""
        try:
            index = self.refresh_index()
            if self._settings.dimension() is None:
                return  # nothing was ever embedded
            self.catalog.remember_index(self._index_version)
            index.save(self.directory / INDEX, self._index_version, source=self.catalog.identity)
            self._saved_version = self._index_version
        except OSError as error:
            logger.warning("the index is not saved and will be rebuilt: %s", error)

    def check_index_file(self) -> list[str]:
        """What is wrong with the index and its file; one never saved is made when needed."""
        path = self.directory / INDEX
        leftovers = atomic_files.abandoned(path.parent, INDEX)
        problems = [f"leftover temporary file: {leftover.name}" for leftover in leftovers]
        lost = False
        try:
            saved, version = VectorIndex.load(path, source=self.catalog.identity)
            if version == self.catalog.version():
                problems += self._differences(saved)
        except FileNotFoundError:
            lost = True
            if self.catalog.index_version() is not None:
                problems.append(f"missing file: {INDEX}")
        except (IndexCorrupt, OSError) as error:
            lost = True
            problems.append(str(error))
        # one that would only now be made from the catalog cannot differ from it
        return problems if lost and self._index is None else problems + self._differences()

    def _differences(self, index: VectorIndex | None = None) -> list[str]:
        """Whether `index` (None: the one in use) holds other vectors than the catalog."""
        try:
            index = self.index if index is None else index
            expected = self.catalog.changes_since(0)
        except CatalogError:
            return []  # a damaged embedding, which `Catalog.check` has told
        if set(expected.rows.tolist()) != index.ids:
            return [f"found {len(index)} vectors, expected those of {len(expected.rows)} documents"]
        same = np.array_equal(index.vectors(expected.rows), expected.vectors)
        return [] if same or not len(index) else ["found other vectors than the catalog's"]

    def reset_index(self) -> None:
        """Make the index anew from the catalog, and its file."""
        with self._lock:
            self._index, self._index_version = VectorIndex(self._dimension(), self._search()), 0
            self._saved_version = -1
            self.save_index()

    def is_indexed(self, entry: Entry | None, document: Document, *, embed: bool) -> bool:
        """Whether `entry` holds `document` as it is, with an embedding if `embed`."""
        if entry is None or entry.document.canonical() != document.canonical():
            return False
        return not embed or entry.row in self.index

    def has_snapshot(self, entry: Entry) -> bool:
        """Whether the store holds this entry's snapshot."""
        return entry.snapshot_key is not None and entry.snapshot_key in self.store

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """One writer at a time, among all threads and processes."""
        if self._locks[0] != os.getpid():
            self._locks = self._new_locks()  # forked: the others are the parent's
        _, writer, writing = self._locks
        with writer:
            try:
                writing.acquire()
            except OSError as error:
                raise StorageError(
                    f"{self.directory / LOCK} cannot be locked for writing: {error}"
                ) from error
            try:
                yield
            finally:
                writing.release()

    def _new_locks(self) -> tuple[int, threading.RLock, filelock.BaseFileLock]:
        """For writers: this process, a lock among its threads, and one among processes."""
        lock = filelock.FileLock(self.directory / LOCK, thread_local=False, mode=0o600)
        return os.getpid(), threading.RLock(), lock

    def _take(
        self, documents: Iterable[Document], *, embed: bool, show_progress: bool
    ) -> AddReport:
        if isinstance(documents, Document):
            raise ConfigError("found one Document, expected an iterable of them; use [document]")
        total = len(documents) if isinstance(documents, Sequence) else None
        with (
            self.writing(),
            tqdm(total=total, unit="passage", desc="indexing", disable=not show_progress) as bar,
        ):
            self._settings.model()  # SettingsMismatch where another process took another model
            return index_documents(self, documents, embed=embed, advance=bar.update)

    def _recognised(
        self, messages: Sequence[Mapping[str, Any]], trace: Trace, room: int
    ) -> Iterator[Part]:
        """`recognise_chat` when the first part is asked for, with `room` left for the answer."""
        trace.restart()
        with trace.stage("retrieval"):
            parts = self.recognise_chat(messages, trace=trace)
        if not any(isinstance(part, Passage) for part in parts) and len(self):
            logger.warning(
                "recognised none of the %d documents of %s in the prompt, so all of it is "
                "computed; a text is recognised where it stands unchanged between white space",
                len(self),
                self.directory,
            )
        contents = (m["content"] for m in messages if not isinstance(m["content"], str))
        given = {id(part) for content in contents for part in content}
        with trace.stage("layout"):
            fitted = fit(self.model, parts, room, given=given)
        self._warn_of_text(trace, count_passages(parts), count_passages(fitted))
        yield from fitted

    def _warn_of_text(self, trace: Trace, recognised: int, fitted: int) -> None:
        """Say how many passages are computed although they were recognised, and note them."""
        if trace.passages_as_text:
            logger.warning(
                "%d of the %d passages in the prompt are computed as text: the model has link "
                "tokens for %d; retrieve fewer for a prompt (a smaller k)",
                trace.passages_as_text,
                trace.passages_as_text + recognised,
                self.model.spec.max_passages,
            )
        if fitted < recognised:
            logger.warning(
                "%d of the %d passages recognised are computed as text: with their titles and link "
                "tokens the prompt would not leave the answer its room in the model's window; "
                "retrieve fewer, or ask for fewer new tokens",
                recognised - fitted,
                recognised,
            )
        trace.passages_as_text += recognised - fitted

    def _search_many(
        self, queries: Sequence[str], k: int, *, where: Where | None = None
    ) -> list[list[Hit]]:
        if not len(self.refresh_index()):
            return [[] for _ in queries]
        vectors = self.embedder.embed_queries(list(queries))
        return [self._nearest(vector, k, where) for vector in vectors]

    def _nearest(self, vector: Vectors, k: int, where: Where | None) -> list[Hit]:
        """The best `k` hits that `where` takes; asks the index for more until there are `k`."""
        index, ask = self.refresh_index(), k
        hits: list[Hit] = []
        seen: set[int] = set()
        while True:
            found = index.search(vector, ask)
            fresh = [(row, score) for row, score in found if row not in seen]
            entries = {entry.row: entry for entry in self.catalog.by_rows(row for row, _ in fresh)}
            here = [Hit(entries[row].document, score) for row, score in fresh if row in entries]
            hits += [hit for hit in here if where is None or where(hit.document)]
            if len(hits) >= k or len(found) < ask:
                return hits[:k]
            seen.update(row for row, _ in fresh)
            ask *= 4

    def _dimension(self) -> int:
        """Numbers in a vector; any number will do for an index as long as there are none."""
        return self._settings.dimension() or 1

    def _load_index(self, dimension: int) -> tuple[VectorIndex, int]:
        """The saved index, or an empty one at version 0, which the catalog then fills."""
        path = self.directory / INDEX
        try:
            index, version = VectorIndex.load(
                path,
                dimension=dimension,
                source=self.catalog.identity,
                search=self._search(),
            )
            if self.catalog.has_had(version):
                return index, version
            logger.warning(
                "the index was saved at a state that the catalog cannot confirm (its last "
                "documents changed since, or a backup was brought back) and is rebuilt"
            )
        except FileNotFoundError:
            pass
        except (IndexCorrupt, OSError) as error:
            logger.warning("the index is rebuilt from the catalog: %s", error)
        return VectorIndex(dimension, self._search()), 0

    def _search(self) -> str:
        """How the nearest passages are found."""
        return check_search(str(self.catalog.settings().get("search", "auto")))

    def _loaded(self) -> tuple[KVLinkModel, StoredSnapshots, Reuse, Recogniser]:
        with self._lock:
            if self._parts is None:
                model = self._settings.model()
                codec = self._settings.codec
                memory = self._device_memory(model)
                snapshots = StoredSnapshots(
                    self.store, model.backbone, codec=codec, users=self.catalog.users, memory=memory
                )
                # kept runs come from what was read, so they depend on the codec
                scope = f"{self.catalog.identity} {codec}"
                reuse = Reuse(snapshots, self._prefix, scope, memory)
                recogniser = Recogniser(
                    self.catalog,
                    model.tokenizer,
                    min_tokens=self._min_tokens,
                    most=model.spec.max_passages,
                )
                self._parts = model, snapshots, reuse, recogniser
            return self._parts

    def _device_memory(self, model: KVLinkModel) -> DeviceMemory | None:
        """Where hot snapshots are kept on the model's device; None on a CPU unless asked for."""
        budget, pinned = self._budgets
        device = model.backbone.device
        if budget is None:
            budget = default_budget(device)
        if device.type != "cuda" and not budget and not pinned:
            return None
        return DeviceMemory(model.backbone.side, budget, pinned)

    def _settle(self, allow: bool) -> None:
        """Compare what was asked for with what the directory remembers; encode again if told to."""
        with self.writing() if allow else contextlib.nullcontext():
            if self._settings.settle_model(allow):
                reencode(self)
                self._settings.finish_model()
            if self._settings.settle_embedder(allow):
                reembed(self)
                self._settings.finish_embedder()

    def _tokens(self) -> tuple[int, int]:
        """Tokens of all passages, and of those distinct ones whose snapshot is stored."""
        total = 0
        stored: dict[str, int] = {}
        held = set(self.store.keys())
        for key, tokens in self.catalog.snapshots():
            total += tokens or 0
            if key in held:
                stored[str(key)] = tokens or 0
        return total, sum(stored.values())


def _check_says_something(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `PromptError` where `messages` or the last of them, if the user's, say nothing."""
    blank = [_is_blank(message) for message in messages]
    if all(blank):
        raise PromptError("the prompt is empty, expected text or messages with text in them")
    if blank[-1] and messages[-1].get("role") == "user":
        raise PromptError("the last message is the user's and empty, expected a question in it")


def _is_blank(message: Mapping[str, Any]) -> bool:
    """Whether a message's content is known to say nothing; what is no message is told later."""
    content = message.get("content") if isinstance(message, Mapping) else None
    texts = [content] if isinstance(content, str) else content
    if not isinstance(texts, list | tuple):
        return False
    said = (part.text if isinstance(part, Text) else part for part in texts)
    return all(isinstance(text, str) and not text.strip() for text in said)


def _refuse_links(directory: Path) -> None:
    """Raise where a part of the collection is a symbolic link, which may lead anywhere."""
    for name in (CATALOG, INDEX, SNAPSHOTS, LOCK):
        if (directory / name).is_symlink():
            raise StorageError(
                f"{directory / name} is a symbolic link, which is not followed; remove it, or link "
                "the directory as a whole"
            )


class AnswerStream(Iterator[str]):
    """An answer as it comes: question → hits → prompt → text.

    Nothing runs before the first `next()`. `hits` are there after it, `trace` is final at the end.
    """

    def __init__(
        self,
        rag: KVLinkRAG,
        question: str,
        k: int,
        rounds: int,
        order: str,
        arguments: dict[str, Any],
    ) -> None:
        self.hits: list[Hit] = []
        self.trace = Trace()
        self._rag, self._question, self._k, self._rounds = rag, question, k, rounds
        self._order, self._arguments = order, arguments
        self._stream: TextStream | None = None
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """What has been said so far, as an `Answer`."""
        return Answer(self._stream.text if self._stream else "", self.hits, self.trace)

    def _run(self) -> Iterator[str]:
        rag, model = self._rag, self._rag.model
        self.trace.restart()
        # 1. question → hits
        with self.trace.stage("retrieval"):
            self.hits = rag.search(self._question, self._k, rounds=self._rounds)
        # 2. hits → prompt
        laid = in_order(self.hits, self._order)
        parts = model.prompt([hit.document for hit in laid], self._question)
        # 3. prompt → text (answering)
        self._stream = model.stream(parts, reuse=rag.reuse, trace=self.trace, **self._arguments)
        yield from self._stream
