"""Grouped-query attention against torch's own in float32."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvlink_rag.engine import attention
from kvlink_rag.engine.attention import grouped_attention, narrow_attention, pack_mask

HEADS, KV_HEADS, DIM = 8, 2, 32
GROUPS = HEADS // KV_HEADS
SCALE = DIM**-0.5


class _Module(torch.nn.Module):
    num_key_value_groups = GROUPS
    is_causal = True


def drawn(queries: int, keys: int, sharpness: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Query, key and value in float32, keys with a large common part as real ones have, and who
    sees whom: every query the first key, half of the rest, none of them the last.
    """
    random = torch.Generator().manual_seed(seed)
    query = sharpness * torch.randn(1, HEADS, queries, DIM, generator=random)
    key = torch.randn(1, KV_HEADS, keys, DIM, generator=random)
    key += 3 * torch.randn(1, KV_HEADS, 1, DIM, generator=random)
    value = torch.randn(1, KV_HEADS, keys, DIM, generator=random)
    seen = torch.rand(queries, keys, generator=random) < 0.5
    seen[:, 0], seen[:, -1] = True, False
    return query, key, value, seen


def wanted(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """[1, queries, heads, head_dim] in float32, by torch, with keys repeated."""
    repeated = (t.float().repeat_interleave(GROUPS, 1) for t in (key, value))
    return scaled_dot_product_attention(query.float(), *repeated, attn_mask=seen).transpose(1, 2)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    mask = pack_mask(seen, GROUPS, query.dtype)
    with torch.inference_mode():
        return grouped_attention(_Module(), query, key, value, mask, scaling=SCALE)[0]


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (7, 300), (60, 500)])
def test_float32_is_exact(queries: int, keys: int) -> None:
    inputs = drawn(queries, keys, 1.0)
    assert error(grouped(*inputs), wanted(*inputs)) < 1e-6


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (7, 300), (60, 500)])
def test_bfloat16_is_rounded_no_more_than_the_sums_need(
    queries: int, keys: int, sharpness: float
) -> None:
    *states, seen = drawn(queries, keys, sharpness)
    inputs = (*(t.bfloat16() for t in states), seen)
    assert error(grouped(*inputs), wanted(*inputs)) < 6e-3


def test_rounding_scores_as_they_are_would_not_do() -> None:
    """What the guess is for: without it the error is several times as large."""
    query, key, value, seen = drawn(60, 500, 2.0)
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    repeated = key.repeat_interleave(GROUPS, 1), value.repeat_interleave(GROUPS, 1)
    scores = (query @ repeated[0].transpose(-1, -2)) * SCALE
    plain = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ repeated[1]
    expected = wanted(query, key, value, seen)
    assert error(plain.transpose(1, 2), expected) > 3 * error(
        grouped(query, key, value, seen), expected
    )


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    *states, seen = drawn(33, 257, 2.0)
    query, key, value = (t[0].bfloat16() for t in states)
    packed = query.reshape(KV_HEADS, GROUPS * 33, DIM)
    mask = pack_mask(seen, GROUPS, torch.bfloat16)[0, 0]
    with torch.inference_mode():
        whole = narrow_attention(packed, key, value, mask, SCALE)
        monkeypatch.setattr(attention, "SCORE_BYTES", 257 * 2 * 10)  # 10 rows
        parts = narrow_attention(packed, key, value, mask, SCALE)
    assert error(parts, whole.float()) < 2e-3


def test_what_no_query_sees_counts_for_nothing() -> None:
    *states, seen = drawn(7, 300, 2.0)
    query, key, value = (t.bfloat16() for t in states)
    before = grouped(query, key, value, seen)
    value[:, :, -1] = 1e4
    assert torch.equal(before, grouped(query, key, value, seen))


def test_hidden_keys_with_large_scores_do_not_drown_the_others() -> None:
    """A key that is sampled and never seen, with scores far above all others."""
    query, key, value, seen = drawn(7, 321, 1.0)
    key[:, :, 320] = 40 * query[:, ::GROUPS, 0]
    inputs = (query.bfloat16(), key.bfloat16(), value.bfloat16(), seen)
    assert error(grouped(*inputs), wanted(*inputs)) < 6e-3


def test_a_query_may_see_nothing_that_was_sampled() -> None:
    query, key, value, seen = drawn(7, 300, 1.0)
    seen[:] = False
    seen[:, 1:9] = True
    inputs = (query.bfloat16(), key.bfloat16(), value.bfloat16(), seen)
    assert error(grouped(*inputs), wanted(*inputs)) < 2e-2


def test_gradients_go_through_torch() -> None:
    *states, seen = drawn(3, 20, 1.0)
    query, key, value = (t.bfloat16().requires_grad_() for t in states)
    mask = pack_mask(seen, GROUPS, torch.bfloat16)
    out, _ = grouped_attention(_Module(), query, key, value, mask, scaling=SCALE)
    out.float().sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_sees_all_keys(dtype: torch.dtype) -> None:
    """A generated token, whose attention goes another way: every key counts, each group its own."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, 1, 32, generator=generator).to(dtype)
    key, value = (torch.randn(1, 2, 60, 32, generator=generator).to(dtype)[:, :, :50] for _ in "kv")
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    wide_key, wide_value = (each.double().repeat_interleave(3, dim=1) for each in (key, value))
    scores = (query.double() @ wide_key.transpose(2, 3) * 0.3).softmax(-1)
    wanted = (scores @ wide_value).transpose(1, 2)
    assert found.shape == (1, 1, 6, 32)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
