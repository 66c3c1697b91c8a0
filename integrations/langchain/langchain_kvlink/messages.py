"""LangChain's messages as the engine's: roles, and contents as `Text` and `Passage` parts.

Knows content blocks; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage

from kvlink_rag.documents import Document, Part, Passage, Text
from kvlink_rag.errors import PromptError

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (SystemMessage, "system"),
)
_SILENT = ("reasoning", "thinking", "redacted_thinking")  # what a model thought; not repeated


def to_conversation(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """`{"role", "content"}` of each message; contents are lists of parts.

    Raises `PromptError` for messages that say nothing, and for blocks other than text.
    """
    contents = [list(parts_of(message.content)) for message in messages]
    if not any(_says_something(part) for content in contents for part in content):
        raise PromptError("the prompt is empty, expected a message with text or passages")
    roles = [role_of(message) for message in messages]
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]


def role_of(message: BaseMessage) -> str:
    """The role as chat templates name it. Raises `PromptError` for tools' messages."""
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES:
        if isinstance(message, kind) and not getattr(message, "tool_calls", None):
            return role
    raise PromptError(
        f"found a {type(message).__name__} of a tool, but this model calls no tools; give "
        "system, human and AI messages"
    )


def parts_of(content: str | Sequence[str | Mapping[str, Any]]) -> Iterator[Part]:
    """The parts of a message's content: text, and a passage for each document."""
    blocks = [content] if isinstance(content, str) else content
    for number, block in enumerate(blocks, 1):
        if isinstance(block, str):
            yield Text(block)
        elif block.get("type") == "text":
            yield Text(str(block.get("text", "")))
        elif _is_document(block):
            text, title = str(block.get("text") or ""), str(block.get("title") or "")
            if not text.strip():
                raise PromptError(
                    f"content block {number} of {len(blocks)}, of type {block['type']!r} (title "
                    f"{title!r}), is a document without text; leave it out"
                )
            yield Passage(Document(text, title=title))
        elif block.get("type") not in _SILENT:
            raise PromptError(
                f"found a content block of type {block.get('type')!r}; this model reads 'text' "
                "and 'text-plain' (see document_block)"
            )


def _is_document(block: Mapping[str, Any]) -> bool:
    """A standard plain-text block, or one as LangChain wrote it before version 1."""
    old = block.get("type") == "file" and block.get("source_type") == "text"
    return block.get("type") == "text-plain" or old


def _says_something(part: Part) -> bool:
    return isinstance(part, Passage) or bool(part.text.strip())
