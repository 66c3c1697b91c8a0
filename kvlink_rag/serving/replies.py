"""The bodies that are sent, as OpenAI's API has them; `kvlink` is this server's own field.

Knows shapes; knows no model.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

Thing = TypeVar("Thing")


class ModelCard(BaseModel):
    """A name that requests may give as their model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvlink"


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class PromptDetails(BaseModel):
    """cached_tokens: taken from snapshots and kept runs, not computed for this request."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Source(BaseModel):
    """A passage that an answer was read from. file_id: "" for a passage of no uploaded file."""

    id: str
    title: str
    text: str
    score: float
    file_id: str
    filename: str
    metadata: dict[str, Any]


class Extension(BaseModel):
    """What OpenAI has no field for: the sources, best first, and what the answer cost."""

    sources: list[Source]
    trace: dict[str, float | int | str]


class UrlCitation(BaseModel):
    """Which part of an answer a source stands behind; characters of the text."""

    start_index: int
    end_index: int
    title: str
    url: str


class Annotation(BaseModel):
    """A citation."""

    type: Literal["url_citation"] = "url_citation"
    url_citation: UrlCitation


class AnswerMessage(BaseModel):
    """What the assistant said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[Annotation]


class ChatChoice(BaseModel):
    """The answer."""

    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """Of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    kvlink: Extension


class CompletionChoice(BaseModel):
    """The answer to one prompt."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]
    kvlink: Extension


class CompletionAnswer(BaseModel):
    """Of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ResponseCitation(UrlCitation):
    """A citation, as /v1/responses writes one."""

    type: Literal["url_citation"] = "url_citation"


class FileCitation(BaseModel):
    """An uploaded file behind an answer, cited after character `index` of its text."""

    type: Literal["file_citation"] = "file_citation"
    index: int
    file_id: str
    filename: str


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[ResponseCitation | FileCitation]
    logprobs: list[None] = []


class OutputMessage(BaseModel):
    """What the assistant said."""

    id: str
    type: Literal["message"] = "message"
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class SearchResult(BaseModel):
    """A passage that the answer was read from."""

    file_id: str
    filename: str
    score: float
    text: str
    attributes: dict[str, Any]


class SearchCall(BaseModel):
    """That a vector store was searched. results: where they were asked for (`include`)."""

    id: str
    type: Literal["file_search_call"] = "file_search_call"
    status: Literal["completed"] = "completed"
    queries: list[str]
    results: list[SearchResult] | None = None


class InputDetails(PromptDetails):
    """cache_write_tokens: none, since nothing of a prompt is kept for its own sake."""

    cache_write_tokens: Literal[0] = 0


class OutputDetails(BaseModel):
    """This server's models do not reason before they answer."""

    reasoning_tokens: Literal[0] = 0


class ResponseUsage(BaseModel):
    """Tokens of a request, in the words of /v1/responses."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(BaseModel):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseAnswer(BaseModel):
    """Of /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[SearchCall | OutputMessage]
    parallel_tool_calls: Literal[False] = False
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    kvlink: Extension | None = None


class Embedding(BaseModel):
    """A vector, or its float32 numbers, little-endian, in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Of /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Listed(BaseModel, Generic[Thing]):
    """One page of a list."""

    object: Literal["list"] = "list"
    data: list[Thing]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """What is gone."""

    id: str
    object: str
    deleted: Literal[True] = True


class FileObject(BaseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileCounts(BaseModel):
    """Files of a store by what became of them."""

    in_progress: int
    completed: int
    failed: int
    cancelled: int = 0
    total: int


class VectorStore(BaseModel):
    """A collection. usage_bytes: of its snapshots. kvlink_model: the model that answers from it."""

    id: str
    object: Literal["vector_store"] = "vector_store"
    created_at: int
    name: str
    usage_bytes: int
    file_counts: FileCounts
    status: Literal["in_progress", "completed"]
    expires_after: None = None
    expires_at: None = None
    last_active_at: int
    metadata: dict[str, str]
    kvlink_model: str
    kvlink_passages: int


class LastError(BaseModel):
    """Why a file is not indexed."""

    code: Literal["server_error", "unsupported_file", "invalid_file"]
    message: str


class StaticSizes(BaseModel):
    """Tokens of a passage."""

    max_chunk_size_tokens: int
    chunk_overlap_tokens: Literal[0] = 0


class StaticStrategy(BaseModel):
    """How a file is split."""

    type: Literal["static"] = "static"
    static: StaticSizes


class StoreFile(BaseModel):
    """A file in a store."""

    id: str
    object: Literal["vector_store.file"] = "vector_store.file"
    created_at: int
    usage_bytes: int
    vector_store_id: str
    status: Literal["in_progress", "completed", "failed"]
    last_error: LastError | None
    attributes: dict[str, Any]
    chunking_strategy: StaticStrategy


class FoundText(BaseModel):
    """A passage's text."""

    type: Literal["text"] = "text"
    text: str


class Found(BaseModel):
    """A passage that a search found. score: inner product; larger is nearer."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, Any]
    content: list[FoundText]


class SearchPage(BaseModel):
    """Of /v1/vector_stores/{id}/search."""

    object: Literal["vector_store.search_results.page"] = "vector_store.search_results.page"
    search_query: list[str]
    data: list[Found]
    has_more: Literal[False] = False
    next_page: None = None


class State(BaseModel):
    """Of /health and /ready."""

    status: Literal["ok", "stopping"]
