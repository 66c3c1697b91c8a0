"""/v1/responses: the newer shape of a conversation, with `file_search` over a vector store.

Nothing is kept between requests, so there is no `previous_response_id`: clients send the whole
conversation, earlier output items among it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .events import event, respond
from .pieces import Cited, Piece, Read, Whole, answers_for, citation_of, conversation, store_of
from .records import new_id, now
from .refusals import ErrorDetail, Refused
from .replies import (
    FileCitation,
    Incomplete,
    InputDetails,
    OutputDetails,
    OutputMessage,
    OutputText,
    ResponseAnswer,
    ResponseCitation,
    ResponseUsage,
    SearchCall,
    SearchResult,
    Source,
    Usage,
)
from .requests import FileSearch, ResponseRequest, SearchChoice
from .service import DEFAULT_TOKENS, Call

RESULTS = "file_search_call.results"  # of `include`


async def create(call: Call) -> Any:
    """Serve /v1/responses."""
    body: ResponseRequest = call.body
    messages = conversation(body.messages(), "input")
    store, searched = store_of(call, body.model), body.searched()
    if body.tools and store is not None:
        raise Refused(400, f"{body.model!r} answers from its own collection", "tools")
    if searched is not None:
        store = call.service.library.find(searched, call.asker)
    answers = answers_for(call, body, store, [messages], tokens=DEFAULT_TOKENS)
    shape = _Response(body, messages[-1]["content"])
    return await respond(call, answers, shape, stream=bool(body.stream))


class _Response:
    """How /v1/responses writes an answer: one message, after a search where a tool asked for it."""

    def __init__(self, body: ResponseRequest, question: str) -> None:
        self._body, self._question = body, question
        self._id, self._message, self._search = new_id("resp_"), new_id("msg_"), new_id("fs_")
        self._created = now()
        self._sent = 0
        self._searches = body.searched() is not None
        self._place = int(self._searches)  # of the message among the outputs

    def answer(self, wholes: Sequence[Whole]) -> ResponseAnswer:
        """See `Shape`."""
        (whole,) = wholes
        cut = whole.reason == "length"
        return self._answer(
            "incomplete" if cut else "completed",
            [*self._searched(whole.extension.sources), self._said(whole)],
            incomplete_details=Incomplete() if cut else None,
            usage=_usage(whole.usage),
            kvlink=whole.extension,
        )

    def begin(self) -> Iterator[str]:
        """See `Shape`."""
        started = self._answer("in_progress", []).model_dump()
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)

    def read(self, read: Read) -> Iterator[str]:
        """See `Shape`: the search, whole, then the message begins."""
        for call in self._searched(read.sources):
            added = {**call.model_dump(), "status": "in_progress", "results": None}
            yield self._event("response.output_item.added", output_index=0, item=added)
            for state in ("in_progress", "searching", "completed"):
                kind = f"response.file_search_call.{state}"
                yield self._event(kind, output_index=0, item_id=call.id)
            done = call.model_dump()
            yield self._event("response.output_item.done", output_index=0, item=done)
        message = OutputMessage(id=self._message, status="in_progress", content=[])
        yield self._item("response.output_item.added", message)
        part = OutputText(text="", annotations=[]).model_dump()
        yield self._of_text("response.content_part.added", part=part)

    def piece(self, piece: Piece) -> Iterator[str]:
        """See `Shape`."""
        yield self._of_text("response.output_text.delta", delta=piece.text, logprobs=[])

    def end(self, whole: Whole) -> Iterator[str]:
        """See `Shape`."""
        said = self._said(whole)
        (text,) = said.content
        for number, cited in enumerate(text.annotations):
            yield self._of_text(
                "response.output_text.annotation.added",
                annotation_index=number,
                annotation=cited.model_dump(),
            )
        yield self._of_text("response.output_text.done", text=text.text, logprobs=[])
        yield self._of_text("response.content_part.done", part=text.model_dump())
        yield self._item("response.output_item.done", said)

    def close(self, wholes: Sequence[Whole]) -> Iterator[str]:
        """See `Shape`."""
        answer = self.answer(wholes)
        yield self._event(f"response.{answer.status}", response=answer.model_dump())

    def failed(self, why: ErrorDetail) -> str:
        """See `Shape`."""
        return self._event("error", message=why.message, code=why.code, param=why.param)

    # The pieces of it

    def _answer(self, status: Any, output: list[Any], **more: Any) -> ResponseAnswer:
        body = self._body
        return ResponseAnswer(
            id=self._id,
            created_at=self._created,
            status=status,
            instructions=body.instructions,
            max_output_tokens=body.asked_tokens(),
            metadata=body.metadata or {},
            model=body.model,
            output=output,
            temperature=body.temperature or 0.0,
            tools=[_tool(tool) for tool in body.tools or ()],
            tool_choice=_choice(body),
            top_p=1.0 if body.top_p is None else body.top_p,
            **more,
        )

    def _said(self, whole: Whole) -> OutputMessage:
        cited = [self._citation(each, whole.text) for each in whole.citations]
        status: Any = "incomplete" if whole.reason == "length" else "completed"
        text = OutputText(text=whole.text, annotations=cited)
        return OutputMessage(id=self._message, status=status, content=[text])

    def _citation(self, cited: Cited, text: str) -> ResponseCitation | FileCitation:
        """Of a search: the file, where the passage is of an uploaded one."""
        source = cited.source
        if self._searches and source.file_id:
            return FileCitation(index=len(text), file_id=source.file_id, filename=source.filename)
        return ResponseCitation(**citation_of(cited, text).model_dump())

    def _searched(self, sources: Sequence[Source]) -> list[SearchCall]:
        """The search, if there was one."""
        if not self._searches:
            return []
        results = [
            SearchResult(
                file_id=each.file_id,
                filename=each.filename,
                score=each.score,
                text=each.text,
                attributes=each.metadata,
            )
            for each in sources
        ]
        wanted = RESULTS in (self._body.include or ())
        return [
            SearchCall(
                id=self._search,
                queries=[self._question],
                results=results if wanted else None,
            )
        ]

    def _of_text(self, kind: str, **fields: Any) -> str:
        place = {"output_index": self._place, "content_index": 0}
        return self._event(kind, item_id=self._message, **place, **fields)

    def _item(self, kind: str, item: OutputMessage) -> str:
        return self._event(kind, output_index=self._place, item=item.model_dump())

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._sent = self._sent, self._sent + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)


def _tool(tool: FileSearch) -> dict[str, Any]:
    """The tool as it was understood."""
    return tool.model_dump(
        include={"type", "vector_store_ids", "max_num_results"}, exclude_none=True
    )


def _choice(body: ResponseRequest) -> str | dict[str, Any]:
    chosen = body.tool_choice
    return {"type": chosen.type} if isinstance(chosen, SearchChoice) else chosen or "auto"


def _usage(usage: Usage) -> ResponseUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=cached),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(),
        total_tokens=usage.total_tokens,
    )
