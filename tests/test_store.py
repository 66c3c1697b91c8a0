"""The store: what is put comes back or is a miss, whatever happens to process, file or table."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import random
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diskcache
import pytest
import storage_workers as workers
from storage_workers import ids_of, key_of, make_snapshot, same

from kvlink_rag.collection.catalog import Catalog
from kvlink_rag.errors import ConfigError, StorageError
from kvlink_rag.snapshots.file_format import snapshot_size
from kvlink_rag.snapshots.store import SnapshotStore
from kvlink_rag.snapshots.store import store as store_module
from kvlink_rag.snapshots.store.table import SnapshotDisk

SIZE = snapshot_size(make_snapshot(0), key_of(0))
STRIDE = 1 if os.environ.get("KVLINK_STRESS") else 11  # kill at every n-th line


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SnapshotStore]:
    with SnapshotStore(tmp_path / "store") as opened:
        yield opened


def put(store: SnapshotStore, *numbers: int) -> None:
    for number in numbers:
        assert store.put(key_of(number), make_snapshot(number))


def get(store: SnapshotStore, number: int) -> bool:
    """Whether `number` is there; what is there must be right."""
    found = store.get(key_of(number), ids_of(number))
    assert found is None or same(found, make_snapshot(number))
    return found is not None


def snapshot_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("??/*"))


def file_of(store: SnapshotStore, number: int) -> Path:
    (path,) = store.directory.glob(f"??/{key_of(number)}-*")
    return path


def sql(store: SnapshotStore, statement: str, *values: object) -> list[Any]:
    with sqlite3.connect(store.directory / "cache.db") as connection:
        rows = connection.execute(statement, values).fetchall()
    connection.close()
    return rows


def is_whole(directory: Path, damaged: bool = False) -> None:
    """No file without a row, nothing left over, and `check` mends what else there is."""
    with SnapshotStore(directory) as opened:
        named = {str(directory / name) for (name,) in sql(opened, "SELECT filename FROM Cache")}
        assert {str(path) for path in snapshot_files(directory)} <= named
        assert list((directory / "tmp").iterdir()) == []
        problems = opened.check(fix=True)
        assert damaged or all("missing file" in line for line in problems)
        assert opened.check() == []
        assert opened.bytes() == sum(p.stat().st_size for p in snapshot_files(directory))
        for number in range(8):
            assert get(opened, number) == (key_of(number) in opened)


# What it does.


def test_put_get_delete(store: SnapshotStore) -> None:
    assert not get(store, 1)
    put(store, 1, 2)
    assert get(store, 1)
    assert key_of(1) in store
    assert store.keys() == [key_of(1), key_of(2)]
    assert (len(store), store.bytes()) == (2, 2 * SIZE)
    assert store.delete(key_of(1))
    assert not store.delete(key_of(1))
    assert key_of(1) not in store
    assert not get(store, 1)
    assert get(store, 2)
    seen = store.stats()
    assert (seen.count, seen.bytes, seen.hits, seen.misses) == (1, SIZE, 2, 2)
    assert (seen.corrupt, seen.evicted) == (0, 0)
    assert store.check() == []
    assert len(snapshot_files(store.directory)) == 1


def test_it_is_there_after_reopening(store: SnapshotStore) -> None:
    put(store, 1)
    store.close()
    with SnapshotStore(store.directory) as again:
        assert get(again, 1)


def test_putting_again_replaces(store: SnapshotStore) -> None:
    put(store, 1)
    (old,) = snapshot_files(store.directory)
    held = store.get(key_of(1), ids_of(1))
    put(store, 1)
    assert get(store, 1)
    assert snapshot_files(store.directory) != [old]
    assert len(snapshot_files(store.directory)) == 1
    assert held is not None
    assert same(held, make_snapshot(1))


def test_only_the_owner_can_read(store: SnapshotStore) -> None:
    put(store, 1)
    for path in [store.directory, *store.directory.rglob("*")]:
        found = stat.S_IMODE(path.stat().st_mode)
        assert found == (0o700 if path.is_dir() else 0o600), path


def test_an_open_directory_is_narrowed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o755)
    SnapshotStore(tmp_path / "store").close()
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "key",
    [b"ab" * 32, "AB" * 32, "ab" * 31, "../" + "a" * 61, ("ab" * 32,), 7, None, "ab" * 32 + "\n"],
)
def test_keys_are_digests_only(store: SnapshotStore, key: Any) -> None:
    for action in (
        lambda: store.put(key, make_snapshot(1)),
        lambda: store.get(key, [1]),
        lambda: store.delete(key),
        lambda: key in store,
    ):
        with pytest.raises(ConfigError, match="64 hexadecimal"):
            action()


def test_many_are_read_as_one_is(store: SnapshotStore) -> None:
    for number in range(1, 13):
        put(store, number)
    wanted = {key_of(n): ids_of(n) for n in range(14)}
    path = next(p for p in snapshot_files(store.directory) if key_of(5) in p.name)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = store.stats()
    found = store.get_many(wanted)
    assert list(found) == list(wanted)
    assert [n for n in range(14) if found[key_of(n)] is None] == [0, 5, 13]
    for number in (1, 12):
        assert same(found[key_of(number)], make_snapshot(number))
    after = store.stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (11, 3)
    assert (after.corrupt, len(store), path.exists()) == (1, 11, False)
    assert store.get_many({}) == {}


# The budget.


def test_the_budget_bounds_the_bytes_on_disk(tmp_path: Path) -> None:
    with SnapshotStore(tmp_path / "s", size_limit=3 * SIZE) as store:
        for number in range(10):
            put(store, number)
            on_disk = sum(p.stat().st_size for p in snapshot_files(store.directory))
            assert on_disk == store.bytes() <= 3 * SIZE
        assert store.keys() == [key_of(n) for n in (7, 8, 9)]
        assert store.stats().evicted == 7
        assert store.check() == []


def test_room_is_made_before_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, temporary ones too, never take more than the budget."""
    with SnapshotStore(tmp_path / "s", size_limit=3 * SIZE) as store:
        seen = []
        original = store_module.write_snapshot

        def write(*args: Any, **options: Any) -> int:
            written = original(*args, **options)
            files = {p.stat().st_ino: p.stat().st_size for p in store.directory.rglob("*.s*")}
            seen.append(sum(files.values()))
            return written

        monkeypatch.setattr(store_module, "write_snapshot", write)
        put(store, *range(8))
        assert len(seen) == 8
        assert max(seen) <= 3 * SIZE


