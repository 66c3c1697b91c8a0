"""The vector index against plain numpy, and its file against damage."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storage_workers as workers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import kvlink_rag.retrieval.vector_index
from kvlink_rag.errors import ConfigError, IndexCorrupt
from kvlink_rag.retrieval.vector_index import VectorIndex

STRIDE = 1 if os.environ.get("KVLINK_STRESS") else 13


def vectors(count: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def brute_force(held: dict[int, np.ndarray], query: np.ndarray, k: int) -> list[int]:
    """Best first, ties by id."""
    scores = {id: float(vector @ query) for id, vector in held.items()}
    return sorted(held, key=lambda id: (-scores[id], id))[:k]


def filled(count: int = 20) -> VectorIndex:
    index = VectorIndex(8)
    index.add(range(100, 100 + count), vectors(count))
    return index


def test_search_is_exact() -> None:
    held = dict(zip(range(500), vectors(500), strict=True))
    index = VectorIndex(8)
    index.add(list(held), np.stack(list(held.values())))
    for query in vectors(20, seed=1):
        found = index.search(query, 10)
        assert [id for id, _ in found] == brute_force(held, query, 10)
        scores = [score for _, score in found]
        np.testing.assert_allclose(scores, [held[id] @ query for id, _ in found], rtol=1e-5)
        assert scores == sorted(scores, reverse=True)


# Small integers: inner products are exact, and ties are many.
small = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
steps = st.lists(
    st.tuples(st.sampled_from(["add", "remove"]), st.lists(st.tuples(st.integers(0, 9), small)))
)


@settings(deadline=None, max_examples=150)
@given(steps, small, st.integers(0, 12))
def test_any_history_gives_what_brute_force_gives(history: Any, query: Any, k: int) -> None:
    index, held = VectorIndex(2), dict[int, np.ndarray]()
    for what, items in history:
        chosen = {id: np.array(vector, dtype=np.float32) for id, vector in items}
        if what == "add":
            rows = np.array(list(chosen.values()), dtype=np.float32).reshape(len(chosen), 2)
            index.add(list(chosen), rows)
            held.update(chosen)
        else:
            assert index.remove(list(chosen)) == len(held.keys() & chosen.keys())
            held = {id: vector for id, vector in held.items() if id not in chosen}
    found = index.search(np.array(query, dtype=np.float32), k)
    assert [id for id, _ in found] == brute_force(held, np.array(query), k)
    assert len(index) == len(held)
    assert all((id in index) == (id in held) for id in range(10))


def test_ties_come_by_id_at_the_cut_too() -> None:
    index = VectorIndex(2)
    ids = list(range(1000))
    random.Random(0).shuffle(ids)
    index.add(ids, np.ones((1000, 2), dtype=np.float32))
    index.add([5000], np.full((1, 2), 2, dtype=np.float32))
    found = index.search(np.ones(2, dtype=np.float32), 7)
    assert [id for id, _ in found] == [5000, 0, 1, 2, 3, 4, 5]


def test_more_than_there_is_and_none_at_all() -> None:
    index = VectorIndex(3)
    query = np.ones(3, dtype=np.float32)
    assert index.search(query, 5) == []
    index.add([1 << 40], np.ones((1, 3), dtype=np.float32))
    assert index.search(query, 1000) == [(1 << 40, 3.0)]
    assert index.search(query, 0) == []
    assert index.search(query, -1) == []


def test_adding_an_id_again_replaces_its_vector() -> None:
    index = VectorIndex(2)
    index.add([7, 8], np.array([[1, 0], [0, 1]], dtype=np.float32))
    index.add([7], np.array([[5, 5]], dtype=np.float32))
    assert len(index) == 2
    assert index.search(np.array([1, 0], dtype=np.float32), 5) == [(7, 5.0), (8, 0.0)]


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        ([1], np.zeros((1, 3), dtype=np.float32)),
        ([1], np.zeros((1, 2), dtype=np.float64)),
        ([1], np.zeros(2, dtype=np.float32)),
        ([1, 2], np.zeros((1, 2), dtype=np.float32)),
        ([1, 1], np.zeros((2, 2), dtype=np.float32)),
        ([1], np.array([[np.nan, 0]], dtype=np.float32)),
        ([1], np.array([[np.inf, 0]], dtype=np.float32)),
        ([1.5], np.zeros((1, 2), dtype=np.float32)),
        ([[1]], np.zeros((1, 2), dtype=np.float32)),
    ],
)
def test_bad_vectors_and_ids_are_refused(ids: Any, rows: np.ndarray) -> None:
    index = VectorIndex(2)
    with pytest.raises(ConfigError):
        index.add(ids, rows)
    assert len(index) == 0


def test_bad_queries_are_refused() -> None:
    index = filled()
    for query in (np.ones(7, "f4"), np.ones(8), np.full(8, np.nan, "f4"), np.ones((1, 8), "f4")):
        with pytest.raises(ConfigError):
            index.search(query, 3)
    with pytest.raises(ConfigError):
        VectorIndex(0)


@pytest.mark.parametrize("count", [0, 1, 50])
def test_it_comes_back_from_its_file(tmp_path: Path, count: int) -> None:
    index = filled(count)
    index.save(tmp_path / "index", 42, source="catalog")
    loaded, version = VectorIndex.load(tmp_path / "index", dimension=8, source="catalog")
    assert version == 42
    assert len(loaded) == count
    for query in vectors(5, seed=2):
        assert loaded.search(query, 10) == index.search(query, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert (tmp_path / "index").stat().st_mode & 0o777 == 0o600


def test_a_loaded_index_can_be_changed(tmp_path: Path) -> None:
    filled().save(tmp_path / "index", 1)
    loaded, _ = VectorIndex.load(tmp_path / "index")
    (tmp_path / "index").unlink()
    loaded.remove([100])
    loaded.add([1], vectors(1, seed=5))
    assert len(loaded) == 20


def test_safetensors_reads_the_file(tmp_path: Path) -> None:
    filled().save(tmp_path / "index", 7, source="abc")
    loaded = load_file(tmp_path / "index")
    np.testing.assert_array_equal(loaded["ids"], np.arange(100, 120))
    np.testing.assert_array_equal(loaded["vectors"], vectors(20))
    with safe_open(tmp_path / "index", "np") as opened:
        facts = opened.metadata()
    assert (facts["format"], facts["catalog_version"], facts["source"]) == (
        "kvlink-index",
        "7",
        "abc",
    )


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "index"
    filled().save(path, 7)
    good = path.read_bytes()
    chance = random.Random(3)
    with path.open("r+b", buffering=0) as file:
        for _ in range(1000):
            at, bit = chance.randrange(len(good)), chance.randrange(8)
            os.pwrite(file.fileno(), bytes([good[at] ^ 1 << bit]), at)
            with pytest.raises(IndexCorrupt):
                VectorIndex.load(path)
            os.pwrite(file.fileno(), good[at : at + 1], at)
    VectorIndex.load(path)
    for length in sorted(chance.sample(range(len(good)), 200), reverse=True):
        os.truncate(path, length)
        with pytest.raises(IndexCorrupt):
            VectorIndex.load(path)


def test_another_dimension_or_source_is_refused(tmp_path: Path) -> None:
    filled().save(tmp_path / "index", 7, source="a")
    with pytest.raises(IndexCorrupt, match="dimension"):
        VectorIndex.load(tmp_path / "index", dimension=9)
    with pytest.raises(IndexCorrupt, match="source"):
        VectorIndex.load(tmp_path / "index", source="b")
    with pytest.raises(FileNotFoundError):
        VectorIndex.load(tmp_path / "missing")


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    from kvlink_rag.disk.checked_file import write_sealed
    from kvlink_rag.retrieval.vector_index import KIND

    save_file({"ids": np.arange(2), "vectors": vectors(2)}, tmp_path / "plain")
    ids, rows = torch.arange(2), torch.from_numpy(vectors(2))
    forged = [
        ({"ids": ids, "vectors": rows}, {}),
        ({"ids": ids, "vectors": rows}, {"catalog_version": "-1"}),
        ({"ids": ids, "vectors": rows}, {"catalog_version": "9" * 30}),
        ({"ids": ids, "vectors": rows[0]}, {"catalog_version": "1"}),
        ({"ids": ids, "vectors": rows[:1]}, {"catalog_version": "1"}),
        ({"ids": ids * 0, "vectors": rows}, {"catalog_version": "1"}),
        ({"ids": ids.float(), "vectors": rows}, {"catalog_version": "1"}),
        ({"ids": ids, "vectors": rows.half()}, {"catalog_version": "1"}),
        ({"ids": ids, "vectors": rows / 0}, {"catalog_version": "1"}),
        ({"ids": ids, "vectors": rows[:, :0]}, {"catalog_version": "1"}),
        ({"vectors": rows, "ids": ids}, {"catalog_version": "1"}),
        ({"ids": ids}, {"catalog_version": "1"}),
    ]
    for number, (tensors, facts) in enumerate(forged):
        with open(tmp_path / str(number), "xb", buffering=0) as file:
            write_sealed(file, KIND, tensors, facts)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(IndexCorrupt, match=r"found .*expected|metadata"):
            VectorIndex.load(path)


# Lists.


def around(count: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    """Vectors around 40 centres, as texts lie around topics."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, dimension))
    rows = centres[rng.integers(40, size=count)] + 0.6 * rng.standard_normal((count, dimension))
    return rows.astype(np.float32)


