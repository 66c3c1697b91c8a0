"""`kvlink-rag eval`: measure answers as the KVLink paper does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from kvlink_rag.errors import ConfigError
from kvlink_rag.evaluation.request import Request

from .opening import OPTIONS, Options, load_model
from .values import Count, Groups, Names, Places, Seed

NAME = "eval"  # the command's
RESUMES = True  # an interrupted run is finished by repeating it


def evaluate(
    data_set: Annotated[str | None, Parameter(name="SET")] = None,
    /,
    *,
    out: Path | None = None,
    compare: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = (),
    data: str | None = None,
    split: str | None = None,
    first: int = 0,
    limit: Count | None = None,
    modes: Names = ("full", "masked", "reuse"),
    prompt: str | None = None,
    rank: Literal["none", "fixed", "exact"] | None = None,
    documents: Count | None = None,
    gold_at: Places = (),
    by: Groups = (),
    retrieve: Count | None = None,
    corpus: str | None = None,
    batch: Count = 8,
    max_new_tokens: Count = 200,
    on_bad: Literal["skip", "refuse"] = "skip",
    seed: Seed = 0,
    options: Options = OPTIONS,
) -> int:
    """Measure answers as the KVLink paper does.

    Answers the questions of a data set in several modes and scores the answers. An interrupted run
    is finished by repeating it. Needs kvlink-rag[eval]. Exit code 1: reuse said something else
    than the masked prefill.

    Args:
        data_set: nq, 2wikimultihopqa, triviaqa, hotpotqa, musique, multinews or samsum
        out: where answers and table go
        compare: only one table of several --out
        data: a file, folder or hub id with the set's rows (the hub's)
        split: of a hub data set
        first: examples to leave out
        limit: the most examples to ask
        modes: full, masked, reuse, closed (no documents); :0 after one leaves the link tokens out
        prompt: a preset of the model's kvlink.json
        rank: what {rank} in passages stands for
        documents: fill up with distractors to so many a question
        gold_at: places (from 0) of the one gold document: 0-9, or 0,4,9; each question once for
            each
        by: also a line for each kind of question, number of passages, or both: kind,passages
        retrieve: ask over so many passages that --embedder finds
        corpus: passages to search (the set's own)
        batch: answers at once
        max_new_tokens: the most tokens of an answer
        on_bad: what becomes of rows that cannot be used
        seed: of drawing distractors
    """
    if compare:
        from kvlink_rag.evaluation.command import report

        return report(compare, out or compare[0], by=by)
    if data_set is None or out is None:
        raise ConfigError("name a data set and --out DIR, or directories with --compare")
    request = Request(
        set=data_set,
        out=out,
        data=data,
        split=split,
        first=first,
        limit=limit,
        modes=modes,
        prompt=prompt,
        rank=rank,
        documents=documents,
        gold_at=gold_at,
        by=by,
        retrieve=retrieve,
        corpus=corpus,
        embedder=options.embedder,
        device=options.device,
        batch=batch,
        max_new_tokens=max_new_tokens,
        on_bad=on_bad,
        seed=seed,
    )
    model = load_model(options)
    from kvlink_rag.evaluation.command import run

    return run(request, model)
