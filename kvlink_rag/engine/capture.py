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
from torch.utils.hooks import RemovableHandle

from kvlink_rag.disk.forks import ForkSafeLock

from .families import Family


@dataclass(frozen=True, slots=True)
class _Source:
    """Where keys, or values, come from: these columns of what `module` gives.

    module: its name in an attention block. heads_first: see `Family`.
    """

    module: str
    columns: slice
    heads_first: bool = False

    def states(self, output: Tensor) -> Tensor:
        """Keys or values alone; copied where more came with them, so that no queries are kept."""
        states = output[..., self.columns]
        return states if states.shape == output.shape else states.contiguous()


@dataclass(frozen=True, slots=True)
class _Given:
    """Keys before RoPE and values of the tokens at `places`: [layers, kv_heads, n, head_dim]."""

    places: Tensor
    keys: Tensor
    values: Tensor

    def instead(self, states: Tensor, output: Tensor, source: _Source) -> Tensor:
        """`output` of one layer's hook with `states` of that layer put in.

        output: [1, tokens, …], or where heads come first [1, kv_heads, tokens, head_dim].
        """
        changed = output.clone()
        kv_heads, _, head_dim = states.shape
        part = changed[..., source.columns]
        if source.heads_first:
            part[0, :, self.places] = states
            return changed
        part.view(output.shape[1], kv_heads, head_dim)[self.places] = states.transpose(0, 1)
        return changed


class Capture(threading.local):
    """Where this thread's hooks put keys before RoPE and values; None when not capturing.

    given: what they put in place of those of some tokens, or None.
    """

    keys: list[Tensor] | None = None
    values: list[Tensor] | None = None
    given: _Given | None = None

    def keep(self, name: str, number: int, source: _Source, output: Tensor) -> Tensor | None:
        """What a hook does with `output` of layer `number`: None leaves it as it is."""
        if (kept := getattr(self, name)) is not None:
            kept.append(source.states(output))
        if (given := self.given) is None:
            return None
        return given.instead(getattr(given, name)[number], output, source)

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


class Hooks:
    """The hooks of all layers, where RoPE is applied to the keys next, and on the values.

    They follow the model: where a module was put in another's place, as an adapter does that is
    added later, the hook moves there. width: kv_heads * head_dim of the model.
    """

    def __init__(
        self,
        attentions: Iterable[torch.nn.Module],
        family: Family,
        width: int,
        capture: Capture,
    ) -> None:
        self._attentions, self._capture = list(attentions), capture
        keys, values = family.columns(width)
        self._sources = {
            "keys": _Source(family.keys[-1], keys, family.heads_first),
            "values": _Source(family.values, values),
        }
        self._hooked: dict[tuple[str, int], tuple[torch.nn.Module, RemovableHandle]] = {}
        self._lock = ForkSafeLock()
        self.follow()

    def follow(self) -> None:
        """Hook the modules that are there now."""
        with self._lock:
            for number, attention in enumerate(self._attentions):
                for name, source in self._sources.items():
                    self._hook(name, number, attention.get_submodule(source.module))

    def _hook(self, name: str, number: int, module: torch.nn.Module) -> None:
        hooked, handle = self._hooked.get((name, number), (None, None))
        if hooked is module:
            return
        if handle is not None:
            handle.remove()
        keep = partial(self._capture.keep, name, number, self._sources[name])
        handle = module.register_forward_hook(lambda _, __, output: keep(output))
        self._hooked[name, number] = module, handle
