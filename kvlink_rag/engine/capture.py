"""Hooks on a model's attention: keys before RoPE and values are captured, or others given.

They stay on the model and do nothing until a thread asks, each for itself. Knows which modules
give keys and values (`families`); knows no cache, no file and no prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .families import Family


@dataclass(frozen=True, slots=True)
class _Given:
    """Keys before RoPE and values of the tokens at `places`: [layers, kv_heads, n, head_dim]."""

    places: Tensor
    keys: Tensor
    values: Tensor

    def instead(self, states: Tensor, output: Tensor) -> Tensor:
        """`output` of one layer's hook, [1, tokens, …], with `states` of that layer put in."""
        changed = output.clone()
        kv_heads, _, head_dim = states.shape
        changed.view(output.shape[1], kv_heads, head_dim)[self.places] = states.transpose(0, 1)
        return changed


class Capture(threading.local):
    """Where this thread's hooks put keys before RoPE and values; None when not capturing.

    given: what they put in place of those of some tokens, or None.
    """

    keys: list[Tensor] | None = None
    values: list[Tensor] | None = None
    given: _Given | None = None

    def install(self, attentions: Iterable[torch.nn.Module], family: Family) -> None:
        """Hook the attention blocks of all layers, where RoPE is applied to the keys next."""
        for number, attention in enumerate(attentions):
            modules = {"keys": family.keys[-1], "values": family.values}
            for name, module in modules.items():
                hook = partial(self._keep, name, number)
                attention.get_submodule(module).register_forward_hook(
                    lambda _, __, output, hook=hook: hook(output)
                )

    def _keep(self, name: str, number: int, output: Tensor) -> Tensor | None:
        if (kept := getattr(self, name)) is not None:
            kept.append(output)
        if (given := self.given) is None:
            return None
        return given.instead(getattr(given, name)[number], output)

    @contextmanager
    def capturing(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Until the end of the block, forwards add keys and values to these lists, by layer."""
        lists: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.keys, self.values = lists
        try:
            yield lists
        finally:
            self.keys = self.values = None

    @contextmanager
    def giving(self, places: Tensor, keys: Tensor, values: Tensor) -> Iterator[None]:
        """Until the end of the block, forwards give the tokens at `places` these keys and values.

        places: int64 [n], indices of the token ids of the forward. keys before RoPE, values:
        [layers, kv_heads, n, head_dim]; all where the model is.
        """
        self.given = _Given(places, keys, values)
        try:
            yield
        finally:
            self.given = None
