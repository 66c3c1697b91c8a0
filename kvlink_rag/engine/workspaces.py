"""The workspaces of one model, which serve one answer at a time each. Knows no forward's inside."""

from __future__ import annotations

import logging
import threading
import weakref

import torch
from torch import Tensor

from .attention import NAME as GROUPED
from .backbone import Backbone
from .live_cache import LiveCache
from .workspace import Graphs, Workspace, bucket

SMALLEST = 1024  # entries
KEPT = 2  # workspaces

logger = logging.getLogger(__name__)


class Workspaces:
    """The workspaces of one model: each serves one answer at a time.

    record: whether shapes that come again become CUDA graphs. For any number of threads.
    """

    def __init__(self, backbone: Backbone, *, record: bool) -> None:
        self._backbone = weakref.ref(backbone)
        self.graphs = Graphs(record, self._drop_all)
        self.taken = 0
        self._held: list[Workspace] = []  # the most recently taken last
        self._weights: tuple[int, ...] = ()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, backbone: Backbone) -> Workspaces | None:
        """Those of `backbone`, or None where fixed shapes are not proved for it."""
        devices = {parameter.device for parameter in backbone.model.parameters()}
        attention = backbone.config._attn_implementation
        if len(devices) > 1 or attention not in (GROUPED, "sdpa"):
            logger.info(
                "no CUDA graphs: found attention %r and %d devices, expected %r or 'sdpa' and one",
                *(attention, len(devices), GROUPED),
            )
            return None
        return cls(backbone, record=backbone.device.type == "cuda")

    def take(
        self, positions: Tensor, segments: Tensor, capacity: int, computed: int
    ) -> LiveCache | None:
        """A live cache in a free workspace, its first entries yet to be filled, or None.

        positions, segments: int64 [entries] of these on the CPU. capacity: entries in all.
        computed: tokens of the first forward. The workspace is free again once the cache is gone.
        """
        tokens = bucket(computed)
        if self.graphs.refused is not None or tokens is None:
            return None
        with self._lock:
            workspace = self._find(max(capacity, len(positions) + tokens))
            if workspace is None:
                return None
            self.taken += 1
            return workspace.begin(positions, segments)

    def clear(self) -> None:
        """Drop the workspaces that are free, and their graphs."""
        with self._lock:
            self._keep([workspace for workspace in self._held if workspace.busy])

    def _drop_all(self) -> None:
        with self._lock:
            self._keep([])  # an answer under way has its own hold on what it needs

    def _find(self, entries: int) -> Workspace | None:
        """A free workspace of that many entries, made where there is room for another one."""
        backbone = self._backbone()
        if backbone is None:
            return None
        self._forget_other_weights(backbone)
        size = capacity_of(entries)
        free = [w for w in self._held if not w.busy]
        suit = [w for w in free if size <= w.capacity <= 2 * size]
        found = min(suit, key=lambda w: w.capacity, default=None)
        if found is not None:
            self._held.remove(found)
        elif len(self._held) >= KEPT and not free:
            return None
        else:
            if len(self._held) >= KEPT:
                self._keep([w for w in self._held if w is not free[0]])
            free.clear()  # so that the dropped one's memory can be taken
            try:
                found = Workspace(backbone, size, self.graphs)
            except torch.cuda.OutOfMemoryError as error:
                logger.info("no room for a workspace of %d entries: %s", size, error)
                return None
        self._held.append(found)
        return found

    def _forget_other_weights(self, backbone: Backbone) -> None:
        """A graph reads weights where they lay; where they have moved it is of no use."""
        weights = tuple(p.data_ptr() for p in backbone.model.parameters())
        if weights != self._weights:
            self._keep([])
            self._weights = weights

    def _keep(self, workspaces: list[Workspace]) -> None:
        """Drop the others; what still writes to their buffers comes before what takes them next."""
        if (backbone := self._backbone()) is not None:
            backbone.side.join()
        self._held = workspaces


def capacity_of(entries: int) -> int:
    """The capacity of a workspace for `entries`: a power of two, or one and a half of it."""
    size = SMALLEST
    while size < entries:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
