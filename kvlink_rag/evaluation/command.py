"""From a request to a directory of answers, a table and a figure. Knows no command line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvlink_rag.datasets.rows import Source
from kvlink_rag.datasets.schemas import Example
from kvlink_rag.datasets.sets import DataSet, Skipped, filled_up, find_set, read
from kvlink_rag.errors import ConfigError, MissingExtra
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.model.verify import TOLERANCE
from kvlink_rag.pretrained.known import DEFAULT
from kvlink_rag.retrieval.embedder import Embedder
from kvlink_rag.retrieval.embedder_kinds import load_embedder

from .figure import draw
from .modes import contenders
from .records import Records
from .records import read as read_records
from .request import By, Request
from .retrieved import Corpus, read_corpus
from .run import Case, at_positions, evaluate, usable
from .scores import scorer
from .summary import agreement, summarize, table

log = logging.getLogger(__name__)

TABLE, SUMMARY, FIGURE = "summary.md", "summary.json", "figure.png"


def run(request: Request, model: KVLinkModel) -> int:
    """Evaluate and show the table; 1 if reuse said something else than the masked prefill."""
    data_set = find_set(request.set)
    scorer(data_set.metric)  # a missing package is told before any work
    skipped = Skipped(request.on_bad)
    model = model.with_spec(_spec(model, request))
    compared = list(contenders(model, request.modes))
    cases = list(usable(_cases(request, data_set, skipped), compared, skipped))
    if not cases:
        raise ConfigError(f"nothing to ask: all examples were skipped ({dict(skipped.reasons)})")
    with (
        Records(request.out, _settings(request, model)) as records,
        tqdm(total=len(cases) * len(compared), unit=" answers", disable=None) as bar,
    ):
        evaluate(
            compared,
            cases,
            records,
            data_set=data_set.name,
            metric=data_set.metric,
            batch=request.batch,
            most=request.max_new_tokens,
            advance=bar.update,
        )
    return report([request.out], request.out, model, skipped, by=request.by)


def report(
    directories: Sequence[Path],
    out: Path,
    model: KVLinkModel | None = None,
    skipped: Skipped | None = None,
    *,
    by: Sequence[By] = (),
) -> int:
    """Summarise the answers of one or more directories into `out`, and print the table."""
    records = [record for directory in directories for record in read_records(directory)]
    lines = summarize(records, by=by)
    found = {
        "lines": [line.to_dict() for line in lines],
        "skipped": dict(skipped.reasons) if skipped else {},
    }
    differ = 0
    if model is not None:
        seen = agreement(records, model.name, TOLERANCE.get(model.backbone.dtype, 6e-2))
        found["agreement"] = asdict(seen)
        differ = seen.differ
    told = [*table(lines), *_remarks(found)]
    out.mkdir(parents=True, exist_ok=True)
    (out / SUMMARY).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    (out / TABLE).write_text("\n".join(told) + "\n", "utf-8")
    sys.stdout.write("\n".join(told) + "\n")
    try:
        draw(lines, out / FIGURE)
    except MissingExtra as error:
        log.warning("no figure: %s", error)
    return 1 if differ else 0


def _remarks(found: dict[str, Any]) -> list[str]:
    lines = []
    if skipped := found["skipped"]:
        told = ", ".join(f"{count} ({reason})" for reason, count in skipped.items())
        lines += ["", f"Skipped: {told}."]
    if (seen := found.get("agreement")) and seen["compared"]:
        lines += [
            "",
            f"Reuse against the masked prefill: {seen['identical']} of {seen['compared']} answers "
            f"identical, {seen['ties']} first differ where the two best logits lie within "
            f"{seen['tolerance']:g}, {seen['differ']} elsewhere.",
        ]
    return lines


def _spec(model: KVLinkModel, request: Request) -> Any:
    """The model's spec with the prompt preset and the rank that were asked for."""
    changes: dict[str, Any] = {"preset": request.prompt, "rank": request.rank}
    return replace(model.spec, **{name: value for name, value in changes.items() if value})


def _cases(request: Request, data_set: DataSet, skipped: Skipped) -> list[Case]:
    """Examples, filled up or over retrieved documents, with the gold one at each place wanted."""
    source = data_set.source
    if request.data:
        source = Source(request.data, None, request.split or source.split)
    elif request.split:
        source = replace(source, split=request.split)
    pool: Iterable[Example] = read(data_set, source, skipped)
    if request.documents or (request.retrieve and not request.corpus):
        pool = list(pool)  # others' documents are wanted too
    last = None if request.limit is None else request.first + request.limit
    examples = list(islice(pool, request.first, last))
    if request.retrieve:
        return _retrieved(request, request.retrieve, pool, examples, skipped)
    if request.documents:
        chosen = {example.id for example in examples}
        filled = filled_up(list(pool), request.documents, request.seed)
        examples = [example for example in filled if example.id in chosen]
    return list(at_positions(examples, request.gold_at, skipped))


def _retrieved(
    request: Request,
    k: int,
    pool: Iterable[Example],
    examples: Sequence[Example],
    skipped: Skipped,
) -> list[Case]:
    if request.gold_at:
        raise ConfigError("--gold-at needs documents that are given; leave out --retrieve")
    passages = (
        read_corpus(Source(request.corpus), skipped)
        if request.corpus
        else (document for example in pool for document in example.documents)
    )
    corpus = Corpus(passages, _embedder(request))
    return [Case(e, None, found) for e, found in corpus.ask(examples, k)]


def _embedder(request: Request) -> Embedder:
    return load_embedder(request.embedder or DEFAULT, device=request.device)


_ANSWERED_UNDER = (
    "set", "data", "split", "first", "documents", "gold_at", "retrieve", "corpus", "embedder",
    "prompt", "rank", "max_new_tokens", "seed",
)  # fmt: skip


def _settings(request: Request, model: KVLinkModel) -> dict[str, Any]:
    """What must not change within one directory; modes and the limit may grow."""
    settings = {name: getattr(request, name) for name in _ANSWERED_UNDER}
    settings["gold_at"] = list(request.gold_at)  # as JSON gives it back
    dtype = model.backbone.dtype_name
    return {**settings, "model": model.name, "fingerprint": model.fingerprint, "dtype": dtype}
