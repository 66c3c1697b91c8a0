"""Snapshots in device memory, and which of them are kept there.

`DeviceSnapshot` is a snapshot that is, or is on its way, in device memory, `DeviceMemory` keeps the
hot ones under a byte budget, as they are stored: assembly alone brings them to the model's dtype.
Knows snapshots by key; knows no prompt, no store and no model. On a CPU all of it works too.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kvlink_rag.disk.forks import ForkSafeLock
from kvlink_rag.engine.copy_stream import CopyStream, pinned

from .snapshot import ALL, AnySnapshot

SHARE = 4  # the default budget is this part of the memory that is free


class DeviceSnapshot:
    """A snapshot in device memory, or on its way: layers are copied when they are first asked for.

    For any number of threads. Used on the `CopyStream` it was made on, or as `fill` and `exact` do.
    Raises `torch.cuda.OutOfMemoryError` where the device has no room for it.
    """

    def __init__(self, side: CopyStream, host: AnySnapshot) -> None:
        self.codec, self.token_ids, self.nbytes = host.codec, host.token_ids, host.nbytes
        self._side, self._lock = side, ForkSafeLock()
        self._host: AnySnapshot | None = host
        self._layers, self._here = len(host.tensors["keys"]), 0
        with side.work():
            self._twin = host.moved(
                lambda t: torch.empty(t.shape, dtype=t.dtype, device=side.device)
            )

    @property
    def arriving(self) -> bool:
        """Whether some layers are not copied yet."""
        return self._host is not None

    def codec_for(self, dtype: torch.dtype) -> str:
        """See `Snapshot.codec_for`."""
        return self._twin.codec_for(dtype)

    def part(self, layers: slice) -> AnySnapshot:
        """Some layers, on the device. What reads them has to do so on the side stream."""
        with self._lock:
            stop = layers.indices(self._layers)[1]
            if self._host is not None and self._here < stop:
                self._copy(self._host, slice(self._here, stop))
                self._here = stop
                self._host = self._host if stop < self._layers else None
        return self._twin.part(layers)

    def _copy(self, host: AnySnapshot, layers: slice) -> None:
        there = self._twin.part(layers).tensors
        for name, tensor in host.part(layers).tensors.items():
            if name != "token_ids":
                self._side.upload(there[name], tensor)

    def fill(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None:
        """See `Snapshot.fill`; the current stream may go on at once."""
        with self._side.work():
            self.part(ALL).fill(keys, values, cos, sin)
        self._side.join()

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Snapshot.exact`."""
        whole = self.part(ALL)
        self._side.join()
        self._side.lend(*(t for name, t in whole.tensors.items() if name != "token_ids"))
        return whole.exact(dtype)


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Item = TypeVar("Item", bound=_Sized)


class Recent(Generic[Item]):
    """The least recently used go until the rest fits `budget` bytes. Safe to share by threads."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = self.hits = self.misses = 0
        self._held: OrderedDict[str, Item] = OrderedDict()
        self._lock = ForkSafeLock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: str) -> Item | None:
        """What is held under `key`, now the most recently used."""
        with self._lock:
            item = self._held.get(key)
            if item is None:
                self.misses += 1
                return None
            self.hits += 1
            self._held.move_to_end(key)
            return item

    def put(self, key: str, item: Item) -> None:
        """Hold `item`, unless something is held under `key` or it is larger than the budget."""
        with self._lock:
            if key in self._held or item.nbytes > self.budget:
                return
            self._held[key] = item
            self.nbytes += item.nbytes
            while self.nbytes > self.budget:
                self.nbytes -= self._held.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()
            self.nbytes = 0


class DeviceMemory:
    """Hot snapshots by key: `on_device` in device memory, `pinned` in pinned host memory.

    budget, pinned_budget: bytes of each; 0 keeps none.
    """

    def __init__(self, side: CopyStream, budget: int, pinned_budget: int = 0) -> None:
        self.side = side
        self.on_device: Recent[DeviceSnapshot] = Recent(budget)
        self.pinned: Recent[AnySnapshot] = Recent(pinned_budget)

    def get(self, key: str) -> DeviceSnapshot | None:
        """The snapshot of `key`, from either memory."""
        held = self.on_device.get(key)
        if held is not None or not self.pinned.budget:
            return held
        host = self.pinned.get(key)
        return None if host is None else self._take(key, host)

    def take(self, key: str, host: AnySnapshot) -> DeviceSnapshot:
        """`host`, just read or made, on its way to the device; kept as the budgets allow."""
        if host.nbytes <= self.pinned.budget:
            on_gpu = self.side.stream is not None
            host = host.moved(pinned if on_gpu else torch.clone)
            self.pinned.put(key, host)
        return self._take(key, host)

    def shrink(self) -> None:
        """Give the device its memory back, and take at most half as much from now on."""
        self.on_device.clear()
        self.on_device.budget //= 2

    def _take(self, key: str, host: AnySnapshot) -> DeviceSnapshot:
        snapshot = DeviceSnapshot(self.side, host)
        self.on_device.put(key, snapshot)
        return snapshot


def default_budget(device: torch.device) -> int:
    """Bytes of device memory for snapshots: a quarter of what is free; 0 on a CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) // SHARE if device.type == "cuda" else 0
