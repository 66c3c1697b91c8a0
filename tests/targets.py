"""Places where bytes from outside come in: each takes any bytes and checks what must hold.

Run by hypothesis (`test_hostile.py`) and by a coverage-guided fuzzer (`fuzz.py`). A target returns
for input that is refused as it should be, and raises for anything else: another exception, a wrong
result, a file outside its directory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from conftest import byte_tokenizer

from kvlink_rag.collection.catalog import Catalog, Record
from kvlink_rag.documents import Document, Passage, Text
from kvlink_rag.errors import CatalogError, SnapshotCorrupt, SpecError
from kvlink_rag.ingest.readers.files import Problem, SourceFile
from kvlink_rag.ingest.readers.jsonl import read_jsonl
from kvlink_rag.ingest.splitter import split_document
from kvlink_rag.prompt.recognition import Recogniser
from kvlink_rag.prompt.spec import Spec
from kvlink_rag.prompt.tokenizer import PartTokenizer
from kvlink_rag.snapshots.file_format import read_snapshot, write_snapshot
from kvlink_rag.snapshots.snapshot import Snapshot
from kvlink_rag.snapshots.store.keys import Refused, locate

KEY = "ab" * 32
NAME = f"ab/{KEY}-0123456789abcdef.safetensors"
DOCUMENTS = [
    Document(f"The town of {name} has a harbour of grey stone.", title=name, id=name.lower())
    for name in ("Orvale", "Marnik", "Teldon")
]


@functools.cache
def scratch() -> Path:
    """A directory for as long as the process lives."""
    directory = tempfile.TemporaryDirectory()
    scratch.kept = directory  # type: ignore[attr-defined]
    return Path(directory.name)


@functools.cache
def words() -> PartTokenizer:
    return PartTokenizer(byte_tokenizer())


def text_of(data: bytes) -> str:
    """Any text, lone surrogates too."""
    return data.decode("utf-8", errors="surrogateescape")


def written(snapshot: Snapshot, key: str) -> bytes:
    path = scratch() / "written"
    with open(path, "wb", buffering=0) as file:
        write_snapshot(file, snapshot, key)
    return path.read_bytes()


def a_snapshot() -> bytes:
    keys = torch.arange(12.0).view(1, 2, 3, 2)
    return written(Snapshot(keys, -keys, torch.tensor([5, 6, 7])), KEY)


def snapshot_bytes(data: bytes) -> None:
    """Any bytes are refused, or are what a writer would have written for the same snapshot."""
    path = scratch() / "snapshot"
    path.write_bytes(data)
    try:
        found = read_snapshot(path, key=KEY)
    except SnapshotCorrupt:
        return
    assert written(found, KEY) == data


def snapshot_sealed(data: bytes) -> None:
    """The same behind a checksum that fits, so that the checks behind it are reached.

    The first 2 bytes: the length of the header; the checksum's place in it is filled.
    """
    size = int.from_bytes(data[:2], "little")
    header, body = data[2 : 2 + size], data[2 + size :]
    unsealed = struct.pack("<Q", len(header)) + header
    at = unsealed.find(b"xxh3_128:") + 9
    if at >= 9:
        unsealed = unsealed[:at] + b"0" * 32 + unsealed[at + 32 :]
        digest = xxhash.xxh3_128(unsealed + body).hexdigest().encode()
        unsealed = unsealed[:at] + digest + unsealed[at + 32 :]
    snapshot_bytes(unsealed + body)


def file_name(data: bytes) -> None:
    """A name read back from the table leads to a snapshot's place in the store, or nowhere."""
    for name in (data, text_of(data), f"ab/{text_of(data)}", NAME + text_of(data)):
        try:
            path = locate(scratch(), name)
        except Refused:
            continue
        assert path.parent.parent == scratch()
        assert path.resolve().is_relative_to(scratch().resolve())
        assert path.name.endswith(".safetensors")


@functools.cache
def a_catalog() -> bytes:
    path = scratch() / "template.sqlite"
    with Catalog.open(path, create=True) as catalog:
        vectors = torch.eye(3).numpy()
        catalog.upsert([Record(d, vectors[n], KEY, 9) for n, d in enumerate(DOCUMENTS)])
        catalog.delete([str(DOCUMENTS[2].id)])
        catalog.set_setting("model", "tiny")
    return path.read_bytes()


def catalog_patches(data: bytes) -> None:
    """A catalog with some bytes changed gives its documents or errors, never others.

    Each 6 bytes: an offset (4) and what stands there (2).
    """
    changed = bytearray(a_catalog())
    for start in range(0, len(data) - 5, 6):
        at = int.from_bytes(data[start : start + 4], "little") % (len(changed) - 1)
        changed[at : at + 2] = data[start + 4 : start + 6]
    catalog_bytes(bytes(changed))


