"""The parts of a prompt that someone else wrote: passages recognised, fitted into the window.

Knows the parts of a collection and what to warn of; the rules stand in `prompt.recognition`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kvlink_rag.documents import Part, Text
from kvlink_rag.errors import PromptError
from kvlink_rag.prompt.fitting import fit
from kvlink_rag.prompt.recognition import count_passages
from kvlink_rag.trace import Trace

from .answering import Find, Found
from .parts import Parts

Message = Mapping[str, Any]

ROOMY = 400  # characters of a prompt that may well hold a passage besides its question
PATIENT = 3  # such prompts in which none is recognised, before it is told

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
    _warn_of_none(parts, trace, recognised)
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


def _warn_of_none(parts: Parts, trace: Trace, recognised: Sequence[Part]) -> None:
    """Say, once each, why passages may not be recognised. A call that holds none is no reason."""
    seen, known = parts.seen, count_passages(recognised)
    seen.passages += known
    text = sum(len(part.text) for part in recognised if isinstance(part, Text))
    seen.prompts_without += not known and text >= ROOMY
    if trace.unrecognised_tokens and seen.first("alike"):
        logger.warning(
            "%d tokens of the prompt look like documents of %s but are not word for word what it "
            "holds, so they are computed; hand over texts unchanged, and register what you hand "
            "over (a text cut or joined by a splitter or a window is another text)",
            trace.unrecognised_tokens,
            parts.directory,
        )
    if seen.passages or not seen.prompts_without:
        return
    documents = parts.catalog.count()
    if not documents and seen.first("empty"):
        logger.warning(
            "the collection %s holds no documents, so nothing is reused; is it the right "
            "directory? Its documents are added or registered first",
            parts.directory,
        )
    elif documents and seen.prompts_without >= PATIENT and seen.first("none"):
        logger.warning(
            "recognised none of the %d documents of %s in %d prompts, so all of them were "
            "computed; is it the right directory, and does it hold what the retriever returns?",
            documents,
            parts.directory,
            seen.prompts_without,
        )


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
