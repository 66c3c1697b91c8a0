"""The bodies and queries that clients send, as OpenAI's API has them, checked.

Fields that OpenAI has and this server does not serve are refused unless they ask for nothing; what
neither knows is passed over, since clients send much of their own. Lists are read to the first
thing that is wrong: to collect millions of complaints would keep the server busy. Knows shapes;
knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from kvlink_rag.arguments import MAX_SEED, MAX_TOKENS, Mode, parse_repair

_OF_CHAT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
_OF_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}

_OF_RESPONSES: dict[str, tuple[Any, ...]] = {
    **_OF_CHAT,
    "previous_response_id": ("",),
    "conversation": ("",),
    "prompt": ({},),
    "background": (False,),
    "reasoning": ({}, {"effort": "none"}),
    "truncation": ("disabled",),
}

Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Attribute = (
    Annotated[str, StringConstraints(max_length=512)]
    | bool
    | int
    | Annotated[float, Field(allow_inf_nan=False)]
)
MOST_ENTRIES = 16  # of metadata and attributes


def _few(value: Any) -> Any:
    """`value`, unless it is so large that to look at all of it would take seconds."""
    if isinstance(value, dict) and len(value) > MOST_ENTRIES:
        raise ValueError(f"found {len(value)} entries, expected at most {MOST_ENTRIES}")
    return value


Attributes = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Attribute],
    Field(max_length=MOST_ENTRIES),
    BeforeValidator(_few),
]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=MOST_ENTRIES),
    BeforeValidator(_few),
]


class Asked(BaseModel):
    """A body or query. unserved: fields that are refused, with values that ask for nothing."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="after")
    def _refuse_unserved(self) -> Asked:
        for name, value in (self.model_extra or {}).items():
            harmless = self.unserved.get(name)
            if isinstance(value, dict):  # a field of nothing asks for nothing
                value = {key: each for key, each in value.items() if each is not None}
            if harmless is not None and value is not None and value not in harmless:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return self


class StreamOptions(Asked):
    """What a stream brings besides the answer."""

    include_usage: bool | None = None


class Answering(Asked):
    """How an answer is made. Greedy unless a temperature is given."""

    said_in: ClassVar[str] = "messages"  # the field that a prompt is too long in
    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_SEED)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = Field(None, description="0: from all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    repair: str | None = Field(None, description="of reused passages: none, first:N, select:P%")
    k: Annotated[int, Field(ge=1, le=100)] | None = Field(None, description="passages to retrieve")
    mode: Mode | None = Field(None, description="reuse; or compute all: masked, full")
    rounds: Literal[1, 2] | None = Field(None, description="2: retrieve again with the first hits")

    @model_validator(mode="after")
    def _check(self) -> Answering:
        if self.repair is not None:
            parse_repair(self.repair)
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        return self

    def sampling(self, most: int, default: int) -> dict[str, Any]:
        """As `KVLinkModel.stream` takes it, with at most `most` tokens."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        named = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": stop,
            "seed": None if self.seed is None else self.seed % (MAX_SEED + 1),
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "repair": self.repair,
            "mode": self.mode,
        }
        tokens = min(most, self.asked_tokens() or default)
        return {"max_new_tokens": tokens, **{k: v for k, v in named.items() if v is not None}}

    def asked_tokens(self) -> int | None:
        """The most tokens that were asked for."""
        return self.max_tokens

    def asked_passages(self) -> int | None:
        """How many passages were asked for."""
        return self.k


class ContentPart(Asked):
    """A part of a message; text only."""

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _only_text(self) -> ContentPart:
        if self.type not in ("text", "input_text", "output_text") or self.text is None:
            raise ValueError(
                f"a content part of type {self.type[:40]!r}, expected text: this model "
                "reads no images, sounds or files"
            )
        return self


class ChatMessage(Asked):
    """One message of a conversation."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "function_call": (),
        "audio": (),
        "refusal": ("",),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(max_length=2048, fail_fast=True)] | None = (
        None
    )

    def plain(self) -> dict[str, str]:
        """As the library takes it; `developer` is the newer word for `system`."""
        parts = [part.text or "" for part in self.content] if isinstance(self.content, list) else []
        content = self.content if isinstance(self.content, str) else "".join(parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Answering):
    """Of /v1/chat/completions."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = _OF_CHAT
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def asked_tokens(self) -> int | None:
        """`max_completion_tokens` is the newer name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Answering):
    """Of /v1/completions. Each prompt is one user message, in the model's own template."""

    said_in = "prompt"
    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = _OF_COMPLETIONS
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=16, fail_fast=True)]


