"""Computed runs kept between questions: exact reuse of what is not a passage.

The keys and values of a computed run (a system prompt, a passage's link tokens, an earlier turn)
depend on everything before it, so an entry is keyed by the whole chain of runs and passages up to
and including it. Lives in memory under a byte budget. Knows tensors and digests only.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .layout import Layout


@dataclass(frozen=True, slots=True)
class Run:
    """Keys after RoPE and values of one computed run: each [layers, kv_heads, tokens, head_dim]."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes


class PrefixCache:
    """Least-recently-used runs under `budget` bytes. Safe to share between threads."""

    def __init__(self, budget: int = 256 << 20) -> None:
        self.budget = budget
        self.nbytes = self.hits = self.misses = 0
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, key: str) -> bool:
        return key in self._runs

    def get(self, key: str) -> Run | None:
        """The run under `key`, now the most recently used, or None."""
        with self._lock:
            run = self._runs.get(key)
            if run is None:
                self.misses += 1
                return None
            self.hits += 1
            self._runs.move_to_end(key)
            return run

    def put(self, key: str, run: Run) -> None:
        """Keep `run`; the least recently used go until the budget holds."""
        with self._lock:
            if key in self._runs or run.nbytes > self.budget:
                return
            self._runs[key] = run
            self.nbytes += run.nbytes
            while self.nbytes > self.budget:
                _, oldest = self._runs.popitem(last=False)
                self.nbytes -= oldest.nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._runs.clear()
            self.nbytes = 0


def chain_keys(prompt: Layout, root: str) -> list[str]:
    """One SHA-256 key a span: `root`, then kind and token ids of every span up to it.

    Link tokens, markers and order enter through their ids; `root` names model and scope.
    """
    ids = prompt.token_ids.numpy().astype("<i8")
    digest = hashlib.sha256(root.encode())
    keys = []
    for span in prompt.spans:
        kind = b"P" if span.document is not None else b"C"
        digest.update(kind + np.int64(len(span)).tobytes() + ids[span.start : span.stop].tobytes())
        keys.append(digest.hexdigest())
    return keys