def test_the_least_recently_read_go_first(tmp_path: Path) -> None:
    with SnapshotStore(tmp_path / "s", size_limit=3 * SIZE) as store:
        put(store, 0, 1, 2)
        time.sleep(0.02)  # the clock of file times ticks every few milliseconds
        assert get(store, 0)
        put(store, 3)
        assert sorted(store.keys()) == sorted(key_of(n) for n in (0, 2, 3))
        put(store, 4, 5)
        assert sorted(store.keys()) == sorted(key_of(n) for n in (3, 4, 5))


def test_reads_of_another_process_count_as_recent(tmp_path: Path) -> None:
    with (
        SnapshotStore(tmp_path / "s", size_limit=2 * SIZE) as writer,
        SnapshotStore(tmp_path / "s") as reader,
    ):
        put(writer, 0, 1)
        time.sleep(0.02)
        assert get(reader, 0)
        put(writer, 2)
        assert get(writer, 0)
        assert not get(writer, 1)


def test_a_read_is_no_write_transaction(tmp_path: Path) -> None:
    with SnapshotStore(tmp_path / "s", size_limit=2 * SIZE) as store:
        put(store, 0)
        lock = sqlite3.connect(tmp_path / "s" / "cache.db")
        lock.execute("BEGIN IMMEDIATE")  # whoever needs to write would wait for 60 s
        assert get(store, 0)
        assert not get(store, 1)
        assert key_of(0) in store
        store.stats()
        lock.close()


