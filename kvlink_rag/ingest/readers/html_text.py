"""HTML to Markdown: headings stay headings, rows and items lines, code stays code.

Elements end where the HTML standard ends them (WHATWG, 13.1.2.4 Optional tags), by rules instead of
a tree: the work for a tag is bounded, and memory is that of the text. Scripts, styles, navigation
and what the page hides are dropped. Knows tags and text; knows no bytes and no files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .html_tokens import End, Start, tokens
from .inline import Piece, Script, Text, joined
from .markdown_writer import List, MarkdownWriter
from .mathml import Formula

# fmt: off
_DROPPED = frozenset((
    "script", "style", "template", "iframe", "noembed", "noframes", "audio", "video", "canvas",
    "datalist", "rp",
))
_SET_ASIDE = frozenset(("nav", "noscript"))  # … unless there is nothing else on the page
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details",
    "dialog", "dir", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form",
    "frameset", "header", "hgroup", "hr", "html", "legend", "li", "listing", "main", "menu", "nav",
    "ol", "optgroup", "p", "plaintext", "pre", "search", "section", "summary", "table", "tbody",
    "td", "textarea", "tfoot", "th", "thead", "tr", "ul", "xmp", *_HEADINGS,
))
_VOID = frozenset((
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source",
    "track", "wbr", "image", "keygen", "frame",
))
# What a start tag ends: the names, and the names behind which it looks for none.
_CELLS = frozenset(("td", "th", "caption"))
_PARTS = frozenset(("thead", "tbody", "tfoot"))
_LISTS = frozenset(("ul", "ol", "menu", "dir", "dl"))
_ENDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "li": (frozenset(("li",)), _LISTS | _CELLS),
    **dict.fromkeys(("dd", "dt"), (frozenset(("dd", "dt")), _LISTS | _CELLS)),
    **dict.fromkeys(("td", "th", "caption"), (_CELLS, frozenset(("table",)))),
    "tr": (_CELLS | {"tr"}, frozenset(("table",))),
    **dict.fromkeys(_PARTS, (_CELLS | _PARTS | {"tr"}, frozenset(("table",)))),
    **dict.fromkeys(("rt", "rp"), (frozenset(("rt", "rp")), frozenset(("ruby",)))),
    "a": (frozenset(("a",)), frozenset()),
    **dict.fromkeys(_HEADINGS, (frozenset(_HEADINGS), frozenset())),
}
_PRE = frozenset(("pre", "listing", "xmp", "plaintext", "textarea"))
_FOREIGN = frozenset(("svg", "math"))
_STRUCK = frozenset(("del", "s", "strike"))
_APART = frozenset(("button", "option", "label", "svg", "object", "text", "foreignobject"))
_SHOWN_INPUTS = frozenset((
    "text", "search", "tel", "url", "email", "number", "date", "button", "image",
))
# fmt: on
_MEANT = (  # elements that do something even without attributes
    _BLOCKS
    | _VOID
    | _DROPPED
    | _SET_ASIDE
    | _APART
    | _STRUCK
    | _FOREIGN
    | _ENDS.keys()
    | {"title", "sup", "sub", "ruby"}
)
_DEPTH = 256  # elements that are open at once; browsers have such a limit too
_TABLES = 16  # tables in tables
_PERMALINKS = frozenset(("¶", "#", "§", "🔗", "⚓", "⁋", "∞", "link", "permalink", ""))
_IGNORED = re.compile("[\u200b\ufe0e\ufe0f]")
_SPACE = re.compile(r"[ \t\r\n\f\u00a0\u202f\u2007]+")
_HIDING = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_STRIKING = re.compile(r"text-decoration[\w-]*\s*:[^;]*line-through", re.IGNORECASE)
_BREAKING = re.compile(
    r"display\s*:\s*(?:block|flex|grid|table|list-item|flow-root)", re.IGNORECASE
)
_NOTE = re.compile(r"foot|note|\bref|cite", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Page:
    """A page as Markdown, and what its <title> says."""

    text: str
    title: str


def to_markdown(page: str, *, whole: bool = False) -> Page:
    """The text of `page`. whole: also navigation and what the page hides."""
    walk = _Walk(whole)
    for token in tokens(page):
        if isinstance(token, Start):
            walk.start(token)
        elif isinstance(token, End):
            walk.end(token.name)
        else:
            walk.text(token)
    return Page(walk.markdown(), " ".join(walk.title.split()))


@dataclass(slots=True)
class _Open:
    """An element that is open. kind: what its end does. pieces, start: where its text begins."""

    name: str
    kind: str
    pieces: list[Piece]
    start: int
    hides: bool = False
    spares_formulas: bool = False
    strikes: bool = False
    note: bool = False
    same: int = 0  # plain elements of its name that opened in it


class _Walk:
    """Where in the page we stand: the open elements that matter, at most `_DEPTH`."""

    def __init__(self, whole: bool) -> None:
        self.title = ""
        self._whole = whole
        self._open: list[_Open] = []
        self._count: Counter[str] = Counter()  # of open elements by name, and by what they do
        self._formula: Formula | None = None
        self._in_title = False
        self._writer = MarkdownWriter()

    def text(self, text: str) -> None:
        """Text, as it stands between tags."""
        text = text.replace("\0", "").replace("\u00ad", "")
        if self._in_title:
            self.title += text
        elif self._formula is not None:
            self._formula.text(text)
        elif not self._count["hides"] and (not self._count["svg"] or self._in_svg_text()):
            text = text if self._count["pre"] else _SPACE.sub(" ", text)
            self._writer.add(Text(text, self._count["strikes"] > 0))

    def start(self, tag: Start) -> None:
        """An element begins."""
        name, self._in_title = tag.name, False
        plain = name not in _MEANT and not tag.attributes and "-" not in name
        if plain and self._formula is None:
            self._start_plain(name)
        elif name == "title":
            self._in_title = not self.title and not self._count["svg"]
            if not self._in_title:
                self._push(_Open("title", "", [], 0, hides=True))
        elif self._formula is not None and name not in _BLOCKS:
            if not tag.closed:
                self._formula.start(name)
        else:
            self._end_formula()
            self._start_html(tag)

    def _start_plain(self, name: str) -> None:
        """An element that says nothing; its end is not that of an outer one of its name."""
        if (outer := self._inline(name)) is not None:
            outer.same += 1

    def _start_html(self, tag: Start) -> None:
        self._end_before(tag.name)
        if tag.name in _VOID or (tag.closed and (self._count["svg"] or tag.name in _FOREIGN)):
            self._void(tag)
        elif tag.name == "math" and self._count["hides"] == self._count["spares_formulas"]:
            self._formula = Formula()
        elif tag.name in _BLOCKS:
            self._start_block(tag)
        else:
            self._start_inline(tag)

    def end(self, name: str) -> None:
        """An end tag: what it ends, with all that is open in it."""
        if name == "title" and self._in_title:
            self._in_title = False
        elif self._formula is not None and name not in _BLOCKS:
            if name == "math":
                self._end_formula()
            else:
                self._formula.end(name)
        else:
            self._end_formula()
            self._end_html(name)

    def _end_html(self, name: str) -> None:
        if name == "br":
            self._break()
        elif name not in _BLOCKS:
            self._end_inline(name)
        elif name in _HEADINGS:
            self._pop_to(frozenset(_HEADINGS), _CELLS)
        else:
            inside_table = name in _CELLS or name in _PARTS or name == "tr"
            limit = frozenset(("table",)) if inside_table else _CELLS - {name}
            if not self._pop_to(frozenset((name,)), frozenset() if name == "table" else limit):
                self._end_line()

    def markdown(self) -> str:
        """The page, which is at its end."""
        self._end_formula()
        while self._open:
            self._pop()
        return self._writer.markdown()

    # blocks

    def _end_before(self, name: str) -> None:
        """End what the start of `name` ends."""
        if name in _BLOCKS and self._innermost_block() == "p":
            self._pop_to(frozenset(("p",)), frozenset())
        if name in _HEADINGS:
            if self._innermost_block() in _HEADINGS:
                self._pop_to(frozenset(_HEADINGS), frozenset())
        elif name == "a":
            self._pop_to(frozenset(("a",)), _BLOCKS)
        elif name in _ENDS:
            names, limit = _ENDS[name]
            while self._pop_to(names, limit):
                pass

    def _start_block(self, tag: Start) -> None:
        name = tag.name
        if name in ("tr", "td", "th") and not self._count["table"]:
            self._start_block(Start("table"))
        self._end_line()
        unseen = self._count["hides"] or self._is_hidden(tag)
        kind = "" if unseen else self._kind(name)
        if self._push(self._new(tag, kind)):
            self._begin(kind, tag)

    def _kind(self, name: str) -> str:
        """What a block is for the writer: nothing in code, nor where tables are too deep."""
        if self._count["pre"]:
            return ""
        if name in ("table", "tr", "td", "th"):
            deep = self._count["table"] > _TABLES - (name == "table")
            return "" if deep else "cell" if name in ("td", "th") else name
        if name in _HEADINGS:
            return "heading"
        if name in ("ul", "ol", "menu", "dir"):
            return "list"
        if name in _PRE:
            return "area" if name == "textarea" else "pre"
        return name if name in ("li", "dt", "dd") else ""

    def _begin(self, kind: str, tag: Start) -> None:
        writer = self._writer
        if kind in ("pre", "area"):
            self._count["pre"] += 1
        elif kind == "heading":
            writer.heading(_HEADINGS[tag.name])
        elif kind == "list":
            writer.open_list(_list(tag))
        elif kind == "li":
            writer.item(_integer(tag.attributes.get("value")))
        elif kind in ("dt", "dd"):
            writer.line()
        elif kind == "table":
            writer.open_table()
        elif kind == "tr":
            writer.open_row()
        elif kind == "cell":
            writer.open_cell(header=tag.name == "th")

    def _finish(self, element: _Open) -> None:
        """What the end of a block does."""
        writer, kind = self._writer, element.kind
        if kind in ("pre", "area"):
            self._count["pre"] -= 1
            writer.code() if kind == "pre" else writer.lines()
        elif kind == "list":
            writer.close_list()
        elif kind == "table":
            writer.close_table()
        elif kind == "tr":
            writer.close_row()
        elif kind == "cell":
            writer.close_cell()
        else:
            self._end_line()
            if not self._count["pre"]:
                writer.end_block()

    def _end_line(self) -> None:
        if self._count["pre"]:
            self._writer.end_code_line()
        else:
            self._writer.end_text()

    # inline

    def _start_inline(self, tag: Start) -> None:
        name, attributes = tag.name, tag.attributes
        style = attributes.get("style", "")
        kind = name if name in ("sup", "sub", "rt", "svg") else ""
        if name in _APART or "-" in name:
            self._writer.edge()
            kind = kind or "apart"
        elif name == "a" and "#" in attributes.get("href", ""):
            kind = "link"
            for element in self._open[-4:]:
                element.note = element.note or element.kind == "sup"
        elif not kind and _BREAKING.search(style):
            self._break()
            kind = "line"
        element = self._new(tag, kind)
        if kind or element.hides or element.strikes or name == "ruby":
            self._push(element)
        else:
            self._start_plain(name)

    def _end_inline(self, name: str) -> None:
        element = self._inline(name)
        if element is not None and element.same:
            element.same -= 1
        elif element is not None:
            self._pop_to(frozenset((name,)), frozenset())

    def _inline(self, name: str) -> _Open | None:
        """The innermost open element of this name within the block."""
        for element in reversed(self._open):
            if element.name in _BLOCKS:
                return None
            if element.name == name:
                return element
        return None

    def _finish_inline(self, element: _Open) -> None:
        pieces, start, kind = element.pieces, element.start, element.kind
        if kind in ("apart", "svg"):
            self._writer.edge()
        elif kind == "line":
            self._break()
        elif pieces is not self._writer.pieces or not kind:
            return  # the line in which it began is over
        elif kind in ("sup", "sub"):
            struck = self._count["strikes"] > 0
            pieces[start:] = [Script(joined(pieces[start:]), kind == "sup", element.note, struck)]
        elif kind == "rt" and (text := joined(pieces[start:]).strip()):
            pieces[start:] = [Text(f"({text})")]
        elif kind == "link":
            text = _IGNORED.sub("", joined(pieces[start:])).strip()
            if text.lower() in _PERMALINKS:
                del pieces[start:]

    def _void(self, tag: Start) -> None:
        name, attributes = tag.name, tag.attributes
        if name == "br":
            self._break()
        elif name == "hr":
            self._end_line()
        elif name in _FOREIGN:
            self._writer.edge()
        elif self._count["hides"] or self._is_hidden(tag):
            return
        elif name in ("img", "area", "image"):
            self._picture(attributes.get("alt", ""))
        elif name == "input":
            self._input(attributes)

    def _picture(self, alternative: str) -> None:
        self._writer.edge()
        if text := _SPACE.sub(" ", alternative).strip():
            self._writer.add(Text(text, self._count["strikes"] > 0))
            self._writer.edge()

    def _input(self, attributes: Mapping[str, str]) -> None:
        kind = attributes.get("type", "text").lower()
        if kind in ("checkbox", "radio"):
            self._writer.add(Text("[x] " if "checked" in attributes else "[ ] "))
        elif kind in _SHOWN_INPUTS:
            self._picture(attributes.get("alt" if kind == "image" else "value", ""))

    def _break(self) -> None:
        if not self._count["hides"]:
            self._writer.add(Text("\n"))

    def _end_formula(self) -> None:
        if self._formula is not None:
            line, self._formula = self._formula.line(), None
            self._picture(line)

    # what is open

    def _new(self, tag: Start, kind: str) -> _Open:
        attributes, pieces = tag.attributes, self._writer.pieces
        style, hides = attributes.get("style", ""), self._is_hidden(tag)
        return _Open(
            tag.name,
            kind,
            pieces,
            len(pieces),
            hides=hides,
            spares_formulas=hides and tag.name in ("span", "div"),
            strikes=tag.name in _STRUCK or bool(style and _STRIKING.search(style)),
            note=kind == "sup" and self._is_note(attributes),
        )

    def _is_note(self, attributes: Mapping[str, str]) -> bool:
        """Whether a raised mark is a reference: its name says so, or it stands in a link."""
        named = " ".join(attributes.get(name, "") for name in ("class", "role", "id"))
        return _NOTE.search(named) is not None or self._inline("a") is not None

    def _push(self, element: _Open) -> bool:
        """Whether there was room. Where there is none, its text stands in what is open."""
        if len(self._open) >= _DEPTH:
            return False
        self._open.append(element)
        self._tally(element, 1)
        return True

    def _tally(self, element: _Open, by: int) -> None:
        count = self._count
        count[element.name] += by
        if element.hides or element.strikes:
            count["hides"] += by * element.hides
            count["spares_formulas"] += by * element.spares_formulas
            count["strikes"] += by * element.strikes

    def _pop(self) -> None:
        element = self._open.pop()
        if element.name in _BLOCKS:
            self._finish(element)
        else:
            self._finish_inline(element)
        self._tally(element, -1)

    def _pop_to(self, names: frozenset[str], limit: frozenset[str]) -> bool:
        """End the innermost of `names` that stands before any of `limit`; whether there is one."""
        if not any(map(self._count.get, names)):
            return False
        for place in range(len(self._open) - 1, -1, -1):
            name = self._open[place].name
            if name in names:
                while len(self._open) > place:
                    self._pop()
                return True
            if name in limit:
                return False
        return False

    def _innermost_block(self) -> str:
        """Its name; that of a button, in which paragraphs stand by themselves."""
        found = (e.name for e in reversed(self._open) if e.name in _BLOCKS or e.name == "button")
        return next(found, "")

    def _in_svg_text(self) -> bool:
        return self._count["text"] + self._count["foreignobject"] > 0

    def _is_hidden(self, tag: Start) -> bool:
        attributes, name = tag.attributes, tag.name
        if name in _DROPPED:
            return name != "template" or "shadowrootmode" not in attributes
        if self._whole:
            return False
        if name in _SET_ASIDE or name == "math":  # the latter only inside what is hidden
            return True
        return bool(attributes) and (
            attributes.get("hidden", "until-found").lower() != "until-found"
            or attributes.get("aria-hidden", "").lower() == "true"
            or bool(_HIDING.search(attributes.get("style", "")))
            or (name in _CELLS and "linenos" in attributes.get("class", ""))
        )


def _list(tag: Start) -> List:
    if tag.name != "ol":
        return List(None)
    backwards = "reversed" in tag.attributes
    start = _integer(tag.attributes.get("start"))
    return List(
        1 if start is None and not backwards else start,
        -1 if backwards else 1,
        tag.attributes.get("type", "1"),
    )


def _integer(text: str | None) -> int | None:
    """The number that an attribute gives; none of more than nine digits."""
    found = re.match(r"\s*([+-]?\d{1,9})(?!\d)", text or "")
    return int(found[1]) if found else None
