"""The command line: finds the commands, runs one, and gives its exit code and one-line errors.

A command is a module beside this one with a function of the module's name: its parameters are the
arguments, its docstring is the help. Of the module, `NAME` names the command where that differs,
`RESUMES` says that repeating an interrupted run finishes it, `FOREIGN` that what follows its first
word is for another program. No module here imports anything heavy before it is needed, so that help
is instant.

Exit codes: 0 done, 1 failed or problems found, 2 wrong usage, 130 interrupted, 141 the reader of
the output went away.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from inspect import cleandoc
from pkgutil import iter_modules
from types import ModuleType

from cyclopts import App, CycloptsError, Parameter

from kvlink_rag._version import __version__

from .opening import OPTIONS, Options
from .values import shown_default

FAILED, USAGE, INTERRUPTED, NO_READER = 1, 2, 130, 141

_ABOUT = (
    "Answer questions from your documents with a local language model. Every document is encoded "
    "once; its keys and values are kept on disk and reused, so that the model does not read it "
    "again for each question.\n\n"
    "The collection is the directory --dir, else `collection` in the directory that the variable "
    "KVLINK_CACHE_DIR names, else in the user's cache directory. It remembers its models."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    modules = find_commands()
    app = _app(modules)
    if not given:
        return _wrong("a command is missing", [])
    tokens = _command_first(given, modules)
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _wrong(str(error), error.command_chain or [])
    bound.apply_defaults()
    options = bound.arguments.get("options", OPTIONS)
    try:
        _prepare(options)
        code = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        return _no_reader()
    except KeyboardInterrupt:
        resumes = getattr(modules.get(tokens[0]), "RESUMES", False)
        again = "; run the same command again to go on from here" if resumes else ""
        _say(f"interrupted{again}")
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        _say(f"error: {_one_line(error)}")
        return FAILED


def find_commands() -> dict[str, ModuleType]:
    """The modules of commands, by the command's name."""
    package = sys.modules[__package__]
    names = [each.name for each in iter_modules(package.__path__) if each.name != "main"]
    modules = {name: import_module(f".{name}", __package__) for name in names}
    return {
        getattr(module, "NAME", name): module
        for name, module in modules.items()
        if callable(getattr(module, name, None))
    }


def _app(modules: dict[str, ModuleType]) -> App:
    app = App(
        name="kvlink-rag",
        help=_ABOUT,
        help_format="plaintext",
        version=f"kvlink-rag {__version__}",
        default_parameter=Parameter(negative=(), show_default=shown_default, allow_repeating=True),
    )
    for name, module in modules.items():
        app.command(_unwrapped(_function(module)), name=name)
    app.register_install_completion_command()
    return app


def _function(module: ModuleType) -> Callable[..., int]:
    function: Callable[..., int] = getattr(module, module.__name__.rpartition(".")[2])
    return function


def _unwrapped(function: Callable[..., int]) -> Callable[..., int]:
    """`function`, with each paragraph of its docstring in one line, for a terminal to break."""
    text = cleandoc(function.__doc__ or "")
    function.__doc__ = re.sub(r"(?<=\S)\n(?=\S)|(?<=\S)\n {8,}(?=\S)", " ", text)
    return function


def _command_first(tokens: list[str], modules: dict[str, ModuleType]) -> list[str]:
    """`tokens` with the options before the command behind it, where the library looks for them.

    The options behind the first word of a `FOREIGN` command are not ours to read.
    """
    at = 0
    while at < len(tokens) and _OF_EVERY.fullmatch(tokens[at]):
        at += 2 if tokens[at] in _WITH_VALUE else 1
    before, command, after = tokens[:at], tokens[at : at + 1], tokens[at + 1 :]
    foreign = getattr(modules.get("".join(command)), "FOREIGN", False)
    if foreign and after and not after[0].startswith("-"):
        after = ["--", *after]
    return [*command, *before, *after]


_WITH_VALUE = frozenset(
    f"--{each.name}" for each in fields(Options) if each.default is None or each.default == "auto"
)
_OF_EVERY = re.compile(rf"(?:{'|'.join(f'--{each.name}' for each in fields(Options))})(?:=.*)?|-v+")


def _wrong(what: str, chain: Sequence[str]) -> int:
    """Say what is wrong with the arguments, and where the right ones stand."""
    _say(f"error: {' '.join(what.split())} (usage: {' '.join(['kvlink-rag', *chain])} --help)")
    return USAGE


def _prepare(options: Options) -> None:
    """Settings that must be made before transformers is imported, and how text is written."""
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    level = {0: logging.WARNING, 1: logging.INFO}.get(options.verbose, logging.DEBUG)
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
