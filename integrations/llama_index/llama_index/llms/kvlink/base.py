"""`KVLink`: the LLM of an unchanged LlamaIndex application.

    prompt or messages → kvlink_rag (recognition, snapshots, generation) → responses

One generator, `_responses`, is the way of every call; the eight methods of an LLM are thin round
it. Asynchronous ones run each of its steps in a worker thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt as own_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import Field, field_validator
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.llms.kvlink.collection import Collection, CollectionFields
from llama_index.llms.kvlink.errors import KVLinkCallError, NotSupported
from llama_index.llms.kvlink.threads import closed_at_exit, in_thread

from kvlink_rag.arguments import check_question
from kvlink_rag.documents import Document, Part, Passage, Text
from kvlink_rag.errors import ConfigError, DocumentError, KVLinkError, PromptTooLong

if TYPE_CHECKING:
    from typing_extensions import Never

    from kvlink_rag import AnswerStream, TextStream, Trace

    Stream: TypeAlias = AnswerStream | TextStream

_ROLES = {"developer": "system", "model": "assistant", "chatbot": "assistant"}
_SAMPLING = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("stop", "seed", "repair"),
)
_SILENT = ("ThinkingBlock", "CachePoint")  # what a model thought, which is not repeated, and marks
_TOOLS = ("tools", "tool_choice", "tool_required", "functions", "response_format")
_PACKED = (
    "Where LlamaIndex packed this prompt, it counted as GPT-3.5 does; Settings.tokenizer = "
    "llm.tokenizer, set before the engine is made, lets it count as this model does"
)
_NO_TOOLS = (
    "a KVLink model answers from passages: it calls no functions, and nothing binds its tokens to "
    "a schema. Let an engine retrieve for it; for an agent take another LLM, with a "
    "QueryEngineTool over this one's engine; structured_predict asks for JSON in the prompt"
)


class KVLink(CollectionFields, CustomLLM):
    """A local LLM that reuses the keys and values of every passage its collection knows.

    Wherever a prompt holds, verbatim, the text of a registered node, that stretch is not computed
    but taken from disk; so any query engine or chat engine profits unchanged. Nodes become known
    by `KVLinkRegister` or `KVLinkRetriever`. Weights are loaded at the first call; calls from any
    number of threads are safe.

    Args:
        model: name, directory or `kvlink_rag.KVLinkModel`; None: what the directory remembers,
            else the reader of the pair small.
        embedder: name, directory, or embedding object of kvlink_rag, LlamaIndex or LangChain;
            None likewise. The LLM itself never embeds.
        directory: where the collection is kept; None: the one of the `kvlink-rag` command line.
            Classes that name the same directory share one collection.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        codec: how snapshots are kept, "exact", "bf16", "int8", "int4" or "fp8"; None: as the
            directory remembers, else "bf16" on a CPU, "exact" on a GPU.
        remote: a tier of snapshots that machines share, such as "redis://…"; it may hold a
            password, so `to_dict` leaves it out. None: what KVLINK_REMOTE says, "" for none.
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, seed, repair:
            how answers are generated; each may also be given to a call (`max_tokens` means
            `max_new_tokens`). temperature 0 is greedy. repair: what is computed again of reused
            passages, "first:16" or "select:15%"; None: the collection's.
        messages_to_prompt: makes one prompt, which is one user message, of a conversation; left
            out, conversations go through the tokenizer's chat template.
        rag: an open `kvlink_rag.KVLinkRAG` instead of the first five and `remote`.

    Nothing of the process is changed. LlamaIndex counts tokens as GPT-3.5 does, so that prompts
    that it packs may not fit the window: `Settings.tokenizer = llm.tokenizer` lets it count as this
    model does.

    Recognised passages beyond the model's slots are computed as text: a warning says how many, and
    the trace counts them in `passages_as_text`. Passages that are handed over (`documents`,
    `KVLinkSynthesizer`) beyond them are an error.

    Examples:
        ```python
        from llama_index.llms.kvlink import KVLink, KVLinkRegister

        index = VectorStoreIndex.from_documents(
            documents, transformations=[SentenceSplitter(), KVLinkRegister()]
        )
        response = index.as_query_engine(llm=KVLink()).query("When was the harbour built?")
        ```

    """

    max_new_tokens: int = Field(default=256, gt=0, description="The most tokens of an answer.")
    temperature: float = Field(default=0.0, ge=0.0, description="0 is greedy.")
    top_k: int = Field(default=0, ge=0, description="So many of the likeliest tokens; 0: all.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Nucleus sampling.")
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Least share of the likeliest one's probability."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, allow_inf_nan=False, description="Above 1, repeats are less likely."
    )
    stop: list[str] = Field(default_factory=list, description="Strings that end an answer.")
    seed: int | None = Field(default=None, description="Seed for sampling.")
    repair: str | None = Field(
        default=None, description="Passages' tokens computed again, as first:16; None: as opened."
    )

    def __init__(self, **words: Any) -> None:
        super().__init__(**words)

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Sequence[str] | str) -> list[str]:
        return _strings(stop)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "KVLink"

    @property
    def tokenizer(self) -> Callable[[str], list[int]]:
        """Text to token ids as the model reads it, for `Settings.tokenizer` and splitters."""
        return TokenIds(self._collection)

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex's prompt helpers go by; read without loading weights.

        context_window: the model's, less what this integration itself may add to a prompt: the
        chat template round one message and the link tokens after passages.
        """
        outline = self._collection.outline()
        preset = outline.spec.prompt_preset
        around = outline.tokenizer.encode(preset.before + preset.after, special=True)
        added = len(around) + outline.link_tokens
        return LLMMetadata(
            context_window=outline.window - min(added, outline.window // 4),
            num_output=self.max_new_tokens,
            is_chat_model=outline.has_chat_template,
            model_name=outline.name,
        )

    def to_payload(self) -> dict[str, Any]:
        """What events say of this LLM; read without opening anything."""
        return {"class_name": self.class_name(), "model_name": self.model or "", **self._sampling}

    # Complete

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The answer to a prompt, which is one user message.

        documents: in `kwargs`, passages (`kvlink_rag.Document`) that precede the prompt. Raises
        `KVLinkCallError` for more of them than the model has link tokens for, and for an empty
        prompt.
        """
        return _last(self._completions(prompt, formatted, kwargs))

    @closed_at_exit
    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """As `complete`, as it comes; the last response has an empty delta and the trace."""
        return self._completions(prompt, formatted, kwargs)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """As `complete`; a cancelled call stops after the token it is at."""
        return await _alast(in_thread(self._completions(prompt, formatted, kwargs)))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """As `stream_complete`."""
        return in_thread(self._completions(prompt, formatted, kwargs))

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The answer to a conversation, which goes through the tokenizer's chat template."""
        return _last(self._replies(messages, kwargs))

    @closed_at_exit
    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """As `chat`, as it comes; the last response has an empty delta and the trace."""
        return self._replies(messages, kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As `chat`; a cancelled call stops after the token it is at."""
        return await _alast(in_thread(self._replies(messages, kwargs)))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """As `stream_chat`."""
        return in_thread(self._replies(messages, kwargs))

    def _refuse(self, *arguments: Any, **named: Any) -> Never:
        """Raises `NotSupported`, which says what to use instead."""
        raise NotSupported(_NO_TOOLS)

    chat_with_tools = achat_with_tools = _refuse
    stream_chat_with_tools = astream_chat_with_tools = _refuse
    get_tool_calls_from_response = _refuse

    # One way for all of them

    @property
    def _sampling(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SAMPLING}

    def _completions(
        self, prompt: str, formatted: bool, arguments: dict[str, Any]
    ) -> Generator[CompletionResponse, None, None]:
        if not isinstance(prompt, str):
            raise KVLinkCallError(f"the prompt is a {type(prompt).__name__}, expected a string")
        documents = arguments.get("documents")
        sampling = {name: value for name, value in arguments.items() if name != "documents"}
        if not formatted and self.completion_to_prompt is not None:
            prompt = self.completion_to_prompt(prompt)
        if documents is None:
            return self._responses(lambda **given: self.rag.complete(prompt, **given), sampling)
        with _unswallowed():
            check_question(prompt)
            _check_documents(documents)
        return self._responses(partial(self._over, documents, prompt), sampling)

    def _replies(
        self, messages: Sequence[ChatMessage], sampling: dict[str, Any]
    ) -> Generator[ChatResponse, None, None]:
        def start(**given: Any) -> Stream:
            render = self.messages_to_prompt
            if render is not None and render is not own_messages_to_prompt:
                return self.rag.complete(render(messages), **given)
            return self.rag.complete([_message(message) for message in messages], **given)

        for response in self._responses(start, sampling):
            yield ChatResponse(
                message=ChatMessage(role=MessageRole.ASSISTANT, content=response.text),
                delta=response.delta,
                raw=response.raw,
                additional_kwargs=response.additional_kwargs,
            )

    def _responses(
        self, start: Callable[..., Stream], sampling: dict[str, Any]
    ) -> Generator[CompletionResponse, None, None]:
        """Text so far and what is new, one response a piece; then the trace. Lazy from the start.

        Raises `KVLinkCallError` where kvlink_rag raises an error that LlamaIndex would swallow.
        """
        with _unswallowed():
            stream = start(**self._merged(sampling))
            try:
                for piece in stream:
                    yield CompletionResponse(text=stream.text, delta=piece)
            finally:
                stream.close()
            yield CompletionResponse(
                text=stream.text,
                delta="",
                raw=self._raw(stream.trace),
                additional_kwargs=_usage(stream.trace),
            )

    def _over(self, documents: Sequence[Document], question: str, **sampling: Any) -> TextStream:
        """The answer to `question` after `documents`."""
        model = self.rag.model
        if self.system_prompt:
            user: list[Part] = [*(Passage(document) for document in documents), Text(question)]
            system = {"role": "system", "content": self.system_prompt}
            parts = model.chat([system, {"role": "user", "content": user}])
        else:
            parts = model.prompt(documents, question)
        return model.stream(parts, reuse=self.rag.reuse, **sampling)

    def _merged(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """This LLM's sampling with that of one call. Raises `KVLinkCallError` for other words."""
        if tools := [name for name in _TOOLS if arguments.get(name)]:
            raise NotSupported(f"found {tools[0]}=, but {_NO_TOOLS}")
        words = {"max_tokens": "max_new_tokens"}
        given = {words.get(k, k): v for k, v in arguments.items() if k not in _TOOLS}
        given = {name: value for name, value in given.items() if value is not None}
        if unknown := sorted(set(given) - set(_SAMPLING)):
            raise KVLinkCallError(
                f"found the argument {unknown[0]!r}, expected one of {', '.join(_SAMPLING)}"
            )
        if "stop" in given:
            given["stop"] = _strings(given["stop"])
        return {**self._sampling, **given}

    def _raw(self, trace: Trace) -> dict[str, Any]:
        return {
            "model": self.rag.model.name,
            "finish_reason": trace.finish_reason,
            "usage": _usage(trace),
            "trace": trace.to_dict(),
        }


class TokenIds:
    """Text to token ids as the model reads it. Holds the collection only until the first call."""

    def __init__(self, collection: Collection) -> None:
        self._find: Callable[[], Callable[[str], list[int]]] = lambda: (
            collection.outline().tokenizer.encode
        )

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text` alone, special-token strings spelled out."""
        encode = self._find()
        self._find = lambda: encode
        return encode(text)


@contextmanager
def _unswallowed() -> Iterator[None]:
    """Our errors as `KVLinkCallError` where LlamaIndex would take them for bad model output."""
    try:
        yield
    except KVLinkError as error:
        if isinstance(error, PromptTooLong):
            raise KVLinkCallError(f"{error}. {_PACKED}") from error
        if isinstance(error, ValueError | TypeError):
            raise KVLinkCallError(str(error)) from error
        raise


def _check_documents(documents: Sequence[Document]) -> None:
    """Raise `DocumentError` for what is no list of documents with text."""
    if isinstance(documents, str | Document) or not isinstance(documents, Sequence):
        raise DocumentError(
            f"documents is a {type(documents).__name__}, expected a list of kvlink_rag.Document"
        )
    for number, document in enumerate(documents, 1):
        place = f"document {number} of {len(documents)}"
        if not isinstance(document, Document):
            raise DocumentError(
                f"{place} is a {type(document).__name__}, expected a kvlink_rag.Document"
            )
        if not document.text.strip():
            raise DocumentError(
                f"{place} (id {document.id!r}, title {document.title!r}) has no text; leave it out"
            )


def _message(message: ChatMessage) -> dict[str, str]:
    """A message as kvlink_rag takes it. Raises `KVLinkCallError` for images and the like."""
    for block in message.blocks:
        if not isinstance(block, TextBlock) and type(block).__name__ not in _SILENT:
            raise KVLinkCallError(
                f"found a {type(block).__name__} in a message, expected text: this model reads text"
            )
    role = str(getattr(message.role, "value", message.role))
    if role in ("tool", "function"):
        raise NotSupported(f"found a message of the role {role!r}, but {_NO_TOOLS}")
    return {"role": _ROLES.get(role, role), "content": message.content or ""}


def _usage(trace: Trace) -> dict[str, int]:
    """Token counts under the names that LlamaIndex's counters read; cached: reused or kept."""
    cached = trace.reused_tokens + trace.prefix_tokens
    prompt = cached + trace.computed_tokens
    return {
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "completion_tokens": trace.generated_tokens,
        "total_tokens": prompt + trace.generated_tokens,
    }


def _strings(stop: Sequence[str] | str | None) -> list[str]:
    """A list of strings. Raises `ConfigError` (a `ValueError`) for what is none."""
    if isinstance(stop, str):
        return [stop]
    if not isinstance(stop, Iterable | None):
        raise ConfigError(f"stop is {stop!r}, expected a list of strings")
    return list(stop or ())


Response = TypeVar("Response", CompletionResponse, ChatResponse)


def _last(responses: Iterable[Response]) -> Response:
    """The whole answer: the last response of a stream, without a delta."""
    return _whole(deque(responses, maxlen=1).pop())


async def _alast(responses: AsyncGenerator[Response, None]) -> Response:
    last = None
    async with aclosing(responses):
        async for response in responses:
            last = response
    if last is None:
        raise RuntimeError("a stream of responses was empty")
    return _whole(last)


def _whole(response: Response) -> Response:
    response.delta = None
    return response