def test_what_is_larger_than_the_budget_is_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with SnapshotStore(tmp_path / "s", size_limit=SIZE - 1) as store:
        assert not store.put(key_of(1), make_snapshot(1))
        assert len(store) == 0
        assert "over the limit" in caplog.text
        assert snapshot_files(store.directory) == []


def test_a_smaller_budget_takes_effect_at_opening(
    store: SnapshotStore, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, *range(6))
    store.close()
    with SnapshotStore(store.directory, size_limit=2 * SIZE) as smaller:
        assert sorted(smaller.keys()) == sorted(key_of(n) for n in (4, 5))
        assert f"evicted 4 snapshots ({4 * SIZE} bytes)" in caplog.text
        assert smaller.stats().evicted == 4
        assert smaller.check() == []
        put(smaller, 6)
        assert smaller.bytes() <= 2 * SIZE
        assert get(smaller, 6)


def test_a_mapping_outlives_eviction(tmp_path: Path) -> None:
    with SnapshotStore(tmp_path / "s", size_limit=SIZE) as store:
        put(store, 1)
        held = store.get(key_of(1), ids_of(1))
        put(store, 2)
        assert key_of(1) not in store
        assert held is not None
        assert same(held, make_snapshot(1))


# Damage.


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_other(path: Path) -> None:
    """A sound snapshot of another passage under this one's name."""
    with SnapshotStore(path.parents[1] / "other") as other:
        put(other, 9)
        shutil.copy(snapshot_files(other.directory)[0], path)
    shutil.rmtree(path.parents[1] / "other")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (damage_flip, "corrupt file"),
    "truncated": (lambda path: os.truncate(path, 100), "wrong size"),
    "empty": (lambda path: os.truncate(path, 0), "wrong size"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "wrong size"),
    "of another passage": (damage_other, "corrupt file"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "wrong size"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_a_logged_miss(
    store: SnapshotStore, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    put(store, 1, 2)
    path = file_of(store, 1)
    DAMAGE[name][0](path)
    assert not get(store, 1)
    assert key_of(1) in caplog.text
    assert (store.stats().corrupt, store.stats().misses) == (1, 1)
    put(store, 1)
    assert get(store, 1)
    assert get(store, 2)
    store.check(fix=True)
    assert store.check() == []


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds_and_mends_a_damaged_file(store: SnapshotStore, name: str) -> None:
    put(store, 1, 2)
    path = file_of(store, 1)
    DAMAGE[name][0](path)
    found = store.check()
    assert len(found) == 1
    assert DAMAGE[name][1] in found[0]
    assert path.name in found[0]
    assert store.check(fix=True)[0] == found[0]
    assert store.check() == []
    assert store.keys() == [key_of(2)]


def test_a_deleted_file_is_a_miss(store: SnapshotStore) -> None:
    put(store, 1)
    (path,) = snapshot_files(store.directory)
    path.unlink()
    assert key_of(1) not in store
    assert not get(store, 1)
    assert store.check(fix=True) == [f"missing file: {path.relative_to(store.directory)}"]
    assert store.check() == []
    assert len(store) == 0


def test_other_token_ids_are_refused(store: SnapshotStore) -> None:
    put(store, 1)
    assert store.get(key_of(1), [9, 9, 9, 9, 9]) is None
    assert store.stats().corrupt == 1


def test_check_adopts_a_file_that_lost_its_row(store: SnapshotStore) -> None:
    put(store, 1)
    sql(store, "DELETE FROM Cache")
    assert store.check() == [
        f"unknown file: {snapshot_files(store.directory)[0].relative_to(store.directory)}"
    ]
    store.check(fix=True)
    assert get(store, 1)
    assert store.check() == []


def test_check_removes_what_is_unknown(store: SnapshotStore, tmp_path: Path) -> None:
    put(store, 1)
    outside = tmp_path / "outside"
    outside.write_text("kept")
    planted = [
        store.directory / "notes.txt",
        store.directory / key_of(1)[:2] / "x.safetensors",
        store.directory / "tmp" / "something",
        store.directory / "deep" / "er" / "file",
        store.directory / os.fsdecode(b"\xff\xfe"),
        store.directory / "ab" / f"{'ab' * 32}-{'0' * 16}.safetensors",  # right name, wrong bytes
    ]
    for path in planted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("?")
    (store.directory / "link").symlink_to(outside)
    (store.directory / "directory-link").symlink_to(tmp_path)
    assert len(store.check()) == len(planted) + 2
    assert len(store.check(fix=True)) == len(planted) + 2
    assert store.check() == []
    assert outside.read_text() == "kept"
    assert get(store, 1)


def test_check_mends_wrong_totals(store: SnapshotStore) -> None:
    put(store, 1)
    sql(store, "UPDATE Settings SET value = 999 WHERE key IN ('count', 'size')")
    wrong = ["wrong total: count is 999, expected 1", f"wrong total: size is 999, expected {SIZE}"]
    assert store.check() == wrong
    assert set(store.check(fix=True)) <= set(wrong)
    assert store.check() == []
    assert (len(store), store.bytes()) == (1, SIZE)


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(20_000))


TABLE_DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "garbage": garbage,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "another database": lambda path: (path.unlink(), make_other_database(path)),
}


