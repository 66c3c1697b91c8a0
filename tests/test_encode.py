"""Encoding in batches: of similar length, within the budget, and the same as each passage alone."""

from __future__ import annotations

import torch
from conftest import ModelMaker
from hypothesis import given
from hypothesis import strategies as st

from kvlink_rag.snapshots.encode import PassageEncoder, batches


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 900))
def test_batches_hold_every_passage_once_and_fit(lengths: list[int], budget: int) -> None:
    found = list(batches(lengths, budget))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_little_is_padded_where_lengths_alternate() -> None:
    """Long and short passages in turn: together, half of what is computed would be padding."""
    lengths = [200, 10] * 16
    found = batches(lengths, 800)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in found)
    assert padded <= 1.1 * sum(lengths)


def test_a_batch_gives_what_each_passage_alone_gives(make_model: ModelMaker) -> None:
    backbone = make_model("qwen3", torch.float32).backbone
    passages = [tuple(range(70, 70 + n)) for n in (3, 40, 1, 17, 40)]
    found = dict(PassageEncoder(backbone).many(passages, tokens_a_batch=90))
    assert sorted(found) == list(range(len(passages)))
    for index, ids in enumerate(passages):
        alone = PassageEncoder(backbone).one(ids)
        assert found[index].token_ids.tolist() == list(ids)
        assert torch.allclose(found[index].keys, alone.keys, atol=1e-4)
        assert torch.allclose(found[index].values, alone.values, atol=1e-4)
