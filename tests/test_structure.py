"""Imports point down and never in a circle, also those inside functions and for types alone."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package and what it may stand on: these, and all that they stand on (docs/architecture.md).
BENEATH = {
    "arguments": ["errors"],
    "documents": ["errors"],
    "quantities": ["errors"],
    "trace": ["errors"],
    "disk": ["arguments", "documents", "quantities", "trace"],
    "pretrained": ["disk"],
    "prompt": ["pretrained"],
    "engine": ["prompt"],
    "snapshots": ["engine"],
    "model": ["snapshots"],
    "retrieval": ["pretrained"],
    "collection": ["model", "retrieval"],
    "ingest": ["collection"],
    "compare": ["collection"],
    "datasets": ["disk"],
    "evaluation": ["ingest", "compare", "datasets"],
    "training": ["ingest", "compare", "datasets"],
    "serving": ["ingest", "_version"],
    "cli": ["evaluation", "training", "serving", "_version"],
    "__init__": ["cli"],  # the public face, which nothing beneath may import
    "__main__": ["cli"],
}

Imports = dict[str, set[str]]  # module -> modules of the same package that it imports


def imports_of(root: Path, package: str) -> Imports:
    """The modules of `root / package` by their files' dotted names (packages end in `__init__`)."""
    files = {dotted(path, root): path for path in sorted((root / package).rglob("*.py"))}
    found: Imports = {}
    for name, path in files.items():
        named = imported(ast.parse(path.read_bytes(), str(path)), name)
        wanted = (known for names in named if (known := first_of(names, files)))
        found[name] = set(wanted)
    return found


def dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imported(tree: ast.AST, name: str) -> Iterator[tuple[str, ...]]:
    """For every name that an import brings in: the modules it may stand for, likeliest first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", base) for alias in node.names)


def first_of(names: tuple[str, ...], files: dict[str, Path]) -> str | None:
    both = (each for name in names for each in (name, f"{name}.__init__"))
    return next((each for each in both if each in files), None)


def circle(imports: Imports) -> list[str]:
    """One circle of files, or none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def arrows_up(imports: Imports) -> list[str]:
    """Imports of a package that does not stand beneath the importing one."""
    return [
        f"{name} imports {other}"
        for name in sorted(imports)
        for other in sorted(imports[name])
        if (low := other.split(".")[1]) != (high := name.split(".")[1]) and low not in under(high)
    ]


def under(package: str) -> set[str]:
    return {each for one in BENEATH.get(package, []) for each in (one, *under(one))}


@pytest.fixture(scope="module")
def ours() -> Imports:
    return imports_of(ROOT, "kvlink_rag")


def test_no_files_import_each_other_in_a_circle(ours: Imports) -> None:
    assert " → ".join(circle(ours)) == ""


def test_imports_point_down(ours: Imports) -> None:
    assert "\n".join(arrows_up(ours)) == ""


def test_every_package_has_its_place(ours: Imports) -> None:
    """Nothing stands outside the order, and nothing was read past."""
    assert {name.split(".")[1] for name in ours} <= {*BENEATH, *under("cli")}
    assert "kvlink_rag.documents" in ours["kvlink_rag.prompt.layout"]


@pytest.mark.parametrize(
    "package", ["langchain/langchain_kvlink", "llama_index/llama_index", "vllm/vllm_kvlink"]
)
def test_integrations_have_no_circle(package: str) -> None:
    root = ROOT / "integrations" / package
    imports = imports_of(root.parent, root.name)
    assert sum(map(len, imports.values())) > 5
    assert " → ".join(circle(imports)) == ""


PLANTED = {
    "relative": ("from . import b", "from .a import x"),
    "in a function": ("def f():\n    from kvlink_rag.disk.b import x", "import kvlink_rag.disk.a"),
    "for types": ("from . import b", "if TYPE_CHECKING:\n    from kvlink_rag.disk import a"),
    "of three": ("from ..prompt import c", "from .a import x"),
    "through a package": ("from kvlink_rag.prompt import x", "from ..disk.a import x"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_circle_is_found(tmp_path: Path, kind: str) -> None:
    plant(
        tmp_path, *PLANTED[kind], c="from kvlink_rag.disk.b import x", init="from ..disk import b"
    )
    assert len(circle(imports_of(tmp_path, "kvlink_rag"))) > 2
    plant(tmp_path, PLANTED[kind][0], "import torch", c="", init="")
    assert circle(imports_of(tmp_path, "kvlink_rag")) == []


UP = [
    "from ..prompt import c",
    "import kvlink_rag.prompt.c",
    "def f():\n    if TYPE_CHECKING:\n        from kvlink_rag.prompt.c import x",
]


@pytest.mark.parametrize("line", UP)
def test_a_planted_arrow_up_is_found(tmp_path: Path, line: str) -> None:
    plant(tmp_path, line, "", c="from ..disk import b", init="")
    (found,) = arrows_up(imports_of(tmp_path, "kvlink_rag"))
    assert found == "kvlink_rag.disk.a imports kvlink_rag.prompt.c"
    plant(tmp_path, "from . import b", "", c="from ..disk import b", init="")
    assert arrows_up(imports_of(tmp_path, "kvlink_rag")) == []


def plant(root: Path, a: str, b: str, *, c: str, init: str) -> None:
    """`disk.a`, `disk.b`, `prompt.c` and `prompt` itself, with these contents."""
    for name, text in {"disk/a": a, "disk/b": b, "prompt/c": c, "prompt/__init__": init}.items():
        path = root / "kvlink_rag" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("library", "place"),
    [
        ("diskcache", "snapshots/store/table.py"),
        ("faiss", "retrieval/vector_index.py"),
        ("transformers.cache_utils", "engine/live_cache.py"),
        ("starlette", "serving/"),
        ("uvicorn", "serving/"),
    ],
)
def test_one_place_knows_each_of_these(library: str, place: str) -> None:
    wanted = re.compile(rf"^\s*(?:import|from) {re.escape(library)}\b", re.MULTILINE)
    package = ROOT / "kvlink_rag"
    found = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if wanted.search(file.read_text("utf-8"))
    }
    assert found
    assert all(name.startswith(place) for name in found), found
