"""The tier that machines share: each passage is encoded once, and no fault of it is an answer's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import WordEmbedder, byte_spec, byte_tokenizer, random_model

from kvlink_rag import Document, KVLinkModel, KVLinkRAG, Trace
from kvlink_rag.collection.opening import REMOTE
from kvlink_rag.errors import ConfigError, MissingExtra, SnapshotCorrupt
from kvlink_rag.snapshots.remote.places import Folder, Place
from kvlink_rag.snapshots.remote.sealing import seal, unseal
from kvlink_rag.snapshots.remote.tier import FAULTS, HANGING, PAUSE, SECRET, RemoteTier, open_remote
from kvlink_rag.snapshots.snapshot import Snapshot
from kvlink_rag.snapshots.store import SnapshotStore

SHARED = "0123456789abcdef"
DOCUMENTS = [Document(f"Town {i} lies at river {i % 3}.", title=f"T{i}") for i in range(6)]
QUESTION = "Which town lies at river 2?"
KEY = "ab" * 32


@pytest.fixture(scope="module")
def model() -> KVLinkModel:
    import torch

    return KVLinkModel(random_model("llama", torch.float32), byte_tokenizer(), byte_spec())


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, SHARED)
    monkeypatch.delenv(REMOTE, raising=False)


Machine = Callable[..., KVLinkRAG]


@pytest.fixture
def machine(model: KVLinkModel, tmp_path: Path) -> Iterator[Machine]:
    """Opens collections in directories of their own, and closes them."""
    opened: list[KVLinkRAG] = []

    def open_one(name: str, remote: str | None, **settings: Any) -> KVLinkRAG:
        rag = KVLinkRAG.open(
            tmp_path / name, model=model, embedder=WordEmbedder(), remote=remote, **settings
        )
        opened.append(rag)
        return rag

    yield open_one
    for rag in opened:
        rag.close()


def settled(rag: KVLinkRAG) -> dict[str, int]:
    """The tier's counts once all that was queued was tried."""
    assert rag.parts.remote is not None
    assert rag.parts.remote.flush(60)
    return rag.parts.remote.stats().to_dict()


