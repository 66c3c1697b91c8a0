"""All endpoints: one table, from which the routes and the OpenAPI document are made."""

from __future__ import annotations

from starlette.responses import Response

from . import completions, embeddings, replies, requests, responses, stores
from .refusals import Refused, not_found
from .service import Call, Endpoint
from .tally import CONTENT_TYPE


def list_models(call: Call) -> replies.ModelList:
    """The reader, the embedder, and a model for each collection that the key may read."""
    service = call.service
    made = {name: s.created for name, s in service.library.model_names(call.asker).items()}
    own = {service.reader_name: service.started, service.embedder_name: service.started}
    cards = [replies.ModelCard(id=name, created=at) for name, at in {**made, **own}.items()]
    return replies.ModelList(data=cards)


def get_model(call: Call) -> replies.ModelCard:
    """One of them."""
    name = call.path["model"]
    for card in list_models(call).data:
        if card.id == name:
            return card
    raise not_found("model", name)


def health(call: Call) -> replies.State:
    """Whether the process answers at all."""
    return replies.State(status="ok")


def ready(call: Call) -> replies.State:
    """Whether new requests are taken."""
    if call.service.runner.stopping:
        raise Refused(503, "the server is stopping", code="stopping", retry_after=5)
    return replies.State(status="ok")


def metrics(call: Call) -> Response:
    """Counts for Prometheus, for keys that see every collection."""
    if not call.asker.sees_all:
        raise Refused(403, "metrics tell of every collection; expected a key with *")
    service = call.service
    service.tally.running.set(service.runner.running)
    service.tally.waiting.set(service.runner.queued)
    return Response(service.tally.text(), media_type=CONTENT_TYPE)


_STORE, _STORES = "/v1/vector_stores/{store}", "/v1/vector_stores"
_FILE = _STORE + "/files/{file}"

ENDPOINTS = (
    Endpoint("GET", "/health", health, "Liveness", replies.State, open=True),
    Endpoint("GET", "/ready", ready, "Readiness", replies.State, open=True),
    Endpoint("GET", "/metrics", metrics, "Prometheus metrics", None, media="text/plain"),
    Endpoint("GET", "/v1/models", list_models, "List models", replies.ModelList),
    Endpoint("GET", "/v1/models/{model:path}", get_model, "Get a model", replies.ModelCard),
    Endpoint(
        "POST",
        "/v1/chat/completions",
        completions.chat,
        "Answer a conversation",
        replies.ChatAnswer,
        requests.ChatRequest,
        sse=True,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        completions.complete,
        "Answer prompts",
        replies.CompletionAnswer,
        requests.CompletionRequest,
        sse=True,
    ),
    Endpoint(
        "POST",
        "/v1/responses",
        responses.create,
        "Create a response",
        replies.ResponseAnswer,
        requests.ResponseRequest,
        sse=True,
    ),
    Endpoint(
        "POST",
        "/v1/embeddings",
        embeddings.embeddings,
        "Embed texts",
        replies.Embeddings,
        requests.EmbeddingsRequest,
    ),
    Endpoint("POST", "/v1/files", stores.upload, "Upload a file", replies.FileObject, form=True),
    Endpoint(
        "GET",
        "/v1/files",
        stores.list_files,
        "List files",
        replies.Listed[replies.FileObject],
        query=requests.FilesPage,
    ),
    Endpoint("GET", "/v1/files/{file}", stores.get_file, "Get a file", replies.FileObject),
    Endpoint(
        "GET",
        "/v1/files/{file}/content",
        stores.file_content,
        "Get a file's bytes",
        None,
        media="application/octet-stream",
    ),
    Endpoint("DELETE", "/v1/files/{file}", stores.delete_file, "Erase a file", replies.Deleted),
    Endpoint(
        "POST",
        _STORES,
        stores.create_store,
        "Create a vector store",
        replies.VectorStore,
        requests.StoreRequest,
    ),
    Endpoint(
        "GET",
        _STORES,
        stores.list_stores,
        "List vector stores",
        replies.Listed[replies.VectorStore],
        query=requests.Page,
    ),
    Endpoint("GET", _STORE, stores.get_store, "Get a vector store", replies.VectorStore),
    Endpoint(
        "POST",
        _STORE,
        stores.change_store,
        "Rename a vector store",
        replies.VectorStore,
        requests.StoreChange,
    ),
    Endpoint("DELETE", _STORE, stores.delete_store, "Erase a vector store", replies.Deleted),
    Endpoint(
        "POST",
        _STORE + "/search",
        stores.search,
        "Search a vector store",
        replies.SearchPage,
        requests.SearchRequest,
    ),
    Endpoint(
        "POST",
        _STORE + "/files",
        stores.attach,
        "Put a file into a store",
        replies.StoreFile,
        requests.StoreFileRequest,
    ),
    Endpoint(
        "GET",
        _STORE + "/files",
        stores.list_store_files,
        "List a store's files",
        replies.Listed[replies.StoreFile],
        query=requests.StoreFilesPage,
    ),
    Endpoint("GET", _FILE, stores.get_store_file, "Get a store's file", replies.StoreFile),
    Endpoint(
        "POST",
        _FILE,
        stores.change_store_file,
        "Change a file's attributes",
        replies.StoreFile,
        requests.StoreFileChange,
    ),
    Endpoint("DELETE", _FILE, stores.detach, "Take a file out of a store", replies.Deleted),
)
