"""Sealed files: safetensors files whose checksum covers header and data.

The bytes that snapshots and the index share (`docs/formats.md`). Any safetensors reader opens
them. This reader takes only the one header this writer would have written for the same facts,
so a file that any other program, accident or adversary changed is refused, whatever was changed.
Knows names, dtypes and shapes; does not know what the tensors mean.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from kvlink_rag.arguments import COMPRESSIONS, check_choice
from kvlink_rag.errors import MissingExtra, StorageError

from .atomic_files import write_all
from .huge_pages import find_madvise, prefer_huge

MAX_HEADER = 1 << 16  # bytes; ours are below 1 KiB
ALIGNMENT = 64  # bytes: where the second tensor starts (the first one is small)
COMPRESSION = "zstd"  # the one there is
MOST_RATIO = 16  # bytes that one compressed byte may stand for; real ones stand for 1.0 to 1.3
_LEVEL = 1  # higher ones take several times as long for a hundredth of the bytes
_MOST_WINDOW = 8 << 20  # bytes; level 1 has half a MiB
_UNSEALED = "0" * 32
_MADV_POPULATE_READ = 22

DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a sealed file is: its format's name and version, and the error when it is not."""

    format: str
    version: int
    corrupt: type[StorageError]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor as the header tells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_sealed(
    file: FileIO,
    kind: Kind,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, str],
    *,
    compress: bool = False,
) -> int:
    """Write `tensors` and `facts` to an unbuffered `file`; returns the bytes written.

    The memory of contiguous CPU tensors is written as it is, without a copy. With `compress` it is
    one zstd frame instead, where that is smaller. Raises `MissingExtra` without zstandard.
    """
    entries = [_Entry(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    buffers = [_memory(tensor) for tensor in tensors.values()]
    facts = {**facts, "format": kind.format, "version": str(kind.version)}
    if compress and (packed := _packed(buffers)) is not None:
        buffers = [packed]
        facts |= {"compression": COMPRESSION, "stored": str(len(packed))}
    header = _header(entries, facts, _checksum(_header(entries, facts, _UNSEALED), *buffers))
    for buffer in (memoryview(header), *buffers):
        write_all(file, buffer)
    return len(header) + sum(buffer.nbytes for buffer in buffers)


def check_compression(name: str) -> str:
    """`name`. Raises `ConfigError` where there is no such compression, `MissingExtra`."""
    if check_choice("compression", name, COMPRESSIONS) != "none":
        require_compression()
    return name


def require_compression() -> Any:
    """The module `zstandard`. Raises `MissingExtra` where it is not installed."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra.of("zstandard", "zstd", "Compressing snapshots") from error
    return zstandard


def sealed_size(tensors: Mapping[str, Tensor], kind: Kind, facts: Mapping[str, str]) -> int:
    """The bytes that `write_sealed` would write; the most it would write with `compress`."""
    entries = [_Entry(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    facts = {**facts, "format": kind.format, "version": str(kind.version)}
    return len(_header(entries, facts, _UNSEALED)) + sum(entry.nbytes for entry in entries)


def read_sealed(path: Path, kind: Kind) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and facts of the file at `path`.

    The tensors are views of a private mapping of the file: nothing is copied, no descriptor
    stays open, and they outlive the file's name. Those of a compressed file are in memory of this
    process; without zstandard `MissingExtra` is raised. Raises `kind.corrupt` where the bytes are
    not what `write_sealed` wrote, `FileNotFoundError` and other `OSError` where it cannot be read.
    """
    try:
        return _parse(_map(path), kind)
    except _Damage as damage:
        raise kind.corrupt(f"{path}: {damage}; remove the file, it is made again") from None


class _Damage(Exception):
    """What was found and what was expected."""


def _parse(mapped: Tensor, kind: Kind) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Size, header, version, structure, checksum: in this order, each before it is relied on."""
    raw = _raw_header(mapped)
    fields = _fields(raw)
    facts = _facts(fields, kind)
    entries = [_entry(name, value) for name, value in fields.items()]
    checksum = facts.pop("checksum", "").removeprefix("xxh3_128:")
    size = sum(entry.nbytes for entry in entries)
    stored = _stored(facts, size)
    expected = len(raw) + stored
    if len(mapped) != expected:
        raise _Damage(f"found {len(mapped)} bytes, expected {expected}")
    if raw != _header(entries, facts, checksum):
        raise _Damage("found another header than the one these facts are written with")
    data = mapped.numpy().data[len(raw) :]
    if (found := _checksum(_header(entries, facts, _UNSEALED), data)) != checksum:
        raise _Damage(f"found checksum {found}, expected {checksum!r}")
    if facts.pop("compression", None) is not None:
        del facts["stored"]
        mapped = _unpacked(data, len(raw), size)
    return _views(mapped, len(raw), entries), facts


def _stored(facts: Mapping[str, str], size: int) -> int:
    """Bytes after the header: `size`, or those of the frame that they are compressed to."""
    how, stored = facts.get("compression"), facts.get("stored", "")
    if how is None:
        return size
    if how != COMPRESSION:
        raise _Damage(f"found compression {how!r}, expected {COMPRESSION!r} or none")
    if not (stored.isascii() and stored.isdigit() and len(stored) < 16):
        raise _Damage(f"found {stored!r} stored bytes, expected a number")
    if size > MOST_RATIO * int(stored):
        raise _Damage(f"found {stored} bytes for {size}, expected at least a {MOST_RATIO}th")
    return int(stored)


def _packed(buffers: list[memoryview]) -> memoryview | None:
    """All buffers as one zstd frame; None where that is not smaller, or beyond `MOST_RATIO`."""
    size = sum(buffer.nbytes for buffer in buffers)
    frame = require_compression().ZstdCompressor(level=_LEVEL).compressobj(size=size)
    packed = b"".join([*map(frame.compress, buffers), frame.flush()])
    worth = len(packed) + 4 * ALIGNMENT <= size <= MOST_RATIO * len(packed)  # the header grows too
    return memoryview(packed) if worth else None


def _unpacked(data: memoryview, start: int, size: int) -> Tensor:
    """uint8 [start + size], the frame `data` decompressed from `start` on: exactly `size` bytes."""
    zstandard = require_compression()
    plain = torch.empty(start + size, dtype=torch.uint8)
    prefer_huge(plain)
    place = plain.numpy().data[start:]
    reader = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW).stream_reader(data)
    try:
        found = 0
        while found < size and (count := reader.readinto(place[found:])):
            found += count
        more = reader.read(1)
    except zstandard.ZstdError as error:
        raise _Damage(f"found a frame that cannot be decompressed ({error})") from None
    if found != size or more:
        raise _Damage(f"found a frame of {'more' if more else found} bytes, expected {size}")
    return plain


def _map(path: Path) -> Tensor:
    """The file as uint8 [bytes], mapped privately: writes to it never reach the file."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise _Damage(f"found {stat.filemode(found.st_mode)}, expected a regular file")
    if found.st_size < 8:
        raise _Damage(f"found {found.st_size} bytes, expected at least 8")
    try:
        storage = torch.UntypedStorage.from_file(os.fspath(path), False, found.st_size)
    except RuntimeError as error:
        raise _os_error(path, error) from error
    mapped = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    _populate(mapped, path)
    return mapped


def _os_error(path: Path, error: RuntimeError) -> OSError:
    """torch tells a failed open or mmap as RuntimeError: say it as the OSError it was."""
    if not os.path.lexists(path):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    return OSError(f"{path} cannot be mapped: {str(error).splitlines()[0]}")


def _populate(mapped: Tensor, path: Path) -> None:
    """Read the whole mapping now, so that a disk error is an OSError and not a SIGBUS.

    Linux 5.14 and later; elsewhere the pages come in when they are touched.
    """
    if (madvise := find_madvise()) is None:
        return
    if madvise(mapped.data_ptr(), len(mapped), _MADV_POPULATE_READ) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, f"cannot be read ({os.strerror(code)})", os.fspath(path))


def _raw_header(mapped: Tensor) -> bytes:
    """The length field, the JSON and its padding."""
    size = int.from_bytes(bytes(mapped[:8].tolist()), "little")
    if not 2 <= size <= min(MAX_HEADER, len(mapped) - 8):
        limit = min(MAX_HEADER, len(mapped) - 8)
        raise _Damage(f"found a header of {size} bytes, expected 2 to {limit}")
    return mapped[: 8 + size].numpy().tobytes()


def _fields(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw[8:].decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise _Damage(f"found a header that is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise _Damage(f"found a header that is {type(fields).__name__}, expected an object")
    return fields


def _facts(fields: dict[str, Any], kind: Kind) -> dict[str, str]:
    """Take the metadata out of `fields`; format and version must be those of `kind`."""
    facts = fields.pop("__metadata__", None)
    if not isinstance(facts, dict) or not all(isinstance(v, str) for v in facts.values()):
        raise _Damage("found no metadata of strings in the header")
    if facts.get("format") != kind.format:
        raise _Damage(f"found format {facts.get('format')!r}, expected {kind.format!r}")
    if facts.get("version") != str(kind.version):
        raise _Damage(
            f"found format version {facts.get('version')!r}, expected '{kind.version}', "
            "the one this release reads and writes"
        )
    return facts


def _entry(name: str, value: object) -> _Entry:
    dtype = value.get("dtype") if isinstance(value, dict) else None
    shape = value.get("shape") if isinstance(value, dict) else None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Damage(f"found {name!r} of dtype {dtype!r}, expected one of {sorted(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(n) for n in shape):
        raise _Damage(f"found {name!r} of shape {shape!r}, expected a list of sizes")
    return _Entry(name, dtype, tuple(shape))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _header(entries: list[_Entry], facts: Mapping[str, str], checksum: str) -> bytes:
    """The one header for these facts: length, JSON, spaces up to the alignment."""
    metadata = {**facts, "checksum": f"xxh3_128:{checksum}"}
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for entry in entries:
        stop = start + entry.nbytes
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    first = entries[0].nbytes if entries else 0
    padding = -(8 + len(text) + first) % ALIGNMENT
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of `tensor`, little-endian and contiguous, without a copy where they are so."""
    if not tensor.numel():
        return memoryview(b"")  # an empty tensor cannot be viewed as bytes
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _checksum(*buffers: bytes | memoryview) -> str:
    digest = xxhash.xxh3_128()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def _views(mapped: Tensor, start: int, entries: list[_Entry]) -> dict[str, Tensor]:
    tensors = {}
    for entry in entries:
        part = mapped[start : start + entry.nbytes]
        try:
            tensors[entry.name] = part.view(DTYPES[entry.dtype]).view(entry.shape)
        except RuntimeError as error:
            raise _Damage(f"found {entry.name!r} not aligned to its dtype ({error})") from None
        start += entry.nbytes
    return tensors
