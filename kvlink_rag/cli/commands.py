"""What the commands of `kvlink-rag` do: one function each, from arguments to exit code.

Knows `KVLinkRAG` and the terminal; `cli` knows arguments and errors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from kvlink_rag.collection.answering import AnswerStream
from kvlink_rag.collection.conversation import Conversation
from kvlink_rag.collection.opening import CATALOG, INDEX, SNAPSHOTS
from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.disk.digests import cache_directory
from kvlink_rag.disk.model_files import BUNDLED
from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError, DocumentNotFound
from kvlink_rag.ingest.index_files import IngestReport, gone, ids_from, ingest
from kvlink_rag.ingest.readers import MAX_BYTES, Problem, find, raise_or_log
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.retrieval.contriever import ContrieverEmbedder

from . import terminal

# What `verify` lays out where there is no collection: each names something of the other.
_SAMPLES = (
    Document("The harbour of Orvale was built in 1911 by the Tarn company.", title="Orvale"),
    Document("The Tarn company makes cranes. Its seat is in Orvale.", title="Tarn company"),
)
# What `stats` shows; its JSON also has counters, which begin anew with each command.
_STATS = (
    "directory",
    "model",
    "embedder",
    "codec",
    "documents",
    "embedded",
    "tokens",
    "snapshots",
    "snapshot_bytes",
    "bytes_per_token",
)


def index(arguments: argparse.Namespace) -> int:
    """Take files in; 1 if anything had to be skipped."""
    problems = _Problems(strict=arguments.strict)
    files = find(arguments.paths, problems)
    if not files:
        return 1
    with (
        _open(
            arguments,
            create=True,
            size_limit=arguments.size_limit,
            codec=arguments.codec,
            compression=arguments.compression,
            search=arguments.search,
        ) as rag,
        _progress(sum(file.size() for file in files)) as bar,
    ):
        problems.write = bar.write
        _show_notice(rag, bar.write)
        report = ingest(
            rag,
            files,
            on_problem=problems,
            advance=bar.update,
            max_tokens=arguments.passage_tokens,
            max_bytes=arguments.max_file_size or MAX_BYTES,
        )
        bar.close()
        read = {file.source for file in files}  # of a name that is no Unicode, not its path
        report.gone = [source for source in gone(rag, arguments.paths) if source not in read]
        _show_report(rag, report, as_json=arguments.json)
    return 1 if problems.skipped else 0


def plan(arguments: argparse.Namespace) -> int:
    """Say what `index` would take; 1 if anything would have to be skipped."""
    from kvlink_rag.ingest.estimate import plan as make

    problems = _Problems(strict=False)
    files = find(arguments.paths, problems)
    if not files:
        return 1
    with _progress(sum(file.size() for file in files), "reading") as bar:
        problems.write = bar.write
        made = make(
            files,
            _opener(arguments),
            on_problem=problems,
            advance=bar.update,
            max_tokens=arguments.passage_tokens,
            max_bytes=arguments.max_file_size or MAX_BYTES,
            seconds=arguments.seconds,
        )
    if arguments.json:
        _print_json(made.to_dict())
    else:
        _print_lines(terminal.plan(made.to_dict()))
    return 1 if problems.skipped else 0


def ask(arguments: argparse.Namespace) -> int:
    """Answer one question."""
    question = sys.stdin.read() if arguments.question == "-" else arguments.question
    if not question.strip():
        raise ConfigError("the question is empty; give some text")
    with _open(arguments) as rag:
        _require_documents(rag)
        _show_notice(rag)
        stream = rag.stream(question.strip(), **_answering(arguments), k=arguments.k)
        if arguments.json:
            _print_json(_answer_fields(question.strip(), stream))
            return 0
        _print_pieces(stream)
        _print_lines(["", *terminal.sources(stream.hits)])
        if arguments.trace:
            _print_lines(terminal.trace(stream.trace.to_dict()))
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Answer questions, a line each, until the end of input."""
    with _open(arguments) as rag:
        _require_documents(rag)
        _show_notice(rag)
        options = _answering(arguments)
        conversation = Conversation(
            rag,
            arguments.k,
            options.pop("rounds"),
            system=arguments.system,
            order=options.pop("order"),
        )
        for question in _questions():
            turn = conversation.ask(question, **options)
            _print_pieces(turn)
            _print_lines([*terminal.sources(turn.hits, turn.first_number), ""])
            if arguments.trace:
                _print_lines([*terminal.trace(turn.trace.to_dict()), ""])
    return 0


