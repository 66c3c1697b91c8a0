"""What the benchmarks share: options, models, percentiles, tables, cold files, figures, JSON.

Every benchmark prints its tables and, last, one JSON object: machine, arguments, rows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, machine, random_model

from kvlink_rag import KVLinkModel
from kvlink_rag.engine.processor import computing_dtype
from kvlink_rag.errors import MissingExtra

Row = dict[str, Any]

CHUNK = 1 << 20  # bytes that the disk is read in


# Options and models.


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Options of every benchmark of a language model."""
    options = argparse.ArgumentParser(
        description=(description or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument(
        "--random-weights",
        "--shape",
        dest="shape",
        choices=sorted(SHAPES),
        default="llama-3.2-1b",
        help="a published shape with random weights, for times alone",
    )
    options.add_argument("--model", help="a checkpoint instead: a directory, hub id or 'small'")
    options.add_argument(
        "--dtype",
        default="auto",
        help="auto: a checkpoint's own, of a shape bfloat16; as suits a CPU",
    )
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--rounds", type=int, default=7, help="timings of each kind")
    options.add_argument("--scratch", help="folder for what is written")
    options.add_argument("--figure", help="write PATH.png and PATH.svg")
    options.set_defaults(**defaults)
    return options


def load(arguments: argparse.Namespace) -> KVLinkModel:
    """The checkpoint, or a random model of the shape."""
    torch.set_num_threads(arguments.threads)
    if arguments.model:
        return KVLinkModel.from_pretrained(
            arguments.model, device=arguments.device, dtype=arguments.dtype
        )
    return random_model(arguments.shape, dtype_of(arguments), arguments.device)


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    """What a random model computes in: as named, else as suits bfloat16 on the device."""
    if arguments.dtype == "auto":
        return computing_dtype(torch.bfloat16, torch.device(arguments.device))
    return getattr(torch, arguments.dtype)  # type: ignore[no-any-return]


def refuse(reason: str) -> None:
    """End without figures."""
    raise SystemExit(f"no figures: {reason}")


# Figures in numbers.


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that `share` of all are not above."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def timed(model: KVLinkModel, call: Callable[[], Any]) -> float:
    """Seconds of `call`, device included."""
    with torch.inference_mode():
        model.backbone.synchronize()
        start = time.perf_counter()
        call()
        model.backbone.synchronize()
        return time.perf_counter() - start


def show(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """A table of some columns, numbers to four digits."""
    cells = [[*columns], *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    print(flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def finish(arguments: argparse.Namespace, rows: Sequence[Row], **more: Any) -> None:
    """The last line: one JSON object."""
    hidden = {"scratch", "figure", *(["shape"] if getattr(arguments, "model", None) else [])}
    given = {k: v for k, v in vars(arguments).items() if k not in hidden}
    print(json.dumps({"machine": machine(), "arguments": given, "rows": rows, **more}))


# Cold files.


def make_cold(paths: Sequence[Path]) -> None:
    """Drop the page cache of files that nothing maps, and confirm it with mincore, or refuse."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # a page that is not written yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    warm = [path for path in paths if resident_pages(path)]
    if warm:
        refuse(
            f"{len(warm)} of {len(paths)} files stay in memory after posix_fadvise(DONTNEED), as "
            f"mincore tells ({warm[0].name} first); put --scratch on a disk that is not tmpfs"
        )


def read_cold(paths: Sequence[Path]) -> float:
    """Seconds to read cold files one after the other, and nothing else: the disk's own rate."""
    make_cold(paths)
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def resident_pages(path: Path) -> int:
    """Pages of the file that are in the page cache."""
    size = path.stat().st_size
    seen = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    mapped = np.memmap(path, dtype=np.uint8, mode="r")  # no page is touched
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(size), seen):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(byte & 1 for byte in seen)


# Figures to look at.


def draw(path: str | None, plot: Callable[[Any], None], *, title: str) -> None:
    """`plot(axes)` into PATH.png and PATH.svg, if there is a path."""
    if path is None:
        return
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra(
            "found no matplotlib, which figures need; pip install 'kvlink-rag[bench]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    plot(axes)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    for suffix in (".png", ".svg"):
        figure.savefig(f"{path}{suffix}", dpi=150)
    pyplot.close(figure)
