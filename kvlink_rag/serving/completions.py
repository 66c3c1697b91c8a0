"""/v1/chat/completions and /v1/completions: a request to an answer, whole or as it comes.

    body → makers of streams → Job in a thread → pieces → JSON or server-sent events

A client that goes away ends its job. Knows OpenAI's shapes; how an answer is made knows `answers`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from kvlink_rag.collection.answering import AnswerStream
from kvlink_rag.collection.citing import cited
from kvlink_rag.documents import Document, Hit
from kvlink_rag.model.text_stream import TextStream
from kvlink_rag.trace import Trace

from .answers import from_collection
from .records import Store, new_id, now
from .refusals import ErrorAnswer, Refused, not_found, refusal_of
from .replies import (
    Annotation,
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    CompletionAnswer,
    CompletionChoice,
    Extension,
    PromptDetails,
    Source,
    UrlCitation,
    Usage,
)
from .requests import Answering, ChatRequest, CompletionRequest
from .runner import Job
from .service import DEFAULT_TOKENS, Call

Stream = AnswerStream | TextStream
Result = TypeVar("Result")
Item = TypeVar("Item")
Messages = Sequence[dict[str, str]]

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of the answer to one prompt."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Whole:
    """The end of the answer to one prompt."""

    index: int
    text: str
    reason: Any
    usage: Usage
    citations: list[Annotation]
    extension: Extension


class GoneAway(Exception):
    """The client closed the connection."""


async def chat(call: Call) -> Any:
    """Serve /v1/chat/completions."""
    body: ChatRequest = call.body
    messages = [message.plain() for message in body.messages]
    if messages[-1]["role"] != "user":
        raise Refused(400, "the last message is not the user's, expected a question", "messages")
    answers = _answers(call, body, [messages], DEFAULT_TOKENS)
    shape = _Chat(new_id("chatcmpl-"), now(), body.model)
    return await _respond(call, body, answers, shape)


async def complete(call: Call) -> Any:
    """Serve /v1/completions."""
    body: CompletionRequest = call.body
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = _answers(call, body, asked, 16)
    return await _respond(call, body, answers, _Text(new_id("cmpl-"), now(), body.model))


# A request to streams


def _answers(
    call: Call, body: Answering, asked: Sequence[Messages], tokens: int
) -> Callable[[], Generator[Piece | Whole, None, None]]:
    """What a thread is to run. Raises `Refused` where there is no such model."""
    service, asker = call.service, call.asker
    store = service.library.of_model(body.model, asker)
    if store is None and body.model != service.reader_name:
        raise not_found("model", body.model)
    arguments = body.sampling(service.limits.tokens, tokens)
    k, rounds = body.k or service.k, body.rounds or 1

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

    def run() -> Generator[Piece | Whole, None, None]:
        for index, messages in enumerate(asked):
            with opened(messages) as stream, closing(stream):
                for text in stream:
                    yield Piece(index, text)
                service.tally.answered(stream.trace)
                yield _whole(call, index, store, messages[-1]["content"], stream)

    return run


def _whole(call: Call, index: int, store: Store | None, question: str, stream: Stream) -> Whole:
    hits = stream.hits if isinstance(stream, AnswerStream) else []
    sources = [_source(call, hit) for hit in hits]
    trace = stream.trace.to_dict()
    citations = _citations(stream.text, question, hits, store)
    extension = Extension(sources=sources, trace=trace)
    reason = stream.trace.finish_reason or "length"
    return Whole(index, stream.text, reason, _usage(stream.trace), citations, extension)


def _usage(trace: Trace) -> Usage:
    cached = trace.reused_tokens + trace.prefix_tokens
    return _used(cached + trace.computed_tokens, cached, trace.generated_tokens)


def _sum(usages: Sequence[Usage]) -> Usage:
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
    text: str, question: str, hits: Sequence[Hit], store: Store | None
) -> list[Annotation]:
    """The passages that share most words with the answer, as citations of all of it."""
    if store is None or not text:
        return []
    passages = {n: f"{hit.document.title}\n{hit.document.text}" for n, hit in enumerate(hits)}
    found = (hits[number].document for number in cited(text, question, passages))
    return [
        Annotation(
            url_citation=UrlCitation(
                start_index=0,
                end_index=len(text),
                title=document.title or document.text[:60],
                url=_url(document, store),
            )
        )
        for document in found
    ]


def _url(document: Document, store: Store) -> str:
    source = str(document.metadata.get("source", ""))
    is_web = source.startswith(("https://", "http://"))
    return source if is_web else f"urn:kvlink:{store.id}:{document.id}"


# Streams to responses


@dataclass(frozen=True, slots=True)
class _Chat:
    """How /v1/chat/completions writes an answer."""

    id: str
    created: int
    model: str
    kind: str = "chat.completion.chunk"

    def begin(self) -> list[dict[str, Any]]:
        """Choices before the first text."""
        return [_choice(0, delta={"role": "assistant", "content": ""})]

    def piece(self, piece: Piece) -> dict[str, Any]:
        """The choice of some text."""
        return _choice(piece.index, delta={"content": piece.text})

    def end(self, whole: Whole) -> dict[str, Any]:
        """The choice after the last text."""
        annotations = [each.model_dump() for each in whole.citations]
        delta = {"annotations": annotations} if annotations else {}
        return _choice(whole.index, whole.reason, delta=delta)

    def answer(self, wholes: Sequence[Whole]) -> ChatAnswer:
        """The whole of it."""
        (whole,) = wholes
        message = AnswerMessage(content=whole.text, annotations=whole.citations)
        choice = ChatChoice(index=0, message=message, finish_reason=whole.reason)
        return ChatAnswer(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=whole.usage,
            kvlink=whole.extension,
        )


@dataclass(frozen=True, slots=True)
class _Text:
    """How /v1/completions writes answers."""

    id: str
    created: int
    model: str
    kind: str = "text_completion"

    def begin(self) -> list[dict[str, Any]]:
        """Choices before the first text: none."""
        return []

    def piece(self, piece: Piece) -> dict[str, Any]:
        """The choice of some text."""
        return _choice(piece.index, text=piece.text)

    def end(self, whole: Whole) -> dict[str, Any]:
        """The choice after the last text of a prompt."""
        return _choice(whole.index, whole.reason, text="")

    def answer(self, wholes: Sequence[Whole]) -> CompletionAnswer:
        """The whole of it."""
        choices = [
            CompletionChoice(
                index=whole.index,
                text=whole.text,
                finish_reason=whole.reason,
                kvlink=whole.extension,
            )
            for whole in wholes
        ]
        usage = _sum([whole.usage for whole in wholes])
        return CompletionAnswer(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )


def _choice(index: int, reason: str | None = None, **what: Any) -> dict[str, Any]:
    return {"index": index, **what, "logprobs": None, "finish_reason": reason}


async def _respond(
    call: Call,
    body: Answering,
    answers: Callable[[], Generator[Piece | Whole, None, None]],
    shape: _Chat | _Text,
) -> Any:
    """The answer, whole or as a stream. What fails before the first text is an HTTP error."""
    job = call.service.runner.start(answers)
    try:
        if not body.stream:
            return shape.answer(await _unless_gone(call.request, _wholes(job)))
        first = await _unless_gone(call.request, job.first())
    except GoneAway:
        call.service.tally.left.inc()
        job.leave()
        return Response(status_code=499)
    except BaseException:
        job.leave()
        raise
    usage = bool(body.stream_options and body.stream_options.include_usage)
    events = _events(call, job, first, shape, usage)
    return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)


async def _wholes(job: Job[Piece | Whole]) -> list[Whole]:
    return [item async for item in job if isinstance(item, Whole)]


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives. Raises `GoneAway` where the client closes the connection first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise GoneAway
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    call: Call,
    job: Job[Piece | Whole],
    first: Piece | Whole,
    shape: _Chat | _Text,
    with_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events, to the last; the job ends with them."""
    wholes: list[Whole] = []
    named = {"id": shape.id, "object": shape.kind, "created": shape.created, "model": shape.model}
    extra = {"usage": None} if with_usage else {}

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return _event({**named, "choices": choices, **extra, **more})

    try:
        for choice in shape.begin():
            yield event([choice])
        async for item in _from(first, job):
            if isinstance(item, Piece):
                yield event([shape.piece(item)])
            else:
                wholes.append(item)
                yield event([shape.end(item)], kvlink=item.extension.model_dump())
        if with_usage:
            yield event([], usage=_sum([whole.usage for whole in wholes]).model_dump())
        yield _DONE
    except Exception as error:  # the status is sent already
        refusal = refusal_of(error)
        yield _event(ErrorAnswer(error=refusal.detail()).model_dump())
    finally:
        job.leave()
        if not job.ended:
            call.service.tally.left.inc()


async def _from(first: Item, job: Job[Item]) -> AsyncIterator[Item]:
    yield first
    async for item in job:
        yield item


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False, separators=(',', ':'))}\n\n"