def values(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Two machines


def test_a_passage_is_encoded_on_one_machine_only(machine: Machine, url: str) -> None:
    alone, one, two = machine("alone", None), machine("one", url), machine("two", url)
    expected = alone.add(DOCUMENTS) and alone.ask(QUESTION, max_new_tokens=6).text
    assert one.add(DOCUMENTS).encoded == 6
    assert settled(one)["written"] == 6
    assert two.add(DOCUMENTS).encoded == 0
    assert two.stats().snapshots == 6
    assert two.stats().remote["hits"] == 6
    answers = [rag.ask(QUESTION, max_new_tokens=6) for rag in (one, two)]
    assert [answer.text for answer in answers] == [expected] * 2
    assert all(answer.trace.snapshots_encoded == 0 for answer in answers)
    assert one.check() == two.check() == []


def test_a_question_takes_what_others_encoded(machine: Machine, url: str) -> None:
    """Of passages over the budget, or evicted: the tier is asked before anything is encoded."""
    one, two = machine("one", url), machine("two", url, budget=0)
    one.add(DOCUMENTS[:3])
    settled(one)
    two.add(DOCUMENTS)  # three of them are there, and no budget for the others
    answer = two.ask(QUESTION, k=6, max_new_tokens=4)
    assert (answer.trace.snapshots_found, answer.trace.snapshots_encoded) == (3, 3)
    assert settled(two)["written"] == 3  # behind the answer
    assert len(values(Path(url.removeprefix("file://").partition("?")[0]))) == 6


def test_counts_are_exported(machine: Machine, url: str) -> None:
    pytest.importorskip("prometheus_client")
    from kvlink_rag.collection.prometheus import CollectionMetrics

    one = machine("one", url)
    one.add(DOCUMENTS)
    settled(one)
    found = {metric.name: metric.samples[0].value for metric in CollectionMetrics(one).collect()}
    assert found["kvlink_remote_written"] == 6
    assert found["kvlink_remote_misses"] == 6
    assert found["kvlink_remote_resting"] == 0


def test_the_environment_names_a_tier(
    machine: Machine, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REMOTE, url)
    one, none = machine("one", None), machine("none", "")
    one.add(DOCUMENTS)
    assert settled(one)["written"] == 6
    assert none.stats().remote is None


def test_a_server_shares_what_it_was_given_and_no_store_of_a_client(
    machine: Machine, url: str, tmp_path: Path, model: KVLinkModel
) -> None:
    library = pytest.importorskip("kvlink_rag.serving.library")
    machine("towns", "").close()
    given = {"towns": tmp_path / "towns"}
    served = library.Library(model, WordEmbedder(), tmp_path / "data", given, remote=url)
    try:
        store = served.create("owner", "own", {})
        remotes = {}
        for id in ("towns", store.id):
            with served.using(id) as rag:
                remotes[id] = rag.stats().remote
        assert remotes["towns"] is not None
        assert remotes[store.id] is None
    finally:
        served.close()


def test_collections_share_nothing_unless_they_say_so(machine: Machine, folder: Path) -> None:
    one, two = (machine(name, f"file://{folder}") for name in ("one", "two"))
    one.add(DOCUMENTS)
    settled(one)
    assert two.add(DOCUMENTS).encoded == 6


def test_deleting_erases_there(machine: Machine, url: str, folder: Path) -> None:
    one = machine("one", url)
    one.add(DOCUMENTS)
    settled(one)
    assert len(values(folder)) == 6
    one.delete([document.identified().id for document in DOCUMENTS[:2]])
    assert settled(one)["erased"] >= 2
    assert len(values(folder)) == 4


def test_what_is_deleted_without_the_tier_is_erased_when_it_is_back(
    machine: Machine, url: str, folder: Path
) -> None:
    first = machine("one", url)
    first.add(DOCUMENTS)
    settled(first)
    first.close()
    without = machine("one", "")
    without.delete([DOCUMENTS[0].identified().id])
    without.close()
    assert len(values(folder)) == 6
    settled(machine("one", url))
    assert len(values(folder)) == 5
    never = machine("never", "")
    never.add(DOCUMENTS)
    never.delete([DOCUMENTS[0].identified().id])
    assert not list(never.directory.glob("remote*"))


# Faults


class Broken(Folder):
    """A folder whose calls fail, hang or lie as a test says."""

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self.fails: type[Exception] | None = None
        self.hangs: threading.Event | None = None
        self.calls = 0
        self.entered = threading.Event()

    def _call(self) -> None:
        self.calls += 1
        self.entered.set()
        if self.hangs is not None:
            self.hangs.wait()
        if self.fails is not None:
            raise self.fails("as the test says")

    def get(self, name: str, most: int) -> bytes | None:
        self._call()
        return super().get(name, most)

    def put(self, name: str, value: bytes) -> None:
        self._call()
        super().put(name, value)

    def delete(self, name: str) -> None:
        self._call()
        super().delete(name)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def tier(place: Place, tmp_path: Path, **settings: Any) -> RemoteTier:
    return RemoteTier(
        place,
        "team",
        SHARED.encode(),
        lambda key: key.encode(),
        **{"timeout": 60.0, "erasures": tmp_path / "erasures.txt", **settings},
    )


@pytest.mark.parametrize("damage", ["flipped", "another key", "forged", "cut", "unsigned"])
def test_a_tier_that_lies_is_not_believed(
    machine: Machine, url: str, folder: Path, damage: str
) -> None:
    one = machine("one", url)
    one.add(DOCUMENTS)
    settled(one)
    files = values(folder)
    whole = [path.read_bytes() for path in files]
    for path, value, other in zip(files, whole, [*whole[1:], whole[0]], strict=True):
        name = str(path.relative_to(folder))
        path.write_bytes(
            {
                "flipped": value[:-5] + bytes([value[-5] ^ 1]) + value[-4:],
                "another key": other,
                "forged": seal(
                    b"somebody else's secret", name, unseal(SHARED.encode(), name, value)
                ),
                "cut": value[: len(value) // 2],
                "unsigned": seal(b"", name, unseal(SHARED.encode(), name, value)),
            }[damage]
        )
    two = machine("two", url)
    assert two.add(DOCUMENTS).encoded == 6
    assert two.stats().remote["refused"] == 6
    assert two.ask(QUESTION, max_new_tokens=6).text == one.ask(QUESTION, max_new_tokens=6).text
    assert two.check() == []


def test_a_signed_file_of_other_tokens_is_refused(
    machine: Machine, url: str, folder: Path, model: KVLinkModel
) -> None:
    """A machine that has the secret, and a fault: the file under a name is another passage's."""
    one = machine("one", url)
    one.add(DOCUMENTS[:2])
    settled(one)
    first, second = values(folder)
    names = [str(path.relative_to(folder)) for path in (first, second)]
    file = unseal(SHARED.encode(), names[1], second.read_bytes())
    first.write_bytes(seal(SHARED.encode(), names[0], file))
    two = machine("two", url)
    assert two.add(DOCUMENTS[:2]).encoded == 1
    assert two.stats().remote["refused"] == 1
    assert two.check() == []


def test_a_signed_file_of_another_shape_is_refused(
    machine: Machine, url: str, folder: Path, tmp_path: Path
) -> None:
    one = machine("one", url)
    one.add(DOCUMENTS[:1])
    settled(one)
    (path,) = values(folder)
    name = str(path.relative_to(folder))
    (key,) = one.parts.store.keys()
    ids = one.model.passage_tokens(DOCUMENTS[0])
    whole = one.parts.store.get(key, ids)
    assert isinstance(whole, Snapshot)
    with SnapshotStore(tmp_path / "forged") as forged:
        forged.put(key, Snapshot(whole.keys[:1], whole.values[:1], whole.token_ids))
        file = forged.file_of(key)
    assert file is not None
    path.write_bytes(seal(SHARED.encode(), name, file))
    two = machine("two", url)
    assert two.add(DOCUMENTS[:1]).encoded == 1
    assert two.stats().remote["refused"] == 1
    assert two.ask(QUESTION, max_new_tokens=4).text == one.ask(QUESTION, max_new_tokens=4).text


def test_a_compressed_value_is_refused_where_nothing_reads_it(
    machine: Machine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zstandard")
    one, two = machine("one", url, compression="zstd"), machine("two", url)
    one.add(DOCUMENTS)
    settled(one)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "zstandard", None)
        assert two.add(DOCUMENTS[:3]).encoded == 3
        assert two.stats().remote["refused"] == 3
    assert two.add(DOCUMENTS[3:]).encoded == 0


def test_after_faults_in_a_row_it_is_left_alone_for_a_while(tmp_path: Path, folder: Path) -> None:
    place, clock = Broken(folder), Clock()
    place.fails = ConnectionError
    shared = tier(place, tmp_path, clock=clock)
    for _ in range(FAULTS + 4):
        assert shared.fetch({KEY: 99}) == {}
    assert place.calls == FAULTS
    assert shared.stats().resting
    clock.now += PAUSE
    place.fails = None
    shared.offer(KEY)
    assert shared.flush(60)
    assert shared.fetch({KEY: 99}) == {KEY: KEY.encode()}
    assert shared.stats().to_dict() == {
        **dict.fromkeys(("misses", "erased", "dropped", "refused"), 0),
        "hits": 1,
        "written": 1,
        "faults": FAULTS,
        "resting": False,
    }


def test_a_tier_that_never_answers_costs_the_time_limit(tmp_path: Path, folder: Path) -> None:
    place = Broken(folder)
    place.hangs = threading.Event()
    shared = tier(place, tmp_path, timeout=0.05)
    assert shared.fetch({KEY[:-2] + f"{i:02x}": 99 for i in range(20)}) == {}
    assert shared.stats().faults == 20
    place.hangs.set()


def test_reads_that_never_end_are_a_bounded_number(tmp_path: Path, folder: Path) -> None:
    """A mount that hangs for days leaves some threads behind, not one more at each try."""
    place, clock = Broken(folder), Clock()
    place.hangs = threading.Event()
    shared = tier(place, tmp_path, timeout=0.01, clock=clock)
    for _ in range(HANGING):
        assert shared.fetch({f"{i:02x}" + KEY[2:]: 99 for i in range(8)}) == {}
        clock.now += PAUSE
    assert place.calls <= HANGING
    place.hangs.set()
    shared.offer(KEY)
    assert shared.flush(60)
    clock.now += PAUSE
    patient = tier(Folder(urlsplit(f"file://{folder}")), tmp_path)
    for _ in range(2 * HANGING):  # those that end make room
        assert patient.fetch({KEY: 99})


def test_closing_leaves_nothing_to_be_done(tmp_path: Path, folder: Path) -> None:
    """Afterwards the store and the catalog are closed."""
    place, clock = Broken(folder), Clock()
    place.fails = OSError
    shared = tier(place, tmp_path, clock=clock)
    assert shared.fetch({f"{i:02x}" + KEY[2:]: 99 for i in range(FAULTS)}) == {}
    assert shared.stats().resting
    place.fails, place.hangs = None, threading.Event()
    clock.now += PAUSE
    place.entered.clear()
    shared.offer(KEY)  # under way, and hanging
    assert place.entered.wait(60)
    clock.now -= PAUSE  # resting, so that closing waits for nothing
    shared.offer("cd" * 32)
    shared.close()
    shared.offer("ef" * 32)
    place.hangs.set()
    assert shared._writer is not None
    shared._writer.join(60)
    assert [path.name for path in values(folder)] == [KEY]
    assert shared.stats().dropped == 2


def test_a_queued_write_never_brings_back_what_was_erased(tmp_path: Path, folder: Path) -> None:
    place = Broken(folder)
    place.hangs = threading.Event()
    shared = tier(place, tmp_path)
    other = "cd" * 32
    shared.offer(other)  # under way, and hanging
    assert place.entered.wait(60)
    shared.offer(KEY)  # queued
    shared.erase(KEY)
    shared.erase(other)
    place.hangs.set()
    assert shared.flush(60)
    assert values(folder) == []
    assert shared.stats().written == 1  # the one under way, erased behind it


def test_what_could_not_be_erased_is_erased_later(tmp_path: Path, folder: Path) -> None:
    place, clock = Broken(folder), Clock()
    shared = tier(place, tmp_path, clock=clock)
    for key in (KEY, "cd" * 32):
        shared.offer(key)
    assert shared.flush(60)
    place.fails = OSError
    shared.erase(KEY)
    assert shared.flush(60)
    assert len(values(folder)) == 2
    shared.close()  # or killed: it is written down
    assert (tmp_path / "erasures.txt").read_text().split() == [KEY]
    place.fails = None
    again = tier(place, tmp_path, clock=clock)
    assert again.flush(60)
    assert [path.name for path in values(folder)] == ["cd" * 32]
    assert (tmp_path / "erasures.txt").read_text() == ""


def test_erasing_is_tried_again_when_it_answers(tmp_path: Path, folder: Path) -> None:
    place = Broken(folder)
    shared = tier(place, tmp_path)
    shared.offer(KEY)
    assert shared.flush(60)
    place.fails = OSError
    shared.erase(KEY)
    assert shared.flush(60)
    place.fails = None
    shared.offer("cd" * 32)
    assert shared.flush(60)
    assert [path.name for path in values(folder)] == ["cd" * 32]


def test_a_full_tier_loses_nothing(machine: Machine, url: str, folder: Path) -> None:
    """What cannot be written there is in the local store all the same."""
    one = machine("one", url)
    assert one.parts.remote is not None
    place = Broken(folder)
    place.fails = OSError
    one.parts.remote._place = place
    assert one.add(DOCUMENTS).encoded == 6
    assert settled(one)["faults"] >= 1
    assert one.stats().snapshots == 6
    assert one.check() == []


def test_a_value_larger_than_such_a_snapshot_is_not_read(
    machine: Machine, url: str, folder: Path
) -> None:
    one = machine("one", url)
    one.add(DOCUMENTS[:1])
    settled(one)
    (path,) = values(folder)
    with path.open("ab") as file:
        file.truncate(1 << 40)  # a hole; reading it would take all memory
    two = machine("two", url)
    assert two.add(DOCUMENTS[:1]).encoded == 1
    assert two.stats().remote["refused"] == 1


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_neither_links_nor_pipes_are_read(
    machine: Machine, url: str, folder: Path, kind: str
) -> None:
    one = machine("one", url)
    one.add(DOCUMENTS[:1])
    settled(one)
    (path,) = values(folder)
    elsewhere = folder.parent / "elsewhere"
    path.rename(elsewhere)
    if kind == "link":
        path.symlink_to(elsewhere)
    else:
        os.mkfifo(path)
    two = machine("two", url)
    assert two.add(DOCUMENTS[:1]).encoded == 1
    assert two.stats().remote["faults"] == 1


def test_what_no_document_has_is_not_written(machine: Machine, url: str, folder: Path) -> None:
    one = machine("one", url)
    ids = one.model.passage_tokens(Document("A passage of an application's own."))
    one.parts.loaded().snapshots.fetch([ids], Trace())
    assert settled(one)["written"] == 0
    assert values(folder) == []


def test_what_is_deleted_while_it_is_written_is_taken_back(tmp_path: Path, folder: Path) -> None:
    """By another process, whose erasure came before the write."""
    place = Broken(folder)
    there = iter([True, False])  # before the write, after it
    shared = tier(place, tmp_path, wanted=lambda key: next(there))
    shared.offer(KEY)
    assert shared.flush(60)
    assert values(folder) == []


def test_a_forked_child_has_a_queue_of_its_own(tmp_path: Path, folder: Path) -> None:
    shared = tier(Broken(folder), tmp_path)
    shared.offer(KEY)
    assert shared.flush(60)
    child = os.fork()
    if not child:
        try:
            shared.offer("cd" * 32)
            os._exit(0 if shared.flush(60) else 3)
        finally:
            os._exit(4)
    assert os.waitpid(child, 0)[1] == 0
    assert len(values(folder)) == 2


# Settings


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host", "remote tier 'ftp'"),
        ("redis://:ab12/Zk9@cache:6379/0", "cannot be read.*%2F"),
        ("file:///not/there", "there is no folder"),
        ("file://host/x", "expected file:///absolute"),
        ("file:///tmp?namespace=../up", "namespace '../up'"),
        ("file:///tmp?namespace=..", "namespace"),
        ("file:///tmp?timeout=soon", "timeout='soon'"),
        ("file:///tmp?timeout=0", "expected seconds"),
    ],
)
def test_what_is_wrong_with_a_url_is_said(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_remote(url, "own", tmp_path, lambda key: None)


def test_a_tier_without_a_secret_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, machine: Machine
) -> None:
    monkeypatch.setenv(SECRET, "short")
    with pytest.raises(ConfigError, match=f"set {SECRET} to 16 characters"):
        machine("one", f"file://{folder}")
    unsigned = open_remote(f"file://{folder}?unsigned=1", "own", tmp_path, lambda key: b"file")
    unsigned.offer(KEY)
    assert unsigned.flush(60)
    assert unsigned.fetch({KEY: 4}) == {KEY: b"file"}


