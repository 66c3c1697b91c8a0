"""A request to the pieces of its answers, as a thread makes them.

    body → opened streams → Read, Piece …, Whole, for each prompt

Knows collections and streams; how they are written for a client knows `events`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kvlink_rag.collection.answering import AnswerStream
from kvlink_rag.collection.citing import cited
from kvlink_rag.documents import Document, Hit
from kvlink_rag.errors import PromptTooLong
from kvlink_rag.model.text_stream import TextStream
from kvlink_rag.trace import Trace

from .answers import from_collection
from .records import Store
from .refusals import Refused, not_found, refusal_of
from .replies import Extension, PromptDetails, Source, UrlCitation, Usage
from .requests import Answering
from .service import Call

Stream = AnswerStream | TextStream
Messages = Sequence[dict[str, str]]
Answers = Callable[[], Generator["Read | Piece | Whole", None, None]]


@dataclass(frozen=True, slots=True)
class Read:
    """What the answer to one prompt is read from, before its first text."""

    index: int
    sources: list[Source]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of the answer to one prompt."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Cited:
    """A source that stands behind an answer, and where it can be found."""

    source: Source
    url: str


@dataclass(frozen=True, slots=True)
class Whole:
    """The end of the answer to one prompt."""

    index: int
    text: str
    reason: Any
    usage: Usage
    citations: list[Cited]
    extension: Extension


def store_of(call: Call, model: str) -> Store | None:
    """The collection that answers under this name, None for the bare reader.

    Raises `Refused` where there is no such model.
    """
    store = call.service.library.of_model(model, call.asker)
    if store is None and model != call.service.reader_name:
        raise not_found("model", model)
    return store


def conversation(messages: list[dict[str, str]], field: str) -> list[dict[str, str]]:
    """`messages`. Raises `Refused`, naming `field`, unless they end with a question."""
    if not messages or messages[-1]["role"] != "user":
        raise Refused(400, "the last message is not the user's, expected a question", field)
    if not messages[-1]["content"].strip():
        raise Refused(400, "the last message is empty, expected a question", field)
    return messages


def answers_for(
    call: Call,
    body: Answering,
    store: Store | None,
    asked: Sequence[Messages],
    *,
    tokens: int,
) -> Answers:
    """What a thread is to run. tokens: of an answer, where the request does not say."""
    service, asker = call.service, call.asker
    arguments = body.sampling(service.limits.tokens, tokens)
    k, rounds = body.asked_passages() or service.k, body.rounds or 1

    @contextmanager
    def opened(messages: Messages) -> Iterator[Stream]:
        with ExitStack() as stack:
            if store is not None:
                rag = stack.enter_context(service.library.using(store.id))
                yield from_collection(rag, messages, asker, k=k, rounds=rounds, **arguments)
            else:
                readable = sorted(each.id for each in service.library.readable(asker))
                rags = [stack.enter_context(service.library.using(id)) for id in readable]
                yield service.reader.stream(rags, messages, asker, **arguments)

    def run() -> Generator[Read | Piece | Whole, None, None]:
        for index, messages in enumerate(asked):
            with named(body.said_in), opened(messages) as stream, closing(stream):
                pieces = iter(stream)
                first = next(pieces, "")  # what was retrieved is known with it
                yield Read(index, _sources(call, stream))
                for text in chain([first] if first else [], pieces):
                    yield Piece(index, text)
                service.tally.answered(stream.trace)
                yield _whole(call, index, store, messages[-1]["content"], stream)

    return run


@contextmanager
def named(field: str) -> Iterator[None]:
    """A block in which a prompt that is too long is told to be in `field` of the request."""
    try:
        yield
    except PromptTooLong as error:
        refused = refusal_of(error)
        refused.param = field
        raise refused from error


def _whole(call: Call, index: int, store: Store | None, question: str, stream: Stream) -> Whole:
    hits = _hits(stream)
    trace = stream.trace.to_dict()
    sources = _sources(call, stream)
    citations = _citations(stream.text, question, hits, sources, store)
    extension = Extension(sources=sources, trace=trace)
    reason = stream.trace.finish_reason or "length"
    return Whole(index, stream.text, reason, _usage(stream.trace), citations, extension)


def _hits(stream: Stream) -> list[Hit]:
    return stream.hits if isinstance(stream, AnswerStream) else []


def _sources(call: Call, stream: Stream) -> list[Source]:
    return [_source(call, hit) for hit in _hits(stream)]


def _usage(trace: Trace) -> Usage:
    cached = trace.reused_tokens + trace.prefix_tokens
    return _used(cached + trace.computed_tokens, cached, trace.generated_tokens)


def sum_of(usages: Sequence[Usage]) -> Usage:
    """Of several prompts together."""
    return _used(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.prompt_tokens_details.cached_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
    )


def _used(prompt: int, cached: int, said: int) -> Usage:
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=said,
        total_tokens=prompt + said,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
    )


def _source(call: Call, hit: Hit) -> Source:
    document, place = hit.document, call.service.shelf.place(hit.document)
    return Source(
        id=str(document.id),
        title=document.title,
        text=document.text,
        score=hit.score,
        file_id=place.file,
        filename=place.name,
        metadata=place.metadata,
    )


def _citations(
    text: str, question: str, hits: Sequence[Hit], sources: Sequence[Source], store: Store | None
) -> list[Cited]:
    """The passages that share most words with the answer, as citations of all of it."""
    if store is None or not text:
        return []
    passages = {n: f"{source.title}\n{source.text}" for n, source in enumerate(sources)}
    found = cited(text, question, passages)
    return [Cited(sources[n], _url(hits[n].document, store)) for n in found]


def citation_of(cited: Cited, text: str) -> UrlCitation:
    """A citation of all of `text`."""
    source = cited.source
    title = source.title or source.text[:60]
    return UrlCitation(start_index=0, end_index=len(text), title=title, url=cited.url)


def _url(document: Document, store: Store) -> str:
    source = str(document.metadata.get("source", ""))
    is_web = source.startswith(("https://", "http://"))
    return source if is_web else f"urn:kvlink:{store.id}:{document.id}"
