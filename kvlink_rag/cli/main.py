"""The command line: arguments, exit codes and one-line errors. What commands do is in `commands`.

Imports nothing heavy, so that `--help` is instant. Exit codes: 0 done, 1 failed or problems found,
2 wrong usage, 130 interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvlink_rag._version import __version__
from kvlink_rag.arguments import (
    BF16,
    CODECS,
    COMPRESSIONS,
    DTYPES,
    MAX_SEED,
    MODES,
    ORDERS,
    SEARCHES,
    parse_size,
)
from kvlink_rag.errors import ConfigError
from kvlink_rag.ingest.readers import SUFFIXES
from kvlink_rag.ingest.splitter import MAX_TOKENS

GROUPS = ("kind", "passages")  # those of `evaluation.summary`, likewise
FAILED, USAGE, INTERRUPTED, NO_READER = 1, 2, 130, 141

_ABOUT = """\
Answer questions from your documents with a local language model. Every document is encoded once;
its keys and values are kept on disk and reused, so the first word of an answer comes at once."""
_COLLECTION = """\
The collection is the directory --dir, else `collection` in the directory that the environment
variable KVLINK_CACHE_DIR names, else in the user's cache directory. It remembers its models."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        _prepare(arguments)
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _no_reader()
    except KeyboardInterrupt:
        _say(getattr(arguments, "interrupted", "interrupted"))
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        _say(f"error: {_one_line(error)}")
        return FAILED


def _run(arguments: argparse.Namespace) -> int:
    from . import commands

    command: Callable[[argparse.Namespace], int] = getattr(commands, arguments.command)
    return command(arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    """Settings that must be made before transformers is imported, and how text is written."""
    if arguments.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    level = {0: logging.WARNING, 1: logging.INFO}.get(arguments.verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="kvlink-rag: %(message)s", stream=sys.stderr)
    logging.getLogger("pypdf").setLevel(logging.ERROR if level > logging.DEBUG else level)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _no_reader() -> int:
    """Let the interpreter's own last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return NO_READER


def _one_line(error: Exception) -> str:
    """What went wrong; of an error that is not ours also its kind and how to learn more."""
    from kvlink_rag.errors import KVLinkError

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KVLinkError | OSError):
        return text
    return f"{type(error).__name__}: {text[:300]} (--debug shows where)"


def _say(text: str) -> None:
    sys.stderr.write(f"kvlink-rag: {text}\n")


# ── arguments ────────────────────────────────────────────────────────────────────────────────


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("kvlink-rag", description=_ABOUT, epilog=_COLLECTION)
    parser.add_argument("--version", action="version", version=f"kvlink-rag {__version__}")
    _add_common(parser, {})
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    everyday = (_index, _plan, _ask, _chat, _stats, _check, _delete, _verify, _demo)
    for add in (*everyday, _bench, _eval, _train):
        _add_common(add(commands), {"default": argparse.SUPPRESS})
    return parser


def _add_common(parser: argparse.ArgumentParser, default: dict[str, Any]) -> None:
    """Options of every command; given before or after it."""
    group = parser.add_argument_group("options of every command")
    group.add_argument("--dir", metavar="DIR", help="the collection's directory", **default)
    group.add_argument(
        "--model", help="a model directory, hub id or 'bundled' (the collection's)", **default
    )
    group.add_argument("--embedder", help="likewise for the embedder", **default)
    group.add_argument(
        "--device", help="auto, cpu, cuda, cuda:1, … (auto)", **(default or {"default": "auto"})
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the model (auto: its own)",
        **(default or {"default": "auto"}),
    )
    group.add_argument(
        "--reencode",
        action="store_true",
        help="take another --model or --embedder than the collection's and encode it again",
        **default,
    )
    group.add_argument("--offline", action="store_true", help="use no network", **default)
    group.add_argument("--debug", action="store_true", help="show tracebacks", **default)
    group.add_argument(
        "-v",
        "--verbose",
        action="count",
        help="say more; twice: say all",
        **(default or {"default": 0}),
    )


def _index(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "index",
        help="take files into the collection",
        description=f"Read files ({', '.join(SUFFIXES)}) and folders, split them into passages, "
        "encode each. A file that was indexed before (a file is known by its path as given) is "
        "brought up to date; what is unchanged costs nothing. An interrupted run is finished by "
        "repeating it. What cannot be read is reported and skipped; the exit code is then 1.",
    )
    _add_reading(parser)
    parser.add_argument(
        "--size-limit", type=_size, metavar="SIZE", help="most bytes of snapshots to keep: 20GB"
    )
    parser.add_argument(
        "--search",
        choices=SEARCHES,
        default=None,
        help="how passages are found: exact, in lists (ivf: sooner, may miss one), or by size "
        "(the collection's, else auto)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first file or line that cannot be read"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(interrupted="interrupted; run the same command again to go on from here")
    return parser


def _ask(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "ask", help="answer one question", description="Answer one question, with its sources."
    )
    parser.add_argument("question", help="the question; - reads it from standard input")
    _add_answering(parser, k=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _chat(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="several questions, with what was said before",
        description="Read a question a line until the end of input; each is answered from newly "
        "retrieved passages and the conversation so far.",
    )
    _add_answering(parser, k=4)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    return parser


def _plan(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="what index would take: passages, tokens, bytes, time",
        description="Read and split files as `index` would, into an empty collection, and say what "
        "it would take. Model, embedder and codec are those given, else the collection's. Bytes of "
        "snapshots are exact; time, and the bytes beside them, come from a sample that is indexed "
        "and thrown away.",
    )
    _add_reading(parser)
    parser.add_argument(
        "--seconds", type=_count, default=5, metavar="N", help="for the sample, about (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """What is read, and what becomes of it."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file or folder")
    parser.add_argument(
        "--passage-tokens",
        type=_count,
        default=MAX_TOKENS,
        metavar="N",
        help="the most tokens of a passage (%(default)s)",
    )
    parser.add_argument(
        "--max-file-size", type=_size, default=None, metavar="SIZE", help="per file or line (64MB)"
    )
    parser.add_argument(
        "--codec",
        choices=(*CODECS, BF16),
        default=None,
        help="how to keep snapshots: as they are (exact; bf16 is the same of a bfloat16 model), "
        "or smaller at a price that `verify` states (the collection's, else exact)",
    )
    parser.add_argument(
        "--compression",
        choices=COMPRESSIONS,
        default=None,
        help="compress snapshots on top of the codec, without loss; needs kvlink-rag[zstd] "
        "(the collection's, else none)",
    )


