"""Forwards of fixed shape over a cache of fixed capacity, and CUDA graphs that replay them.

A `Workspace` is a live cache whose unwritten entries stand at a position that no query reaches.
The prefill is padded to a bucket of tokens; what its padding writes is hidden as well, and later
tokens write over it. Nothing here waits for the device or looks at a tensor's numbers on the way,
so CUDA graphs may record it, one for each group of layers: copies of later groups go on meanwhile.
Knows the backbone; knows no snapshot and no prompt. On any doubt the plain forward is taken.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from .attention import NAME as GROUPED
from .backbone import Backbone, LiveCache, Step
from .device import new_event

GROUPS = 8  # of layers, each one graph
TOKENS = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512)  # shapes of a forward
SMALLEST = 1024  # entries
KEPT = 2  # workspaces
HIDDEN = 1 << 40  # the position of entries that nothing sees

logger = logging.getLogger(__name__)


class Workspaces:
    """The workspaces of one model: each serves one answer at a time.

    record: whether shapes that come again become CUDA graphs. For any number of threads.
    """

    def __init__(self, backbone: Backbone, *, record: bool) -> None:
        self._backbone, self.record = weakref.ref(backbone), record
        self.refused: str | None = None  # why the plain forward alone is used from now on
        self.replays = self.taken = 0
        self._held: list[Workspace] = []  # the most recently taken last
        self._weights: tuple[int, ...] = ()
        self._lock = threading.Lock()
        self.recording = threading.Lock()  # one graph at a time

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
        if self.refused is not None or tokens is None:
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

    def refuse(self, reason: BaseException) -> None:
        """Take the plain forward from now on; says so once."""
        if self.refused is None:
            self.refused = f"{type(reason).__name__}: {reason}"
            logger.warning("no CUDA graphs from now on, the plain forward is used: %s", reason)
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
                found = Workspace(self, backbone, size)
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


class Workspace:
    """A live cache of fixed capacity, and the forwards over it.

    at, segments: int64 [capacity], position and segment of each entry; `HIDDEN` where nothing is.
    """

    def __init__(self, owner: Workspaces, backbone: Backbone, capacity: int) -> None:
        self.owner, self.backbone, self.capacity = owner, weakref.proxy(backbone), capacity
        everything = torch.zeros(capacity, dtype=torch.int64)
        self.static = backbone.new_cache(everything, everything, capacity)
        self.at, self.segments = self.static.positions, self.static.segments.clone()
        self.pool = torch.cuda.graph_pool_handle() if owner.record else None
        self.groups = layer_groups(backbone.layers, GROUPS)
        self._forwards: dict[int, _Forward] = {}
        self._holder: Callable[[], LiveCache | None] = lambda: None
        self._done = new_event(backbone.device)

    @property
    def busy(self) -> bool:
        """Whether an answer uses it."""
        return self._holder() is not None

    def begin(self, positions: Tensor, segments: Tensor) -> LiveCache:
        """A live cache here, whose first entries, at these positions, are still to be filled."""
        if self._done is not None:
            torch.cuda.current_stream(self.at.device).wait_event(self._done)
        self.backbone.side.join()  # copies for an answer that failed before its forward
        standing = len(positions)
        facts = torch.zeros(2, self.capacity, dtype=torch.int64)
        facts[0] = HIDDEN
        facts[0, :standing], facts[1, :standing] = positions, segments
        _send(facts[0], self.at)
        _send(facts[1], self.segments)
        keys, values = self.static.buffers
        for buffer in (keys, values):
            buffer[:, :, standing:].zero_()  # hidden, but 0 times infinity would not be
        cache = LiveCache(keys, values, self.at[:standing], self.segments[:standing])
        cache.workspace = self
        self._holder = weakref.ref(cache)
        return cache

    def forward(
        self, token_ids: Tensor, positions: Tensor, segments: Tensor, cache: LiveCache, keep: int
    ) -> Tensor | None:
        """See `Backbone.forward`; None where the plain forward has to go on with `cache`."""
        start, tokens = len(cache.positions), len(token_ids)
        size = bucket(tokens)
        if size is None or keep != 1 or start + size > self.capacity or bool(segments.any()):
            self._leave(cache)
            return None
        forward = self._forwards.get(size)
        if forward is None:
            forward = self._forwards[size] = _Forward(self, size)
        if self.owner.record and self.owner.refused is None and forward.runs == 1:
            try:
                forward.record()
            except RuntimeError as error:  # memory too: the plain forward needs less
                self._forwards.clear()
                self.owner.refuse(error)
                self._leave(cache)
                return None
        forward.set(token_ids, positions, start)
        for group in range(len(self.groups)):
            if cache.ready:
                self.backbone.side.wait(cache.ready[min(group, len(cache.ready) - 1)])
            forward.play(group)
        forward.runs += 1
        cache.ready = ()
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self.at.device))
        stop = start + tokens
        cache.positions, cache.segments = self.at[:stop], self.segments[:stop]
        for layer in cache.layers:
            layer.length = stop
        return forward.logits[None].clone()  # the next replay writes over it

    def _leave(self, cache: LiveCache) -> None:
        """From here on `cache` is an ordinary one, which keeps this workspace's buffers."""
        for mark in cache.ready:
            self.backbone.side.wait(mark)
        cache.ready, cache.workspace = (), None