def catalog_bytes(data: bytes) -> None:
    """Any bytes as a catalog."""
    directory = scratch() / "catalog"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    path = directory / "catalog.sqlite"
    path.write_bytes(data)
    known = {d.id: d for d in DOCUMENTS}
    try:
        catalog = Catalog.open(path)
    except CatalogError:
        return
    with catalog:
        for read in (
            lambda: [entry.document for entry in catalog.iterate()],
            lambda: [entry.document for entry in catalog.iterate(skip_damaged=True)],
            lambda: [entry.document for entry in catalog.get(known)],
        ):
            with contextlib.suppress(CatalogError):
                for found in read():
                    assert found == known[found.id]
        for other in (
            catalog.settings, catalog.version, catalog.count, catalog.embedded, catalog.snapshots,
            catalog.check, lambda: catalog.changes_since(0), lambda: catalog.check(fix=True),
            lambda: catalog.upsert([Record(DOCUMENTS[0])]), lambda: catalog.delete(known),
        ):  # fmt: skip
            with contextlib.suppress(CatalogError):
                other()


def splitter(data: bytes) -> None:
    """Nothing but white space and headings is lost, and all is in order. First byte: the limit."""
    limit, text = 1 + data[0] if data else 9, text_of(data[1:])
    passages = split_document(Document(text), encoder=words(), max_tokens=limit)
    kept = "".join("".join(p.text.split()) for p in passages)
    rest = iter("".join(text.split()))
    assert all(character in rest for character in kept)  # a subsequence
    if "#" not in text and "=" not in text and "-" not in text:
        assert kept == "".join(text.split())


@functools.cache
def recogniser() -> Recogniser:
    catalog = Catalog.open(scratch() / "known.sqlite", create=True)
    catalog.upsert([Record(d) for d in DOCUMENTS])
    return Recogniser(catalog, words(), min_tokens=8)


def recognition(data: bytes) -> None:
    """Put back, passages and text are the prompt. A byte below 3 stands for a document's text."""
    pieces = [DOCUMENTS[byte].text if byte < 3 else text_of(bytes([byte])) for byte in data[:4000]]
    prompt = "".join(pieces)
    parts = recogniser().recognise(prompt)
    texts = [p.text if isinstance(p, Text) else p.document.text.strip() for p in parts]
    assert "".join(texts) == prompt
    assert all(not p.special for p in parts if isinstance(p, Text))
    assert all(p.document in DOCUMENTS for p in parts if isinstance(p, Passage))


def kvlink_json(data: bytes) -> None:
    """A spec that renders passages with their text, or a `SpecError`."""
    try:
        spec = Spec.from_json(text_of(data))
    except SpecError:
        return
    rendered = spec.render_passage(Document("{text} \0", title="{title}"))
    assert "{text} \0" in rendered
    assert len(rendered) < len(data) + 100 * 20
    assert Spec.from_json(spec.to_json()) == spec
    spec.prompt([DOCUMENTS[0]], "?")
    spec.link_ids(3)


def jsonl(data: bytes) -> None:
    """Documents that a catalog takes, or problems that name the place."""
    path = scratch() / "lines.jsonl"
    path.write_bytes(data)
    for found in read_jsonl(SourceFile(path, "lines.jsonl"), 1 << 20):
        if isinstance(found, Problem):
            assert found.source.startswith("lines.jsonl")
            assert found.message
        else:
            assert found.text.strip()
            found.identified().canonical().encode()
            found.text.encode(), found.title.encode(), str(found.id).encode()
            json.dumps(dict(found.metadata), allow_nan=False).encode()


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        snapshot_bytes, snapshot_sealed, file_name, catalog_patches, catalog_bytes, splitter,
        recognition, kvlink_json, jsonl,
    )
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Inputs that reach far into a target."""
    sound = a_snapshot()
    header = sound[8 : 8 + int.from_bytes(sound[:8], "little")]
    return {
        "snapshot_bytes": [sound],
        "snapshot_sealed": [struct.pack("<H", len(header)) + sound[8:]],
        "file_name": [b"", b"../x", NAME.encode(), b"/etc/passwd", b"\0", b"\n"],
        "catalog_patches": [b"\x00\x10\x00\x00\xff\xff", struct.pack("<IH", 4096, 7)],
        "catalog_bytes": [a_catalog(), a_catalog()[:5000]],
        "splitter": [b"\x10One. Two three!\n\n# Four\n\nfive " + "é漢🙂".encode()],
        "recognition": [b"Read:\n\0\n\x01\n\nQuestion: what?\nAnswer:", b"\0\x01\x02"],
        "kvlink_json": [Spec().to_json().encode(), b'{"format": 1, "rank": "exact"}'],
        "jsonl": [
            b'{"text": "a", "id": 1, "metadata": {"x": [1e999]}}\n{"text": "b"',
            b"\xff\xfe{",
        ],
    }[name]