def _add_answering(parser: argparse.ArgumentParser, *, k: int) -> None:
    parser.add_argument("-k", type=_count, default=k, help="passages to retrieve (%(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: retrieve again with the first hits, for questions over two facts (%(default)s)",
    )
    parser.add_argument(
        "--order",
        choices=ORDERS,
        help="of the passages in the prompt: best first, or by id, which lets questions over the "
        "same passages reuse more (the collection's, else score)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="reuse",
        help="reuse snapshots; or compute all, masked as reuse is or in full (%(default)s)",
    )
    parser.add_argument("--max-new-tokens", type=_count, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=_seed, metavar="N", help="of sampling")
    parser.add_argument("--trace", action="store_true", help="show times and token counts")


def _stats(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "stats", help="what the collection holds", description="What the collection holds."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _check(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "check",
        help="find lost or damaged files",
        description="Compare catalog, index and snapshots. Exit code 1: problems are left.",
    )
    parser.add_argument("--fix", action="store_true", help="mend what can be made again")
    return parser


def _delete(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "delete", help="delete passages", description="Delete passages by id or by their file."
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="as shown by ask")
    parser.add_argument(
        "--source", action="append", default=[], metavar="PATH", help="all passages of this file"
    )
    return parser


def _verify(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="is reuse exact on this model?",
        description="Compare the model's output over snapshots with one full prefill that has the "
        "same visibility, on passages of the collection (on two of its own, if there is no "
        "collection at all).",
    )
    parser.add_argument("-k", type=_count, default=4, help="passages to compare (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _bench(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure on this machine",
        description="Run a benchmark: `kvlink-rag bench ttft --help` shows its options. Without a "
        "name, list them. Each prints tables and, last, one JSON object.",
    )
    parser.add_argument("name", nargs="?", help="ttft, quality, …")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its own options")
    return parser


def _demo(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="the bundled model on the bundled documents",
        description="Index the bundled documents, answer questions, show times. Keeps nothing "
        "unless --dir is given.",
    )
    parser.add_argument("--threads", type=_count, default=None, metavar="N", help="of the CPU")
    parser.add_argument("--runs", type=_count, default=5, metavar="N", help="timings of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _eval(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "eval",
        help="measure answers as the KVLink paper does",
        description="Answer the questions of a data set in several modes and score the answers. "
        "An interrupted run is finished by repeating it. Needs kvlink-rag[eval].",
    )
    parser.add_argument(
        "set",
        nargs="?",
        help="nq, 2wikimultihopqa, triviaqa, hotpotqa, musique, multinews, samsum or generated",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where answers and table go")
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="DIR", help="only one table of several --out"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="a file, folder or hub id with the set's rows (the hub's)"
    )
    parser.add_argument("--split", help="of a hub data set")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="examples to leave out")
    parser.add_argument("--limit", type=_count, metavar="N", help="the most examples to ask")
    parser.add_argument(
        "--modes",
        type=lambda text: text.split(","),
        default=["full", "masked", "reuse"],
        metavar="A,B",
        help="full, masked, reuse, closed (no documents); :0 after one leaves the link tokens out",
    )
    parser.add_argument("--prompt", metavar="NAME", help="a preset of the model's kvlink.json")
    parser.add_argument("--rank", choices=("none", "fixed", "exact"), help="{rank} in passages")
    parser.add_argument(
        "--documents", type=_count, metavar="N", help="fill up with distractors to N a question"
    )
    parser.add_argument(
        "--gold-at",
        type=_places,
        default=[],
        metavar="P",
        help="places (from 0) of the one gold document: 0-9, or 0,4,9; each question once for each",
    )
    parser.add_argument(
        "--by",
        type=_groups,
        default=[],
        metavar="A,B",
        help="also a line for each kind of question, number of passages, or both: kind,passages",
    )
    parser.add_argument(
        "--retrieve", type=_count, metavar="K", help="ask over K passages that --embedder finds"
    )
    parser.add_argument("--corpus", metavar="PATH", help="passages to search (the set's own)")
    parser.add_argument("--batch", type=_count, default=8, metavar="N", help="answers at once")
    parser.add_argument("--max-new-tokens", type=_count, default=200, metavar="N")
    parser.add_argument("--on-bad", choices=("skip", "refuse"), default="skip")
    parser.add_argument("--seed", type=_seed, default=0)
    parser.set_defaults(
        command="evaluate", interrupted="interrupted; run the same command again to go on from here"
    )
    return parser