class FileSearch(Asked):
    """The tool of OpenAI's that answers from a vector store; the answer is always from it."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "filters": (),
        "ranking_options": ({}, {"ranker": "auto"}),
    }
    type: Literal["file_search"]
    vector_store_ids: Annotated[list[Name], Field(min_length=1, max_length=1)]
    max_num_results: Annotated[int, Field(ge=1, le=50)] | None = None


class InputMessage(ChatMessage):
    """A message of a response's input."""

    type: Literal["message"] | None = None


class EarlierSearch(Asked):
    """What an earlier response says it did, which clients send back; passed over."""

    type: Literal["file_search_call"]


def _kind(item: Any) -> str:
    """What an item of a response's input is; a message need not say so."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[EarlierSearch, Tag("file_search_call")],
    Discriminator(
        _kind,
        custom_error_type="item_kind",
        custom_error_message="found another item, expected a message or a file_search_call",
    ),
]


class TextFormat(Asked):
    """Plain text only."""

    type: Literal["text"]


class TextOptions(Asked):
    """How the text is to be."""

    format: TextFormat | None = None


class SearchChoice(Asked):
    """That the tool is to be used, as it always is."""

    type: Literal["file_search"]


Included = Literal[
    "file_search_call.results",
    # of what this server never does, so that nothing is missing without it
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
]


class ResponseRequest(Answering):
    """Of /v1/responses. Nothing of it is kept: a conversation is sent whole each time."""

    said_in = "input"
    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = _OF_RESPONSES
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=2048, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[FileSearch], Field(max_length=1)] | None = None
    tool_choice: Literal["auto", "none", "required"] | SearchChoice | None = None
    text: TextOptions | None = None
    include: Annotated[list[Included], Field(max_length=16, fail_fast=True)] | None = None
    metadata: Metadata | None = None

    def asked_tokens(self) -> int | None:
        """See `Answering`."""
        return self.max_output_tokens or self.max_tokens

    def asked_passages(self) -> int | None:
        """See `Answering`; the tool's word for it is `max_num_results`."""
        return self.k or (self.tools[0].max_num_results if self.tools else None)

    def searched(self) -> str | None:
        """The vector store to answer from, where a tool names one that is to be used."""
        if not self.tools or self.tool_choice == "none":
            return None
        return self.tools[0].vector_store_ids[0]

    def messages(self) -> list[dict[str, str]]:
        """The instructions, then the conversation, as the library takes them."""
        before = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*before, {"role": "user", "content": self.input}]
        said = [item.plain() for item in self.input if isinstance(item, InputMessage)]
        return [*before, *said]


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class EmbeddingsRequest(Asked):
    """Of /v1/embeddings. Token ids are those of the encoding cl100k_base, which clients send."""

    model: Name
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    input_type: Literal["passage", "query"] | None = Field(
        None, description="what the texts are to the embedder; passages unless said"
    )


class StaticChunking(Asked):
    """Passages of at most so many tokens; they do not overlap."""

    max_chunk_size_tokens: Annotated[int, Field(ge=32, le=4096)]
    chunk_overlap_tokens: Annotated[int, Field(ge=0, le=0)] = Field(
        description="0: a passage that overlapped others would be encoded twice"
    )