def stats(arguments: argparse.Namespace) -> int:
    """What the collection holds."""
    with _open(arguments) as rag:
        fields = {"directory": str(rag.directory), **rag.stats().to_dict()}
    if arguments.json:
        _print_json(fields)
        return 0
    fields["snapshot_bytes"] = terminal.size(fields["snapshot_bytes"])
    _print_lines(f"{name.replace('_', ' '):15}  {_plain(fields[name])}" for name in _STATS)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Find, and mend if asked to; 1 if problems are left."""
    with _open(arguments) as rag:
        problems = rag.check(fix=arguments.fix)
        _print_lines(problems)
        left = rag.check() if arguments.fix and problems else problems
    if not problems:
        _print_lines(["no problems"])
    elif arguments.fix:
        found = terminal.number(len(problems), "problem")
        _print_lines([f"{found} found, {len(left)} left", *left])
    return 1 if left else 0


def delete(arguments: argparse.Namespace) -> int:
    """Delete passages by id or source."""
    if not arguments.ids and not arguments.source:
        raise ConfigError("nothing to delete; give ids, or --source with a file's path")
    with _open(arguments) as rag:
        ids = set(arguments.ids)
        for source in arguments.source:
            found = ids_from(rag, [source])
            if not found:
                raise DocumentNotFound(f"no passage of {source!r} in {rag.directory}")
            ids |= found
        count = rag.delete(sorted(ids))
    _print_lines([f"deleted {terminal.number(count, 'passage')}"])
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare reuse with the masked full prefill; 1 if they differ."""
    if _directory(arguments).exists():
        with _open(arguments) as rag:
            name, found = rag.model_name, rag.verify(k=arguments.k)
    else:
        model = _load_model(arguments)
        name, found = model.name, model.verify(model.prompt(_SAMPLES, "Where is it?"))
    if arguments.json:
        fields = ("holds", "difference", "tolerance", "same_top_token", "margin", "message")
        price = {"price": asdict(found.price)} if found.price else {}
        _print_json({"model": name, **{f: getattr(found, f) for f in fields}, **price})
    else:
        _print_lines([f"{name}: {found.message}"])
    return 0 if found.holds else 1


def bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark in a process of its own, or list them; its exit code."""
    found = find_benchmarks()
    if arguments.name is None:
        width = max(map(len, found))
        _print_lines(f"{name:{width}}  {_first_line(path)}" for name, path in found.items())
        return 0
    if arguments.name not in found:
        raise ConfigError(f"no benchmark {arguments.name!r}, expected one of {', '.join(found)}")
    command = [sys.executable, str(found[arguments.name]), *arguments.rest]
    return subprocess.run(command, check=False).returncode


def find_benchmarks() -> dict[str, Path]:
    """The benchmarks by name: the repository's, else those that came with the package.

    Raises `ConfigError` where there are none.
    """
    package = Path(__file__).parents[1]
    for folder in (package.parent / "benchmarks", package / "benchmarks"):
        scripts = sorted(folder.glob("*.py"))
        found = {p.stem: p for p in scripts if '__name__ == "__main__"' in p.read_text("utf-8")}
        if "ttft" in found:
            return found
    raise ConfigError("this installation came without its benchmarks; install it from a wheel")


def _first_line(path: Path) -> str:
    """Of the docstring."""
    return path.read_text("utf-8").lstrip().removeprefix('"""').splitlines()[0]


