"""Computed runs kept between questions: exact reuse of what is not a passage.

The keys and values of a computed run (a system prompt, a passage's link tokens, a question, an
answer) depend on everything before it and on nothing after, so an entry is keyed by the whole
chain of runs and passages up to and including it, and the beginning of a run is reused where a
new one goes on differently. Lives in memory under a byte budget. Knows tensors and digests only.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvlink_rag.prompt.layout import Layout

TRIED = 16  # runs after one chain that are compared with a new one, the latest first

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """Keys after RoPE and values of one computed run: each [layers, kv_heads, tokens, head_dim]."""

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes

    def part(self, layers: slice) -> Run:
        """Some layers, as views."""
        return Run(self.keys[layers], self.values[layers])

    def fill(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Write them in place, [layers, kv_heads, tokens, head_dim]; the keys stand rotated."""
        keys.copy_(self.keys)
        values.copy_(self.values)

    def first(self, count: int) -> Run:
        """The first `count` tokens, as views."""
        return Run(self.keys[:, :, :count], self.values[:, :, :count])


@dataclass(frozen=True, slots=True)
class _Kept:
    run: Run
    chain: str
    ids: Ids


class PrefixCache:
    """Least-recently-used runs under `budget` bytes. Safe to share between threads."""

    def __init__(self, budget: int = 256 << 20) -> None:
        self.budget = budget
        self.nbytes = self.hits = self.misses = 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._after: dict[str, list[str]] = {}  # keys of the runs that follow a chain
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, chain: str, ids: Ids) -> Run | None:
        """What is known of the run `ids` (int64 [tokens]) after `chain`: all, a beginning, None.

        The run it comes from is now the most recently used.
        """
        with self._lock:
            key, count = self._longest(chain, ids)
            if not count:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key].run.first(count)

    def put(self, chain: str, ids: Ids, run: Run) -> None:
        """Keep the `run` of `ids` after `chain`; the least recently used go until it fits."""
        key = run_key(chain, ids)
        with self._lock:
            if key in self._kept or run.nbytes > self.budget:
                return
            self._kept[key] = _Kept(run, chain, ids)
            self._after.setdefault(chain, []).append(key)
            self.nbytes += run.nbytes
            while self.nbytes > self.budget:
                self._drop_oldest()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._after.clear()
            self.nbytes = 0

    def _longest(self, chain: str, ids: Ids) -> tuple[str, int]:
        """The kept run after `chain` that begins as `ids` does, and for how many tokens."""
        exact = run_key(chain, ids)
        if exact in self._kept:
            return exact, len(ids)
        latest = self._after.get(chain, [])[: -TRIED - 1 : -1]
        found = [(shared(self._kept[key].ids, ids), key) for key in latest]
        count, key = max(found, default=(0, ""))
        return key, count

    def _drop_oldest(self) -> None:
        key, oldest = self._kept.popitem(last=False)
        self.nbytes -= oldest.run.nbytes
        siblings = self._after[oldest.chain]
        siblings.remove(key)
        if not siblings:
            del self._after[oldest.chain]


def shared(one: Ids, two: Ids) -> int:
    """How many ids both begin with."""
    length = min(len(one), len(two))
    differ = np.flatnonzero(one[:length] != two[:length])
    return int(differ[0]) if len(differ) else length


def run_key(chain: str, ids: Ids | Sequence[int], kind: bytes = b"C") -> str:
    """The key of a run, or with kind "P" of a passage, after the chain `chain`: SHA-256."""
    numbers = np.asarray(ids, dtype="<i8")
    return hashlib.sha256(chain.encode() + kind + numbers.tobytes()).hexdigest()


def chain_root(fingerprint: str, dtype: torch.dtype, scope: str) -> str:
    """What every chain begins with: SHA-256 over the model, its dtype and the scope."""
    return hashlib.sha256(f"{fingerprint}\0{dtype}\0{scope}".encode()).hexdigest()


def chain_keys(prompt: Layout, root: str) -> list[str]:
    """`root`, then one key a span: kind and token ids of every span up to it.

    Link tokens, markers and order enter through their ids; `root` is that of `chain_root`.
    """
    ids = prompt.token_ids.numpy()
    keys = [root]
    for span in prompt.spans:
        kind = b"P" if span.document is not None else b"C"
        keys.append(run_key(keys[-1], ids[span.start : span.stop], kind))
    return keys