def nearest(rows: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    scores = rows @ query
    return np.lexsort((np.arange(len(rows)), -scores))[:k].tolist()


def test_lists_find_nearly_all_of_the_nearest_with_their_scores() -> None:
    rows, queries = around(4000), around(50, seed=1)
    index = VectorIndex(16, "ivf")
    index.add(range(4000), rows)
    assert not index.is_exact
    shares = []
    for query in queries:
        found = index.search(query, 10)
        assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)
        for id, score in found:
            assert score == pytest.approx(float(rows[id] @ query), rel=1e-5, abs=1e-5)
        shares.append(len({id for id, _ in found} & set(nearest(rows, query, 10))) / 10)
    assert 0.9 <= sum(shares) / len(shares) <= 1
    everything = index.search(queries[0], 4000)  # asked for all, lists must all be read
    assert sorted(id for id, _ in everything) == list(range(4000))


def test_lists_follow_changes_and_are_made_anew_when_they_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    plain = kvlink_rag.retrieval.vector_index._centroids
    monkeypatch.setattr(
        kvlink_rag.retrieval.vector_index,
        "_centroids",
        lambda rows: made.append(len(rows)) or plain(rows),
    )
    held: dict[int, np.ndarray] = {}
    index, rng = VectorIndex(16, "ivf"), random.Random(0)
    for step in range(12):
        ids = rng.sample(range(9000), 700)
        rows = around(700, seed=step)
        index.add(ids, rows)
        held.update(zip(ids, rows, strict=True))
        gone = rng.sample(range(9000), 100)
        assert index.remove(gone) == sum(held.pop(id, None) is not None for id in gone)
        assert len(index) == len(held)
        order = sorted(held)
        query = around(1, seed=100 + step)[0]
        found = index.search(query, len(held))
        assert sorted(id for id, _ in found) == order
        expected = np.sort(np.stack([held[id] for id in order]) @ query)[::-1]
        assert np.allclose([score for _, score in found], expected, rtol=1e-4, atol=1e-4)
        assert np.array_equal(index.vectors(order[:9]), np.stack([held[i] for i in order[:9]]))
        index.save(tmp_path / "index", step)
        index, version = VectorIndex.load(tmp_path / "index", search="ivf")
        assert version == step
    assert made[0] >= 1000
    assert len(made) == 2
    assert made[1] >= 3.5 * made[0]


