"""`KVLinkRAG`: a collection in a directory, and the questions asked of it.

    directory/
      catalog.sqlite   documents, metadata, embeddings, settings: the truth
      index.faiss      vectors, derived
      snapshots/       keys and values of each passage, derived

A face: the life of a document stands in `adding`, that of a question in `answering`. Model and
embedder are loaded when first needed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from kvlink_rag.arguments import check_question, is_count, parse_size
from kvlink_rag.disk import atomic_files
from kvlink_rag.documents import Document, Hit, Part
from kvlink_rag.errors import ConfigError, DocumentNotFound, StorageError
from kvlink_rag.prompt.format import PromptFormat
from kvlink_rag.prompt.recognition import MIN_TOKENS
from kvlink_rag.prompt.spec import Spec
from kvlink_rag.retrieval.embedder import Embedder, Vectors
from kvlink_rag.retrieval.framework_embedders import AnyEmbedder, as_embedder
from kvlink_rag.retrieval.rounds import Where
from kvlink_rag.retrieval.vector_index import VectorIndex
from kvlink_rag.snapshots.sources import Reuse, StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore
from kvlink_rag.trace import Trace

from . import adding, checking, erasing, proving, recognising, reencoding, searching
from .adding import AddReport
from .answering import Answer, AnswerStream, from_question
from .catalog import Catalog
from .lock import WriteLock
from .opening import LOCK, open_parts
from .parts import Parts
from .settings import Asked
from .stats import Stats, stats

if TYPE_CHECKING:
    from kvlink_rag.model.model import KVLinkModel
    from kvlink_rag.model.verify import Verification

PREFIX_BUDGET = 256 << 20  # bytes
AT_ONCE = 8  # questions of `ask_many` under way
VERIFIED = 32  # snapshots that `verify` encodes again

logger = logging.getLogger(__name__)


class KVLinkRAG:
    """A collection of documents that answers questions. Open it with `KVLinkRAG.open`.

    For any number of threads; other processes may read and write the same directory.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._writer = WriteLock(parts.directory / LOCK)
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
        weights: str = "own",
        spec: Spec | None = None,
        codec: str | None = None,
        compression: str | None = None,
        search: str | None = None,
        order: str | None = None,
        repair: str | None = None,
        size_limit: int | str | None = None,
        budget: int | str | None = None,
        prefix_budget: int | str = PREFIX_BUDGET,
        min_tokens: int = MIN_TOKENS,
        device_budget: int | str | None = None,
        pinned_budget: int | str = 0,
        remote: str | None = None,
        reencode: bool = False,
        create: bool = True,
    ) -> KVLinkRAG:
        """Open the collection in `directory`, or make one there.

        model, embedder: names, directories or loaded objects (an embedder may be LangChain's or
        LlamaIndex's, see `as_embedder`); None: what the directory remembers, else the pair `small`.
        dtype: what the model computes in; "auto": as in `KVLinkModel.from_pretrained`; it is no
        part of the collection. weights: "int8" for generated tokens, on a CPU, likewise. codec: how
        snapshots are kept, "exact" (what the model computes in), "bf16", "int8", "int4" or "fp8"
        (smaller, see docs/architecture.md for the price); None: as the directory remembers, else
        "bf16" where the dtype is left to a CPU, else "exact". compression: "zstd" compresses
        snapshots on top of the codec, without loss; "none"; None: as the directory remembers, else
        none. search: how the nearest passages are found, "exact", "ivf" or "auto", which goes by
        size (see `VectorIndex`); None: as the directory remembers, else auto. order: of the hits in
        the prompt, "score" or "id" (see `stream`); None: as the directory remembers, else score.
        repair: what is computed again of reused passages, "first:16" (tokens of each), "select:15%"
        (of all, those that deviate most) or "none"; None: as the directory remembers, else none.
        size_limit: bytes of snapshots to keep at most, as a number or text such as "20GB"; what is
        over it goes at once. budget: what snapshots may take before they are asked for, as "50%" of
        the disk that would be free without them, "20GB", or "none", which is no bound; what is over
        it is encoded by the first question that needs it, and a warning says so; None: as the
        directory remembers, else "50%". prefix_budget: bytes of computed runs to keep in memory; 0
        keeps none. min_tokens: the shortest stretch that `recognise` takes for a passage.
        device_budget: bytes of snapshots to keep in the device's memory; None: a quarter of what a
        GPU has free, none on a CPU. pinned_budget: bytes of them to keep in pinned host memory as
        well, which is for GPUs and taken from all other programs. remote: a tier of snapshots that
        machines share, behind the directory's own: "redis://…", "s3://bucket/prefix" or
        "file:///mnt/…" (docs/serving.md); None: what KVLINK_REMOTE says, "" for none. reencode:
        where the directory remembers another model, embedder or codec, take the new one and encode
        again.
        Raises `SettingsMismatch` (another of these, without `reencode`), `ConfigError` (no such
        codec), `StorageError`.
        """
        asked = Asked(
            model,
            embedder if isinstance(embedder, str | Path | None) else as_embedder(embedder),
            *(device, dtype, weights, spec, codec, compression, search, order, repair, budget),
        )
        parts = open_parts(
            directory,
            asked,
            create=create,
            size_limit=None if size_limit is None else parse_size(size_limit, "size_limit"),
            prefix_budget=parse_size(prefix_budget, "prefix_budget"),
            min_tokens=min_tokens,
            device_budget=(
                None if device_budget is None else parse_size(device_budget, "device_budget")
            ),
            pinned_budget=parse_size(pinned_budget, "pinned_budget"),
            remote=remote,
        )
        with contextlib.ExitStack() as opened:
            rag = opened.enter_context(contextlib.closing(cls(parts)))
            with rag.writing() if reencode else contextlib.nullcontext():
                reencoding.settle(parts, allow=reencode)
            opened.pop_all()
        return rag

    # Documents

    def add(self, documents: Iterable[Document], *, show_progress: bool = False) -> AddReport:
        """Embed, index and encode `documents`; see `adding` for the steps.

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

    def delete(self, ids: Iterable[str], *, missing_ok: bool = False, now: bool = False) -> int:
        """Delete documents by id, with all that was derived from them, and return how many.

        now: also empty the catalog's log and free pages and drop snapshots of no document, which
        takes longer; see "Erasure" in docs/security.md. Raises `DocumentNotFound`, and deletes
        none, where one of them is not there, unless `missing_ok`.
        """
        wanted = [ids] if isinstance(ids, str) else list(ids)
        with self.writing():
            if not missing_ok:
                self._require(wanted)
            return erasing.erase(self.parts, wanted, now=now)

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
        return searching.search(self.parts, query, k, rounds=rounds, where=where)

    def search_vector(
        self, vector: Vectors, k: int = 10, *, where: Where | None = None
    ) -> list[Hit]:
        """The best `k` documents for a vector (float32 [dimension]) of this embedder."""
        return searching.search_vector(self.parts, vector, k, where)

    def vectors(self, ids: Iterable[str]) -> Vectors:
        """The vectors of documents, float32 [ids, dimension], in order.

        Raises `DocumentNotFound` where one is not there or was registered without a vector.
        """
        return searching.vectors(self.parts, ids)

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
        find = from_question(self.parts, question, k=k, rounds=rounds, order=self.order(order))
        return AnswerStream(self.parts, find, arguments)

    def ask(self, question: str, *, k: int = 10, rounds: int = 1, **arguments: Any) -> Answer:
        """The whole answer, its hits and its trace. Arguments as in `stream`."""
        stream = self.stream(question, k=k, rounds=rounds, **arguments)
        for _ in stream:
            pass
        return stream.answer

    def ask_many(
        self, questions: Iterable[str], *, at_once: int = AT_ONCE, **arguments: Any
    ) -> list[Answer]:
        """The whole answers to several questions, in their order, as `ask` gives each.

        at_once: how many are under way together; their tokens are computed together, for which a
        model takes little longer than for one. Arguments as in `ask`. Raises what the first
        question that fails raises, once those under way have ended.
        """
        if not is_count(at_once):
            raise ConfigError(f"at_once is {at_once!r}, expected a whole number of at least 1")
        with ThreadPoolExecutor(at_once, "questions") as askers:
            return list(askers.map(lambda question: self.ask(question, **arguments), questions))

    def verify(
        self,
        question: str = "What is this about?",
        *,
        k: int = 4,
        sample: int | None = VERIFIED,
        seed: int | None = None,
    ) -> Verification:
        """Compare reuse of this collection's snapshots with the masked full prefill.

        Documents come from anywhere in the collection, others at each call unless there is a
        `seed`: k for the prompt, and `sample` (None: all) whose snapshots are compared with what
        the model encodes now. Raises `ConfigError` where the collection holds no documents.
        """
        return proving.verify(self.parts, question, k=k, sample=sample, seed=seed)

    # Prompts that someone else wrote

    def recognise(
        self, prompt: str, *, question: str | None = None, system: Sequence[str] = ()
    ) -> list[Part]:
        """`prompt` as parts: what is verbatim the text of a document here becomes a `Passage`.

        question: the question as it stands in the prompt, which is never a passage; None finds it
        (`recognition.rules.find_question`). system: more prompts of the application, besides those
        registered. Passages beyond the model's slots stay text.
        """
        known = (*self._system_prompts, *system)
        recogniser = self.parts.loaded().recogniser
        return recogniser.recognise(prompt, question=question, system=known)

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
        return recognising.recognise_chat(self.parts, messages, known, trace)

    def register_system_prompt(self, text: str) -> None:
        """Never take `text`, the application's own prompt, for a passage."""
        if text.strip() and text not in self._system_prompts:
            self._system_prompts += (text,)

    def complete(self, prompt: str | Sequence[Mapping[str, Any]], **arguments: Any) -> AnswerStream:
        """Stream the answer to a prompt or to messages, reusing every passage recognised in it.

        A string is one user message; without a chat template the spec's preset stands around it.
        What fits as text is never too long for being recognised (`fit`); passages beyond the
        model's slots are computed as text. Either logs a warning and counts in the trace's
        `passages_as_text`. Warns, once each, where several prompts held none of the collection's
        documents, where it has none, and where something looks like one but differs.
        Arguments as in `KVLinkModel.stream`. Raises `PromptError` for an empty prompt, and where
        the last message is the user's and empty.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        room = arguments.get("max_new_tokens", 256)
        system = self._system_prompts
        find = recognising.from_prompt(self.parts, messages, system=system, room=room)
        return AnswerStream(self.parts, find, arguments)

    # Care

    def stats(self) -> Stats:
        """Counts, bytes and counters."""
        return stats(self.parts)

    def check(self, fix: bool = False, *, sample: int | None = 0) -> list[str]:
        """What is wrong in the directory, one line each; with `fix`, mend all that can be.

        sample: how many snapshots (None: all) are compared with what the model encodes now, which
        loads it.
        """
        frozen = atomic_files.is_read_only(self.directory)  # then nobody writes
        with contextlib.nullcontext() if frozen and not fix else self.writing():
            try:
                return checking.check(self.parts, fix, sample)
            except StorageError:
                raise
            except OSError as error:
                raise StorageError(f"{self.directory} cannot be checked: {error}") from error

    def save_index(self) -> None:
        """Write the index file. A failure is logged: the file is made again from the catalog."""
        self.parts.index.save()

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """One writer at a time, among all threads and processes."""
        return self._writer.held()

    def close(self) -> None:
        """Save the index and release the directory. Nothing is lost without it."""
        self.parts.close()

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
    def directory(self) -> Path:
        """Where the collection lies, resolved."""
        return self.parts.directory

    @property
    def catalog(self) -> Catalog:
        """Documents, metadata, embeddings and settings: the truth."""
        return self.parts.catalog

    @property
    def store(self) -> SnapshotStore:
        """Snapshots on disk."""
        return self.parts.store

    @property
    def index(self) -> VectorIndex:
        """The vector index, up to date with the catalog."""
        return self.parts.index.current()

    @property
    def model(self) -> KVLinkModel:
        """The language model."""
        return self.parts.loaded().model

    @property
    def snapshots(self) -> StoredSnapshots:
        """Where this collection's snapshots come from."""
        return self.parts.loaded().snapshots

    @property
    def reuse(self) -> Reuse:
        """What this collection brings to `KVLinkModel.stream`, `prefill` and `verify`."""
        return self.parts.loaded().reuse

    @property
    def embedder(self) -> Embedder:
        """The embedder."""
        return self.parts.embedder()

    def outline(self) -> PromptFormat:
        """The model's name, window, tokenizer and spec, without loading its weights."""
        return self.parts.settings.format()

    def uses(
        self,
        model: KVLinkModel | str | Path | None = None,
        embedder: AnyEmbedder | str | Path | None = None,
        device: str = "auto",
        codec: str | None = None,
    ) -> bool:
        """Whether these arguments of `open` ask for what is open here."""
        return self.parts.settings.uses(model, embedder, device, codec)

    @property
    def model_name(self) -> str:
        """The language model's name, without loading it."""
        return self.parts.settings.model_name

    @property
    def embedder_name(self) -> str:
        """The embedder's name, without loading it."""
        return self.parts.settings.embedder_name

    @property
    def codec(self) -> str:
        """How snapshots are kept."""
        return self.parts.settings.codec

    @property
    def storage_dtype(self) -> str:
        """The dtype that exact and bf16 snapshots are kept in; "" of others and before the first.

        It is the collection's, whatever the model computes in.
        """
        return self.parts.settings.storage_dtype

    @property
    def compression(self) -> str:
        """What compresses new snapshots, "zstd" or "none"."""
        return self.parts.settings.compression

    def order(self, asked: str | None = None) -> str:
        """How hits follow each other in a prompt: `asked`, else as the collection remembers."""
        return self.parts.settings.order(asked)

    def _take(
        self, documents: Iterable[Document], *, embed: bool, show_progress: bool
    ) -> AddReport:
        """`adding.add`, by one writer at a time and with a bar."""
        if isinstance(documents, Document):
            raise ConfigError("found one Document, expected an iterable of them; use [document]")
        total = len(documents) if isinstance(documents, Sequence) else None
        with (
            self.writing(),
            tqdm(total=total, unit="passage", desc="indexing", disable=not show_progress) as bar,
        ):
            return adding.add(self.parts, documents, embed=embed, advance=bar.update)
