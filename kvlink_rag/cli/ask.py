"""`kvlink-rag ask`: one question, one answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from kvlink_rag.arguments import Mode, Order
from kvlink_rag.errors import ConfigError

from . import terminal
from .opening import OPTIONS, Options, collection, load, require_documents
from .values import (
    Count,
    CountOrAll,
    Json,
    Penalty,
    Probability,
    Repair,
    Seed,
    Share,
    Temperature,
)

if TYPE_CHECKING:
    from kvlink_rag.collection.answering import AnswerStream


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """How an answer is made, as `KVLinkRAG.stream` takes it."""

    rounds: Literal[1, 2] = 1
    """2: retrieve again with the first hits, for questions over two facts"""
    order: Order | None = None
    """of passages in the prompt: best first, or by id, which reuses more (the collection's)"""
    mode: Mode = "reuse"
    """reuse snapshots; or compute all, masked as reuse is or in full"""
    repair: Repair | None = None
    """compute again of passages: first:16 (tokens of each), select:15%, none (the collection's)"""
    max_new_tokens: Count = 256
    """the most tokens of an answer"""
    temperature: Annotated[Temperature, Parameter(show_default=str)] = 0.0
    """0 is greedy"""
    top_p: Probability = 1.0
    """sample from the likeliest tokens that together have this probability"""
    top_k: CountOrAll = 0
    """sample from so many of the likeliest tokens; 0: from all"""
    min_p: Share = 0.0
    """sample from tokens with at least this share of the likeliest one's probability"""
    repetition_penalty: Penalty = 1.0
    """above 1: what was said already becomes less likely"""
    seed: Seed | None = None
    """of sampling"""


def ask(
    question: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    k: Annotated[Count, Parameter(name="-k")] = 10,
    answering: Answering = Answering(),
    trace: bool = False,
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """Answer one question, with its sources.

    Args:
        question: the question; - reads it from standard input
        k: passages to retrieve
        trace: show times and token counts
        as_json: print one JSON object at the end
    """
    text = (sys.stdin.read() if question == "-" else question).strip()
    if not text:
        raise ConfigError("the question is empty; give some text")
    with collection(options, models=True) as rag:
        require_documents(rag)
        load(rag)
        stream = rag.stream(text, k=k, **asdict(answering))
        if as_json:
            terminal.show_json(_fields(text, stream))
            return 0
        terminal.show_pieces(stream)
        terminal.show(["\n", *terminal.sources(stream.hits)])
        if trace:
            terminal.show(terminal.trace(stream.trace.to_dict()))
    return 0


def _fields(question: str, stream: AnswerStream) -> Mapping[str, Any]:
    text = "".join(stream)
    hits = [
        {
            "id": hit.document.id,
            "title": hit.document.title,
            "text": hit.document.text,
            "metadata": dict(hit.document.metadata),
            "score": hit.score,
            "also": [{"id": each.id, "metadata": dict(each.metadata)} for each in hit.also],
        }
        for hit in stream.hits
    ]
    trace = stream.trace.to_dict()
    return {"question": question, "answer": text, "sources": hits, "trace": trace}
