"""`kvlink-rag demo`: the bundled model on the bundled documents."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from tempfile import TemporaryDirectory

from . import terminal
from .opening import OPTIONS, Options, collection, load
from .values import Count, Json


def demo(
    *,
    threads: Count | None = None,
    runs: Count = 5,
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """The bundled model on the bundled documents.

    Indexes them, answers questions, shows times. Keeps nothing unless --dir is given.

    Args:
        threads: of the CPU
        runs: timings of each kind
        as_json: print one JSON object at the end
    """
    say = terminal.above(as_json)
    with ExitStack() as stack:
        directory = options.dir or stack.enter_context(TemporaryDirectory(prefix="kvlink-demo-"))
        rag = stack.enter_context(
            collection(replace(options, dir=directory), create=True, models=True)
        )
        import torch

        from kvlink_rag.evaluation.demonstration import run

        if threads:
            torch.set_num_threads(threads)
        load(rag)
        found = run(rag, runs=runs, say=say)
    if options.dir:
        say(f"\nAsk it yourself: kvlink-rag --dir {options.dir} ask '…' --rounds 2")
    if as_json:
        terminal.show_json(found)
    return 0
