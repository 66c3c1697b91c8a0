"""What Markdown marks by lines: headings, code, tables and comments. Knows no tokens and no files.

After CommonMark and GitHub's tables, as far as cutting a text needs it. Linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

HEADING_CHARACTERS = 200  # a longer "heading" is text that happens to begin with '#'


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading: its level (1 to 6), its text, and where its lines stand."""

    level: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Repeat:
    """The rows of a table or lines of code, and what makes a part of them stand by itself.

    before: goes before what begins in `[start, stop)`, after: behind what ends there. end: past the
    line that ends the code.
    """

    start: int
    stop: int
    end: int
    before: str
    after: str = ""


# ── headings ─────────────────────────────────────────────────────────────────────────────────

# Whatever could begin or end a heading or something without any; other lines are passed over.
_MARK = re.compile(
    r"^ {0,3}(?:(?P<hashes>#{1,6})[ \t]+(?P<name>[^\n]*)"
    r"|(?P<fence>`{3,}|~{3,})(?P<rest>[^\n]*)"
    r"|(?P<under>=+|-{2,})[ \t\r]*"
    r"|<h(?P<level>[1-6])\b[^>\n]*>(?P<html>(?:.|\n){0,400}?)</h(?P=level)>[ \t\r]*"
    r"|(?P<opaque><!--|<(?:pre|script|style|textarea)(?=[\s>]))[^\n]*)$",
    re.MULTILINE | re.IGNORECASE,
)
_NOT_A_NAME = re.compile(r"\s*$|=+\s*$| {4}|\t| {0,3}([-*+>|]|\d+[.)])")
_HTML_TAG = re.compile(r"<[^>]*>")
_END_OF_RAW = re.compile(r"</(?:pre|script|style|textarea)>", re.IGNORECASE)


def headings(text: str) -> Iterator[Heading]:
    """The headings of `text`: `# …`, underlined by === or ---, or `<h1>…</h1>` on their lines.

    None in fenced code, in comments, and in HTML that is no Markdown (<pre>, <script>).
    """
    fence, last, at = "", 0, 0  # the open fence; where the last heading or fence ended
    while mark := _MARK.search(text, at):
        start, stop = mark.start(), mark.end() + 1
        at = mark.end()
        if fence or mark["fence"]:
            fence, last = _fence_after(fence, mark), stop
        elif mark["opaque"]:
            at = last = _past_opaque(text, mark)
        elif mark["hashes"]:
            if name := _name(mark["name"]):
                yield Heading(len(mark["hashes"]), name, start, stop)
                last = stop
        elif mark["level"]:
            if name := _name(" ".join(_HTML_TAG.sub(" ", mark["html"]).split())):
                yield Heading(int(mark["level"]), name, start, stop)
                last = stop
        elif above := _line_above(text, start, last):
            yield Heading(1 if mark["under"][0] == "=" else 2, above[1], above[0], stop)
            last = stop


def _fence_after(fence: str, mark: re.Match[str]) -> str:
    """The fence that is open after `mark`; a fence is closed by one at least as long, alone."""
    found = mark["fence"] or ""
    if not fence:
        return "" if found[:1] == "`" and "`" in mark["rest"] else found
    return "" if found.startswith(fence) and not mark["rest"].strip() else fence


def _past_opaque(text: str, mark: re.Match[str]) -> int:
    """Behind a comment or raw HTML; behind its first line where it does not end."""
    start = mark.start("opaque")
    if mark["opaque"] == "<!--":
        stop = text.find("-->", start + 4)
        return stop + 3 if stop >= 0 else mark.end()
    end = _END_OF_RAW.search(text, start)
    return end.end() if end else mark.end()


def _name(line: str) -> str:
    """A heading's text without closing hashes; empty if it is too long to be one."""
    name = line.strip()
    bare = name.rstrip("#")
    name = bare.rstrip() if not bare or bare[-1] in " \t" else name
    return " ".join(name.split()) if len(name) <= HEADING_CHARACTERS else ""


