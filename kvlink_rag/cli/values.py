"""Values of options: text as it was typed to numbers, sizes, places. Knows no command."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args

from cyclopts import Parameter, Token

from kvlink_rag.arguments import MAX_SEED, check_encoding, parse_budget, parse_repair, parse_size
from kvlink_rag.evaluation.request import GROUPS, By


def shown_default(value: object) -> str | None:
    """How help states a default: nothing for what is simply off."""
    if value is None or value is False or value == 0 or value == ():
        return None
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _of_text(parse: Callable[[str], Any]) -> Parameter:
    """One word, as `parse` reads it. What is wrong with it is a `ValueError`'s message."""

    def convert(kind: object, tokens: Sequence[Token]) -> Any:
        return parse(tokens[0].value)

    return Parameter(converter=convert, n_tokens=1, accepts_keys=False)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"found {text[:40]!r}, expected a whole number of at least 1")
    return int(text)


def _or_all(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"found {text[:40]!r}, expected a whole number, 0 for all")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise ValueError(f"found {text[:40]!r}, expected a whole number from 0 to {MAX_SEED}")
    return int(text)


def _number(allowed: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Reads a finite number that is `allowed`."""

    def parse(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (math.isfinite(found) and allowed(found)):
            raise ValueError(f"found {text[:40]!r}, expected {expected}")
        return found

    return parse


def _repair(text: str) -> str:
    parse_repair(text)
    return text


def _budget(text: str) -> str:
    parse_budget(text)
    return text


def _sample(text: str) -> int | None:
    """How many; None for all."""
    return None if text == "all" else 0 if text == "0" else _count(text)


def _places(text: str) -> tuple[int, ...]:
    """0-9 or 0,4,9."""
    first, dash, last = text.partition("-")
    try:
        found = range(int(first), int(last) + 1) if dash else [int(p) for p in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise ValueError(f"found {text[:40]!r}, expected places such as 0-9 or 0,4,9")
    return tuple(found)


def _groups(text: str) -> tuple[str, ...]:
    if unknown := set(found := text.split(",")) - set(get_args(By)):
        raise ValueError(f"found {sorted(unknown)}, expected {', '.join(GROUPS)}")
    return tuple(found)


Count = Annotated[int, _of_text(_count)]
CountOrAll = Annotated[int, _of_text(_or_all)]
Seed = Annotated[int, _of_text(_seed)]
Temperature = Annotated[float, _of_text(_number(lambda n: n >= 0, "a finite number >= 0"))]
Probability = Annotated[
    float, _of_text(_number(lambda n: 0 < n <= 1, "a number above 0 and at most 1"))
]
Share = Annotated[float, _of_text(_number(lambda n: 0 <= n <= 1, "a number from 0 to 1"))]
Penalty = Annotated[float, _of_text(_number(lambda n: n > 0, "a number above 0"))]
Budget = Annotated[str, _of_text(_budget)]
Repair = Annotated[str, _of_text(_repair)]
Encoding = Annotated[str, _of_text(check_encoding)]
Sample = Annotated[int | None, _of_text(_sample)]
Size = Annotated[int, _of_text(lambda text: parse_size(text, least=1))]
Places = Annotated[tuple[int, ...], _of_text(_places)]
Groups = Annotated[tuple[By, ...], _of_text(_groups)]
Names = Annotated[tuple[str, ...], _of_text(lambda text: tuple(text.split(",")))]
Json = Annotated[bool, Parameter(name="--json")]
