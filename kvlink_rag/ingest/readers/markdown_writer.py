"""Blocks of Markdown from what a page holds, one after the other: paragraphs, items, rows, code.

A row of a table is one line, whatever stands in its cells; a table that only lays out a page
(headings, code or long text in its cells) gives its cells' blocks. Knows no tags.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .inline import Edge, Piece, Text, joined

_INDENTED = 8  # levels of lists
_LONG_TABLE = 12  # rows; the header of a longer one is marked, so that splitting can repeat it
_CELL = 600  # characters; a row with a larger cell is no line
_SPACE = re.compile(r"[ \t\r\n\f\u00a0\u202f\u2007]+")
# A line of text that Markdown would take for a heading, an underline, a fence or HTML.
_MARKDOWN = re.compile(
    r"^(?= {0,3}(?:#{1,6}[ \t]|`{3}|~{3}|=+[ \t]*$|-{2,}[ \t]*$|<!--"
    r"|<(?:pre|script|style|textarea)\b))",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(slots=True)
class List:
    """A list that is open. number: of the next item; None: it has none, or counts backwards."""

    number: int | None
    step: int = 1
    style: str = "1"
    width: int = 0  # of the mark of its last item


@dataclass(slots=True)
class _Block:
    """line: it stands close to a neighbour that is one. plain: it can be part of a row."""

    text: str
    mark: str = ""
    line: bool = False
    plain: bool = True


@dataclass(slots=True)
class _Table:
    """A table that is open, and the row of it that is."""

    rows: int = 0
    header: int | None = None  # the place of its first row's block, if that is a header
    columns: int = 0
    cells: list[list[_Block]] = field(default_factory=list)
    headers: int = 0


@dataclass(slots=True)
class _Outside:
    """What a cell interrupts."""

    blocks: list[_Block]
    lists: list[List]


class MarkdownWriter:
    """Takes pieces of lines and the ends of blocks."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []  # another list for every line, so that it can be told
        self._blocks: list[_Block] = []
        self._lists: list[List] = []
        self._tables: list[_Table] = []
        self._outside: list[_Outside] = []
        self._level, self._mark, self._line = 0, "", False

    def add(self, piece: Piece) -> None:
        """A piece of the line."""
        self.pieces.append(piece)

    def edge(self) -> None:
        """The border of something without text."""
        self.pieces.append(Edge())

    def heading(self, level: int) -> None:
        """The block that begins is a heading."""
        self._level = level

    def line(self) -> None:
        """The block that begins stands close to the one before."""
        self._line = True

    def open_list(self, opened: List) -> None:
        """A list begins."""
        self._lists.append(opened)

    def close_list(self) -> None:
        """A list ends."""
        self.end_text()
        self._lists.pop()

    def item(self, value: int | None) -> None:
        """An item begins; value: its number, where the page gives one."""
        self._line = True
        inner = self._lists[-1] if self._lists else List(None)
        if inner.number is None and value is None:
            mark = "- "
        else:
            number = inner.number if value is None else value
            mark = f"{_numeral(number or 0, inner.style)}. "
            inner.number = None if inner.number is None else (number or 0) + inner.step
        indent = sum(outer.width for outer in self._lists[:-1][:_INDENTED])
        inner.width = len(mark)
        self._mark = " " * indent + mark

    def end_text(self) -> None:
        """The line ends: what was said since the last one is a block, if it is anything."""
        if not self.pieces:
            return
        pieces, self.pieces = self.pieces, []
        text = "\n".join(map(_tidy, joined(pieces).split("\n"))).strip()
        if not text:
            return
        if self._level:
            self._blocks.append(_Block(_one_line(text), "#" * self._level + " ", plain=False))
            self._level = 0
        else:
            self._blocks.append(_Block(_MARKDOWN.sub(r"\\", text), self._mark, self._line))
        self._mark = ""

    def end_block(self) -> None:
        """The element that was a block is over."""
        self.end_text()
        self._level, self._mark, self._line = 0, "", False

    def code(self) -> None:
        """A block kept as it is, in a fence longer than any inside it."""
        text = self._raw()
        longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
        fence = "`" * (longest + 1)
        if text.strip():
            self._blocks.append(_Block(f"{fence}\n{text}\n{fence}", plain=False))

    def lines(self) -> None:
        """A block whose lines are kept, which is no code."""
        if text := self._raw().strip():
            self._blocks.append(_Block(_MARKDOWN.sub(r"\\", text)))

    def end_code_line(self) -> None:
        """A line within code ends."""
        last = joined(self.pieces[-1:])
        if self.pieces and not last.endswith("\n"):
            self.pieces.append(Text("\n"))

    def _raw(self) -> str:
        pieces, self.pieces = self.pieces, []
        return joined(pieces).strip("\n")

    # tables

    def open_table(self) -> None:
        """A table begins."""
        self._tables.append(_Table())

    def open_row(self) -> None:
        """A row begins."""
        self._end_row()

    def open_cell(self, *, header: bool) -> None:
        """A cell begins."""
        self.end_block()
        table = self._tables[-1]
        table.headers += header
        self._outside.append(_Outside(self._blocks, self._lists))
        self._blocks, self._lists = [], []

    def close_cell(self) -> None:
        """A cell ends."""
        self.end_block()
        self._tables[-1].cells.append(self._blocks)
        outside = self._outside.pop()
        self._blocks, self._lists = outside.blocks, outside.lists

    def close_row(self) -> None:
        """A row ends."""
        self.end_block()
        self._end_row()

    def close_table(self) -> None:
        """A table ends."""
        self.end_block()
        self._end_row()
        table = self._tables.pop()
        if table.header is not None and table.rows > _LONG_TABLE and table.columns > 1:
            rule = " | ".join(["---"] * table.columns)
            self._blocks.insert(table.header + 1, _Block(rule, line=True, plain=False))

    def _end_row(self) -> None:
        table = self._tables[-1]
        cells, headers, table.cells, table.headers = table.cells, table.headers, [], 0
        blocks = [block for cell in cells for block in cell]
        if not blocks:
            return
        row = " | ".join(map(_cell, cells))
        if all(block.plain for block in blocks) and max(map(len, map(_cell, cells))) <= _CELL:
            if not table.rows and headers == len(cells):
                table.header, table.columns = len(self._blocks), len(cells)
            table.rows += 1
            text = _MARKDOWN.sub(r"\\", row.rstrip(" |").lstrip())
            self._blocks.append(_Block(text, line=True, plain=False))
        else:
            self._blocks += blocks

    def markdown(self) -> str:
        """All blocks, with blank lines between them."""
        self.end_block()
        pieces: list[str] = []
        before = False
        for block in self._blocks:
            pieces.append("" if not pieces else "\n" if block.line and before else "\n\n")
            pieces.append(block.mark + block.text)
            before = block.line
        return "".join(pieces)


def _cell(blocks: list[_Block]) -> str:
    """A cell's blocks on one line; items of a list apart."""
    items = any(block.mark for block in blocks)
    return ("; " if items else " ").join(_one_line(block.text) for block in blocks)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _tidy(line: str) -> str:
    return _SPACE.sub(" ", line).strip()


def _numeral(number: int, style: str) -> str:
    """A number as an item's mark: 3, c, C, iii, III."""
    if style in ("a", "A") and number > 0:
        letters = ""
        while number:
            number, digit = divmod(number - 1, 26)
            letters = chr(ord(style) + digit) + letters
        return letters
    if style in ("i", "I") and 0 < number < 4000:
        roman = "".join(
            digits[int(digit)]
            for digits, digit in zip(_ROMAN[-len(str(number)) :], str(number), strict=True)
        )
        return roman.upper() if style == "I" else roman
    return str(number)


_ROMAN = (
    ["", "m", "mm", "mmm"],
    ["", "c", "cc", "ccc", "cd", "d", "dc", "dcc", "dccc", "cm"],
    ["", "x", "xx", "xxx", "xl", "l", "lx", "lxx", "lxxx", "xc"],
    ["", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix"],
)
