"""`kvlink-rag chat`: questions a line each, over one growing prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

from cyclopts import Parameter

from kvlink_rag.collection.citing import cited

from . import terminal
from .ask import Answering
from .opening import OPTIONS, Options, collection, load, require_documents
from .values import Count

if TYPE_CHECKING:
    from kvlink_rag.collection.conversation import Turn


def chat(
    *,
    k: Annotated[Count, Parameter(name="-k")] = 4,
    system: str | None = None,
    answering: Answering = Answering(),  # noqa: B008 (frozen)
    save: Path | None = None,
    trace: bool = False,
    options: Options = OPTIONS,
) -> int:
    """Answer questions, a line each.

    Until the end of input (Ctrl-D). The prompt grows: earlier questions, answers and passages stay
    in it and are reused. Behind an answer stand the numbers of the passages that share most words
    with it; passages new to the conversation are listed below. On a terminal, questions can be
    edited, and the up key brings earlier ones back.

    Args:
        k: passages to retrieve for each question
        system: instruction before the conversation; '' for none
        save: append questions, answers and sources to this file
        trace: show times and token counts
    """
    with ExitStack() as stack:
        file = stack.enter_context(save.open("a", encoding="utf-8")) if save else None
        rag = stack.enter_context(collection(options, models=True))
        require_documents(rag)
        load(rag)
        from kvlink_rag.collection.conversation import Conversation

        how = asdict(answering)
        conversation = Conversation(
            rag, k, how.pop("rounds"), system=system, order=how.pop("order")
        )
        passages: dict[int, str] = {}  # of the conversation, by number
        for question in _questions():
            turn = conversation.ask(question, **how)
            lines = _answer(turn, passages)
            terminal.show([*lines, ""])
            if trace:
                terminal.show([*terminal.trace(turn.trace.to_dict()), ""])
            if file is not None:
                _write(file, turn, lines)
    return 0


def _answer(turn: Turn, passages: dict[int, str]) -> list[str]:
    """Show `turn`'s answer as it comes; the rest of its line, and a line for each new passage."""
    terminal.show_pieces(turn)
    for number, hit in enumerate(turn.hits, turn.first_number):
        passages[number] = f"{hit.document.title}\n{hit.document.text}"
    numbers = "".join(f" [{number}]" for number in cited(turn.text, turn.question, passages))
    return [numbers, *terminal.sources(turn.hits, turn.first_number)]


def _questions() -> Iterator[str]:
    """Lines of standard input that hold something; a terminal is prompted, with line editing."""
    while (line := _line()) is not None:
        if line.strip():
            yield line.strip()


def _line() -> str | None:
    """The next line; None at the end of input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    if sys.stdout.isatty():
        with suppress(ImportError):  # not on every system
            import readline  # noqa: F401 (`input` edits lines and remembers them once it is there)
        try:
            return input("> ")
        except EOFError:
            terminal.show([""])
            return None
    sys.stderr.write("> ")
    sys.stderr.flush()
    return sys.stdin.readline() or None


def _write(file: IO[str], turn: Turn, lines: list[str]) -> None:
    """A turn of the transcript, in Markdown; flushed, so that an interruption loses none."""
    numbers, *sources = lines
    text = [f"> {turn.question}", "", turn.text + numbers, "", *(f"- {s}" for s in sources)]
    file.write(terminal.visible("\n".join(text)) + "\n\n")
    file.flush()