class Chunking(Asked):
    """How files are split."""

    type: Literal["auto", "static"]
    static: StaticChunking | None = None

    @model_validator(mode="after")
    def _whole(self) -> Chunking:
        if self.type == "static" and self.static is None:
            raise ValueError(
                "static is missing, expected max_chunk_size_tokens and chunk_overlap_tokens in it"
            )
        return self

    @property
    def passage_tokens(self) -> int:
        """Tokens of a passage."""
        return self.static.max_chunk_size_tokens if self.static else MAX_TOKENS


class StoreRequest(Asked):
    """Of /v1/vector_stores."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {"expires_after": ()}
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    metadata: Metadata | None = None
    file_ids: Annotated[list[Name], Field(max_length=500, fail_fast=True)] | None = None
    chunking_strategy: Chunking | None = None


class StoreChange(Asked):
    """Of /v1/vector_stores/{id}: what is to be another."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {"expires_after": ()}
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    metadata: Metadata | None = None


class StoreFileRequest(Asked):
    """Of /v1/vector_stores/{id}/files."""

    file_id: Name
    attributes: Attributes | None = None
    chunking_strategy: Chunking | None = None


class StoreFileChange(Asked):
    """Of /v1/vector_stores/{id}/files/{file_id}."""

    attributes: Attributes | None


class Filter(Asked):
    """One comparison with an attribute, or several joined by `and` or `or`."""

    type: Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "and", "or"]
    key: str | None = None
    value: Attribute | Annotated[list[Attribute], Field(max_length=2048, fail_fast=True)] | None = (
        None
    )
    filters: Annotated[list[Filter], Field(min_length=1, max_length=32, fail_fast=True)] | None = (
        None
    )

    @model_validator(mode="after")
    def _whole(self) -> Filter:
        joins = self.type in ("and", "or")
        if joins and self.filters is None:
            raise ValueError("filters is missing")
        if not joins and (self.key is None or self.value is None):
            raise ValueError("key or value is missing")
        if not joins and isinstance(self.value, list) != (self.type in ("in", "nin")):
            raise ValueError("a list is compared by in and nin, anything else by the others")
        return self

    def takes(self, attributes: Mapping[str, Any]) -> bool:
        """Whether a file or passage with these attributes is meant; kinds that differ are not."""
        if self.type in ("and", "or"):
            each = (one.takes(attributes) for one in self.filters or ())
            return all(each) if self.type == "and" else any(each)
        found = attributes.get(self.key or "")
        if self.type in ("eq", "ne"):
            return (found == self.value) == (self.type == "eq")
        if isinstance(self.value, list):
            return (found in self.value) == (self.type == "in")
        value: Any = self.value
        if found is None or isinstance(found, str) != isinstance(value, str):
            return False
        results = {"gt": found > value, "gte": found >= value, "lt": found < value}
        return bool(results.get(self.type, found <= value))


class Ranking(Asked):
    """Which hits count."""

    score_threshold: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None


class SearchRequest(Asked):
    """Of /v1/vector_stores/{id}/search."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rewrite_query": (False,)}
    query: Text | Annotated[list[Text], Field(min_length=1, max_length=16, fail_fast=True)]
    max_num_results: Annotated[int, Field(ge=1, le=50)] | None = None
    filters: Filter | None = None
    ranking_options: Ranking | None = None


class Page(BaseModel):
    """The query of a list: how many, from where, in which order of creation."""

    model_config = ConfigDict(extra="ignore")
    limit: Annotated[int, Field(ge=1, le=10000)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    before: str | None = None


class FilesPage(Page):
    """Of /v1/files."""

    limit: Annotated[int, Field(ge=1, le=10000)] = 10000
    purpose: str | None = None


class StoreFilesPage(Page):
    """Of /v1/vector_stores/{id}/files."""

    filter: Literal["in_progress", "completed", "failed", "cancelled"] | None = None
