"""First token where a machine takes its snapshots from a tier that others share.

    python benchmarks/tier.py --model small --places redis s3 folder --sizes 10x200 --rounds 5

Each round asks a new question over the same passages and takes them, one way after the other, from
    cached, cold   this machine's own files, in the page cache and not
    redis          a redis-server of Debian's package, started here, over loopback
    s3             moto's S3 endpoint, started here, over loopback HTTP
    folder         a folder, as a mounted disk is
    encode         nowhere: every passage is encoded again
Before a question of the tier or of `encode` the local store is emptied, and each run must have read
or encoded all its snapshots. What came from the tier is checked (signature, key, token ids) and
written to the local store within the time. Beside them the bandwidth at which fetching takes as
long as encoding: bytes of the snapshots over the time that encoding adds to the first token. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from measuring import Row, finish, load, median, parser, percentile, refuse, show
from shapes import words
from ways import Laid, check

from kvlink_rag import Document, KVLinkModel, Part, Trace
from kvlink_rag.arguments import CODECS
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.remote import RemoteTier, open_remote
from kvlink_rag.snapshots.remote.tier import SECRET
from kvlink_rag.snapshots.snapshot import EXACT
from kvlink_rag.snapshots.sources import Reuse, StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

TIERS = ("redis", "s3", "folder")
OWN = ("cached", "cold")
STARTING = 60.0  # seconds
S3_SETTINGS = {
    "AWS_ENDPOINT": "http://127.0.0.1:{port}",
    "AWS_ALLOW_HTTP": "true",
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_REGION": "us-east-1",
}
COLUMNS = ("size", "codec", "place", "ttft_p50_s", "ttft_p95_s", "read_ms", "encode_ms",
           "snapshot_mb", "read_mb_per_s", "even_mb_per_s")  # fmt: skip


def main() -> None:
    arguments = parse()
    os.environ.setdefault(SECRET, "of a benchmark, no secret")
    model = load(arguments)
    rows: list[Row] = []
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.scratch))
        urls = {p: stack.enter_context(STARTED[p](Path(scratch))) for p in arguments.places}
        for size in arguments.sizes:
            for codec in arguments.codecs:
                directory = Path(scratch) / f"{size}-{codec}"
                directory.mkdir()
                rows += measure(model, directory, size, codec, urls, arguments.rounds)
    show(rows, COLUMNS)
    finish(arguments, rows)


def measure(
    model: KVLinkModel,
    directory: Path,
    size: str,
    codec: str,
    urls: dict[str, str],
    rounds: int,
) -> list[Row]:
    """One size and codec, from everywhere."""
    passages, tokens = (int(n) for n in size.split("x"))
    generator = torch.Generator().manual_seed(passages * tokens)
    encode = model.tokenizer.encode
    documents = [Document(words(tokens, generator, encode)) for _ in range(passages)]
    questions = [words(12, generator, encode) for _ in range(rounds + 1)]
    laid = Laid(model, directory / "own", documents, codec)
    places = {name: Elsewhere(laid, directory / name, urls.get(name)) for name in (*urls, "encode")}
    prompts = [model.prompt(documents, question) for question in questions]
    for name in places:
        check(model, prompts[0], places[name].reuse())
    found: dict[str, list[Trace]] = {}
    for prompt in prompts:
        for name in (*OWN, *places):
            reuse = laid.at(name) if name in OWN else places[name].reuse()
            found.setdefault(name, []).append(first_token(model, prompt, reuse, name == "encode"))
    rows = [row(name, traces[1:], laid.nbytes) for name, traces in found.items()]
    for place in places.values():
        place.close()
    laid.close()
    return [{"model": model.name, "size": size, "codec": codec, **each} for each in rows]


class Elsewhere:
    """A machine whose own store is empty before each question; url: of its tier, or None."""

    def __init__(self, laid: Laid, directory: Path, url: str | None) -> None:
        self._laid, own = laid, laid.source
        self._store = SnapshotStore(directory)
        self._keys = [own.key(ids) for ids in dict.fromkeys(laid.passages)]
        self._remote: RemoteTier | None = None
        if url is not None:
            self._remote = open_remote(url, "", directory, laid.store.file_of)
            for key in self._keys:
                self._remote.write(key)
        self._source = StoredSnapshots(
            self._store, own.encoder, codec=own.storage, remote=self._remote
        )

    def reuse(self) -> Reuse:
        """What answers a question here, the system prompt kept as an earlier one leaves it."""
        model, reuse = self._laid.model, Reuse(self._source, PrefixCache(), scope=self._laid.codec)
        model.prefill(model.prompt([Document("w1 w2 w3")], "w4"), reuse=reuse)
        if self._remote is not None:
            self._remote.flush(STARTING)
        for key in self._keys:
            self._store.delete(key)
        return reuse

    def close(self) -> None:
        if self._remote is not None:
            self._remote.close()
        self._store.close()


def first_token(model: KVLinkModel, prompt: list[Part], reuse: Reuse, encodes: bool) -> Trace:
    """The stream to its first token; refused where snapshots came from elsewhere than claimed."""
    stream = model.stream(prompt, max_new_tokens=1, reuse=reuse)
    for _ in stream:
        pass
    trace, laid = stream.trace, model.layout(prompt)
    wanted = len(set(map(laid.passage_ids, laid.passages)))
    if (trace.snapshots_found, trace.snapshots_encoded) != (
        (0, wanted) if encodes else (wanted, 0)
    ):
        refuse(f"snapshots are not from where they should be ({trace})")
    return trace


def row(place: str, traces: list[Trace], nbytes: int) -> Row:
    """Medians; the rate of reading where there is one, the break-even where all was encoded."""
    first = [trace.first_token_ms / 1e3 for trace in traces]
    read, encode = (median(getattr(t, f"{of}_ms") for t in traces) for of in ("read", "encode"))
    made: Row = {
        "place": place,
        "ttft_p50_s": round(median(first), 4),
        "ttft_p95_s": round(percentile(first, 0.95), 4),
        "read_ms": round(read, 2),
        "encode_ms": round(encode, 2),
        "snapshot_mb": round(nbytes / 1e6, 2),
    }
    if place == "encode":
        return {**made, "even_mb_per_s": round(nbytes / 1e3 / encode, 2)}
    return {**made, "read_mb_per_s": round(nbytes / 1e3 / read, 1)}


# Servers


@contextmanager
def redis(scratch: Path) -> Iterator[str]:
    """A redis-server's URL."""
    program = shutil.which("redis-server") or refuse("no redis-server (Debian: redis-server)")
    port = free_port()
    call = [str(program), "--port", str(port), "--save", "", "--dir", str(scratch)]
    with running(call, port):
        yield f"redis://127.0.0.1:{port}/0?namespace=bench&timeout=60"


@contextmanager
def s3(scratch: Path) -> Iterator[str]:
    """A bucket's URL at moto's server; its address goes into the environment."""
    port = free_port()
    call = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    os.environ |= {name: value.format(port=port) for name, value in S3_SETTINGS.items()}
    with running(call, port):
        made = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        urllib.request.urlopen(made).close()
        yield "s3://bucket/bench?namespace=bench&timeout=60"


@contextmanager
def folder(scratch: Path) -> Iterator[str]:
    """A folder's URL."""
    (scratch / "mounted").mkdir()
    yield f"file://{scratch / 'mounted'}?namespace=bench&timeout=60"


STARTED = {"redis": redis, "s3": s3, "folder": folder}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(call: list[str], port: int) -> Iterator[None]:
    """A server until the end of the block, once it takes connections."""
    server = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + STARTING
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    refuse(f"{' '.join(call[:3])} does not answer; is it installed?")
                time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    options.add_argument("--sizes", nargs="+", default=["10x200"], help="passages x tokens")
    options.add_argument("--codecs", nargs="+", default=[EXACT], choices=CODECS)
    options.add_argument("--places", nargs="*", default=list(TIERS), choices=TIERS)
    return options.parse_args()


if __name__ == "__main__":
    main()
