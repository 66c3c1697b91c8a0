"""`kvlink-rag adapt`: a header and link tokens for a model whose weights stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvlink_rag.arguments import MAX_TOKENS
from kvlink_rag.errors import ConfigError
from kvlink_rag.ingest.readers import find

from . import terminal
from .index import Paths, Problems
from .opening import OPTIONS, Options, collection, importing, load
from .values import Count, Json

RESUMES = True  # an interrupted run goes on when repeated
PASSAGES = "passages"  # the collection in the directory of the result


def adapt(
    paths: Paths,
    /,
    *,
    out: str,
    questions: str | None = None,
    count: Count = 256,
    held: Count = 32,
    passages: Count = 6,
    steps: Count = 400,
    header: int = 8,
    links: int = 4,
    learning_rate: float = 5e-3,
    lora: bool = False,
    passage_tokens: Count = MAX_TOKENS,
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """Make a model that was never tuned read stored passages nearly as it reads text.

    Learns the embeddings of a few new tokens before and behind passages, on your documents, from
    what the model itself answers with full attention; its weights stay. Minutes to hours on a CPU.
    An interrupted run goes on when repeated. The result is a file of kilobytes in OUT/run/adapter;
    use it as --model. Says at the end how far reuse is from full attention, before and after.
    Needs kvlink-rag[train].

    Args:
        out: a directory for all that is made
        questions: a file of questions, one a line or JSON lines (without it the model writes some)
        count: questions to learn from
        held: questions to measure on
        passages: the most passages of a question
        steps: sets of passages to learn from, again and again
        header: new tokens that each passage sees before it
        links: new tokens after each passage
        learning_rate: of the new tokens
        lora: learn low-rank changes of the weights as well
        passage_tokens: the most tokens of a passage
        as_json: print JSON
    """
    if options.dir is not None:
        raise ConfigError(
            f"found --dir {options.dir}, but adapt reads PATH into a collection of its own in OUT; "
            "leave --dir out"
        )
    with importing(options):
        from kvlink_rag.evaluation.quality import questions_in
        from kvlink_rag.training import adapt as adapting
    wanted = adapting.Adaptation(
        header=header,
        links=links,
        lora=lora,
        questions=count,
        held=held,
        passages=passages,
        steps=steps,
        learning_rate=learning_rate,
    )
    asked = [] if questions is None else questions_in(questions)
    directory = Path(out).expanduser()
    files = find(paths, problems := Problems(strict=False))
    inside = replace(options, dir=str(directory / PASSAGES))
    # a collection for searching alone: no snapshot is made before one is asked for
    with collection(inside, create=True, models=True, budget=0) as rag:
        from kvlink_rag.ingest.index_files import ingest

        load(rag)
        with terminal.progress(sum(file.size() for file in files), "reading") as bar:
            problems.write = bar.write
            ingest(rag, files, on_problem=problems, advance=bar.update, max_tokens=passage_tokens)
        total = min(count + held, len(asked)) if asked else count + held
        with terminal.progress(total, "answering") as bar:
            found = adapting.adapt(
                rag, directory, wanted, questions=asked, device=options.device, advance=bar.update
            )
    if as_json:
        terminal.show_json(adapting.report(found))
        return 0
    before, after = found.before, found.after
    terminal.show(
        [
            "reuse against full attention of the model as it was, on "
            f"{found.held} questions held out:",
            f"{'':<8}{'nats a token':>14}{'agreement':>12}{'first token':>14}",
            *(
                f"{way.name:<8}{way.divergence:>14.4f}{way.agreement:>12.1%}{way.first:>14.1%}"
                for way in (before, after)
            ),
            f"the adapter is in {found.directory}; use it with --model {found.directory}",
        ]
    )
    return 0
