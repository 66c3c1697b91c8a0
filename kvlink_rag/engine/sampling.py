"""Logits to token ids, as `Sampling` says. Knows numbers; knows no model and no text but stops."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from kvlink_rag.arguments import is_count
from kvlink_rag.errors import ConfigError

LEAST = 1e-6  # temperature; below it logits divided by it may be beyond float32, so it is greedy


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. Raises `ConfigError` for impossible values.

    max_new_tokens: the most tokens generated. top_k: so many of the best tokens are sampled from
    (0: all). top_p: the smallest set of tokens with this probability. min_p: those with at least
    this share of the best one's probability. repetition_penalty: above 1, what stands in the prompt
    or the answer already becomes less likely. Each as transformers has it. stop: strings that end
    the answer and are left out of it. seed: for sampling; None draws another each time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not is_count(self.max_new_tokens):
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens!r}, expected a whole number of at least 1"
            )
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature!r}, expected a finite number >= 0")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p!r}, expected a number above 0 and at most 1")
        if not is_count(self.top_k, 0):
            raise ConfigError(f"top_k is {self.top_k!r}, expected a whole number, 0 for all")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p!r}, expected a number from 0 to 1")
        penalty = self.repetition_penalty
        if not _is_number(penalty) or not 0 < penalty < float("inf"):
            raise ConfigError(f"repetition_penalty is {penalty!r}, expected a number above 0")
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


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Tensor | None = None
) -> int:
    """One token id from float32 logits [vocab]; seen: int64 ids of prompt and answer so far."""
    if sampling.repetition_penalty != 1 and seen is not None:
        logits = _penalised(logits, seen.to(logits.device), sampling.repetition_penalty)
    if sampling.temperature < LEAST:
        return int(logits.argmax())
    values, ids = (logits.cpu() / sampling.temperature).sort(descending=True, stable=True)
    probabilities = _kept(values, sampling)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def _kept(values: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of logits [vocab] that stand best first, 0 where top_k, top_p or min_p cut."""
    if sampling.top_k:
        values = values[: sampling.top_k]
    probabilities = torch.softmax(values, dim=-1)
    probabilities[probabilities.cumsum(0) - probabilities >= sampling.top_p] = 0
    probabilities[probabilities < sampling.min_p * probabilities[0]] = 0
    return probabilities


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of seen ids divided by the penalty, negative ones multiplied (CTRL, Keskar et al.,
    arXiv 1909.05858, section 4.1)."""
    found = logits[seen]
    return logits.scatter(0, seen, torch.where(found < 0, found * penalty, found / penalty))