def _train(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="tune a model to link tokens, the KVLink paper's recipe",
        description="Tune a model as a config says. An interrupted run goes on from its last "
        "checkpoint. Several devices: torchrun --nproc-per-node N -m kvlink_rag train CONFIG. "
        "Needs kvlink-rag[train].",
    )
    parser.add_argument("config", help="a YAML file, or a bundled one such as llama-3.2-1b")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say examples, tokens, memory and time"
    )
    parser.add_argument(
        "--tflops", type=float, default=300.0, metavar="N", help="a device's, for --dry-run (300)"
    )
    parser.add_argument("--resume", metavar="DIR", help="a checkpoint other than the last")
    parser.add_argument(
        "--merge", action="store_true", help="write the whole model, not the adapter alone"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (--dry-run)")
    parser.set_defaults(interrupted="interrupted; run the same command again to go on from here")
    return parser


def _places(text: str) -> list[int]:
    """0-9 or 0,4,9."""
    first, dash, last = text.partition("-")
    try:
        found = range(int(first), int(last) + 1) if dash else [int(p) for p in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected places such as 0-9 or 0,4,9")
    return list(found)


def _groups(text: str) -> list[str]:
    """kind, passages or both."""
    if unknown := set(found := text.split(",")) - set(GROUPS):
        raise argparse.ArgumentTypeError(f"found {sorted(unknown)}, expected {', '.join(GROUPS)}")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(
            f"found {text[:40]!r}, expected a whole number from 0 to {MAX_SEED}"
        )
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text, least=1)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
