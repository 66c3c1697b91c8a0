"""kvlink.json: what is read back is what was written, and what is wrong is named."""

from __future__ import annotations

import json

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from kvlink_rag import Document, PromptPreset, Spec
from kvlink_rag.errors import SpecError
from kvlink_rag.prompt.format import PromptFormat
from kvlink_rag.prompt.published import KVLINK5_LLAMA32
from kvlink_rag.prompt.tokenizer import PartTokenizer


def test_round_trip() -> None:
    for spec in (Spec(), KVLINK5_LLAMA32, Spec(header=(1, 4093, 198))):
        assert Spec.from_json(spec.to_json()) == spec


def test_only_a_header_needs_the_second_format() -> None:
    assert json.loads(Spec().to_json())["format"] == 1
    assert "header" not in json.loads(Spec().to_json())
    assert json.loads(Spec(header=(1,)).to_json())["format"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format"),
        ({"header": [1, -1]}, "header"),
        ({"header": "abc"}, "header"),
        ({"header": 5}, "iterable"),
        ({"header": [1] * 5000}, "header"),
        ({"surprise": 1}, "unknown fields"),
        ({"links_per_passage": -1}, "links_per_passage"),
        ({"links_per_passage": True}, "links_per_passage"),
        ({"links_per_passage": 5}, "max_passages is missing"),
        ({"mem_start": 3}, "go together"),
        ({"rank": "first"}, "rank"),
        ({"passage_template": "{nothing}"}, "cannot be formatted"),
        ({"passage_template": "{title}"}, "does not hold"),
        ({"preset": "other"}, "expected one of"),
        ({"presets": {"plain": {"middle": ""}}}, "middle"),
        ({"presets": {"plain": {"before": 1}}}, "must be strings"),
        ({"presets": []}, "presets"),
        (
            {"links_per_passage": 2, "first_link_id": 5, "max_passages": 3}
            | {"mem_start": 7, "mem_end": 99},
            "overlap",
        ),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    fields = {**json.loads(Spec().to_json()), **change}
    with pytest.raises(SpecError, match=message):
        Spec.from_json(json.dumps(fields), source="kvlink.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "null", "[" * 100_000])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"here\.json"):
        Spec.from_json(text, source="here.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(json.loads(Spec().to_json()))), json_values))
def test_any_fields_give_a_spec_or_a_spec_error(change: dict[str, object]) -> None:
    fields = {**json.loads(Spec().to_json()), **change}
    try:
        spec = Spec.from_json(json.dumps(fields))
    except SpecError:
        return
    assert Spec.from_json(spec.to_json()) == spec


@given(st.text(), st.text())
def test_templates_never_read_user_text_as_template(title: str, text: str) -> None:
    spec = Spec(passage_template="{title}: {text}\n")
    expected = f"{title}: {text}\n" if title else f"{text}\n"
    assert spec.render_passage(Document(text.replace("\ud800", ""), title)) == expected


def test_empty_preset_parts_are_left_out() -> None:
    spec = Spec(presets={"p": PromptPreset(after="!")}, preset="p")
    assert [part.text for part in spec.prompt([], "q")] == ["q", "!"]  # type: ignore[union-attr]


def test_link_tokens_that_slots_share_are_counted_for_as_many_as_the_window_holds() -> None:
    shared = Spec(links_per_passage=4, first_link_id=300, links_shared=True)
    found = PromptFormat("m", 2000, PartTokenizer(byte_tokenizer(0)), shared)
    assert found.link_tokens == 4 * (2000 // (16 + 4))
    assert PromptFormat("m", 2000, found.tokenizer, Spec()).link_tokens == 0
    assert shared.link_ids(0) == shared.link_ids(7) == [300, 301, 302, 303]
