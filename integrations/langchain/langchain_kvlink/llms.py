"""`KVLinkLLM`: text in, text out, for chains that want an LLM and not a chat model.

One generator, `_stream`, is the way of every call. Knows LangChain's chunks and results.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import aclosing
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.llms import LLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from langchain_kvlink.errors import NotSupported
from langchain_kvlink.generation import (
    NO_STRUCTURE,
    GenerationFields,
    closed_at_exit,
    in_executor,
    response_metadata,
    usage,
)


class KVLinkLLM(GenerationFields, LLM):
    """A local LLM that reuses the keys and values of every passage its collection knows.

    As `ChatKVLink`, with a string for a prompt: it is one user message, in the model's own prompt.
    Fields and errors as there. `generation_info` carries usage, the model's name and the trace.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @property
    def _llm_type(self) -> str:
        return "kvlink"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self.facts()

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "kvlink"
        params.setdefault("ls_model_name", self.model_label)
        return params

    @closed_at_exit
    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Generator[GenerationChunk, None, None]:
        rag = self.collection
        stream = rag.complete(prompt, **self.sampling(stop, kwargs))
        try:
            for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        finally:
            stream.close()
        info = {"usage_metadata": usage(stream.trace), **response_metadata(rag, stream)}
        yield GenerationChunk(text="", generation_info=info)

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async with aclosing(in_executor(self._stream(prompt, stop, **kwargs))) as chunks:
            async for chunk in chunks:
                if run_manager and chunk.text:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        return "".join(c.text for c in self._stream(prompt, stop, run_manager, **kwargs))

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        answers = [list(self._stream(p, stop, run_manager, **kwargs)) for p in prompts]
        return LLMResult(generations=[[_whole(chunks)] for chunks in answers])

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        generations = []
        for prompt in prompts:
            chunks = self._astream(prompt, stop, run_manager, **kwargs)
            generations.append([_whole([chunk async for chunk in chunks])])
        return LLMResult(generations=generations)

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Any:
        """Raises `NotSupported`, which says what to use instead."""
        raise NotSupported(f"{type(self).__name__} {NO_STRUCTURE}")

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` alone, by this model's tokenizer; loads no weights."""
        return self.collection.outline().tokenizer.encode(text)


def _whole(chunks: Sequence[GenerationChunk]) -> Generation:
    """The whole answer: the pieces' text, and what the last chunk says about it."""
    text = "".join(chunk.text for chunk in chunks)
    return Generation(text=text, generation_info=chunks[-1].generation_info)
