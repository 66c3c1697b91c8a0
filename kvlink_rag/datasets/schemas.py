"""Public schemas to `Example`: a question, its answers, its documents, which of them are gold.

Each function takes one row and raises `ExampleError` that says which column is missing. Knows rows
only; no files, no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError, ExampleError

from .rows import Row

SUMMARIZE = "Summarize the documents above."
SUMMARIZE_DIALOGUE = "Summarize the dialogue above."
DIALOGUE_TURNS = 4


@dataclass(frozen=True, slots=True)
class Example:
    """One question. answers: any of them is right (for a summary: the references).

    gold: places in `documents` of those that hold the answer, where the data set says so. kind: of
    question, in the data set's own words, where it has any.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...] = ()
    gold: tuple[int, ...] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ExampleError(f"example {self.id}: the question is empty")
        if not any(answer.strip() for answer in self.answers):
            raise ExampleError(f"example {self.id}: there is no answer")

    def with_documents(self, documents: Sequence[Document], gold: Iterable[int] = ()) -> Example:
        """The same question over other documents."""
        return replace(self, documents=tuple(documents), gold=tuple(gold))


def question_answering(row: Row, number: int) -> Example:
    """A row of any of the question-answering schemas, told apart by their columns.

    - `question, answers, ctxs` of title and text: NQ as lost-in-the-middle has it (`isgold`), FiD,
      CacheBlend
    - `question, answer, paragraphs` of title, paragraph_text, is_supporting: MuSiQue
    - `question, answer, context, supporting_facts`: HotpotQA and 2WikiMultihopQA; context is a
      list of [title, sentences], an object of titles and sentences, or such a list as JSON
    - `question, answer` alone: NQ-open, TriviaQA (`value` and `aliases`); documents are retrieved

    `kind`, or `type` as HotpotQA and 2WikiMultihopQA call it, is the kind of question.
    """
    question = _text(row, "question")
    name = str(row.get("id") or row.get("_id") or row.get("question_id") or number)
    documents, gold = _documents(row)
    kind = str(row.get("kind") or row.get("type") or "")
    return Example(name, question, _answers(row), documents, gold, kind)


def multi_news(row: Row, number: int) -> Example:
    """MultiNews: `document` holds articles joined by `|||||`; each is a document."""
    articles = [text.strip() for text in _text(row, "document").split("|||||")]
    documents = tuple(Document(text) for text in articles if text)
    return Example(str(number), SUMMARIZE, (_text(row, "summary"),), documents)


def samsum(row: Row, number: int) -> Example:
    """SAMSum: `dialogue` cut into documents of four lines (what one says) each."""
    turns = [line.strip() for line in _text(row, "dialogue").splitlines() if line.strip()]
    pieces = [turns[at : at + DIALOGUE_TURNS] for at in range(0, len(turns), DIALOGUE_TURNS)]
    documents = tuple(Document("\n".join(piece)) for piece in pieces)
    name = str(row.get("id") or number)
    return Example(name, SUMMARIZE_DIALOGUE, (_text(row, "summary"),), documents)


def _documents(row: Row) -> tuple[tuple[Document, ...], tuple[int, ...]]:
    try:
        if "ctxs" in row:
            found = [(c.get("title") or "", c["text"], bool(c.get("isgold"))) for c in row["ctxs"]]
        elif "paragraphs" in row:
            found = [
                (p.get("title") or "", p["paragraph_text"], bool(p.get("is_supporting")))
                for p in row["paragraphs"]
            ]
        elif "context" in row:
            supporting = _titles(row.get("supporting_facts"))
            found = [
                (title, " ".join(s.strip() for s in sentences), title in supporting)
                for title, sentences in _pairs(row["context"], "sentences")
            ]
        else:
            found = []
        documents = tuple(Document(text, title=title) for title, text, _ in found)
    except (LookupError, TypeError, ValueError, AttributeError, DocumentError) as error:
        raise ExampleError(
            f"the documents are not in a known schema ({type(error).__name__}: {error})"
        ) from error
    return documents, tuple(i for i, (_, _, gold) in enumerate(found) if gold)


def _titles(value: Any) -> set[str]:
    return {title for title, _ in _pairs(value, "sent_id")} if value is not None else set()


def _pairs(value: Any, second: str) -> list[tuple[str, Any]]:
    """[title, x] pairs, from such a list, from an object of two lists, or from either as JSON."""
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, Mapping):
        return list(zip(value["title"], value[second], strict=True))
    return [(title, rest) for title, rest in value]


def _answers(row: Row) -> tuple[str, ...]:
    value = row.get("answers", row.get("answer"))
    if isinstance(value, Mapping):  # TriviaQA
        value = [value.get("value"), *(value.get("aliases") or [])]
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(text, str) for text in found):
        raise _missing(row, "answer or answers")
    return tuple(dict.fromkeys([*found, *(row.get("answer_aliases") or [])]))


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise _missing(row, column)
    return value


def _missing(row: Row, column: str) -> ExampleError:
    return ExampleError(
        f"no usable column {column!r}; found {', '.join(sorted(row))}: rename the column, or name "
        "the data set whose schema this is"
    )