def make_other_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE Settings (a, b, c)")
        connection.execute("CREATE TABLE Cache (a, b, c)")
    connection.close()


@pytest.mark.parametrize("name", TABLE_DAMAGE)
@pytest.mark.parametrize("closed", [True, False])
def test_a_lost_table_is_rebuilt_from_the_files(
    store: SnapshotStore, name: str, closed: bool
) -> None:
    put(store, *range(20))
    sql(store, "PRAGMA wal_checkpoint(TRUNCATE)")
    if closed:
        store.close()
    TABLE_DAMAGE[name](store.directory / "cache.db")
    opened = SnapshotStore(store.directory) if closed else store
    for number in range(20, 22):
        opened.put(key_of(number), make_snapshot(number))
    opened.check(fix=True)
    assert opened.check() == []
    if name != "truncated" or closed:  # an open connection may still know what was cut off
        assert sum(get(opened, number) for number in range(22)) == 22
    opened.close()
    is_whole(store.directory)


def test_flipped_bytes_in_the_table_never_give_a_wrong_snapshot(tmp_path: Path) -> None:
    with SnapshotStore(tmp_path / "good") as store:
        put(store, *range(8))
    chance = random.Random(1)
    good = (tmp_path / "good" / "cache.db").read_bytes()
    for case in range(40):
        directory = tmp_path / str(case)
        shutil.copytree(tmp_path / "good", directory)
        bad = bytearray(good)
        for _ in range(chance.choice([1, 1, 8, 200])):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        (directory / "cache.db").write_bytes(bad)
        with SnapshotStore(directory) as opened:
            for number in range(8):
                get(opened, number)  # right, or a miss
            put(opened, 100)
            assert get(opened, 100)
            opened.check(fix=True)
            assert opened.check() == [], case
        shutil.rmtree(directory)


# Hostile tables.


class Bomb:
    def __reduce__(self) -> Any:
        return os._exit, (66,)


def plant(store: SnapshotStore, **columns: object) -> None:
    row = {
        "key": key_of(1),
        "raw": 1,
        "store_time": 1.0,
        "access_time": 1.0,
        "size": 10,
        "mode": 2,
        **columns,
    }
    names = ", ".join(row)
    sql(store, f"INSERT INTO Cache ({names}) VALUES ({', '.join('?' * len(row))})", *row.values())


