"""The stream beside the forward on which copies to a device run, and what they are staged in.

Knows torch's devices, streams and events; knows no model, no snapshot and no prompt. On a CPU all
of it works too, at once and without a stream.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

STAGING = 32 << 20  # bytes of one pinned staging buffer
BUFFERS = 2  # one is filled while the other is copied from

Mark = torch.cuda.Event | None

logger = logging.getLogger(__name__)


class CopyStream:
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
            self._buffer = pinned(self._buffer)

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


def pinned(tensor: Tensor) -> Tensor:
    """A pinned copy, or `tensor` itself where the host has no pinned memory left."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        logger.warning("no pinned host memory, copies to the device are slower: %s", error)
        return tensor
