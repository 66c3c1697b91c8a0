"""Which weights a model computes with: named by a digest, proved at each use.

A name is taken from the weight files where what is in memory came from them unchanged, else from
the parameters themselves. At each use a cheap look decides whether the name still holds: where the
tensors lie, how often torch saw them changed, the state of adapters, and a sample of each tensor's
numbers, which also sees what torch does not count (fused optimisers, `.data`, a mapped file written
over). Knows tensors, the state of files, and adapters as peft injects them; knows no prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from kvlink_rag.disk.digests import FileStates, module_digest, weight_states, weights_digest
from kvlink_rag.disk.forks import ForkSafeLock

SAMPLED = 16  # numbers of each tensor that are looked at
# What of a configuration shapes keys and values and does not show in the weights.
_SHAPING = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "layer_types",
    "rope_parameters",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Look:
    """What is seen of a model without reading it: equal looks, equal weights."""

    places: tuple[tuple[int, int], ...]
    sample: bytes
    adapters: str
    shape: str


class WeightsIdentity:
    """The name of a model's weights, for as long as they are what it names.

    source: the directory the weights came from, if any. states: of its files before they were
    loaded; None: as they are now. merged: the digest of what was merged into them since, or "". For
    any number of threads.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: Any,
        source: Path | None,
        states: FileStates | None = None,
        merged: str = "",
    ) -> None:
        self._model, self._config = model, config
        self._source, self._merged = source, merged
        self._states = states if states is not None or source is None else weight_states(source)
        self._lock = ForkSafeLock()
        self._modules: list[torch.nn.Module] = []
        self._structure: list[int] = [-1]  # of no model
        self._adapters: list[torch.nn.Module] = []
        self._addresses: list[int] = []
        self._samples: list[Tensor] = []
        self._loaded = self._look()
        self._known: tuple[_Look, str] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights and what of the configuration shapes keys and values.

        Computed once, and again where the look of the model is another.
        """
        with self._lock:
            look = self._look()
            if self._known is None or self._known[0] != look:
                if self._known is not None:
                    logger.info("the model's weights changed in memory; they get another name")
                self._known = look, self._name(look)
            return self._known[1]

    def _name(self, look: _Look) -> str:
        weights = self._weights(look)
        facts: list[Any] = [weights, json.loads(look.shape)]
        facts += [look.adapters] if look.adapters else []  # as it was before adapters were seen
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _weights(self, look: _Look) -> str:
        """Of the files, if they are those that were loaded and nothing changed since."""
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
        return module_digest(self._model)

    def _look(self) -> _Look:
        if self._children() != self._structure:  # a layer was put in another's place
            self._modules = list(self._model.modules())
            self._structure = self._children()
            self._adapters = [m for m in self._modules if _is_adapter(m)]
        tensors = self._tensors()
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses:
            self._addresses, self._samples = addresses, list(_samples(tensors))
        versions = (-1 if t.is_inference() else t._version for t in tensors)
        shape = {name: getattr(self._config, name, None) for name in _SHAPING}
        adapters = [_adapter_facts(module) for module in self._adapters]
        return _Look(
            tuple(zip(addresses, versions, strict=True)),
            _digest(self._samples),
            json.dumps(adapters, default=str) if adapters else "",
            json.dumps(shape, sort_keys=True, default=str),
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
