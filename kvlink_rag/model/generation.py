"""Prefill, decode, and tokens to text.

1. prefill: one forward over the computed tokens gives the next token's logits.
2. sample: logits to a token id.
3. decode: one forward a token.
4. text: token ids to pieces of valid Unicode that never split a stop string.

Knows the backbone and token ids; knows no documents, no store and no prompt templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from kvlink_rag.arguments import is_count
from kvlink_rag.engine.backbone import Backbone, LiveCache
from kvlink_rag.errors import ConfigError
from kvlink_rag.prompt.layout import Layout
from kvlink_rag.snapshots.assemble import Assembled


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. Raises `ConfigError` for impossible values.

    max_new_tokens: the most tokens generated. top_p: the smallest set of tokens with this
    probability is sampled from. stop: strings that end the answer and are left out of it.
    seed: for sampling; None draws another each time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not is_count(self.max_new_tokens):
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens!r}, expected a whole number of at least 1"
            )
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature!r}, expected a finite number >= 0")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p!r}, expected a number above 0 and at most 1")
        if self.seed is not None and not (is_count(self.seed, 0) and self.seed < 2**64):
            raise ConfigError(f"seed is {self.seed!r}, expected a whole number from 0 to 2**64 - 1")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ConfigError(f"stop is {self.stop!r}, expected non-empty strings")

    def generator(self) -> torch.Generator:
        """The random source of one answer."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def prefill(backbone: Backbone, prompt: Layout, assembled: Assembled) -> Tensor:
    """Run over the computed tokens, appending to the cache: float32 logits [vocab] of the next."""
    left = assembled.computed
    logits = backbone.forward(
        prompt.token_ids[left], prompt.positions[left], prompt.segments[left], assembled.cache
    )
    return logits[-1]


def decode_one_token(backbone: Backbone, token_id: int, position: int, cache: LiveCache) -> Tensor:
    """Append one generated token at `position`: float32 logits [vocab] of the next."""
    token, at = torch.tensor([token_id]), torch.tensor([position])
    return backbone.forward(token, at, torch.zeros(1, dtype=torch.int64), cache)[-1]


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from float32 logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.cpu() / sampling.temperature, dim=-1)
    values, ids = probabilities.sort(descending=True, stable=True)
    values[values.cumsum(0) - values >= sampling.top_p] = 0
    return int(ids[torch.multinomial(values, 1, generator=generator)])


class TextPieces:
    """Token ids in, pieces of text out: valid Unicode at every step, no stop string, not half one.

    decode: token ids to text, U+FFFD where bytes are not whole yet.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._context = self._read = 0
        self._held = ""
        self.stopped = False
        self.visible = False

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is now certain, often ""."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        if after.endswith("\N{REPLACEMENT CHARACTER}") or len(after) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """The text still held back, once no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._context : self._read])
        rest = self._decode(self._ids[self._context :])[len(before) :]
        piece = self._release(rest)
        piece, self._held = piece + self._held, ""
        return piece

    def _release(self, text: str) -> str:
        """Pass on `text` up to a stop string, holding back what may begin one."""
        text = self._held + text
        self.visible = self.visible or bool(text.strip())
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
