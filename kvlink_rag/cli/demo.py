"""`kvlink-rag demo`: questions about countries, answered from passages of the package."""

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
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """Index short passages about countries and answer questions.

    The passages, of The World Factbook, come with this package. Shows answers, sources, and the
    time to the first token of reuse and of full prefill. Keeps nothing unless --dir is given.

    Args:
        threads: of the CPU
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
        found = run(rag, say=say)
    if options.dir:
        say(f"\nAsk it yourself: kvlink-rag --dir {options.dir} ask '…'")
    if as_json:
        terminal.show_json(found)
    return 0