@pytest.mark.parametrize(
    ("url", "package", "line"),
    [
        ("redis://host", "redis", r"kvlink-rag\[redis\]"),
        ("s3://bucket/x", "obstore", r"kvlink-rag\[s3\]"),
    ],
)
def test_a_missing_client_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, package: str, line: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=line):
        open_remote(url, "own", tmp_path, lambda key: None)


def test_a_value_is_of_one_name_and_one_secret() -> None:
    value = seal(b"secret", "team/ab/abc", b"file")
    assert unseal(b"secret", "team/ab/abc", value) == b"file"
    for secret, name in (
        (b"secret", "other/ab/abc"),
        (b"other", "team/ab/abc"),
        (b"", "team/ab/abc"),
    ):
        with pytest.raises(SnapshotCorrupt, match="was not signed"):
            unseal(secret, name, value)
    with pytest.raises(SnapshotCorrupt, match="does not begin"):
        unseal(b"secret", "team/ab/abc", b"KVL")


# Real servers


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answers(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until something listens."""
    waited = threading.Event()
    for _ in range(600):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server ended"
        waited.wait(0.1)
    pytest.fail("nothing listens")


@contextmanager
def redis_server(tmp_path: Path, *settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real one with these settings, which name its port, until the end of the block."""
    pytest.importorskip("redis", reason="pip install 'kvlink-rag[redis]'")
    if (program := shutil.which("redis-server")) is None:
        pytest.skip("no redis-server here; Debian's package is redis-server")
    call = [program, "--save", "", "--dir", str(tmp_path), "--maxmemory", "64mb", *settings]
    server = subprocess.Popen(call, stdout=subprocess.DEVNULL)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    with redis_server(tmp_path, "--port", str(port)) as server:
        answers(port, server)
        yield f"redis://127.0.0.1:{port}/0?namespace=team&timeout=60", server


def test_redis(machine: Machine, redis_url: tuple[str, subprocess.Popen[bytes]]) -> None:
    url, server = redis_url
    one, two, three = (machine(name, url) for name in ("one", "two", "three"))
    assert one.add(DOCUMENTS).encoded == 6
    assert settled(one)["written"] == 6
    assert two.add(DOCUMENTS).encoded == 0
    one.delete([DOCUMENTS[0].identified().id])
    assert settled(one)["erased"] >= 1
    assert three.add(DOCUMENTS[:1]).encoded == 1
    expected = one.ask(QUESTION, max_new_tokens=6).text
    server.kill()
    server.wait()
    four = machine("four", url)
    assert four.add(DOCUMENTS[1:]).encoded == 5
    assert four.ask(QUESTION, max_new_tokens=6).text == expected
    assert four.stats().remote["faults"] >= 1


def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A key and its own certificate, for 127.0.0.1."""
    if (program := shutil.which("openssl")) is None:
        pytest.skip("no openssl here; Debian's package is openssl")
    key, made = tmp_path / "key.pem", tmp_path / "certificate.pem"
    asked = ("-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost")
    names = ("-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run(
        [program, "req", *asked, *names, "-keyout", key, "-out", made],
        check=True,
        capture_output=True,
    )
    return key, made


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_redis_over_tls(machine: Machine, tmp_path: Path, scheme: str) -> None:
    """Nobody is believed whose certificate is not known; what they would be told is not sent."""
    key, known = certificate(tmp_path)
    port = free_port()
    tls = {"port": 0, "tls-port": port, "tls-auth-clients": "no"}
    tls |= {"tls-key-file": key, "tls-cert-file": known, "tls-ca-cert-file": known}
    settings = [text for name, value in tls.items() for text in (f"--{name}", str(value))]
    with redis_server(tmp_path, *settings) as server:
        answers(port, server)
        url = f"{scheme}://127.0.0.1:{port}/0?namespace=team&timeout=60"
        strange = machine("strange", url)
        assert strange.add(DOCUMENTS).encoded == 6
        assert settled(strange)["written"] == 0
        assert strange.stats().remote["faults"] >= 1
        one, two = (machine(name, f"{url}&ssl_ca_certs={known}") for name in ("one", "two"))
        assert one.add(DOCUMENTS).encoded == 6
        assert settled(one)["written"] == 6
        assert two.add(DOCUMENTS).encoded == 0
        plain = machine("plain", url.replace(scheme, "redis", 1))
        assert plain.add(DOCUMENTS).encoded == 6


@pytest.fixture
def s3_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("obstore", reason="pip install 'kvlink-rag[s3]'")
    pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    settings = {
        "AWS_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    try:
        answers(port, server)
        import urllib.request

        made = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        urllib.request.urlopen(made).close()
        yield "s3://bucket/snapshots?namespace=team&timeout=60"
    finally:
        server.kill()
        server.wait()


def test_s3(machine: Machine, s3_url: str) -> None:
    one, two = machine("one", s3_url), machine("two", s3_url)
    assert one.add(DOCUMENTS).encoded == 6
    assert settled(one)["written"] == 6
    assert two.add(DOCUMENTS).encoded == 0
    one.delete([DOCUMENTS[0].identified().id])
    assert settled(one)["erased"] >= 1
    three = machine("three", s3_url)
    assert three.add(DOCUMENTS).encoded == 1
    assert three.ask(QUESTION, max_new_tokens=6).text == two.ask(QUESTION, max_new_tokens=6).text
