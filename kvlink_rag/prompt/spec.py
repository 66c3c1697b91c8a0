"""What a KVLink model expects of its prompt: link tokens, memory markers and templates.

A `Spec` stands in `kvlink.json` beside the weights, in the registry of `published` checkpoints, or
is given by the caller. Knows token ids and templates; knows no tensors and no tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvlink_rag.documents import Document, Part, Passage, Text
from kvlink_rag.errors import PromptError, SpecError

SPEC_FILE = "kvlink.json"
SPEC_FORMATS = (1, 2)
SECOND = ("header", "links_shared")  # fields that only the second format has
LONGEST_HEADER = 1024  # tokens; each passage is encoded behind it
MOST = 1 << 22  # a token id, a slot or a count beyond this is a mistake

Rank = Literal["none", "fixed", "exact"]


@dataclass(frozen=True, slots=True)
class PromptPreset:
    """The special text around the memory and the question of a one-question prompt."""

    before: str = ""
    between: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter was trained on.

    name: directory or hub id it was opened by. weights, tokenizer: their digests.
    """

    name: str
    weights: str
    tokenizer: str


PLAIN_PRESET = PromptPreset(between="\nQuestion: ", after="\nAnswer:")


@dataclass(frozen=True, slots=True)
class Spec:
    """Link tokens, markers and templates of one model.

    links_per_passage: link tokens after each passage (0: none).
    first_link_id: link token k of the passage in slot j has id
        `first_link_id + links_per_passage * j + k`; where slots share them, `first_link_id + k`.
    links_shared: whether the link tokens are the same in every slot, so that they bound no number
        of passages.
    mem_start, mem_end: marker ids around each message's passages, or None.
    max_passages: slots that have link tokens; None: as many as the window holds.
    passage_template, untitled_template: `str.format` with `title`, `text` and `rank`.
    header: token ids that every passage sees before its own when it is encoded, and nothing else
        sees; no part of the prompt, and not kept (shared prefix: APE, Yang et al., arXiv
        2502.05431).
    rank: what `{rank}` becomes: "fixed" is always 1, "exact" the slot + 1 (then a snapshot holds
        for one slot only; for evaluation).
    presets: prompt presets by name; `preset` names the one in use.
    tokenizer: repository to take the tokenizer from where the checkpoint carries none.
    base: of an adapter, the model it belongs to.
    """

    links_per_passage: int = 0
    first_link_id: int = 0
    links_shared: bool = False
    mem_start: int | None = None
    mem_end: int | None = None
    max_passages: int | None = None
    passage_template: str = "{title}: {text}\n"
    untitled_template: str = "{text}\n"
    header: tuple[int, ...] = ()
    rank: Rank = "none"
    presets: Mapping[str, PromptPreset] = field(default_factory=lambda: {"plain": PLAIN_PRESET})
    preset: str = "plain"
    tokenizer: str | None = None
    notice: str = ""
    base: Base | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def prompt_preset(self) -> PromptPreset:
        """The preset in use."""
        return self.presets[self.preset]

    def link_ids(self, slot: int) -> list[int]:
        """Ids of the link tokens after the passage in `slot` (from 0)."""
        first = self.first_link_id + self.links_per_passage * (0 if self.links_shared else slot)
        return list(range(first, first + self.links_per_passage))

    def render_passage(self, document: Document, slot: int = 0) -> str:
        """The text that is encoded for `document`; it depends on `slot` for rank "exact" only."""
        template = self.passage_template if document.title else self.untitled_template
        rank = slot + 1 if self.rank == "exact" else 1
        return template.format(title=document.title, text=document.text, rank=rank)

    def prompt(self, documents: Sequence[Document], question: str) -> list[Part]:
        """The preset's prompt: before, the passages, between, the question, after."""
        if isinstance(documents, Document | str):
            raise PromptError(
                f"documents is one {type(documents).__name__}, expected a list of Document; use "
                "[document]"
            )
        preset = self.prompt_preset
        parts: list[Part] = [Text(preset.before, special=True)]
        parts += [Passage(document) for document in documents]
        parts += [
            Text(preset.between, special=True),
            Text(question),
            Text(preset.after, special=True),
        ]
        return [part for part in parts if isinstance(part, Passage) or part.text]

    def special_ids(self) -> list[int]:
        """Every token id that this spec names."""
        markers = [i for i in (self.mem_start, self.mem_end) if i is not None]
        count = self.link_slots * self.links_per_passage
        return markers + list(range(self.first_link_id, self.first_link_id + count))

    @property
    def link_slots(self) -> int:
        """How many slots have link tokens of their own."""
        if not self.links_per_passage:
            return 0
        return 1 if self.links_shared else self.max_passages or 0

    def to_json(self) -> str:
        """The text of a `kvlink.json`."""
        fields = dataclasses.asdict(self)
        if self.base is None:
            del fields["base"]  # an older release reads the file of a whole model
        unused = [name for name in SECOND if not getattr(self, name)]
        for name in unused:
            del fields[name]  # likewise
        fields = {"format": SPEC_FORMATS[len(unused) < len(SECOND)], **fields}
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = SPEC_FILE) -> Spec:
        """Read a `kvlink.json`. Raises `SpecError` naming `source` and the field at fault."""
        fields = _object(text, source)
        if (found := fields.pop("format", None)) not in SPEC_FORMATS:
            raise SpecError(f'{source}: found "format": {found!r}, expected one of {SPEC_FORMATS}')
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise SpecError(f"{source}: unknown fields {unknown}; known are {sorted(known)}")
        try:
            if "presets" in fields:
                fields["presets"] = _presets(fields["presets"])
            if "header" in fields:
                fields["header"] = tuple(fields["header"])
            if fields.get("base") is not None:
                fields["base"] = Base(**fields["base"])
            return cls(**fields)
        except (TypeError, SpecError) as error:
            raise SpecError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Spec:
        """Read the `kvlink.json` at `path`."""
        return cls.from_json(path.read_text(encoding="utf-8"), source=str(path))


