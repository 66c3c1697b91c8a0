"""/v1/chat/completions and /v1/completions: their requests, and how answers are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .events import event, respond
from .pieces import Piece, Read, Whole, answers_for, citation_of, conversation, store_of, sum_of
from .records import new_id, now
from .refusals import ErrorAnswer, ErrorDetail
from .replies import (
    Annotation,
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    CompletionAnswer,
    CompletionChoice,
)
from .requests import Answering, ChatRequest, CompletionRequest
from .service import DEFAULT_TOKENS, Call

_DONE = "data: [DONE]\n\n"


async def chat(call: Call) -> Any:
    """Serve /v1/chat/completions."""
    body: ChatRequest = call.body
    messages = conversation([message.plain() for message in body.messages], "messages")
    store = store_of(call, body.model)
    answers = answers_for(call, body, store, [messages], tokens=DEFAULT_TOKENS)
    shape = _Chat(new_id("chatcmpl-"), body)
    return await respond(call, answers, shape, stream=bool(body.stream))


async def complete(call: Call) -> Any:
    """Serve /v1/completions."""
    body: CompletionRequest = call.body
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = answers_for(call, body, store_of(call, body.model), asked, tokens=16)
    shape = _Text(new_id("cmpl-"), body)
    return await respond(call, answers, shape, stream=bool(body.stream))


class _Chunks:
    """Events of both: chunks of choices, tokens where they are asked for, and `[DONE]`."""

    kind: str

    def __init__(self, id: str, body: Answering) -> None:
        self.id, self.created, self.model = id, now(), body.model
        self._usage = bool(body.stream_options and body.stream_options.include_usage)

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        """One chunk."""
        named = {"id": self.id, "object": self.kind, "created": self.created, "model": self.model}
        extra = {"usage": None} if self._usage else {}
        return event({**named, "choices": choices, **extra, **more})

    def read(self, read: Read) -> Iterator[str]:
        """See `Shape`. The sources come with the end."""
        yield from ()

    def close(self, wholes: Sequence[Whole]) -> Iterator[str]:
        """See `Shape`."""
        if self._usage:
            yield self.chunk([], usage=sum_of([whole.usage for whole in wholes]).model_dump())
        yield _DONE

    def failed(self, why: ErrorDetail) -> str:
        """See `Shape`."""
        return event(ErrorAnswer(error=why).model_dump())


class _Chat(_Chunks):
    """How /v1/chat/completions writes an answer."""

    kind = "chat.completion.chunk"

    def begin(self) -> Iterator[str]:
        """See `Shape`."""
        yield self.chunk([_choice(0, delta={"role": "assistant", "content": ""})])

    def piece(self, piece: Piece) -> Iterator[str]:
        """See `Shape`."""
        yield self.chunk([_choice(piece.index, delta={"content": piece.text})])

    def end(self, whole: Whole) -> Iterator[str]:
        """See `Shape`."""
        annotations = [each.model_dump() for each in _annotations(whole)]
        delta = {"annotations": annotations} if annotations else {}
        choice = _choice(whole.index, whole.reason, delta=delta)
        yield self.chunk([choice], kvlink=whole.extension.model_dump())

    def answer(self, wholes: Sequence[Whole]) -> ChatAnswer:
        """See `Shape`."""
        (whole,) = wholes
        message = AnswerMessage(content=whole.text, annotations=_annotations(whole))
        choice = ChatChoice(index=0, message=message, finish_reason=whole.reason)
        return ChatAnswer(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=whole.usage,
            kvlink=whole.extension,
        )


class _Text(_Chunks):
    """How /v1/completions writes answers."""

    kind = "text_completion"

    def begin(self) -> Iterator[str]:
        """See `Shape`."""
        yield from ()

    def piece(self, piece: Piece) -> Iterator[str]:
        """See `Shape`."""
        yield self.chunk([_choice(piece.index, text=piece.text)])

    def end(self, whole: Whole) -> Iterator[str]:
        """See `Shape`."""
        choice = _choice(whole.index, whole.reason, text="")
        yield self.chunk([choice], kvlink=whole.extension.model_dump())

    def answer(self, wholes: Sequence[Whole]) -> CompletionAnswer:
        """See `Shape`."""
        choices = [
            CompletionChoice(
                index=whole.index,
                text=whole.text,
                finish_reason=whole.reason,
                kvlink=whole.extension,
            )
            for whole in wholes
        ]
        usage = sum_of([whole.usage for whole in wholes])
        return CompletionAnswer(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )


def _annotations(whole: Whole) -> list[Annotation]:
    return [Annotation(url_citation=citation_of(each, whole.text)) for each in whole.citations]


def _choice(index: int, reason: str | None = None, **what: Any) -> dict[str, Any]:
    return {"index": index, **what, "logprobs": None, "finish_reason": reason}