def _line_above(text: str, start: int, last: int) -> tuple[int, str] | None:
    """The line that an underline at `start` makes a heading: a paragraph of one line, no list."""
    if start <= last:
        return None
    above = max(text.rfind("\n", last, start - 1) + 1, last)
    before = max(text.rfind("\n", last, above - 1) + 1, last) if above > last else above
    if text[before:above].strip() or _NOT_A_NAME.match(text[above:start]):
        return None
    name = _name(text[above:start])
    return (above, name) if name else None


# ── tables and code ──────────────────────────────────────────────────────────────────────────

_FENCE = re.compile(r"^(?P<indent> {0,3})(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[^\n]*$", re.MULTILINE)
_RULE = re.compile(
    r"^ {0,3}(?=[^\n]*\|)\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$", re.MULTILINE
)
_BLANK = re.compile(r"^[ \t]*$", re.MULTILINE)


def repeats(text: str) -> list[Repeat]:
    """The tables and fenced code of `text`, in order."""
    code = list(_code(text))
    tables = _tables(text, code) if "|" in text else []
    return sorted([*code, *tables], key=lambda repeat: repeat.start)


def _code(text: str) -> Iterator[Repeat]:
    at = 0
    while opening := _FENCE.search(text, at):
        start = min(opening.end() + 1, len(text))
        end = _closing(text, opening["fence"], start)
        at = end.end() if end else len(text)
        stop = end.start() if end else len(text)
        mark = end[0] if end else opening["indent"] + opening["fence"]
        yield Repeat(start, stop, at, opening[0] + "\n", "\n" + mark)


def _closing(text: str, fence: str, start: int) -> re.Match[str] | None:
    """The line that closes what `fence` opened."""
    length = min(len(fence), 1000)
    closing = re.compile(rf"^ {{0,3}}{fence[0]}{{{length},}}[ \t]*$", re.MULTILINE)
    return closing.search(text, start)


def _tables(text: str, code: list[Repeat]) -> Iterator[Repeat]:
    inside, stop = iter(code), 0
    block = next(inside, None)
    for rule in _RULE.finditer(text):
        while block is not None and block.end <= rule.start():
            block = next(inside, None)
        in_code = block is not None and block.start <= rule.start()
        if in_code or rule.start() <= stop or not rule.start():
            continue
        above = text.rfind("\n", stop, rule.start() - 1) + 1
        header = text[max(above, stop) : rule.start()]
        if "|" not in header:
            continue
        blank = _BLANK.search(text, min(rule.end() + 1, len(text)))
        stop = blank.start() if blank else len(text)
        yield Repeat(min(rule.end() + 1, stop), stop, stop, header + rule[0] + "\n")


# ── comments ─────────────────────────────────────────────────────────────────────────────────

_SPECIAL = re.compile(
    r"^ {0,3}(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})|(?P<ticks>`+)|(?P<comment><!--)", re.MULTILINE
)
_LONGEST_TICKS = 8  # a longer run of them begins no code within a line


def without_comments(text: str) -> str:
    """`text` without HTML comments; those in code stay, and one without an end."""
    if "<!--" not in text:
        return text
    kept: list[str] = []
    done = at = 0
    missing: set[int] = set()
    while found := _SPECIAL.search(text, at):
        at = found.end()
        if found["fence"]:
            end = _closing(text, found["fence"], at)
            at = end.end() if end else len(text)
        elif found["ticks"]:
            at = _past_ticks(text, found, missing)
        else:
            stop = text.find("-->", at)
            if stop < 0:
                break
            kept.append(text[done : found.start()])
            done = at = stop + 3
    return "".join([*kept, text[done:]])


def _past_ticks(text: str, found: re.Match[str], missing: set[int]) -> int:
    """Behind the code that so many ticks begin; behind them where it does not end."""
    length = len(found[0])
    if length > _LONGEST_TICKS or length in missing:
        return found.end()
    end = re.compile(rf"(?<!`)`{{{length}}}(?!`)").search(text, found.end())
    if end is None:
        missing.add(length)
        return found.end()
    paragraph = text.find("\n\n", found.end(), end.start())
    return found.end() if paragraph >= 0 else end.end()