def test_a_planted_pickle_is_never_loaded(store: SnapshotStore) -> None:
    bomb = pickle.dumps(Bomb())
    (store.directory / "ab").mkdir()
    (store.directory / "ab" / "bomb.val").write_bytes(bomb)
    plant(store, mode=4, value=bomb)
    plant(store, key=key_of(2), mode=4, filename="ab/bomb.val")
    plant(store, key=bomb, raw=0, mode=4, value=bomb)
    plant(store, key=key_of(3), mode=1, value=b"raw")
    plant(store, key=key_of(4), mode=3, filename="ab/bomb.val")
    for number in (1, 2, 3, 4):
        assert not get(store, number)
        assert key_of(number) not in store
    assert {len(key) for key in list(store.keys())} <= {64}
    put(store, 1, 2)
    assert get(store, 1)
    assert len(store.check(fix=True)) >= 4
    assert store.check() == []


@pytest.mark.parametrize(
    "name",
    [
        "../victim",
        "{absolute}/victim",
        "ab/../../victim",
        "{fan}/../../victim",
        "{fan}/{key}-0123456789abcdef.safetensors\n",
        "{fan}\\{key}-0123456789abcdef.safetensors",
        "",
        ".",
        "cache.db",
        "{fan}/\x00",
        "~/victim",
        "$HOME/victim",
        b"../victim",
        7,
    ],
)
def test_a_name_that_escapes_the_store_is_never_used(
    store: SnapshotStore, tmp_path: Path, name: Any
) -> None:
    victim = tmp_path / "victim"
    with SnapshotStore(tmp_path / "elsewhere") as other:
        put(other, 1)
        shutil.copy(snapshot_files(other.directory)[0], victim)  # readable, were it followed
    key = key_of(1)
    if isinstance(name, str):
        name = name.format(absolute=tmp_path, fan=key[:2], key=key)
    plant(store, filename=name)
    assert not get(store, 1)
    assert key not in store
    assert store.get_many({key: [1], key_of(7): [7]})[key] is None
    put(store, 1)
    assert get(store, 1)
    sql(store, "UPDATE Cache SET filename = ?", name)
    store.delete(key)
    plant(store, filename=name, size=1 << 40)
    store.size_limit = SIZE
    put(store, 2)  # evicts the planted row
    plant(store, filename=name)
    store.check(fix=True)
    assert store.check() == []
    assert victim.exists()
    assert (store.directory / "cache.db").exists()


def test_links_are_not_followed_out_of_the_store(store: SnapshotStore, tmp_path: Path) -> None:
    put(store, 1)
    fan = store.directory / key_of(1)[:2]
    fan.rename(tmp_path / "outside")
    fan.symlink_to(tmp_path / "outside")
    assert not get(store, 1)
    with pytest.raises(StorageError):
        store.put(key_of(1), make_snapshot(1))
    assert len(list((tmp_path / "outside").iterdir())) == 1
    store.check(fix=True)
    assert store.check() == []
    assert len(list((tmp_path / "outside").iterdir())) == 1
    put(store, 1)
    assert get(store, 1)


def test_a_file_that_became_a_link_is_dropped_alone(store: SnapshotStore, tmp_path: Path) -> None:
    put(store, 1)
    (path,) = snapshot_files(store.directory)
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    assert not get(store, 1)
    assert (tmp_path / "outside").exists()
    assert not path.is_symlink()


def test_a_fifo_does_not_hang_the_reader(store: SnapshotStore) -> None:
    put(store, 1)
    (path,) = snapshot_files(store.directory)
    path.unlink()
    os.mkfifo(path)
    assert store.get_many({key_of(1): [1], key_of(2): [2]}) == {key_of(1): None, key_of(2): None}
    assert not get(store, 1)


@pytest.mark.parametrize("name", ["store", "tmp", "cache.db", "lock"])
def test_a_store_whose_parts_are_links_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    directory = tmp_path / "store"
    if name != "store":
        directory.mkdir()
        (directory / name).symlink_to(tmp_path / "outside")
        with pytest.raises(StorageError):
            SnapshotStore(directory)
    else:  # the store as a whole may stand elsewhere: its owner put it there
        directory.symlink_to(tmp_path / "outside")
        SnapshotStore(directory).close()
        assert (tmp_path / "outside" / "cache.db").exists()


