"""/v1/files and /v1/vector_stores: uploads, stores, files in them, and search.

Functions of one endpoint each. Knows OpenAI's shapes; what files and stores are know `shelf` and
`library`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.responses import FileResponse

from kvlink_rag.arguments import MAX_TOKENS
from kvlink_rag.documents import Document, Hit

from .keys import Asker
from .records import DONE, FAILED, PENDING, Held, Store, Upload
from .refusals import Refused
from .replies import (
    Deleted,
    FileCounts,
    FileObject,
    Found,
    FoundText,
    LastError,
    Listed,
    SearchPage,
    StaticSizes,
    StaticStrategy,
    StoreFile,
    VectorStore,
)
from .requests import (
    Chunking,
    FilesPage,
    Page,
    SearchRequest,
    StoreChange,
    StoreFileChange,
    StoreFileRequest,
    StoreFilesPage,
    StoreRequest,
)
from .service import Call, Service

Row = TypeVar("Row")
Thing = TypeVar("Thing")

# Files


def upload(call: Call) -> FileObject:
    """Keep an uploaded file."""
    form = call.body
    file, purpose = form.get("file"), form.get("purpose") or "assistants"
    if not isinstance(file, UploadFile) or not isinstance(purpose, str):
        raise Refused(400, "found no part `file` with a file name, expected one", "file")
    _may_create(call.asker)
    kept = call.service.shelf.upload(call.asker.id, file.filename or "", purpose[:64], file.file)
    return _file(kept)


def list_files(call: Call) -> Listed[FileObject]:
    """The files of this key."""
    query: FilesPage = call.query
    found = call.service.shelf.files(call.asker)
    if query.purpose is not None:
        found = [file for file in found if file.purpose == query.purpose]
    return _page(found, query, lambda file: file.id, _file)


def get_file(call: Call) -> FileObject:
    """One file."""
    return _file(call.service.shelf.file(call.path["file"], call.asker))


def file_content(call: Call) -> FileResponse:
    """Its bytes, never shown as a page."""
    file = call.service.shelf.file(call.path["file"], call.asker)
    return FileResponse(
        call.service.shelf.original(file),
        media_type="application/octet-stream",
        filename=file.name,
        headers={"X-Content-Type-Options": "nosniff"},
    )


def delete_file(call: Call) -> Deleted:
    """Erase a file, and its passages in every store."""
    service, id = call.service, call.path["file"]
    service.shelf.file(id, call.asker)
    service.shelf.erase(id)
    return Deleted(id=id, object="file")


def _may_create(asker: Asker) -> None:
    if not asker.may_create:
        raise Refused(403, "this key may only read", code="read_only")


def _file(file: Upload) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created,
        filename=file.name,
        purpose=file.purpose,
    )


# Stores


def create_store(call: Call) -> VectorStore:
    """A new store, with files in it where some are named."""
    body: StoreRequest = call.body
    service = call.service
    _may_create(call.asker)
    files = [service.shelf.file(id, call.asker) for id in dict.fromkeys(body.file_ids or ())]
    store = service.library.create(call.asker.id, body.name or "", body.metadata or {})
    for file in files:
        service.shelf.attach(store, file, {}, _passage_tokens(body.chunking_strategy))
    return _store(service, store, call.asker)


def list_stores(call: Call) -> Listed[VectorStore]:
    """The stores and collections that this key may read."""
    found = call.service.library.readable(call.asker)
    return _page(found, call.query, lambda s: s.id, lambda s: _store(call.service, s, call.asker))


def get_store(call: Call) -> VectorStore:
    """One of them."""
    return _store(call.service, _found(call), call.asker)


def change_store(call: Call) -> VectorStore:
    """Another name, other metadata."""
    body: StoreChange = call.body
    store = _own(call, "renamed")
    name = store.name if body.name is None else body.name
    metadata = store.metadata if body.metadata is None else body.metadata
    call.service.library.records.change_store(store.id, name, metadata)
    return _store(call.service, _found(call), call.asker)


def delete_store(call: Call) -> Deleted:
    """Erase a store: its passages, and the originals that no other store holds."""
    store = _own(call, "deleted")
    call.service.shelf.erase_store(store)
    return Deleted(id=store.id, object="vector_store.deleted")


async def search(call: Call) -> SearchPage:
    """The nearest passages."""
    return await call.service.runner.call(lambda: _search(call))


def _search(call: Call) -> SearchPage:
    body: SearchRequest = call.body
    service, store = call.service, _found(call)
    queries = [body.query] if isinstance(body.query, str) else body.query
    held = {each.file: each.attributes for each in service.library.records.held(store=store.id)}

    def attributes(document: Document) -> dict[str, Any]:
        place = service.shelf.place(document)
        return {**place.metadata, **held.get(place.file, {})}

    def wanted(document: Document) -> bool:
        return body.filters is None or body.filters.takes(attributes(document))

    most = body.max_num_results or 10
    least = (body.ranking_options and body.ranking_options.score_threshold) or None
    best: dict[str, Hit] = {}
    with service.library.using(store.id) as rag:
        for query in queries:
            for hit in rag.search(query, most, where=wanted if body.filters else None):
                known = best.get(str(hit.document.id))
                if known is None or hit.score > known.score:
                    best[str(hit.document.id)] = hit
    hits = sorted(best.values(), key=lambda hit: -hit.score)[:most]
    data = [
        Found(
            file_id=place.file or str(hit.document.id),
            filename=place.name,
            score=hit.score,
            attributes=attributes(hit.document),
            content=[FoundText(text=hit.document.text)],
        )
        for hit in hits
        if least is None or hit.score >= least
        for place in [service.shelf.place(hit.document)]
    ]
    return SearchPage(search_query=queries, data=data)


def _found(call: Call, *, write: bool = False) -> Store:
    return call.service.library.find(call.path["store"], call.asker, write=write)


def _own(call: Call, what: str) -> Store:
    """A store that a client made and this key may change. Raises `Refused`."""
    store = _found(call, write=True)
    if call.service.library.is_given(store.id):
        raise Refused(
            400,
            f"the server was started with the collection {store.id!r}, which is not {what} here",
        )
    return store


def _store(service: Service, store: Store, asker: Asker) -> VectorStore:
    held = service.library.records.held(store=store.id)
    counts = {status: sum(h.status == status for h in held) for status in (PENDING, DONE, FAILED)}
    models = service.library.model_names(asker)
    with service.library.using(store.id) as rag:
        passages, size = len(rag), rag.store.bytes()
    return VectorStore(
        id=store.id,
        created_at=store.created,
        name=store.name,
        usage_bytes=size,
        file_counts=FileCounts(**counts, total=len(held)),
        status="in_progress" if counts[PENDING] else "completed",
        last_active_at=max([store.created, *(h.created for h in held)]),
        metadata=store.metadata,
        kvlink_model=next((name for name, s in models.items() if s.id == store.id), ""),
        kvlink_passages=passages,
    )


# Files in stores


def attach(call: Call) -> StoreFile:
    """Put a file into a store; it is indexed in its turn."""
    body: StoreFileRequest = call.body
    service, store = call.service, _found(call, write=True)
    file = service.shelf.file(body.file_id, call.asker)
    tokens = _passage_tokens(body.chunking_strategy)
    held = service.shelf.attach(store, file, body.attributes or {}, tokens)
    return _held(held, file.bytes)


def list_store_files(call: Call) -> Listed[StoreFile]:
    """The files of a store."""
    query: StoreFilesPage = call.query
    service, store = call.service, _found(call)
    found = service.library.records.held(store=store.id)
    if query.filter is not None:
        found = [held for held in found if held.status == query.filter]
    sizes = {file.id: file.bytes for file in service.library.records.files()}
    return _page(found, query, lambda h: h.file, lambda h: _held(h, sizes.get(h.file, 0)))


def get_store_file(call: Call) -> StoreFile:
    """What became of a file in a store."""
    service, store = call.service, _found(call)
    return _sized(service, service.shelf.in_store(store, call.path["file"]))


def change_store_file(call: Call) -> StoreFile:
    """Other attributes."""
    body: StoreFileChange = call.body
    service, store = call.service, _found(call, write=True)
    held = service.shelf.in_store(store, call.path["file"])
    service.library.records.change_held(store.id, held.file, body.attributes or {})
    return _sized(service, service.shelf.in_store(store, held.file))


def detach(call: Call) -> Deleted:
    """Take a file out of a store, with its passages; the original stays."""
    service, store = call.service, _found(call, write=True)
    held = service.shelf.in_store(store, call.path["file"])
    service.shelf.detach(store.id, held.file)
    return Deleted(id=held.file, object="vector_store.file.deleted")


def _passage_tokens(strategy: Chunking | None) -> int:
    return MAX_TOKENS if strategy is None else strategy.passage_tokens


def _sized(service: Service, held: Held) -> StoreFile:
    return _held(held, sum(file.bytes for file in service.library.records.files([held.file])))


def _held(held: Held, size: int) -> StoreFile:
    sizes = StaticSizes(max_chunk_size_tokens=held.passage_tokens)
    error = {"code": held.code, "message": held.error} if held.status == FAILED else None
    return StoreFile(
        id=held.file,
        created_at=held.created,
        usage_bytes=size,
        vector_store_id=held.store,
        status=held.status,
        last_error=LastError.model_validate(error) if error else None,
        attributes=held.attributes,
        chunking_strategy=StaticStrategy(static=sizes),
    )


def _page(
    rows: Sequence[Row], page: Page, id: Callable[[Row], str], shown: Callable[[Row], Thing]
) -> Listed[Thing]:
    """One page of `rows`, which stand in the order they were made."""
    ordered = list(rows) if page.order == "asc" else list(reversed(rows))
    ids = [id(row) for row in ordered]
    start = ids.index(page.after) + 1 if page.after in ids else 0
    stop = ids.index(page.before) if page.before in ids else len(ids)
    chosen = ordered[start:stop]
    if page.before in ids and page.after is None:
        chosen = chosen[-page.limit :]
    shown_rows = chosen[: page.limit]
    return Listed(
        data=[shown(row) for row in shown_rows],
        first_id=id(shown_rows[0]) if shown_rows else None,
        last_id=id(shown_rows[-1]) if shown_rows else None,
        has_more=len(shown_rows) < len(chosen),
    )
