"""A child that is forked in the middle of other threads' work can go on."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import storage_workers as workers
from conftest import ModelMaker, WordEmbedder
from storage_workers import ids_of, key_of, make_snapshot
from stress_crash import ended, fork

from kvlink_rag import Document, KVLinkModel, KVLinkRAG
from kvlink_rag.collection.catalog import Catalog
from kvlink_rag.disk.forks import ForkSafeLock, undivided
from kvlink_rag.snapshots.store import SnapshotStore

HANGING_SECONDS = 120

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[tuple[SnapshotStore, Catalog]]:
    with (
        SnapshotStore(tmp_path / "store", size_limit=20_000) as store,
        Catalog.open(tmp_path / "catalog.db", create=True) as catalog,
    ):
        yield store, catalog


def test_a_fork_waits_for_the_stretches_of_other_threads() -> None:
    seen: list[str] = []
    begun = threading.Event()

    def stretch() -> None:
        with undivided():
            begun.set()
            time.sleep(0.3)
            seen.append("stretch")

    thread = threading.Thread(target=stretch)
    thread.start()
    begun.wait()
    child = fork(lambda: seen == ["stretch"] or os._exit(3))
    seen.append("fork")
    assert ended(child) == 0
    assert seen == ["stretch", "fork"]
    thread.join()


def test_a_fork_does_not_wait_for_its_own_stretch() -> None:
    def child() -> None:
        with undivided():
            pass
        assert ended(fork(lambda: None)) == 0

    with undivided(), undivided():
        assert ended(fork(child)) == 0
    assert ended(fork(child)) == 0


def use(store: SnapshotStore, catalog: Catalog, number: int) -> None:
    """Everything that takes a lock somewhere: ours, SQLite's, a file's."""
    store.put(key_of(number), make_snapshot(number))
    found = store.get(key_of(number), ids_of(number))
    assert found is None or workers.same(found, make_snapshot(number))
    store.stats()
    catalog.upsert([workers.record(f"{number}", "x" * number)])
    catalog.get([f"{number}"])
    Catalog.open(catalog.path).close()
    SnapshotStore(store.directory).close()


def use_until(stop: threading.Event, *args: Any) -> None:
    while not stop.is_set():
        use(*args)


def test_a_child_forked_in_the_middle_of_work_can_work(
    storage: tuple[SnapshotStore, Catalog],
) -> None:
    """Without `undivided` it hangs in most of these, in a lock of ours or within SQLite."""
    store, catalog = storage
    chance = random.Random(0)
    for _ in range(12):
        stop = threading.Event()
        threads = [
            threading.Thread(target=use_until, args=(stop, store, catalog, n)) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(chance.uniform(0, 0.1))

        def child() -> None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it within SQLite, too
            signal.alarm(HANGING_SECONDS)
            use(store, catalog, 5)
            thread = threading.Thread(target=use, args=(store, catalog, 6))
            thread.start()
            thread.join()
            store.close()
            catalog.close()

        process = fork(child)
        stop.set()
        for thread in threads:
            thread.join()
        code = ended(process)
        assert code == 0, "it hung" if code == -signal.SIGALRM else ""
    assert store.check() == []
    assert catalog.check() == []


def test_a_lock_that_another_thread_holds_is_free_in_the_child() -> None:
    lock, held, done = ForkSafeLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def child() -> None:
        with lock, lock:
            pass

    assert ended(fork(child)) == 0
    done.set()
    thread.join()
    with lock:  # one that the forking thread holds stays its own in the child
        assert ended(fork(child)) == 0
    child()


def test_a_collection_can_be_asked_in_a_child_forked_while_it_loads(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add([Document("a mill by a river", id="mill")])
    loading, forked = threading.Event(), threading.Event()

    def load(*arguments: Any, **options: Any) -> KVLinkModel:
        loading.set()
        forked.wait()
        return model

    monkeypatch.setattr(KVLinkModel, "from_pretrained", load)
    with KVLinkRAG.open(tmp_path, embedder=embedder) as rag:
        thread = threading.Thread(target=lambda: rag.model)
        thread.start()
        loading.wait()

        def child() -> None:
            forked.set()
            assert rag.ask("which mill?", k=1, max_new_tokens=1).hits[0].document.id == "mill"

        assert ended(fork(child)) == 0
        forked.set()
        thread.join()
