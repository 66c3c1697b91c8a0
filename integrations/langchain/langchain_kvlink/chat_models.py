"""`ChatKVLink`: the chat model of an unchanged LangChain application.

messages → parts (`messages`) → kvlink_rag (recognition, snapshots, generation) → chunks

One generator, `_stream`, is the way of every call. Knows LangChain's chunks and results.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict

from kvlink_rag.arguments import check_question
from kvlink_rag.documents import Passage, Text
from langchain_kvlink.errors import NotSupported
from langchain_kvlink.generation import (
    NO_STRUCTURE,
    NO_TOOLS,
    GenerationFields,
    closed_at_exit,
    in_executor,
    response_metadata,
    usage,
)
from langchain_kvlink.messages import to_conversation

if TYPE_CHECKING:
    from langchain_kvlink.generation import Stream


class _Refused:
    """A method of LangChain's chat models that an object of ours refuses, saying what to use.

    On the class it stays LangChain's own: that is how LangChain asks whether models of a class call
    tools or take a schema (`bind_tools is BaseChatModel.bind_tools`).
    """

    def __init__(self, theirs: Callable[..., Any], why: str) -> None:
        self._theirs, self._why = theirs, why

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        if instance is None:
            return self._theirs

        def refuse(*arguments: Any, **named: Any) -> Any:
            raise NotSupported(f"{owner.__name__} {self._why}")

        return refuse


class ChatKVLink(GenerationFields, BaseChatModel):
    """A local chat model that reuses the keys and values of every passage its collection knows.

    Wherever a message holds, verbatim, the text of a document of the collection, that stretch is
    not computed but taken from disk, so an unchanged chain profits. Documents become known by
    `KVLinkVectorStore`, or by `register_documents` where the application keeps its own store.

        llm = ChatKVLink(directory="my-collection")
        chain = create_stuff_documents_chain(llm, prompt)

    model, embedder, directory, device, codec, remote: as everywhere in this package; None is the
    pair small and the directory of the `kvlink-rag` command line. rag: an open
    `kvlink_rag.KVLinkRAG` instead.
    temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, seed, stop: fields, and
    arguments of a call (`bind`).

    Messages go through the tokenizer's chat template. A content block of type "text-plain" is a
    passage (`document_block`). Answers carry `usage_metadata`, whose `cache_read` counts the input
    tokens that were not computed, and in `response_metadata` the model's name and the trace.
    Weights are loaded at the first call; calls from any number of threads are safe, and the async
    methods leave the event loop free.

    Raises `kvlink_rag.errors.PromptError` (a `ValueError`) for an empty prompt, one beyond the
    model's window, a last message of the user's that is empty, or more passages in blocks than
    the model has link tokens for, and `NotSupported` (a `NotImplementedError`) for tools and
    schemas. Passages beyond these that were recognised are computed as text:
    a warning says how many, and the trace counts them in `passages_as_text`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    bind_tools: ClassVar[Any] = _Refused(BaseChatModel.bind_tools, NO_TOOLS)
    with_structured_output: ClassVar[Any] = _Refused(
        BaseChatModel.with_structured_output, NO_STRUCTURE
    )

    @property
    def _llm_type(self) -> str:
        return "kvlink-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self.facts()

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "kvlink"
        params.setdefault("ls_model_name", self.model_label)
        if ends := stop or self.stop:
            params["ls_stop"] = ends
        return params

    @closed_at_exit
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Generator[ChatGenerationChunk, None, None]:
        stream = self._begin(messages, stop, kwargs)
        try:
            for piece in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        finally:
            stream.close()
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content="",
                usage_metadata=usage(stream.trace),
                response_metadata=response_metadata(self.collection, stream),
                chunk_position="last",
            )
        )

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(in_executor(self._stream(messages, stop, **kwargs))) as chunks:
            async for chunk in chunks:
                if run_manager and chunk.text:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(list(self._stream(messages, stop, run_manager, **kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        chunks = self._astream(messages, stop, run_manager, **kwargs)
        return _result([chunk async for chunk in chunks])

    def _begin(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, call: dict[str, Any]
    ) -> Stream:
        """The engine's stream. `use_preset` in a call: passages and one question, no template."""
        use_preset = call.pop("use_preset", False)
        sampling = self.sampling(stop, call)
        conversation = to_conversation(messages)
        rag = self.collection
        if not use_preset:
            return rag.complete(conversation, **sampling)
        parts = [part for message in conversation for part in message["content"]]
        documents = [part.document for part in parts if isinstance(part, Passage)]
        question = "".join(part.text for part in parts if isinstance(part, Text))
        check_question(question)
        return rag.model.stream(rag.model.prompt(documents, question), reuse=rag.reuse, **sampling)

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` alone, by this model's tokenizer; loads no weights."""
        return self.collection.outline().tokenizer.encode(text)

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | Any] | None = None,
    ) -> int:
        """Tokens of the prompt that `messages` make, passages and templates included."""
        if tools:
            raise NotSupported(f"found tools, but {type(self).__name__} {NO_TOOLS}")
        rag = self.collection
        return len(rag.model.layout(rag.recognise_chat(to_conversation(messages))))


def _result(chunks: Sequence[ChatGenerationChunk]) -> ChatResult:
    """The whole answer: the pieces' text, and what the last chunk says about it."""
    last = chunks[-1].message
    message = AIMessage(
        content="".join(chunk.text for chunk in chunks),
        usage_metadata=getattr(last, "usage_metadata", None),
        response_metadata=last.response_metadata,
    )
    return ChatResult(generations=[ChatGeneration(message=message)])
