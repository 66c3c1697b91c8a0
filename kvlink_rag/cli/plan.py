"""`kvlink-rag plan`: what `index` would take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlink_rag.arguments import HALF
from kvlink_rag.disk.atomic_files import free_bytes
from kvlink_rag.ingest.readers import find
from kvlink_rag.quantities import number, size

from . import terminal
from .index import Paths, Problems, Reading, told_skipped
from .opening import OPTIONS, Options, directory_of, opener
from .values import Count, Json


def plan(
    paths: Paths,
    /,
    *,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    seconds: Count = 5,
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """What index would take: passages, tokens, bytes, time.

    Reads and splits files as `index` would, into an empty collection. Model, embedder and codec
    are those given, else the collection's. Bytes of snapshots are exact; time, and the bytes
    beside them, come from a sample that is indexed and thrown away. Exit code 1: nothing could be
    read.

    Args:
        seconds: for the sample, about
        as_json: print the plan as JSON
    """
    problems = Problems(strict=False)
    files = find(paths, problems)
    if not files:
        return 1
    with terminal.progress(sum(file.size() for file in files), "reading") as bar:
        problems.write = bar.write
        open_empty = opener(options, codec=reading.codec, compression=reading.compression)
        from kvlink_rag.ingest.estimate import plan as estimate

        made = estimate(
            files,
            open_empty,
            on_problem=problems,
            advance=bar.update,
            **reading.limits(),
            seconds=seconds,
        )
    free = free_bytes(_existing(directory_of(options)))
    fields = {**made.to_dict(), "skipped": problems.skipped, "free_bytes": free}
    if as_json:
        terminal.show_json(fields)
    else:
        room = (
            f"{size(free)} of the disk are free; before they are asked for, snapshots take what "
            f"index --budget allows ({HALF} of that, unless the collection remembers another)"
        )
        terminal.show([*lines(fields), room, *told_skipped(problems.skipped)])
    return 1 if problems.skipped and not made.documents else 0


def _existing(directory: Path) -> Path:
    """The directory, or the one above it that is there."""
    return next(each for each in (directory, *directory.absolute().parents) if each.exists())


def lines(fields: Mapping[str, Any]) -> list[str]:
    """A plan for people."""
    exact = "" if fields["codec"] == "exact" else f" as {fields['codec']}"
    most = "up to " if fields["compression"] != "none" else ""
    seconds = fields["seconds"]
    long = f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{max(seconds, 1):,.0f} s"
    return [
        f"{number(fields['files'], 'file')}, {number(fields['documents'], 'document')}, "
        f"{number(fields['passages'], 'passage')}: {number(fields['snapshots'], 'snapshot')} of "
        f"{number(fields['tokens'], 'token')}{exact}",
        f"{most}{size(fields['total_bytes'])}: snapshots {most}{size(fields['snapshot_bytes'])}, "
        f"catalog and index {size(fields['other_bytes'])}",
        f"about {long} with the model {fields['model']!r} and the embedder "
        f"{fields['embedder']!r}, at {fields['tokens_per_second']:,.0f} tokens a second "
        f"({number(fields['sample_passages'], 'passage')} tried)",
    ]
