"""What arguments may be: choices, counts, sizes, questions. One rule for API and command line.

Knows names, not what stands behind them, and no torch, so that `--help` and a front end can ask.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from .errors import ConfigError, PromptError

Codec = Literal["exact", "bf16", "int8", "int4", "fp8"]
CODECS: tuple[Codec, ...] = get_args(Codec)  # how snapshots are kept (`snapshots.codecs`)
Compression = Literal["none", "zstd"]
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)  # of snapshot files, lossless
Search = Literal["auto", "exact", "ivf"]
SEARCHES: tuple[Search, ...] = get_args(Search)  # how the nearest passages are found (`retrieval`)
Order = Literal["score", "id"]
ORDERS: tuple[Order, ...] = get_args(Order)  # how hits follow each other in the prompt
Mode = Literal["reuse", "masked", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)  # how a prompt comes to its first token
Weights = Literal["own", "int8"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)  # that generated tokens take (`quick_weights`)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
MAX_TOKENS = 200  # of a passage, as files are split
MAX_SEED = 2**64 - 1  # torch's

HALF = "50%"  # of the free disk: what snapshots may take before they are asked for
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)%", re.ASCII)

NO_REPAIR = "none"  # of reused passages; else "first:16", "select:15%" (`model.repair`)
_REPAIR = re.compile(r"first:(?P<first>\d{1,6})|select:(?P<share>\d{1,3}(?:\.\d{1,6})?)%", re.ASCII)
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt])(i?))?b?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Repair:
    """How reused passages are repaired at question time; see `model.repair`.

    first: that many tokens of each passage are computed again. share: of all passages' tokens, from
    0 to 1, the ones that deviate most. name: as it was asked for.
    """

    name: str = NO_REPAIR
    first: int = 0
    share: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.first or self.share)


UNREPAIRED = Repair()


@dataclass(frozen=True, slots=True)
class Budget:
    """What snapshots may take that nobody has asked for yet: bytes, or a share of the free disk.

    Neither: all are made as documents are added. name: as it was asked for.
    """

    name: str = "none"
    bytes: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        return self.name if self.share is None else f"{self.name} of the free disk"


def parse_budget(name: str | int) -> Budget:
    """What `name` allows: "50%" (of the free disk), "20GB", or "none". Raises `ConfigError`."""
    if name == "none":
        return Budget()
    found = _SHARE.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        return Budget(str(name), bytes=parse_size(name, "budget"))
    share = float(found[1]) / 100
    if share > 1:
        raise ConfigError(f"budget is {name!r}, expected at most 100% of the free disk")
    return Budget(str(name), share=share)


def parse_repair(name: str) -> Repair:
    """What `name` asks for: "none", "first:16" or "select:15%". Raises `ConfigError`."""
    if name == NO_REPAIR:
        return UNREPAIRED
    found = _REPAIR.fullmatch(name) if isinstance(name, str) else None
    share = float(found["share"] or 0) / 100 if found else 0.0
    if found is None or share > 1:
        raise ConfigError(
            f"repair is {name!r}, expected none, first:N (tokens of each passage, as "
            "in first:16) or select:P% (of all passages' tokens, as in select:15%)"
        )
    return Repair(name, int(found["first"] or 0), share)


def is_count(value: object, least: int = 1) -> bool:
    """Whether `value` is a whole number (NumPy's too, no bool) of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_choice(what: str, name: object, choices: Sequence[str]) -> str:
    """`name`. Raises `ConfigError` where it is none of `choices`; `what` names the argument."""
    if not isinstance(name, str) or name not in choices:
        raise ConfigError(f"found {what} {name!r}, expected one of {', '.join(choices)}")
    return name


def check_codec(name: str) -> str:
    """`name`. Raises `ConfigError` where there is no such codec."""
    return check_choice("codec", name, CODECS)


def check_search(name: str) -> str:
    """`name`. Raises `ConfigError` where there is no such way."""
    return check_choice("search", name, SEARCHES)


def check_weights(name: str) -> str:
    """`name`. Raises `ConfigError` where there are no such weights."""
    return check_choice("weights", name, WEIGHTS)


def check_order(name: str) -> str:
    """`name`. Raises `ConfigError` where there is no such order."""
    return check_choice("order", name, ORDERS)


def check_mode(name: str) -> str:
    """`name`. Raises `ConfigError` where there is no such mode."""
    return check_choice("mode", name, MODES)


def check_count(k: int, name: str = "k") -> None:
    """Raise `ConfigError` where `k` is no number of hits to ask for."""
    if not is_count(k):
        raise ConfigError(f"{name} is {k!r}, expected a whole number of at least 1")


def check_question(question: str) -> None:
    """Raise `PromptError` where `question` is no text to ask."""
    if not isinstance(question, str) or not question.strip():
        found = repr(question) if isinstance(question, str) else f"a {type(question).__name__}"
        raise PromptError(f"the question is {found}, expected a string with text in it")


def check_encoding(name: str) -> str:
    """`name`, if it is an encoding of text. Raises `ConfigError`."""
    try:
        found = codecs.lookup(name)
        b"".decode(name)
    except (LookupError, ValueError, TypeError) as error:
        raise ConfigError(f"no encoding {name!r}; give one such as cp1252 or utf-16") from error
    if not getattr(found, "_is_text_encoding", True):
        raise ConfigError(f"{name!r} is no encoding of text; give one such as cp1252 or utf-16")
    return name


def parse_size(size: int | str, name: str = "size", *, least: int = 0) -> int:
    """Bytes of `size`: how many, or text such as 500kB, "1.5 GB" (10^9 each) or 512MiB (2^20 each).

    name: of the argument, for the error. Raises `ConfigError` for anything else, and for less than
    `least` bytes.
    """
    count = int(size) if is_count(size, least) else -1
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        number, letter, binary = match.groups()
        thousands = "kmgt".index(letter.lower()) + 1 if letter else 0
        count = int(float(number) * (1024 if binary else 1000) ** thousands)
    if count < least:
        raise ConfigError(
            f"{name} is {size!r}, expected at least {least} bytes: a whole number, or text such as "
            "500MB, 20GB or 512MiB"
        )
    return count
