"""The initial weights copy: what followed a token earlier is likely to follow it again."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvlink_rag.training import lm
from kvlink_rag.training.start import MATCHING_LAYER, lay_induction


def repeated(seed: int = 0, length: int = 40) -> torch.Tensor:
    """Random tokens, twice."""
    half = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:length] + 200
    return torch.cat([half, half])[None]


@torch.no_grad()
def foretold(model: LlamaForCausalLM) -> tuple[float, float]:
    """Share of tokens of the first and of the second half that were the most likely ones."""
    ids = repeated()
    right = (model(ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).float()
    half = ids.shape[1] // 2
    return right[: half - 1].mean().item(), right[half:].mean().item()


def test_repeated_tokens_are_copied_from_the_first_step() -> None:
    model = lm.build()
    first, second = foretold(model)
    assert first < 0.1
    assert second > 0.7

    model.model.layers[MATCHING_LAYER].self_attn.q_proj.weight.data.zero_()
    assert foretold(model)[1] < 0.1, "the matching heads are what copies"


def test_a_model_that_is_too_narrow_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        intermediate_size=64,
    )
    with pytest.raises(ValueError, match="hidden size 64"):
        lay_induction(LlamaForCausalLM(config))
