"""`kvlink-rag bench`: measure on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kvlink_rag.errors import ConfigError

from . import terminal
from .opening import OPTIONS, Options

FOREIGN = True  # options behind the name are the benchmark's


def bench(
    name: str | None = None,
    /,
    *rest: Annotated[str, Parameter(allow_leading_hyphen=True)],
    options: Options = OPTIONS,
) -> int:
    """Measure on this machine.

    Runs a benchmark: `kvlink-rag bench ttft --help` shows its options. Without a name, lists them.
    Each prints tables and, last, one JSON object.

    Args:
        name: ttft, quality, …
        rest: its own options
    """
    found = find_benchmarks()
    if name is None:
        width = max(map(len, found))
        terminal.show(f"{each:{width}}  {_first_line(path)}" for each, path in found.items())
        return 0
    if name not in found:
        raise ConfigError(f"no benchmark {name!r}, expected one of {', '.join(found)}")
    import subprocess

    return subprocess.run([sys.executable, str(found[name]), *rest], check=False).returncode


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