class _Forward:
    """One shape of forward: `tokens` tokens, the last one's logits. Reads and writes one workspace.

    inputs: int64 on the device: token ids, positions, positions of their entries (`HIDDEN` for
    padding) and places of their entries, `tokens` of each, and which token is the last.
    """

    def __init__(self, workspace: Workspace, tokens: int) -> None:
        self._workspace = weakref.proxy(workspace)
        self._tokens, self.runs = tokens, 0
        device = workspace.at.device
        self._inputs = torch.zeros(4 * tokens + 1, dtype=torch.int64, device=device)
        self._ids, self._at, self._key_at, self._places = self._inputs[:-1].view(4, tokens)
        self._last = self._inputs[-1:]
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._step: Step
        self._hidden: Tensor
        self.logits: Tensor

    def set(self, token_ids: Tensor, positions: Tensor, start: int) -> None:
        """The tokens (int64 on the CPU), whose entries are the ones from `start` on.

        Padding repeats the last token, so that its rows see what that one sees.
        """
        real, padding = len(token_ids), self._tokens - len(token_ids)
        hidden = torch.full((padding,), HIDDEN)
        rows = [
            *(token_ids, token_ids[-1:].expand(padding)),
            *(positions, positions[-1:].expand(padding)),
            *(positions, hidden),
            *(torch.arange(start, start + self._tokens), torch.tensor([real - 1])),
        ]
        _send(torch.cat(rows), self._inputs)

    def play(self, group: int) -> None:
        """Run one group of layers; the last one's end is in `logits`."""
        if self._graphs:
            self._graphs[group].replay()
            self._workspace.owner.replays += 1
        else:
            self._run(group)

    def record(self) -> None:
        """Record all groups, as graphs. Raises `RuntimeError` where CUDA cannot."""
        workspace, device = self._workspace, self._inputs.device
        with workspace.owner.recording, _on_stream_of_before(device):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            graphs = []
            for group in range(len(workspace.groups)):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=workspace.pool, stream=stream, capture_error_mode="thread_local"
                ):
                    self._run(group)
                graphs.append(graph)
            self._graphs = graphs

    def _run(self, group: int) -> None:
        """On tensors that stay where they are, without a look at their numbers."""
        workspace = self._workspace
        backbone, groups = workspace.backbone, workspace.groups
        if group == 0:
            workspace.at.index_copy_(0, self._places, self._key_at)
            self._step = backbone.step(self._at, workspace.at, workspace.segments)
            self._hidden = backbone.embed(self._ids)
        for number in range(backbone.layers)[groups[group]]:
            self._hidden = backbone.run_layer(
                number, self._hidden, self._step, workspace.static, self._places
            )
        if group == len(groups) - 1:
            self.logits = backbone.head(self._hidden[0].index_select(0, self._last))


def layer_groups(layers: int, groups: int) -> list[slice]:
    """`layers` in at most `groups` stretches, as even as can be."""
    if groups == 1:
        return [slice(None)]
    groups = min(groups, layers)
    ends = [layers * n // groups for n in range(groups + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def bucket(tokens: int) -> int | None:
    """The shape that `tokens` are padded to; None where there are too many, or none."""
    return next((size for size in TOKENS if 0 < tokens <= size), None)


def capacity_of(entries: int) -> int:
    """The capacity of a workspace for `entries`: a power of two, or one and a half of it."""
    size = SMALLEST
    while size < entries:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@contextmanager
def _on_stream_of_before(device: torch.device) -> Iterator[None]:
    """On `device`; then on the stream of before again, where a failed recording leaves another."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        before = torch.cuda.current_stream(device)
        try:
            yield
        finally:
            torch.cuda.set_stream(before)


def _send(source: Tensor, target: Tensor) -> None:
    """A small CPU tensor to the device, without waiting for what runs there."""
    if target.is_cuda:
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
