"""Snapshots in device memory, and the stream beside the forward that brings them there.

`Side` is the stream, `DeviceSnapshot` a snapshot that is, or is on its way, in device memory,
`DeviceMemory` keeps the hot ones under a byte budget. Knows torch's devices, streams and events;
knows no prompt, no store and no model. On a CPU all of it works too, at once and without a stream.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kvlink_rag.snapshots.snapshot import ALL, AnySnapshot

STAGING = 32 << 20  # bytes of one pinned staging buffer
BUFFERS = 2  # one is filled while the other is copied from
SHARE = 4  # the default budget is this part of the memory that is free

Mark = torch.cuda.Event | None

logger = logging.getLogger(__name__)


class Side:
    """The one stream of a device on which snapshots are copied and rotated.

    What is allocated in a block of `work` and freed later is used again on this stream only, in
    order; so dropping a snapshot never disturbs work on it that is still under way.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging: list[_Staging] = []
        self._lock = threading.Lock()  # of the staging buffers

    @contextmanager
    def work(self) -> Iterator[None]:
        """Put the block's work on the stream, behind all that the current stream was told before.

        The current stream does not wait for it, see `wait` and `join`, unless the block raises.
        """
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                yield
        except BaseException:
            self.join()
            raise

    def mark(self) -> Mark:
        """A point behind all that the stream was told so far."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: Mark) -> None:
        """Let the current stream wait until the stream has come to `mark`."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def join(self) -> None:
        """Let the current stream wait for all that the stream was told so far."""
        self.wait(self.mark())

    def borrow(self, *tensors: Tensor) -> None:
        """Say that the stream reads tensors made on another one, which may soon drop them."""
        if self.stream is not None:
            for tensor in tensors:
                tensor.record_stream(self.stream)

    def lend(self, *tensors: Tensor) -> None:
        """Say that the current stream reads tensors made on this one."""
        if self.stream is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self.device))

    @torch.inference_mode()  # else what was made in it could not be written to
    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy contiguous CPU `source` to contiguous `target` on the device, on the stream.

        Pinned memory is copied from as it is; other memory goes through the staging buffers, in
        turn, so that the host fills one while the device reads the other.
        """
        with self.work():
            if source.is_pinned():
                target.copy_(source, non_blocking=True)
                return
            with self._lock:
                pieces = zip(_pieces(target), _pieces(source), strict=True)
                for number, (to, piece) in enumerate(pieces):
                    self._buffers()[number % BUFFERS].pass_on(to, piece)

    def _buffers(self) -> list[_Staging]:
        while len(self._staging) < BUFFERS:
            self._staging.append(_Staging(self.device))
        return self._staging


class _Staging:
    """One pinned buffer, free again once the device has read it."""

    def __init__(self, device: torch.device) -> None:
        self._event = new_event(device)
        self._buffer = torch.empty(STAGING, dtype=torch.uint8)
        if self._event is not None:
            self._buffer = _pinned(self._buffer)

    def pass_on(self, target: Tensor, piece: Tensor) -> None:
        """uint8 `piece` of at most `STAGING` bytes to `target`, on the current stream."""
        if self._event is not None:
            self._event.synchronize()
        held = self._buffer[: len(piece)]
        held.copy_(piece)
        target.copy_(held, non_blocking=self._event is not None)
        if self._event is not None:
            self._event.record()


def new_event(device: torch.device) -> Mark:
    """An event that nothing has recorded yet, which nothing waits for; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """The bytes of a contiguous tensor, as views of at most `STAGING` bytes."""
    return torch.split(tensor.view(-1).view(torch.uint8), STAGING)


def _pinned(tensor: Tensor) -> Tensor:
    """A pinned copy, or `tensor` itself where the host has no pinned memory left."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        logger.warning("no pinned host memory, copies to the device are slower: %s", error)
        return tensor


class DeviceSnapshot:
    """A snapshot in device memory, or on its way: layers are copied when they are first asked for.

    For any number of threads. Used on the `Side` it was made on, or as `fill` and `exact` do.
    Raises `torch.cuda.OutOfMemoryError` where the device has no room for it.
    """

    def __init__(self, side: Side, host: AnySnapshot) -> None:
        self.codec, self.token_ids, self.nbytes = host.codec, host.token_ids, host.nbytes
        self._side, self._lock = side, threading.Lock()
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
        self._lock = threading.Lock()

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

    def __init__(self, side: Side, budget: int, pinned_budget: int = 0) -> None:
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
            host = host.moved(_pinned if on_gpu else torch.clone)
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
