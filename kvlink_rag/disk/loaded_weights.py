"""Weights in memory: a cheap look that tells whether they changed, and a digest that names them.

The digest is that of the weight files where what is in memory came from them unchanged, else of
the parameters themselves. The look: where the tensors lie, how often torch saw them changed, the
state of adapters, and a sample of each tensor's numbers, which also sees what torch does not count
(fused optimisers, `.data`, a mapped file written over). Knows tensors, the state of files, and
adapters as peft injects them; knows no architecture.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from .digests import FileStates, module_digest, weight_states, weights_digest

SAMPLED = 16  # numbers of each tensor that are looked at

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen of weights without reading them: equal looks, equal weights."""

    places: tuple[tuple[int, int], ...]
    sample: bytes
    adapters: str


class LoadedWeights:
    """The weights of a module. For one thread at a time.

    source: the directory they came from, if any. states: of its files before they were loaded;
    None: as they are now. merged: the digest of what was merged into them since, or "".
    """

    def __init__(
        self,
        module: torch.nn.Module,
        source: Path | None = None,
        states: FileStates | None = None,
        merged: str = "",
    ) -> None:
        self.module = module
        self._source, self._merged = source, merged
        self._states = states if states is not None or source is None else weight_states(source)
        self._modules: list[torch.nn.Module] = []
        self._structure: list[int] = [-1]  # of no module
        self._adapters: list[torch.nn.Module] = []
        self._addresses: list[int] = []
        self._samples: list[Tensor] = []
        self._loaded = self.look()

    def digest(self, look: Look) -> str:
        """Of the files, if they are those that were loaded and nothing changed since.

        look: of now.
        """
        source = self._source
        if source is not None and look == self._loaded and not look.adapters:
            digest = weights_digest(source)
            if weight_states(source) == self._states:
                return digest + self._merged
            logger.warning(
                "the weight files in %s changed since they were loaded; the model is known by "
                "what is in memory",
                source,
            )
        return module_digest(self.module)

    def look(self) -> Look:
        """What is seen of the weights now."""
        if self._children() != self._structure:  # a layer was put in another's place
            self._modules = list(self.module.modules())
            self._structure = self._children()
            self._adapters = [m for m in self._modules if _is_adapter(m)]
        tensors = self._tensors()
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses:
            self._addresses, self._samples = addresses, list(_samples(tensors))
        versions = (-1 if t.is_inference() else t._version for t in tensors)
        adapters = [_adapter_facts(module) for module in self._adapters]
        return Look(
            tuple(zip(addresses, versions, strict=True)),
            _digest(self._samples),
            json.dumps(adapters, default=str) if adapters else "",
        )

    def _children(self) -> list[int]:
        """Which modules stand below those known, by identity; walking the tree takes longer."""
        return [id(child) for module in self._modules for child in module._modules.values()]

    def _tensors(self) -> list[Tensor]:
        tensors = (
            tensor
            for module in self._modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
        )
        return [tensor for tensor in tensors if tensor is not None]


def _samples(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Views of up to `SAMPLED` numbers of each tensor, spread over it; each memory once."""
    seen: set[int] = set()
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if tensor.is_contiguous():
            flat = tensor.detach().view(-1)
            yield flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED]
        else:
            yield tensor.detach()[(0,) * (tensor.dim() - 1)][:SAMPLED]


@torch.no_grad()
def _digest(samples: list[Tensor]) -> bytes:
    """XXH3-128 over what the views hold now."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for sample in samples:
        kinds.setdefault((sample.dtype, sample.device), []).append(sample)
    digest = xxhash.xxh3_128()
    for alike in kinds.values():
        digest.update(torch.cat(alike).cpu().view(torch.uint8).numpy().data)
    return bytes(digest.digest())


def _is_adapter(module: torch.nn.Module) -> bool:
    """Whether peft put it around a layer: its effect depends on more than its tensors."""
    return hasattr(module, "adapter_layer_names") and hasattr(module, "active_adapters")


def _adapter_facts(module: Any) -> list[Any]:
    active = list(module.active_adapters)
    scaling = getattr(module, "scaling", None) or {}
    return [
        bool(module.disable_adapters),
        active,
        list(getattr(module, "merged_adapters", ())),
        {each: scaling[each] for each in active if each in scaling},
    ]
