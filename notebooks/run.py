"""Run the notebooks in place and leave nothing in them that depends on this machine or hour.

    python notebooks/run.py                         # all of them (make notebooks)
    python notebooks/run.py 04_inside_kvlink.ipynb

Each runs in a new temporary folder, with a new kernel of this Python. What is kept: sources,
outputs, numbers of the cells. `KVLINK_MODEL` and `KVLINK_EMBEDDER` name other models than the
pair `small`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).parent
TIMEOUT = 280  # seconds a cell
MOST_BYTES = 300_000  # of one notebook with its pictures
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ABSOLUTE = re.compile(r"""(?:^|[\s'"(=:,])(?:/[\w.-]+/[\w.-]|[A-Za-z]:\\\w)""", re.MULTILINE)


def main(names: list[str]) -> None:
    """Run each and write it back; stops at the first that fails or keeps what it must not."""
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as directory:
            execute(notebook, Path(directory))
        normalise(notebook)
        if found := problems(notebook):
            raise SystemExit(f"{path.name} is not written: {'; '.join(found)}")
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


def execute(notebook: Any, directory: Path) -> None:
    """Run all cells in `directory`; no port is opened, and nothing is kept in the user's folders.

    Raises `nbclient.exceptions.CellExecutionError` with the cell and its traceback.
    """
    with tempfile.TemporaryDirectory() as scratch:  # short: names of sockets have a limit
        kernel = {"transport": "ipc", "connection_file": f"{scratch}/kernel.json"}
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": str(directory)}},
            config=Config(KernelManager=kernel),
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute(env={**os.environ, "IPYTHONDIR": scratch})


def normalise(notebook: Any) -> None:
    """Drop what differs between machines: versions, times, random ids."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})


def problems(notebook: Any) -> list[str]:
    """Errors, warnings, absolute paths and too many bytes in a notebook's outputs."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number} wrote an error or a warning")
            if match := ABSOLUTE.search(_text(output)):
                found.append(f"cell {number} shows the absolute path {match[0].strip()!r}")
    size = len(nbformat.writes(notebook))
    return found + ([f"it has {size:,} bytes"] if size > MOST_BYTES else [])


def _text(output: Any) -> str:
    """All that an output shows but pictures."""
    shown = output.get("data", {})
    texts = [shown[kind] for kind in shown if kind.startswith("text/")]
    return "\n".join([*texts, output.get("text", ""), *output.get("traceback", ())])


if __name__ == "__main__":
    main(sys.argv[1:])
