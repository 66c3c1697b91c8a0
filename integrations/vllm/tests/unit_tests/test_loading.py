"""Loads beside vLLM's steps: each is reported once, however it ends."""

from __future__ import annotations

import threading
from functools import partial

from vllm_kvlink.loading import Loading


def broken(given: object) -> None:
    raise RuntimeError("of this request alone")


def test_every_load_is_reported_once() -> None:
    loading = Loading()
    for name in ("a", "b", "c", "d"):
        loading.begin(name, partial(broken if name == "b" else len, ()))
    ended: set[str] = set()
    failed: set[str] = set()
    while len(ended) < 4:
        new = loading.ended()
        assert not new.all & ended
        ended, failed = ended | new.all, failed | new.failed
    loading.close()
    assert (ended, failed) == ({"a", "b", "c", "d"}, {"b"})
    assert loading.ended().all == set()


def test_nothing_waits_for_a_load() -> None:
    loading, gate = Loading(), threading.Event()
    loading.begin("slow", lambda: None if gate.wait(60) else 1 / 0)
    assert loading.ended().all == set()
    loading.wait(0.01)
    assert loading.ended().all == set()
    gate.set()
    loading.wait(60)  # until it has ended, and no longer
    loading.wait(60)
    loading.close()
    assert loading.ended().all == {"slow"}
    loading.wait(60)  # nothing is under way
