"""Which weights a model computes with: named by a digest, proved at each use.

The name holds as long as a cheap look at the weights (`disk.loaded_weights`) and what of the
configuration shapes keys and values stay the same. Knows which parts of a configuration count;
knows no prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvlink_rag.disk.digests import FileStates
from kvlink_rag.disk.forks import ForkSafeLock
from kvlink_rag.disk.loaded_weights import LoadedWeights, Look

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


class WeightsIdentity:
    """The name of a model's weights, for as long as they are what it names.

    source, states, merged: as in `LoadedWeights`. shaping: settings of the family that count
    besides. For any number of threads.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: Any,
        source: Path | None,
        states: FileStates | None = None,
        merged: str = "",
        shaping: Sequence[str] = (),
    ) -> None:
        self._shaping = (*_SHAPING, *shaping)
        self._weights, self._config = LoadedWeights(model, source, states, merged), config
        self._lock = ForkSafeLock()
        self._known: tuple[Look, str, str] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights and what of the configuration shapes keys and values.

        Computed once, and again where the look of the model is another.
        """
        with self._lock:
            look, shape = self._weights.look(), self._shape()
            if self._known is None or self._known[:2] != (look, shape):
                if self._known is not None:
                    logger.info("the model's weights changed in memory; they get another name")
                self._known = look, shape, self._name(look, shape)
            return self._known[2]

    def _name(self, look: Look, shape: str) -> str:
        facts: list[Any] = [self._weights.digest(look), json.loads(shape)]
        facts += [look.adapters] if look.adapters else []  # as it was before adapters were seen
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _shape(self) -> str:
        shape = {name: getattr(self._config, name, None) for name in self._shaping}
        return json.dumps(shape, sort_keys=True, default=str)
