"""What the chat model and the LLM share: sampling fields, the engine's stream, what it cost.

Knows prompts and answers; knows neither messages nor chunks.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field, model_validator

from kvlink_rag.errors import ConfigError
from langchain_kvlink.collection import CollectionFields, named
from langchain_kvlink.errors import NotSupported

if TYPE_CHECKING:
    from kvlink_rag import AnswerStream, KVLinkRAG, TextStream, Trace

    Stream: TypeAlias = AnswerStream | TextStream

SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("max_tokens", "seed", "repair"),
)
# LangChain's standard arguments that mean nothing to a model in this process, and those that
# LangChain itself passes along with a call.
_REMOTE = ("timeout", "max_retries", "api_key", "base_url")
_CALL = ("stream", "model")
NO_TOOLS = (
    "calls no tools: a KVLink model answers from passages. Let a chain retrieve for it, as with "
    "KVLinkDocumentsChain; or give an agent another chat model, with such a chain as its tool "
    "(chain.as_tool)"
)
NO_STRUCTURE = (
    "has no structured output: nothing binds its tokens to a schema. Ask for JSON in the prompt "
    "and parse the answer, as in llm | PydanticOutputParser(...)"
)
_UNSUPPORTED = {
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call"), NO_TOOLS),
    "response_format": NO_STRUCTURE,
}

Item = TypeVar("Item")
P = ParamSpec("P")
_DONE: Final = object()
_open_streams: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


class GenerationFields(CollectionFields):
    """The fields of a model that answers. Those above `streaming` may be given to a call, too."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_k: int = Field(default=0, ge=0)
    """Sample from so many of the likeliest tokens; 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Above 1, what stands in the prompt or the answer already becomes less likely."""
    max_tokens: int = Field(default=256, ge=1)
    """The most tokens of an answer."""
    seed: int | None = None
    """For sampling; None draws another each time."""
    repair: str | None = None
    """What is computed again of reused passages, `first:16` or `select:15%`; None: the
    collection's."""
    stop: list[str] | None = None
    """Strings that end an answer and are left out of it."""
    streaming: bool = False
    """LangChain's own switch, which changes no answer: callbacks see every token in any case.
    Given to a chat model, True lets `invoke` go the way of streams inside LangChain, and False
    makes `stream` yield the whole answer at once (in newer LangChain)."""

    @model_validator(mode="before")
    @classmethod
    def _drop_remote(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in _REMOTE}

    @property
    def model_label(self) -> str:
        """The model's name as far as it is known without opening or loading anything."""
        rag = self._opened if self.rag is None else self.rag
        return rag.model_name if rag is not None else named(self.model) or "small"

    def facts(self) -> dict[str, Any]:
        """What an answer depends on, for LangChain's caches and traces."""
        directory = self.directory if self.rag is None else self.rag.directory
        return {
            "model": self.model_label,
            "directory": None if directory is None else str(directory),
            "codec": self.codec if self.rag is None else self.rag.codec,
            **{name: getattr(self, name) for name in SAMPLING},
            "default_stop": self.stop,  # LangChain puts the call's under "stop"
        }

    def sampling(self, stop: list[str] | None, call: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `KVLinkModel.stream`; those of the call go before the fields.

        Raises `ConfigError` for a call's arguments that would otherwise do nothing, `NotSupported`
        for tools and schemas.
        """
        for name in _UNSUPPORTED.keys() & call.keys():
            if call[name]:
                raise NotSupported(f"found {name}=, but {type(self).__name__} {_UNSUPPORTED[name]}")
        known = (*SAMPLING, *_CALL, *_UNSUPPORTED)
        if unknown := [name for name in call if name not in known]:
            raise ConfigError(
                f"found the argument {unknown[0]!r}, expected one of {', '.join(SAMPLING)}, stop"
            )
        asked = call.get("model")
        if asked is not None and named(asked) != self.model_label:
            raise ConfigError(
                f"found model={named(asked)!r} in a call to {self.model_label!r}; construct "
                "another object for another model"
            )
        given = {name: call[name] for name in SAMPLING if call.get(name) is not None}
        values = {name: given.get(name, getattr(self, name)) for name in SAMPLING}
        max_new_tokens = values.pop("max_tokens")
        ends = (self.stop if stop is None else stop) or ()
        if isinstance(ends, str):  # else each of its letters would end the answer
            ends = [ends]
        if not isinstance(ends, Iterable):
            raise ConfigError(f"stop is {ends!r}, expected a list of strings")
        return {**values, "max_new_tokens": max_new_tokens, "stop": tuple(ends)}


def usage(trace: Trace) -> UsageMetadata:
    """Token counts of an answer; what was reused is `cache_read`."""
    reused = trace.reused_tokens + trace.prefix_tokens
    read = reused + trace.computed_tokens
    return UsageMetadata(
        input_tokens=read,
        output_tokens=trace.generated_tokens,
        total_tokens=read + trace.generated_tokens,
        input_token_details=InputTokenDetails(cache_read=reused),
    )


def response_metadata(rag: KVLinkRAG, stream: Stream) -> dict[str, Any]:
    """The model's name, why the answer ended, and the trace."""
    trace = stream.trace
    return {
        "model_name": rag.model.name,
        "finish_reason": trace.finish_reason,
        "trace": trace.to_dict(),
    }


def closed_at_exit(
    make: Callable[P, Generator[Item, None, None]],
) -> Callable[P, Generator[Item, None, None]]:
    """`make`, whose generators are closed before the interpreter goes, if nobody has done so.

    One that is closed later, among modules that are gone already, prints a traceback.
    """

    @wraps(make)
    def made(*arguments: P.args, **named: P.kwargs) -> Generator[Item, None, None]:
        items = make(*arguments, **named)
        _open_streams.add(items)
        return items

    return made


@atexit.register
def _close_streams() -> None:
    for items in list(_open_streams):
        with contextlib.suppress(ValueError):  # it is at work in another thread
            items.close()


async def in_executor(items: Generator[Item, None, None]) -> AsyncGenerator[Item, None]:
    """The items of a generator, each made in a thread of the executor.

    Whoever stops early (a cancelled task, `aclose`) stops the generator after the item it is at.
    """
    lock = threading.Lock()

    def step() -> Item | object:
        with lock:
            return next(items, _DONE)

    def close() -> None:
        with lock:  # a cancelled step may still be running
            items.close()

    item: Item | object = None
    try:
        while (item := await run_in_executor(None, step)) is not _DONE:
            yield item  # type: ignore[misc]
    finally:
        if item is not _DONE:
            threading.Thread(target=close, daemon=True).start()
