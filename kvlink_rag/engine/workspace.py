"""A live cache of fixed capacity with forwards of fixed shape, and CUDA graphs that replay them.

Unwritten entries stand at a position that no query reaches. The prefill is padded to a bucket of
tokens; what its padding writes is hidden as well, and later tokens write over it. Nothing here
waits for the device or looks at a tensor's numbers on the way, so CUDA graphs may record it, one
for each group of layers: copies of later groups go on meanwhile. Knows the backbone; knows no other
workspace, no snapshot and no prompt. On any doubt the plain forward is taken.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .backbone import Backbone, Step
from .copy_stream import new_event
from .layer_groups import GROUPS, layer_groups
from .live_cache import LiveCache

TOKENS = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512)  # shapes of a forward
HIDDEN = 1 << 40  # the position of entries that nothing sees

logger = logging.getLogger(__name__)


class Graphs:
    """Whether the forwards of a model's workspaces become CUDA graphs, and what came of it.

    record: whether shapes that come again are recorded. refused: why the plain forward alone is
    used from now on, or None. replays: of graphs, so far. recording: held meanwhile, so that there
    is one at a time. on_refusal: called once `refused` is known, to drop what is of no use then.
    """

    def __init__(self, record: bool, on_refusal: Callable[[], None]) -> None:
        self.record = record
        self.refused: str | None = None
        self.replays = 0
        self.recording = threading.Lock()
        self._on_refusal = on_refusal

    def refuse(self, reason: BaseException) -> None:
        """Take the plain forward from now on; says so once."""
        if self.refused is None:
            self.refused = f"{type(reason).__name__}: {reason}"
            logger.warning("no CUDA graphs from now on, the plain forward is used: %s", reason)
        self._on_refusal()


class Workspace:
    """A live cache of fixed capacity, and the forwards over it.

    at, segments: int64 [capacity], position and segment of each entry; `HIDDEN` where nothing is.
    """

    def __init__(self, backbone: Backbone, capacity: int, graphs: Graphs) -> None:
        self.backbone, self.capacity, self.graphs = weakref.proxy(backbone), capacity, graphs
        everything = torch.zeros(capacity, dtype=torch.int64)
        self.static = backbone.new_cache(everything, everything, capacity)
        self.at, self.segments = self.static.positions, self.static.segments.clone()
        self.pool = torch.cuda.graph_pool_handle() if graphs.record else None
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
        if self.graphs.record and self.graphs.refused is None and forward.runs == 1:
            try:
                forward.record()
            except RuntimeError as error:  # memory too: the plain forward needs less
                self._forwards.clear()
                self.graphs.refuse(error)
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
            self._workspace.graphs.replays += 1
        else:
            self._run(group)

    def record(self) -> None:
        """Record all groups, as graphs. Raises `RuntimeError` where CUDA cannot."""
        workspace, device = self._workspace, self._inputs.device
        with workspace.graphs.recording, _on_stream_of_before(device):
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


def bucket(tokens: int) -> int | None:
    """The shape that `tokens` are padded to; None where there are too many, or none."""
    return next((size for size in TOKENS if 0 < tokens <= size), None)


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
