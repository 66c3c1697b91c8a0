"""`KVLinkDocumentsChain`: documents go to the model as passages, with no prompt in between.

{"input", "context"} → one message of passages and the question → `ChatKVLink` → text

Knows inputs of chains; knows no model.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableSerializable,
)
from pydantic import ConfigDict, Field

from kvlink_rag.errors import DocumentError, PromptError
from langchain_kvlink.chat_models import ChatKVLink
from langchain_kvlink.documents import checked_documents, document_block

if TYPE_CHECKING:
    from kvlink_rag import KVLinkRAG


class KVLinkDocumentsChain(RunnableSerializable[dict[str, Any], str]):
    """Answers `input` from the documents in `context`, in their order; streams as it generates.

        chain = create_retrieval_chain(retriever, KVLinkDocumentsChain())
        for chunk in chain.stream({"input": "When was the harbour built?"}): ...

    Takes the place of `create_stuff_documents_chain`. The prompt is the model's own one-question
    prompt. With a `system` prompt, or a conversation under "chat_history" in the input, it is the
    tokenizer's chat template instead. Documents need not be registered: those that the collection
    does not know are encoded when they first come and kept.

    llm: a `ChatKVLink`, by default one with the reader of the pair small. Raises `PromptError` for
    an input that lacks one of both, for an empty question and for a document without text, and of
    its kind `TooManyPassages` for more documents than the model has link tokens for.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    llm: ChatKVLink = Field(default_factory=ChatKVLink)
    system: str | None = None
    input_key: str = "input"
    documents_key: str = "context"
    history_key: str = "chat_history"

    @property
    def collection(self) -> KVLinkRAG:
        """The model's collection, opened at the first call."""
        return self.llm.collection

    def invoke(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> str:
        """The whole answer. Other arguments are those of a call of the model."""
        return self._chain(kwargs).invoke(input, config)

    async def ainvoke(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> str:
        """`invoke` with the event loop left free."""
        return await self._chain(kwargs).ainvoke(input, config)

    def stream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[str]:
        """The answer in pieces, each as soon as it is generated."""
        yield from self._chain(kwargs).stream(input, config)

    async def astream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[str]:
        """`stream` with the event loop left free."""
        async for piece in self._chain(kwargs).astream(input, config):
            yield piece

    def messages(self, input: Mapping[str, Any]) -> list[BaseMessage]:
        """What the model is asked: history, then the passages and the question."""
        question, documents = self._checked(input)
        blocks: list[str | dict[str, Any]] = [document_block(d) for d in documents]
        blocks.append({"type": "text", "text": question})
        first: list[BaseMessage] = [SystemMessage(self.system)] if self.system else []
        return [*first, *(input.get(self.history_key) or ()), HumanMessage(content=blocks)]

    def _chain(self, arguments: dict[str, Any]) -> Runnable[dict[str, Any], str]:
        def ask(input: dict[str, Any]) -> Runnable[Any, Any]:
            messages = self.messages(input)
            alone = len(messages) == 1
            model = self.llm.bind(use_preset=alone, **arguments)
            return RunnableLambda(lambda _: messages) | model

        return RunnableLambda(ask).with_config(run_name="ask_kvlink") | StrOutputParser()

    def _checked(self, input: Mapping[str, Any]) -> tuple[str, Sequence[Document]]:
        if not isinstance(input, Mapping) or not {self.input_key, self.documents_key} <= set(input):
            found = sorted(input) if isinstance(input, Mapping) else type(input).__name__
            raise PromptError(
                f"found {found}, expected a mapping with {self.input_key!r} (a question) and "
                f"{self.documents_key!r} (documents)"
            )
        question, documents = input[self.input_key], input[self.documents_key]
        if not isinstance(question, str) or not question.strip():
            raise PromptError(f"{self.input_key!r} is {question!r}, expected a question")
        try:
            return question, checked_documents(documents)
        except DocumentError as error:
            raise PromptError(f"in {self.documents_key!r}: {error}") from error
