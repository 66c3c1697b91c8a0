"""How a model's chats are written: the special text between messages.

Llama-3's is built in, as the KVLink authors write it (without a date); any other is read off the
tokenizer's chat template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvlink_rag.documents import Text
from kvlink_rag.errors import ConfigError, PromptError
from kvlink_rag.prompt.chat import has_template, template_pieces
from kvlink_rag.prompt.format import default_spec
from kvlink_rag.prompt.spec import PromptPreset


@dataclass(frozen=True, slots=True)
class Chat:
    """Special text before a system message, from there to the user's, to the assistant's, and on.

    system: stands before the system text; user: between system and user text; assistant: between
    user and assistant text; again: between assistant and the next user text. end: ends an answer
    and is the beginning of `again`. own: the prompt itself, where it is not made of these.
    """

    system: str
    user: str
    assistant: str
    again: str
    end: str
    own: PromptPreset | None = None

    def presets(self, instruction: str) -> dict[str, PromptPreset]:
        """The published prompts: documents in the user's message, or between system and user."""
        if self.own is not None:
            return {"evaluation": self.own}
        opened = self.system + instruction
        return {
            "evaluation": PromptPreset(before=opened + self.user, after=self.assistant),
            "training": PromptPreset(before=opened, between=self.user, after=self.assistant),
        }

    def opening(self, instruction: str) -> Text:
        """Everything up to the first user text; of a system text only the frame is special."""
        return Text(self.system + instruction + self.user, special=True)


LLAMA3 = Chat(
    system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
    user="<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    again="<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    end="<|eot_id|>",
)


def find_chat(name: str, tokenizer: Any) -> Chat:
    """`llama3`, or `template`: what the tokenizer's chat template writes around messages.

    `plain`: what a model without a spec is asked with; for questions only.
    Raises `ConfigError` where that template cannot be used.
    """
    if name == "llama3":
        return LLAMA3
    if name == "plain":
        own = default_spec(tokenizer).prompt_preset
        return Chat("", "", "", "", tokenizer.eos_token or "", own)
    if not has_template(tokenizer):
        raise ConfigError("the tokenizer has no chat template; set chat: llama3 or give it one")
    try:
        pieces = template_pieces(tokenizer, ("system", "user", "assistant", "user"))
    except PromptError as error:
        raise ConfigError(f"{error}; write another template") from error
    end = tokenizer.eos_token
    system, user, assistant, again, last = pieces
    if not end or not again.startswith(end) or assistant != last:
        raise ConfigError(
            f"found {again!r} after an answer and {assistant!r}, then {last!r} before one; "
            f"expected the first to begin with the end of text {end!r}, the others to be the same"
        )
    return Chat(system, user, assistant, again, end)