def test_lists_go_by_size_and_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = around(1500)

    def exact(search: str, count: int = 1500) -> bool:
        index = VectorIndex(16, search)
        index.add(range(count), rows[:count])
        return index.is_exact

    assert exact("auto")
    assert not exact("ivf")
    assert exact("ivf", count=900)
    monkeypatch.setattr(kvlink_rag.retrieval.vector_index, "LARGE", 1200 * 16 * 4)
    assert exact("auto", count=1199)
    assert not exact("auto", count=1200)
    assert exact("exact")
    with pytest.raises(ConfigError, match="expected one of auto, exact, ivf"):
        VectorIndex(16, "hnsw")


def test_saved_lists_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = VectorIndex(16, "ivf")
    index.add(range(1500), around(1500))
    index.save(tmp_path / "lists", 1)
    plain = VectorIndex(16, "exact")
    plain.add(range(1500), around(1500))
    plain.save(tmp_path / "plain", 1)
    query = around(1, seed=5)[0]
    assert not VectorIndex.load(tmp_path / "plain", search="ivf")[0].is_exact

    def fail(rows: np.ndarray) -> np.ndarray:
        raise AssertionError("made again")

    monkeypatch.setattr(kvlink_rag.retrieval.vector_index, "_centroids", fail)
    loaded, _ = VectorIndex.load(tmp_path / "lists")
    assert not loaded.is_exact
    assert loaded.search(query, 10) == index.search(query, 10)
    exact, _ = VectorIndex.load(tmp_path / "lists", search="exact")
    assert exact.is_exact
    assert exact.search(query, 10) == plain.search(query, 10)


