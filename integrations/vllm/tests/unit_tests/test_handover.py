"""What is handed over stands for one layout and no other."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from vllm_kvlink import Handover

from kvlink_rag import KVLinkModel, Text
from kvlink_rag.errors import PromptError


@pytest.fixture(scope="module")
def handover(model: KVLinkModel) -> Handover:
    return Handover.of(model.layout(model.prompt(tiny.documents()[:2], "When?")))


def test_a_layout_comes_back(model: KVLinkModel) -> None:
    sent = model.layout(model.prompt(tiny.documents(), "When was it built?"))
    carried = json.loads(json.dumps(Handover.of(sent, "me").to_json()))
    found = Handover.from_json(carried)
    layout = found.layout(sent.header)
    for name in ("token_ids", "positions", "segments"):
        assert torch.equal(getattr(layout, name), getattr(sent, name))
    assert layout.header == sent.header
    assert [len(span) for span in layout.passages] == [len(span) for span in sent.passages]
    assert sum(map(len, layout.spans)) == len(sent)
    assert found.tenant == "me"


def test_its_states_are_those_of_the_prompt(model: KVLinkModel) -> None:
    sent = model.layout(model.prompt(tiny.documents(), "When was it built?"))
    expected = model.states(sent, "masked")
    found = model.states(Handover.of(sent).layout(sent.header))
    torch.testing.assert_close(found.keys, expected.keys, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.values, expected.values, atol=1e-4, rtol=0)


def test_vllm_is_given_ids_of_its_own(handover: Handover) -> None:
    ids = handover.placeholders(tiny.VOCABULARY)
    assert max(handover.token_ids) >= tiny.VOCABULARY > max(ids)
    kept = [(a, b) for a, b in zip(ids, handover.token_ids, strict=True) if b < tiny.VOCABULARY]
    assert all(a == b for a, b in kept)
    assert len(kept) < len(ids)


def variants(handover: Handover) -> dict[str, Handover]:
    """Other prompts, most of which vLLM is given the very same ids of."""
    ids = handover.token_ids
    at = next(i for i, id in enumerate(ids) if id > tiny.VOCABULARY + 1)
    start, stop = handover.passages[0]
    return {
        "another link token": replace(handover, token_ids=(*ids[:at], ids[at] + 2, *ids[at + 1 :])),
        "a passage as text": replace(handover, passages=handover.passages[1:]),
        "a longer passage": replace(handover, passages=((start - 1, stop), *handover.passages[1:])),
        "another's": replace(handover, tenant="another"),
    }


def test_every_difference_is_in_the_salt(handover: Handover) -> None:
    others = variants(handover)
    assert len({handover.salt, *(other.salt for other in others.values())}) == 1 + len(others)
    ids = handover.placeholders(tiny.VOCABULARY)
    for other in others.values():  # nothing else tells them apart
        assert other.placeholders(tiny.VOCABULARY) == ids


@pytest.mark.parametrize("what", ["another link token", "a passage as text", "another's"])
def test_a_salt_of_another_layout_is_refused(handover: Handover, what: str) -> None:
    ids = handover.placeholders(tiny.VOCABULARY)
    handover.check(ids, handover.salt, tiny.VOCABULARY)
    with pytest.raises(PromptError, match="expected the layout's"):
        handover.check(ids, variants(handover)[what].salt, tiny.VOCABULARY)
    with pytest.raises(PromptError, match="found the cache salt None"):
        handover.check(ids, None, tiny.VOCABULARY)


def test_ids_of_another_prompt_are_refused(handover: Handover) -> None:
    ids = handover.placeholders(tiny.VOCABULARY)
    for other in (ids[:-1], [*ids[:-1], 5], []):
        with pytest.raises(PromptError, match="not those of its layout"):
            handover.check(other, handover.salt, tiny.VOCABULARY)


def test_a_prompt_that_ends_with_an_added_row_is_refused() -> None:
    ended = Handover((1, 2, tiny.VOCABULARY))
    with pytest.raises(PromptError, match="end it with text"):
        ended.check(ended.placeholders(tiny.VOCABULARY), ended.salt, tiny.VOCABULARY)


@pytest.mark.parametrize(
    ("ids", "passages"),
    [
        ((), ()),
        ((1, 2, 3), ((1, 1),)),
        ((1, 2, 3), ((1, 3),)),
        ((1, 2, 3, 4), ((2, 3), (0, 1))),
        ((1, 2, 3, 4), ((0, 2), (1, 3))),
        ((1, 2, 3, 4), ((-1, 2),)),
    ],
)
def test_impossible_stretches(ids: Any, passages: Any) -> None:
    with pytest.raises(PromptError):
        Handover(ids, passages)


@pytest.mark.parametrize(
    "value",
    [
        *(None, [], {}, {"format": 2}, {"format": 1}),
        {"format": 1, "token_ids": [1, -2], "passages": [], "tenant": ""},
        {"format": 1, "token_ids": [1, True], "passages": [], "tenant": ""},
        {"format": 1, "token_ids": [1, 2], "passages": [[0]], "tenant": ""},
        {"format": 1, "token_ids": [1, 2], "passages": [], "tenant": 7},
        {"format": 1, "token_ids": "12", "passages": [], "tenant": ""},
    ],
)
def test_what_is_no_layout_is_refused(value: object) -> None:
    with pytest.raises(PromptError, match="kvlink_layout"):
        Handover.from_json(value)


def test_a_prompt_without_passages(model: KVLinkModel) -> None:
    layout = model.layout([Text("When was it built?")])
    assert Handover.of(layout).layout(()).spans == layout.spans
