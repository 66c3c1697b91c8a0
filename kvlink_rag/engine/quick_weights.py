"""Weights in 8 bits for generated tokens, which wait for nothing but the reading of weights.

Only decode steps take them, a row at a time, whatever company it has. Prefill, snapshots and the
oracle keep the model's own weights, so that nothing that is stored depends on these; they are a
second copy, a byte a number. Weights are rounded by output channel, activations by row, both to
8 bits; products are torch's own (`quantized::linear_dynamic`: FBGEMM, Khudia et al.,
arXiv 2101.05615, or oneDNN). Knows linear layers; knows no prompt and no cache.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlink_rag.errors import ConfigError

from .processor import adds_products_of_bytes

Look = tuple[int, int]

LARGEST = 127  # of an 8-bit weight
ENGINES = ("x86", "fbgemm", "onednn")  # of torch, whose weights may have a scale a channel


logger = logging.getLogger(__name__)


class QuickWeights:
    """The 8-bit copies of a model's linear layers, in use while a thread says so.

    A layer whose weight is changed or replaced afterwards goes back to its own. Raises
    `ConfigError` on a GPU, and where torch has no such products for this processor.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        _check(model)
        self._here = threading.local()
        # 7-bit activations where the processor would overflow 16 bits adding two products
        self._reduced = not adds_products_of_bytes()
        linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
        for module in linears:
            self._take(module)
        taken = sum(module.weight.numel() for module in linears)
        logger.info("weights in 8 bits for generated tokens take %d bytes more", taken)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Until the end of the block, this thread's forwards take them."""
        self._here.on = True
        try:
            yield
        finally:
            self._here.on = False

    @torch.no_grad()
    def _take(self, linear: torch.nn.Linear) -> None:
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch means to drop tensors of this kind; `_check` says so where it has
            warnings.filterwarnings("ignore", message=".*quantize_per_channel.*deprecated")
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        packed = torch.ops.quantized.linear_prepack(rounded, bias)
        plain = linear.forward
        linear.forward = partial(self._forward, linear, plain, packed, _look(linear))  # type: ignore[method-assign]

    def _forward(
        self,
        linear: torch.nn.Linear,
        plain: Callable[[Tensor], Tensor],
        packed: Any,
        look: Look,
        states: Tensor,
    ) -> Tensor:
        """What `linear` gives for `states` [..., in]: [..., out]."""
        if not getattr(self._here, "on", False) or _look(linear) != look:
            return plain(states)
        rows = states.reshape(-1, 1, states.shape[-1]).float()
        made = [torch.ops.quantized.linear_dynamic(row, packed, self._reduced) for row in rows]
        out = made[0] if len(made) == 1 else torch.cat(made)
        return out.to(states.dtype).view(*states.shape[:-1], -1)


def _look(linear: torch.nn.Linear) -> Look:
    """Changes where the weight is another tensor, or was written to."""
    weight = linear.weight
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _check(model: torch.nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ConfigError(
            f"found a model on {device}, expected one on a CPU for weights in 8 bits; leave "
            "weights out"
        )
    engine = torch.backends.quantized.engine
    if engine not in ENGINES or not hasattr(torch, "quantize_per_channel"):
        raise ConfigError(
            f"torch {torch.__version__} has no products of 8-bit weights for this processor (found "
            f"the engine {engine!r}); leave weights out"
        )
