"""Logits to token ids, as `Sampling` says. Knows numbers; knows no model and no text but stops."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from kvlink_rag.arguments import is_count
from kvlink_rag.errors import ConfigError


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


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from float32 logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.cpu() / sampling.temperature, dim=-1)
    values, ids = probabilities.sort(descending=True, stable=True)
    values[values.cumsum(0) - values >= sampling.top_p] = 0
    return int(ids[torch.multinomial(values, 1, generator=generator)])