def _presets(value: Any) -> dict[str, PromptPreset]:
    if not isinstance(value, dict) or not all(isinstance(p, dict) for p in value.values()):
        raise SpecError("presets is not an object of objects with before, between and after")
    return {name: PromptPreset(**preset) for name, preset in value.items()}


def _object(text: str, source: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{source}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise SpecError(f"{source}: found {type(fields).__name__}, expected a JSON object")
    return fields


def _check(spec: Spec) -> None:
    """Raise `SpecError` where the fields of `spec` cannot work together."""
    for name in ("links_per_passage", "first_link_id"):
        _check_count(name, getattr(spec, name), least=0)
    for name in ("mem_start", "mem_end"):
        if getattr(spec, name) is not None:
            _check_count(name, getattr(spec, name), least=0)
    if len(spec.header) > LONGEST_HEADER:
        raise SpecError(f"header has {len(spec.header)} tokens, expected up to {LONGEST_HEADER}")
    for token in spec.header:
        _check_count("an id in header", token, least=0)
    if spec.max_passages is not None:
        _check_count("max_passages", spec.max_passages, least=1)
    elif spec.links_per_passage and not spec.links_shared:
        raise SpecError("max_passages is missing: with link tokens, say how many slots have them")
    if not isinstance(spec.links_shared, bool):
        raise SpecError(f"links_shared is {spec.links_shared!r}, expected true or false")
    if (spec.mem_start is None) != (spec.mem_end is None):
        raise SpecError("mem_start and mem_end go together: give both or neither")
    if spec.rank not in ("none", "fixed", "exact"):
        raise SpecError(f"rank is {spec.rank!r}, expected 'none', 'fixed' or 'exact'")
    if (spec.max_passages or 0) * spec.links_per_passage > MOST:
        raise SpecError(f"links_per_passage times max_passages is more than {MOST}")
    ids = spec.special_ids()
    if len(set(ids)) != len(ids):
        raise SpecError("link-token ids and memory markers overlap")
    _check_texts(spec)


def _check_count(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise SpecError(f"{name} is {value!r}, expected an integer from {least} to {MOST}")


def _check_texts(spec: Spec) -> None:
    for name in ("passage_template", "untitled_template"):
        template = getattr(spec, name)
        _check_fields(name, template)
        try:
            rendered = template.format(title="", text="\0", rank=1)
        except (AttributeError, LookupError, ValueError, TypeError) as error:
            raise SpecError(f"{name} {template!r} cannot be formatted: {error}") from error
        if "\0" not in rendered:
            raise SpecError(f"{name} {template!r} does not hold {{text}}")
    for name, preset in spec.presets.items():
        if not all(isinstance(t, str) for t in (preset.before, preset.between, preset.after)):
            raise SpecError(f"preset {name!r}: before, between and after must be strings")
    if spec.preset not in spec.presets:
        raise SpecError(f"preset is {spec.preset!r}, expected one of {sorted(spec.presets)}")
    if not isinstance(spec.notice, str) or not isinstance(spec.tokenizer, str | None):
        raise SpecError("notice and tokenizer must be strings")


def _check_fields(name: str, template: object) -> None:
    """A template names its fields as they are: `{text[0]}` or `{rank:>9999999}` is a mistake."""
    try:
        fields = list(string.Formatter().parse(str(template)))
    except ValueError as error:
        raise SpecError(f"{name} {template!r} cannot be formatted: {error}") from error
    for _, found, width, conversion in fields:
        if width or conversion or re.search(r"[.\[]", found or ""):
            raise SpecError(
                f"{name} {template!r} cannot be formatted: expected {{title}}, {{text}} and "
                f"{{rank}} as they are, found {found!r} with more"
            )
