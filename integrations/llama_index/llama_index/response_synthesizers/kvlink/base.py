"""`KVLinkSynthesizer`: retrieved nodes become passages, without a detour through one string.

`synthesize` is the last place that sees nodes; LlamaIndex itself goes on with texts.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import BaseNode, NodeWithScore, QueryType
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index.llms.kvlink import KVLink
from llama_index.llms.kvlink.errors import ArgumentError
from llama_index.llms.kvlink.nodes import bare_nodes, to_documents

from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError

if TYPE_CHECKING:
    from llama_index.llms.kvlink.collection import Words
    from typing_extensions import Unpack

TRACE = "kvlink"  # where a response's metadata holds counts and times


class KVLinkSynthesizer(BaseSynthesizer):
    """One prompt, the model's own: all nodes as passages, then the query.

    Every node is a passage of its bare text and title, whether registered or not (then it is
    encoded now and kept); metadata does not enter the prompt. Nothing is repacked: more nodes than
    the model has link tokens for (`TooManyPassages`) or than its window holds (`PromptTooLong`)
    raise a `KVLinkCallError` with `kvlink_rag`'s error as its cause, and so does an empty query.
    Without nodes the answer is LlamaIndex's "Empty Response"; a node without text is a
    `DocumentError`. Nodes may come with or without a score.
    `response.metadata["kvlink"]` holds token counts and the trace, for a stream once it has ended.

    Args:
        llm: a `KVLink`; None makes one of the next seven.
        model, embedder, directory, device, codec, remote, rag: as everywhere in this integration,
            see `KVLink`.
        streaming: whether responses stream.

    Examples:
        ```python
        RetrieverQueryEngine(retriever, KVLinkSynthesizer(llm=llm, streaming=True))
        ```

    """

    def __init__(
        self,
        llm: KVLink | None = None,
        *,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        **words: Unpack[Words],
    ) -> None:
        if llm is not None and set(words.values()) - {None, "auto"}:
            raise ArgumentError(
                "found llm and one of model, embedder, directory, device, codec, remote, rag; "
                "give one"
            )
        if not isinstance(llm, KVLink | None):
            raise ArgumentError(
                f"found llm {type(llm).__name__}, expected KVLink, which takes passages"
            )
        llm = KVLink(**words) if llm is None else llm
        super().__init__(llm=llm, callback_manager=callback_manager, streaming=streaming)
        self._kvlink = llm

    def synthesize(
        self,
        query: QueryType,
        nodes: Sequence[NodeWithScore | BaseNode],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """The answer to `query` from `nodes`. Other arguments are those of `KVLink.complete`."""
        trace: dict[str, Any] = {}
        response = super().synthesize(
            query,
            _scored(nodes),
            additional_source_nodes and _scored(additional_source_nodes),
            documents=to_documents(nodes),
            trace=trace,
            **response_kwargs,
        )
        return _with_trace(response, trace)

    async def asynthesize(
        self,
        query: QueryType,
        nodes: Sequence[NodeWithScore | BaseNode],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """As `synthesize`, without blocking the event loop."""
        trace: dict[str, Any] = {}
        response = await super().asynthesize(
            query,
            _scored(nodes),
            additional_source_nodes and _scored(additional_source_nodes),
            documents=to_documents(nodes),
            trace=trace,
            **response_kwargs,
        )
        return _with_trace(response, trace)

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        documents: Sequence[Document] | None = None,
        trace: dict[str, Any] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """The answer from `documents`, or from `text_chunks` where no nodes are known."""
        asked = {"documents": _passages(documents, text_chunks), **response_kwargs}
        if self._streaming:
            return _tokens(self._kvlink.stream_complete(query_str, formatted=True, **asked), trace)
        return _text(self._kvlink.complete(query_str, formatted=True, **asked), trace)

    async def aget_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        documents: Sequence[Document] | None = None,
        trace: dict[str, Any] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """As `get_response`, without blocking the event loop."""
        asked = {"documents": _passages(documents, text_chunks), **response_kwargs}
        if self._streaming:
            responses = await self._kvlink.astream_complete(query_str, formatted=True, **asked)
            return _atokens(responses, trace)
        return _text(await self._kvlink.acomplete(query_str, formatted=True, **asked), trace)

    def _get_prompts(self) -> PromptDictType:
        """No templates: the prompt is the model's own."""
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """Raises `ConfigError`: there is no template to replace."""
        if prompts:
            raise ConfigError(
                f"found prompts {sorted(prompts)}, but the prompt of a KVLinkSynthesizer is the "
                "model's own; set system_prompt of KVLink, or use CompactAndRefine"
            )


def _scored(nodes: Sequence[NodeWithScore | BaseNode]) -> list[NodeWithScore]:
    """All nodes as LlamaIndex hands them over. Raises `DocumentError` for what is none."""
    bare = bare_nodes(nodes)
    return [
        node if isinstance(node, NodeWithScore) else NodeWithScore(node=bare[i])
        for i, node in enumerate(nodes)
    ]


def _passages(documents: Sequence[Document] | None, texts: Sequence[str]) -> list[Document]:
    if documents is None:
        return [Document(text) for text in texts if text.strip()]
    return list(documents)


def _text(response: CompletionResponse, trace: dict[str, Any] | None) -> str:
    _note(response, trace)
    return response.text


def _tokens(
    responses: Generator[CompletionResponse, None, None], trace: dict[str, Any] | None
) -> Generator[str, None, None]:
    with closing(responses):
        for response in responses:
            _note(response, trace)
            if response.delta:
                yield response.delta


async def _atokens(
    responses: AsyncGenerator[CompletionResponse, None], trace: dict[str, Any] | None
) -> AsyncGenerator[str, None]:
    async with aclosing(responses):
        async for response in responses:
            _note(response, trace)
            if response.delta:
                yield response.delta


def _note(response: CompletionResponse, trace: dict[str, Any] | None) -> None:
    if trace is not None and response.raw:
        trace.update(response.raw)


def _with_trace(response: RESPONSE_TYPE, trace: dict[str, Any]) -> RESPONSE_TYPE:
    """`response`, with `trace` (which a stream fills at its end) in its metadata."""
    if response.metadata is not None:
        response.metadata[TRACE] = trace
    return response