def demo(arguments: argparse.Namespace) -> int:
    """The bundled model on the bundled documents, in a directory that is kept only if named."""
    import torch

    from .demo import run

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with contextlib.ExitStack() as stack:
        kept = arguments.dir
        arguments.dir = kept or stack.enter_context(TemporaryDirectory(prefix="kvlink-demo-"))
        rag = stack.enter_context(_open(arguments, create=True))
        _show_notice(rag)
        found = run(rag, runs=arguments.runs, say=_say_above(arguments.json))
    if kept:
        _say_above(arguments.json)(f"\nAsk it yourself: kvlink-rag --dir {kept} ask '…' --rounds 2")
    if arguments.json:
        _print_json(found)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure answers on a data set, or put several measurements in one table."""
    from kvlink_rag.evaluation.command import report, run

    if arguments.compare:
        return report(arguments.compare, arguments.out or arguments.compare[0], by=arguments.by)
    if arguments.set is None or arguments.out is None:
        raise ConfigError("name a data set and --out DIR, or directories with --compare")
    return run(arguments, _load_model(arguments))


def train(arguments: argparse.Namespace) -> int:
    """Tune a model, or say what that would take."""
    from kvlink_rag.training.finetune.command import run

    _hush(arguments)
    return run(arguments)


# ── opening ──────────────────────────────────────────────────────────────────────────────────


def _directory(arguments: argparse.Namespace) -> Path:
    if arguments.dir == "":
        raise ConfigError("--dir is empty, expected a directory; leave it out for the usual one")
    if arguments.dir is not None:
        return Path(arguments.dir).expanduser()
    return cache_directory() / "collection"


def _has_collection(directory: Path) -> bool:
    """Whether a collection is there, or what is left of one that lost its catalog."""
    parts = (directory / name for name in (CATALOG, INDEX, SNAPSHOTS))
    return directory.is_file() or any(part.exists() for part in parts)


def _open(
    arguments: argparse.Namespace,
    *,
    create: bool = False,
    size_limit: int | None = None,
    codec: str | None = None,
    compression: str | None = None,
    search: str | None = None,
) -> KVLinkRAG:
    """The collection; one that is not there yet is made only to index into."""
    directory = _directory(arguments)
    if not create and not directory.exists():
        raise ConfigError(
            f"no collection in {directory}; make one with: kvlink-rag index PATH (or give --dir)"
        )
    _hush(arguments)
    return KVLinkRAG.open(
        directory,
        model=arguments.model,
        embedder=arguments.embedder,
        device=arguments.device,
        dtype=arguments.dtype,
        reencode=arguments.reencode,
        size_limit=size_limit,
        codec=codec,
        compression=compression,
        search=search,
        create=create,
    )


def _opener(arguments: argparse.Namespace) -> Callable[[Path], KVLinkRAG]:
    """Opens empty collections like the one that `index` would make; models are loaded once."""
    known: dict[str, str] = {}
    if _has_collection(_directory(arguments)):
        with KVLinkRAG.open(_directory(arguments), create=False) as rag:
            known = {"model": rag.model_name, "embedder": rag.embedder_name, "codec": rag.codec}
            known["compression"] = rag.compression
    _hush(arguments)
    model = KVLinkModel.from_pretrained(
        arguments.model or known.get("model", BUNDLED),
        device=arguments.device,
        dtype=arguments.dtype,
    )
    embedder = ContrieverEmbedder.from_pretrained(
        arguments.embedder or known.get("embedder", BUNDLED), device=arguments.device
    )
    codec = arguments.codec or known.get("codec")
    compression = arguments.compression or known.get("compression")
    return lambda path: KVLinkRAG.open(
        path, model=model, embedder=embedder, codec=codec, compression=compression
    )


def _require_documents(rag: KVLinkRAG) -> None:
    if not len(rag):
        raise ConfigError(f"{rag.directory} holds no documents; add some: kvlink-rag index PATH")


def _load_model(arguments: argparse.Namespace) -> KVLinkModel:
    _hush(arguments)
    return KVLinkModel.from_pretrained(
        arguments.model or BUNDLED, device=arguments.device, dtype=arguments.dtype
    )


def _hush(arguments: argparse.Namespace) -> None:
    """No bars and remarks of transformers around our output, unless asked for."""
    if arguments.verbose:
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# ── showing ──────────────────────────────────────────────────────────────────────────────────


class _Problems:
    """Reports each problem in a line as it comes; strict: raises for what must be skipped."""

    def __init__(self, *, strict: bool) -> None:
        self.skipped = 0
        self.write: Any = lambda text, file: file.write(text + "\n")
        self._strict = strict

    def __call__(self, problem: Problem) -> None:
        if self._strict and problem.skipped:
            raise_or_log(problem)
        self.skipped += problem.skipped
        kind = "skipped" if problem.skipped else "warning"
        self.write(terminal.visible(f"kvlink-rag: {kind}: {problem}"), file=sys.stderr)


def _progress(total: int, what: str = "indexing") -> Any:
    """A bar over the bytes of the files, on a terminal only."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None)


