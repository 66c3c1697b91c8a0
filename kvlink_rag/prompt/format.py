"""How one model's prompts are written and laid out, without its weights.

For whoever counts tokens or sizes prompts before the first question, in frameworks whose event
loop must not wait for weights, and for the model itself. Knows a tokenizer and a spec; knows no
tensors of a model and no file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlink_rag.documents import Document, Part, Text
from kvlink_rag.errors import PromptError, PromptTooLong

from .chat import GAP, checked_role, content_parts, has_template, render, template_pieces
from .layout import Layout, layout
from .recognition import MIN_TOKENS
from .spec import PLAIN_PRESET, PromptPreset, Spec
from .tokenizer import PartTokenizer

# What the adapter of the pair `small` was trained with, and a good one for any chat model.
INSTRUCTION = (
    "Answer the question from the documents, as briefly as possible. "
    "If they do not hold the answer, say: The documents do not say."
)


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """A model's name, window (tokens a prompt and its answer may have), tokenizer and spec.

    tuned: whether someone says how it reads passages that are blind to each other; a model without
    a spec was never trained to.
    """

    name: str
    window: int
    tokenizer: PartTokenizer
    spec: Spec
    tuned: bool = True

    @classmethod
    def of(cls, name: str, window: int, tokenizer: Any, spec: Spec | None) -> PromptFormat:
        """That of a Hugging Face `tokenizer`. Without a spec: no link tokens, its chat template."""
        known = spec if spec is not None else default_spec(tokenizer)
        return cls(name, window, PartTokenizer(tokenizer), known, tuned=spec is not None)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer renders conversations itself."""
        return has_template(self.tokenizer.hf)

    @property
    def link_tokens(self) -> int:
        """The most link tokens and markers that the passages of one message can take.

        Where any number of passages has link tokens, as many as the window holds of passages that
        are long enough to be recognised.
        """
        each, most = self.spec.links_per_passage, self.spec.max_passages
        if most is None:
            most = self.window // (MIN_TOKENS + each)
        return each * most + (0 if self.spec.mem_start is None else 2)

    def prompt(self, documents: Sequence[Document], question: str) -> list[Part]:
        """The spec's one-question prompt over `documents`."""
        return self.spec.prompt(documents, question)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[Part]:
        """Parts of a conversation, through the tokenizer's chat template.

        messages: `{"role", "content"}`; content is a string or a list of `Text` and `Passage`.
        Without a chat template the spec's preset wraps all contents as one question.
        Raises `PromptError` where the template drops or repeats a content.
        """
        contents = [content_parts(message["content"]) for message in messages]
        roles = [checked_role(message["role"]) for message in messages]
        if self.has_chat_template:
            return render(self.tokenizer.hf, roles, contents)
        preset = self.spec.prompt_preset
        inner = [part for parts in contents for part in parts]
        return [Text(preset.before, special=True), *inner, Text(preset.after, special=True)]

    def layout(self, parts: Iterable[Part]) -> Layout:
        """Token ids, positions and segments of a prompt. Raises `PromptError` and its kin."""
        prompt = layout(parts, self.tokenizer, self.spec)
        if len(prompt) >= self.window:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the model's window is {self.window} and "
                "must hold the answer too; use fewer or shorter passages (kvlink-rag: a smaller -k)"
            )
        return prompt

    def passage_tokens(self, document: Document, slot: int = 0) -> tuple[int, ...]:
        """Token ids that are encoded for `document`: all its snapshot depends on, but the model."""
        return tuple(self.tokenizer.encode(self.spec.render_passage(document, slot)))


def default_spec(tokenizer: Any) -> Spec:
    """A spec without link tokens; its preset is the tokenizer's own chat template, if any.

    There `INSTRUCTION` is the system message, or where the template has none begins the user's. The
    token that prompts begin with is the header: where attention goes that looks for nothing. Not
    all that stands before the user's text, which may hold today's date.
    """
    if not has_template(tokenizer):
        bos = getattr(tokenizer, "bos_token", None) or ""
        preset = replace(PLAIN_PRESET, before=bos)
        return Spec(presets={"plain": preset}, header=_first_token(bos, tokenizer))
    try:
        before, after = _instructed(tokenizer)
    except PromptError as error:
        raise PromptError(
            "the tokenizer's chat template drops the user's message; give a spec"
        ) from error
    preset = PromptPreset(before=before, after=after)
    header = _first_token(before, tokenizer)
    return Spec(presets={"chat": preset}, preset="chat", header=header)


def _first_token(text: str, tokenizer: Any) -> tuple[int, ...]:
    """The id of the special token that `text` begins with, if it does."""
    ids = PartTokenizer(tokenizer).encode(text, special=True)[:1]
    return tuple(i for i in ids if i in tokenizer.all_special_ids)


def _instructed(tokenizer: Any) -> tuple[str, str]:
    """What stands before and after the user's text, with `INSTRUCTION`. Raises `PromptError`."""
    with contextlib.suppress(PromptError):
        system, user, answer = template_pieces(tokenizer, ["system", "user"])
        return f"{system}{INSTRUCTION}{user}", answer
    user, answer = template_pieces(tokenizer, ["user"])
    return f"{user}{INSTRUCTION}{GAP}", answer
