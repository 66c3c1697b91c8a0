"""Text to token ids and back, part by part.

Wraps a Hugging Face tokenizer so that special-token strings in user text stay plain text. Knows
nothing of prompts; `layout` decides what is encoded.
"""

from __future__ import annotations

import copy
import re
from array import array
from collections import OrderedDict
from functools import cached_property
from typing import Any

KEPT = 2048  # texts whose token ids are remembered
LONGEST = 1 << 14  # characters of such a text
_SURROGATE = re.compile("[\ud800-\udfff]")


class PartTokenizer:
    """A Hugging Face tokenizer that encodes one part at a time. Safe to share between threads.

    The ids of the latest plain texts are remembered: the same passages come with each question, and
    encoding 5,000 tokens takes as long as a GPU needs for the rest of the first token.

    hf: the tokenizer as loaded (`PreTrainedTokenizerBase`).
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        # `split_special_tokens` is state of the backend, not of the call: a copy, so no race.
        self._plain = copy.deepcopy(hf)
        self._known: OrderedDict[str, array[int]] = OrderedDict()

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token, by its text."""
        added = self.hf.added_tokens_decoder.items()
        named = {token.content: id for id, token in added if token.special}
        return named | dict(zip(self.hf.all_special_tokens, self.hf.all_special_ids, strict=True))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text` alone: nothing is added before or after.

        special: special-token strings become their tokens (templates only). Otherwise they are
        spelled out like any text. Lone surrogates, which no tokenizer takes, become U+FFFD.
        """
        clean = _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
        if not clean:
            return []
        if special:  # templates: few, short, and of a tokenizer that others may change
            return self._encode(self.hf, clean, special)
        if (known := self._known.get(clean)) is not None:
            return known.tolist()
        ids = self._encode(self._plain, clean, special)
        if len(clean) <= LONGEST:
            self._known[clean] = array("q", ids)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return ids

    def _encode(self, tokenizer: Any, text: str, special: bool) -> list[int]:
        ids = tokenizer(
            text, add_special_tokens=False, split_special_tokens=not special, verbose=False
        )["input_ids"]
        return list(ids)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens; bytes that are not whole yet give U+FFFD."""
        text = self._plain.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