def test_planted_settings_are_refused(store: SnapshotStore, caplog: Any) -> None:
    """diskcache sets every row of Settings as an attribute of itself."""
    put(store, 1)
    sql(store, "INSERT INTO Settings VALUES ('get', 1), ('_disk', 2), ('disk_put', 3)")
    store.close()
    with SnapshotStore(store.directory) as again:
        assert get(again, 1)
        assert "unknown settings" in caplog.text


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(diskcache.core.pickle, name, refuse)
    with SnapshotStore(tmp_path / "s", size_limit=3 * SIZE) as store:
        put(store, *range(5))
        assert get(store, 4)
        store.delete(key_of(4))
        store.check(fix=True)
        assert {mode for (mode,) in sql(store, "SELECT mode FROM Cache")} == {2}
        assert sql(store, "SELECT 1 FROM Cache WHERE value IS NOT NULL OR raw != 1") == []


def test_the_disk_takes_nothing_but_snapshots(tmp_path: Path) -> None:
    disk = SnapshotDisk(str(tmp_path))
    for value in (b"bytes", "text", 1, None, [1]):
        with pytest.raises(TypeError, match="expected a snapshot"):
            disk.store(value, False, key=key_of(1))
    for key, raw in ((b"x", False), (b"x", True), ("ab", True), (key_of(1), False)):
        with pytest.raises(OSError, match="expected SHA-256"):
            disk.get(key, raw)


# Faults.


def test_a_full_disk_is_an_error_and_leaves_nothing(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1)

    def full(file: Any, *args: Any, **options: Any) -> int:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_snapshot", full)
    with pytest.raises(StorageError, match="No space left"):
        store.put(key_of(2), make_snapshot(2))
    monkeypatch.undo()
    assert list((store.directory / "tmp").iterdir()) == []
    assert store.check() == []
    put(store, 2)
    assert get(store, 1)


def test_a_table_that_cannot_be_written_leaves_no_file(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> int:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store_module, "evict", fail)
    with pytest.raises(StorageError, match="disk is full"):
        store.put(key_of(1), make_snapshot(1))
    monkeypatch.undo()
    assert snapshot_files(store.directory) == []
    assert store.check() == []
    put(store, 1)


def test_an_unreadable_file_is_a_miss_and_stays(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, 1)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store_module, "read_snapshot", fail)
    assert not get(store, 1)
    assert "Input/output error" in caplog.text
    monkeypatch.undo()
    assert get(store, 1)


