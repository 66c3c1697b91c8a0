"""The parts of a prompt that someone else wrote: passages recognised, fitted into the window.

Knows the parts of a collection and what to warn of; the rules stand in `prompt.recognition`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kvlink_rag.documents import Part, Passage, Text
from kvlink_rag.errors import PromptError
from kvlink_rag.prompt.fitting import fit
from kvlink_rag.prompt.recognition import count_passages
from kvlink_rag.trace import Trace

from .answering import Find, Found
from .parts import Parts

Message = Mapping[str, Any]

logger = logging.getLogger(__name__)


def recognise_chat(
    parts: Parts, messages: Sequence[Message], system: Sequence[str], trace: Trace | None = None
) -> list[Part]:
    """A conversation as parts; see `KVLinkRAG.recognise_chat`."""
    loaded = parts.loaded()
    recognised = loaded.recogniser.recognise_contents(messages, system=system, trace=trace)
    return loaded.model.chat(recognised)


def from_prompt(
    parts: Parts, messages: Sequence[Message], *, system: Sequence[str], room: int
) -> Find:
    """Finds what is recognised in `messages`, with `room` tokens left for the answer.

    Raises `PromptError` where they, or the last of them, if the user's, say nothing.
    """
    _check_says_something(messages)

    def find(trace: Trace) -> Found:
        # 1. messages → passages recognised → parts
        with trace.stage("retrieval"):
            recognised = recognise_chat(parts, messages, system, trace)
        # 2. parts → those that fit
        contents = (m["content"] for m in messages if not isinstance(m["content"], str))
        given = {id(part) for content in contents for part in content}
        with trace.stage("layout"):
            fitted = fit(parts.loaded().model.format, recognised, room, given=given)
        _warn(parts, trace, recognised, fitted)
        return Found(fitted)

    return find


def _warn(parts: Parts, trace: Trace, recognised: Sequence[Part], fitted: Sequence[Part]) -> None:
    """Say how many passages are computed although they are known, and note them in `trace`."""
    known, kept = count_passages(recognised), count_passages(fitted)
    if not any(isinstance(part, Passage) for part in recognised) and parts.catalog.count():
        logger.warning(
            "recognised none of the %d documents of %s in the prompt, so all of it is "
            "computed; a text is recognised where it stands unchanged between white space",
            parts.catalog.count(),
            parts.directory,
        )
    if trace.passages_as_text:
        logger.warning(
            "%d of the %d passages in the prompt are computed as text: the model has link "
            "tokens for %d; retrieve fewer for a prompt (a smaller k)",
            trace.passages_as_text,
            trace.passages_as_text + known,
            parts.loaded().model.spec.max_passages,
        )
    if kept < known:
        logger.warning(
            "%d of the %d passages recognised are computed as text: with their titles and link "
            "tokens the prompt would not leave the answer its room in the model's window; "
            "retrieve fewer, or ask for fewer new tokens",
            known - kept,
            known,
        )
    trace.passages_as_text += known - kept


def _check_says_something(messages: Sequence[Message]) -> None:
    blank = [_is_blank(message) for message in messages]
    if all(blank):
        raise PromptError("the prompt is empty, expected text or messages with text in them")
    if blank[-1] and messages[-1].get("role") == "user":
        raise PromptError("the last message is the user's and empty, expected a question in it")


def _is_blank(message: Message) -> bool:
    """Whether a message's content is known to say nothing; what is no message is told later."""
    content = message.get("content") if isinstance(message, Mapping) else None
    texts = [content] if isinstance(content, str) else content
    if not isinstance(texts, list | tuple):
        return False
    said = (part.text if isinstance(part, Text) else part for part in texts)
    return all(isinstance(text, str) and not text.strip() for text in said)
