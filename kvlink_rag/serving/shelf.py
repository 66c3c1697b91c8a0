"""Uploaded files and what becomes of them in stores.

    upload → originals on disk → `attach` → queue → `ingest` in one thread → completed or failed

The readers, the splitter and their limits are those of `kvlink-rag index`. What is deleted is
erased: the original, and in every store that holds it passages, vectors and snapshots. What a
restart finds half done is done then. Knows the library and its records; knows no HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentNotFound, KVLinkError, MissingExtra, StorageError
from kvlink_rag.ingest.index_files import ingest, remove
from kvlink_rag.ingest.readers import Problem, find
from kvlink_rag.ingest.sources import FILE_KEY

from .keys import Asker
from .library import Library
from .records import DONE, FAILED, PENDING, Held, Store, Upload, new_id, now
from .refusals import Refused, not_found

_STEP = 1 << 20  # bytes copied at once
_LONGEST_NAME = 200  # bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a passage is from. file: the id of an uploaded file, or "". name: for people."""

    file: str
    name: str
    metadata: dict[str, Any]


class Shelf:
    """Files on their way into stores, one after the other, in a thread of their own."""

    def __init__(self, library: Library, most_bytes: int) -> None:
        self._library, self._records, self._most = library, library.records, most_bytes
        self._queue: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="kvlink-indexing", daemon=True)

    def start(self) -> None:
        """Finish what an earlier server left half done, and go on."""
        self._library.finish_deletions()
        for upload in self._records.files():
            if upload.leaving:
                self.erase(upload.id)
        for held in self._records.held():
            if held.status == PENDING:
                self._queue.put((held.store, held.file))
        self._thread.start()

    def close(self) -> None:
        """Let the file that is being indexed finish; the others go on at the next start."""
        self._stopping = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    # Files

    def upload(self, owner: str, name: str, purpose: str, stream: IO[bytes]) -> Upload:
        """Keep an original. Raises `Refused` where it has no name or is too large."""
        plain = _plain_name(name)
        id = new_id("file-")
        directory = self._library.originals(id)
        try:
            directory.mkdir(mode=0o700)
            size = self._copy(stream, directory / plain)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise StorageError(f"an upload cannot be kept: {error}") from error
        except Refused:
            shutil.rmtree(directory)
            raise
        upload = Upload(id, now(), owner, plain, purpose, size)
        self._records.add_file(upload)
        return upload

    def _copy(self, stream: IO[bytes], path: Path) -> int:
        size = 0
        with path.open("xb") as file:
            while step := stream.read(_STEP):
                size += len(step)
                if size > self._most:
                    raise Refused(413, f"the file is larger than {self._most:,} bytes", "file")
                file.write(step)
        return size

    def files(self, asker: Asker) -> list[Upload]:
        """Those of `asker`, or all where it sees all."""
        return [file for file in self._records.files() if _may_see(asker, file)]

    def file(self, id: str, asker: Asker) -> Upload:
        """One of them. Raises `Refused`."""
        for file in self._records.files([id]):
            if _may_see(asker, file):
                return file
        raise not_found("file", id)

    def original(self, file: Upload) -> Path:
        """Where its bytes are."""
        return self._library.originals(file.id) / file.name

    def erase(self, id: str) -> None:
        """Erase a file here and in every store that holds it."""
        self._records.leave_file(id)
        for held in self._records.held(file=id):
            self.detach(held.store, id)
        directory = self._library.originals(id)
        try:
            if directory.exists():
                shutil.rmtree(directory)
        except OSError as error:
            raise StorageError(f"the file {id} cannot be erased: {error}") from error
        self._records.forget_file(id)

    def erase_store(self, store: Store) -> None:
        """Erase a store, and the originals that no other store holds."""
        held = self._records.held(store=store.id)
        self._library.delete(store.id)
        for each in held:
            if not self._records.held(file=each.file):
                self.erase(each.file)

    # Files in stores

    def attach(
        self, store: Store, file: Upload, attributes: Mapping[str, Any], passage_tokens: int
    ) -> Held:
        """Put a file into a store; it is indexed in its turn."""
        held = Held(store.id, file.id, now(), dict(attributes), passage_tokens, PENDING)
        self._records.hold(held)
        self._queue.put((store.id, file.id))
        return held

    def in_store(self, store: Store, file: str) -> Held:
        """A file of a store. Raises `Refused`."""
        for held in self._records.held(store=store.id, file=file):
            return held
        raise not_found("file", file)

    def detach(self, store: str, file: str) -> None:
        """Take a file out of a store, with all that was derived from it there."""
        with self._library.changing(store) as rag:
            # it may have given no passage, or not be indexed yet
            with contextlib.suppress(DocumentNotFound):
                remove(rag, [str(self._library.originals(file))], now=True)
            self._records.let_go(store, file)

    def place(self, document: Document) -> Place:
        """Where a passage is from, without where the server keeps files."""
        metadata = {key: value for key, value in document.metadata.items() if key != FILE_KEY}
        named = document.metadata.get(FILE_KEY)
        root = self._library.originals("").resolve()
        for path in map(Path, map(str, named if isinstance(named, list) else ())):
            if path.parent.parent == root:
                return Place(path.parent.name, path.name, {**metadata, "source": path.name})
        return Place("", str(metadata.get("source", "")), metadata)

    # The thread

    def _work(self) -> None:
        while (task := self._queue.get()) is not None and not self._stopping:
            store, file = task
            try:
                self._index(store, file)
            except Refused:
                continue  # the store is gone
            except Exception as error:
                logger.error("indexing a file of %s failed", store, exc_info=error)
                self._settle_failed(store, file, "server_error", "the server failed")

    def _index(self, store: str, file: str) -> None:
        with self._library.changing(store) as rag:
            rows = self._records.held(store=store, file=file)
            uploads = [each for each in self._records.files([file]) if not each.leaving]
            if not rows or not uploads or rows[0].status != PENDING:
                return
            (upload,) = uploads
            problems: list[Problem] = []
            try:
                found = find([self.original(upload)], problems.append)
                tokens = rows[0].passage_tokens
                report = ingest(rag, found, on_problem=problems.append, max_tokens=tokens)
            except MissingExtra as error:
                self._settle_failed(store, file, "unsupported_file", str(error))
            except KVLinkError as error:
                logger.warning("%s of %s is not indexed: %s", file, store, error)
                self._settle_failed(store, file, "invalid_file", _told(error))
            else:
                if report.passages:
                    self._records.settle(store, file, DONE)
                else:
                    why = problems[0].message if problems else "no text in it"
                    self._settle_failed(store, file, "invalid_file", why)

    def _settle_failed(self, store: str, file: str, code: str, message: str) -> None:
        self._records.settle(store, file, FAILED, code, message[:500])


def _told(error: KVLinkError) -> str:
    return "the server's storage failed" if isinstance(error, StorageError) else str(error)


def _may_see(asker: Asker, file: Upload) -> bool:
    return not file.leaving and (asker.sees_all or file.owner == asker.id)


def _plain_name(name: str) -> str:
    """The last part of a path, as a client's system writes it. Raises `Refused`."""
    plain = name.replace("\\", "/").rpartition("/")[2].strip()
    if plain in ("", ".", "..") or not plain.isprintable():
        raise Refused(400, "the file has no usable name; its suffix says how to read it", "file")
    if len(plain.encode()) > _LONGEST_NAME:
        raise Refused(400, f"the file's name is longer than {_LONGEST_NAME} bytes", "file")
    return plain