def test_a_file_system_without_links(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    put(store, 1, 2)
    assert get(store, 1)
    assert store.check() == []


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be opened"):
        SnapshotStore(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot be opened"):
        SnapshotStore(tmp_path / "file" / "store")


def test_a_store_that_was_removed_gives_misses(
    store: SnapshotStore, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, 1)
    shutil.rmtree(store.directory)
    assert not get(store, 1)
    assert key_of(1) not in store
    assert "cannot be looked up" in caplog.text
    with pytest.raises(StorageError):
        store.put(key_of(1), make_snapshot(1))


def mounted(task: str, directory: Path) -> None:
    code = workers.run(task, str(directory))
    if code == workers.SKIPPED:
        pytest.skip("this process may not mount file systems")
    assert code == 0


def test_a_read_only_collection_can_be_read(tmp_path: Path) -> None:
    with SnapshotStore(tmp_path / "store") as store:
        put(store, 1)
    with Catalog.open(tmp_path / "catalog.db", create=True) as catalog:
        catalog.upsert([workers.record("a", "text")])
    mounted("read_only", tmp_path)


def test_a_full_disk_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    mounted("full_disk", tmp_path)


def test_a_variable_in_the_path_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "elsewhere")
    with pytest.raises(StorageError, match="variable"):
        SnapshotStore(tmp_path / "$PLACE")
    with SnapshotStore(tmp_path / "$NO_SUCH_VARIABLE") as store:
        put(store, 1)


# Crashes: SIGKILL at chosen lines of our code and of diskcache.


def killed(task: str, args: list[Any], prepare: Callable[[Path], object], root: Path) -> int:
    """Kill `task` at every STRIDE-th line, each on a fresh copy; look at what is left."""
    prepare(root / "template")
    stride = STRIDE * (8 if task == "open_store" else 1)
    for case in itertools.count():
        directory = root / f"case{case}"
        shutil.copytree(root / "template", directory)
        code = workers.run("kill_at", 1 + case * stride, task, str(directory), *args)
        is_whole(directory, damaged=prepare is prepare_damaged)
        shutil.rmtree(directory)
        if code == 0:
            return case
        assert code == workers.KILLED
    raise AssertionError


def prepare(directory: Path) -> None:
    with SnapshotStore(directory) as opened:
        put(opened, 1, 2)


def prepare_damaged(directory: Path) -> None:
    with SnapshotStore(directory) as opened:
        put(opened, 1, 2, 3)
    paths = snapshot_files(directory)
    damage_flip(paths[0])
    paths[1].unlink()
    (directory / "unknown").write_text("?")


def prepare_lost(directory: Path) -> None:
    prepare(directory)
    (directory / "cache.db").unlink()


@pytest.mark.parametrize(
    ("task", "args", "prepare"),
    [
        pytest.param("put", [[3]], prepare, id="put"),
        pytest.param("put", [[1]], prepare, id="put again"),
        pytest.param("put", [[4], 2 * SIZE], prepare, id="put and evict"),
        pytest.param("delete", [[1]], prepare, id="delete"),
        pytest.param("mend", [], prepare_damaged, id="mend"),
        pytest.param("open_store", [], prepare_lost, id="rebuild the table"),
        pytest.param("open_store", [], lambda directory: directory.mkdir(), id="create"),
    ],
)
def test_a_kill_at_any_line_costs_time_only(
    tmp_path: Path, task: str, args: list[Any], prepare: Callable[[Path], object]
) -> None:
    assert killed(task, args, prepare, tmp_path) > 5


# Several at once.


def test_processes_at_once(tmp_path: Path) -> None:
    directory, limit = str(tmp_path / "s"), 6 * SIZE
    started = [workers.start("mixed_load", directory, seed, 60, limit) for seed in range(3)]
    assert [workers.join(process) for process in started] == [0, 0, 0]
    with SnapshotStore(directory, size_limit=limit) as store:
        assert store.check() == []
        assert 0 < store.bytes() <= limit


def test_threads_at_once(tmp_path: Path) -> None:
    wrong = []
    with SnapshotStore(tmp_path / "s", size_limit=6 * SIZE) as store:

        def load(seed: int) -> None:
            chance = random.Random(seed)
            try:
                for _ in range(60):
                    number = chance.randrange(12)
                    if chance.random() < 0.4:
                        put(store, number)
                    else:
                        get(store, number)
            except BaseException as error:
                wrong.append(error)
            finally:
                store.close()

        threads = [threading.Thread(target=load, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert store.check() == []
        assert store.bytes() <= 6 * SIZE
        assert store.stats().corrupt == 0


def test_processes_open_a_new_store_at_once(tmp_path: Path) -> None:
    started = [workers.start("put", str(tmp_path / "s"), [number]) for number in range(6)]
    assert [workers.join(process) for process in started] == [0] * 6
    with SnapshotStore(tmp_path / "s") as store:
        assert all(get(store, number) for number in range(6))
        assert store.check() == []


def test_check_beside_a_writer_finds_nothing(tmp_path: Path) -> None:
    writer = workers.start("mixed_load", str(tmp_path / "s"), 1, 100, 6 * SIZE)
    with SnapshotStore(tmp_path / "s") as store:
        while workers.is_running(writer):
            assert store.check() == []
    assert workers.join(writer) == 0


def test_log_lines_name_the_key(store: SnapshotStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kvlink_rag.snapshots.store")
    store.size_limit = SIZE
    put(store, 1, 2)
    assert "1 snapshots evicted" in caplog.text
    damage_flip(snapshot_files(store.directory)[0])
    assert not get(store, 2)
    assert f"snapshot {key_of(2)} is corrupt" in caplog.text