def _show_notice(rag: KVLinkRAG, write: Any = None) -> None:
    """What the model's spec wants people to know, such as that it is a demonstration."""
    if text := rag.model.spec.notice:
        line = f"kvlink-rag: {terminal.visible(text)}"
        (write or print)(line, file=sys.stderr)


def _show_report(rag: KVLinkRAG, report: IngestReport, *, as_json: bool) -> None:
    seen = rag.stats()
    if as_json:
        keys = ("documents", "snapshots", "snapshot_bytes", "bytes_per_token")
        collection = {key: getattr(seen, key) for key in keys}
        _print_json({**report.to_dict(), "collection": collection})
        return
    number, size = terminal.number, terminal.size
    repeated = f" ({report.repeated:,} repeated)" if report.repeated else ""
    rate = f", {report.tokens / report.seconds:,.0f} a second" if report.tokens else ""
    _print_lines(
        [
            f"{number(report.files, 'file')}, {number(report.documents, 'document')}, "
            f"{number(report.passages, 'passage')}{repeated}: {report.added:,} added, "
            f"{report.replaced:,} replaced, {report.unchanged:,} unchanged, "
            f"{report.removed:,} removed",
            f"{number(report.encoded, 'snapshot')} encoded: {number(report.tokens, 'token')} in "
            f"{report.seconds:.1f} s{rate}",
            f"{rag.directory} holds {number(seen.documents, 'passage')}; snapshots "
            f"{size(seen.snapshot_bytes)}, {size(seen.bytes_per_token)} a token",
        ]
    )
    if report.gone:
        shown = ", ".join(report.gone[:3]) + (", …" if len(report.gone) > 3 else "")
        terminal.note(
            f"passages of {number(len(report.gone), 'file')} that are no more are kept: {shown}; "
            "drop them with: kvlink-rag delete --source PATH"
        )


def _answering(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of an answer, as `KVLinkRAG.stream` takes them."""
    names = ("rounds", "order", "mode", "max_new_tokens", "temperature", "top_p", "seed")
    return {name: getattr(arguments, name) for name in names}


def _answer_fields(question: str, stream: AnswerStream) -> dict[str, Any]:
    text = "".join(stream)
    hits = [
        {
            "id": hit.document.id,
            "title": hit.document.title,
            "text": hit.document.text,
            "metadata": dict(hit.document.metadata),
            "score": hit.score,
        }
        for hit in stream.hits
    ]
    trace = stream.trace.to_dict()
    return {"question": question, "answer": text, "sources": hits, "trace": trace}


def _say_above(json: bool) -> Callable[[str], object]:
    """Prints a line at once; to stderr where stdout is for JSON."""
    stream = sys.stderr if json else sys.stdout
    return lambda text: print(terminal.visible(text), file=stream, flush=True)


def _questions() -> Iterator[str]:
    """Lines of standard input that hold something; a terminal is prompted."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _print_pieces(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(terminal.visible(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_lines(lines: Any) -> None:
    for line in lines:
        sys.stdout.write(f"{terminal.visible(line)}\n")


def _print_json(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields, indent=2) + "\n")


def _plain(value: object) -> str:
    return (
        f"{value:,.1f}"
        if isinstance(value, float)
        else (f"{value:,}" if isinstance(value, int) else str(value))
    )