def test_forged_lists_are_refused(tmp_path: Path) -> None:
    from kvlink_rag.disk.checked_file import write_sealed
    from kvlink_rag.retrieval.vector_index import KIND

    ids, rows = torch.arange(3), torch.from_numpy(vectors(3))
    good = {"ids": ids, "vectors": rows, "centroids": rows[:2], "lists": torch.tensor([0, 1, 1])}
    wrong = [
        {**good, "lists": torch.tensor([0, 1, 2])},
        {**good, "lists": torch.tensor([0, 1, -1])},
        {**good, "lists": torch.tensor([0, 1])},
        {**good, "lists": torch.tensor([0.0, 1, 1])},
        {**good, "centroids": rows[:2, :3]},
        {**good, "centroids": rows[:0]},
        {**good, "centroids": rows[:2] / 0},
        {**good, "more": ids},
        {n: t for n, t in good.items() if n != "lists"},
        {n: good[n] for n in ("ids", "vectors", "lists", "centroids")},
    ]
    for number, tensors in enumerate([good, *wrong]):
        with open(tmp_path / str(number), "xb", buffering=0) as file:
            write_sealed(file, KIND, tensors, {"catalog_version": "1"})
    assert len(VectorIndex.load(tmp_path / "0")[0]) == 3
    for number in range(1, len(wrong) + 1):
        with pytest.raises(IndexCorrupt, match="expected"):
            VectorIndex.load(tmp_path / str(number))


def test_a_kill_while_saving_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "index"
    workers.perform(workers.save_index(str(path), 5, 1))
    seen = set()
    for line in range(1, 10_000, STRIDE):
        code = workers.run("kill_at", line, "save_index", str(path), 9, 2)
        loaded, version = VectorIndex.load(path)
        assert (version, len(loaded)) in {(1, 5), (2, 9)}
        seen.add(version)
        workers.perform(workers.save_index(str(path), 5, 1))
        assert [p.name for p in tmp_path.iterdir()] == ["index"]  # leftovers are swept
        if code == 0:
            break
    assert seen == {1, 2}


def test_searches_beside_changes() -> None:
    index, wrong = filled(50), []
    stop = threading.Event()

    def search() -> None:
        try:
            while not stop.is_set():
                found = index.search(vectors(1, seed=4)[0], 10)
                assert len({id for id, _ in found}) == len(found) == 10
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for round in range(100):
        index.add(range(1000, 1010), vectors(10, seed=round))
        index.remove(range(1000, 1010))
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(index) == 50
