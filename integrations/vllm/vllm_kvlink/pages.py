"""Keys and values into vLLM's pages, by the attention back end's own function.

How a page is laid out inside is the back end's affair: it is handed tensors and slots. Knows layers
by the attributes that vLLM gives them; imports no vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kvlink_rag.errors import ConfigError


class Writer(Protocol):
    """An attention back end's implementation."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write key and value [tokens, kv_heads, head_dim] into the slots (int64 [tokens])."""
        ...


class PagedLayer(Protocol):
    """One attention layer of vLLM."""

    impl: Writer
    kv_cache: Tensor


def find_layers(context: Mapping[str, Any], names: Sequence[str], count: int) -> list[PagedLayer]:
    """The layers `names` of vLLM's forward context, by their numbers from 0.

    Raises `ConfigError` where they are not `count` layers, one a number, that can be written to.
    """
    numbered = {_number(name): context[name] for name in names}
    if len(names) != count or sorted(numbered) != list(range(count)):
        raise ConfigError(
            f"found pages of the layers {sorted(names)[:3]}… ({len(names)}), expected one for each "
            f"of the {count} layers of the model that prefills"
        )
    layers = [numbered[number] for number in range(count)]
    for name, layer in zip(sorted(names), layers, strict=True):
        if not hasattr(getattr(layer, "impl", None), "do_kv_cache_update"):
            raise ConfigError(
                f"the attention back end of {name} has no do_kv_cache_update, expected one that "
                "writes keys and values by slots; choose another with --attention-backend"
            )
    return layers


def _number(name: str) -> int:
    """The number in a layer's name, such as model.layers.7.self_attn.attn."""
    found = re.findall(r"\.(\d+)\.", f".{name}.")
    if len(found) != 1:
        raise ConfigError(f"found a layer named {name!r}, expected one number in its name")
    return int(found[0])


def slots(block_ids: Sequence[int], block_size: int, first: int, count: int) -> Tensor:
    """The slots of tokens `[first, first + count)` of a request: int64 [count]."""
    places = torch.arange(first, first + count)
    blocks = torch.tensor(block_ids, dtype=torch.int64)[places // block_size]
    return blocks * block_size + places % block_size


@torch.inference_mode()
def write(layers: Sequence[PagedLayer], keys: Tensor, values: Tensor, at: Tensor) -> None:
    """Write tokens into the slots `at` (int64 [tokens]) of every layer.

    keys (after RoPE), values: [layers, kv_heads, tokens, head_dim].
    """
    for layer, key, value in zip(layers, keys, values, strict=True):
        cache = layer.kv_cache
        key, value = (t.transpose(0, 1).to(cache.device).contiguous() for t in (key, value))
        layer.impl.do_kv_cache_update(layer, key, value, cache, at.to(cache.device))
