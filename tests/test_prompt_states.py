"""`KVLinkModel.states`: what another engine goes on from is what the model itself would go on from.

Against transformers' own cache where no passage is in the prompt, against the masked full prefill
where some are.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, ModelMaker, byte_spec, byte_tokenizer, random_model
from test_oracle import F32, fresh, prompt

from kvlink_rag import KVLinkModel, PromptStates, Text
from kvlink_rag.arguments import parse_repair
from kvlink_rag.engine.attention import NAME as GROUPED

CLOSE = {"atol": 2e-4, "rtol": 0.0}  # float32 over three layers, in another order of summation


def same(found: PromptStates, expected: PromptStates) -> None:
    torch.testing.assert_close(found.keys, expected.keys, **CLOSE)
    torch.testing.assert_close(found.values, expected.values, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_reused_states_are_the_masked_prefills(make_model: ModelMaker, family: str) -> None:
    model = make_model(family)
    layout = model.layout(prompt(model, 3))
    found, expected = model.states(layout), model.states(layout, "masked")
    same(found, expected)
    core = model.backbone
    assert found.keys.shape == (core.layers, core.kv_heads, len(layout), core.head_dim)
    assert found.trace.reused_tokens == layout.reused_tokens > 0
    same(model.states(layout), expected)  # from kept runs as well
    same(
        model.states(layout, reuse=replace(fresh(model), repair=parse_repair("first:4"))), expected
    )


def test_a_computed_prompts_states_are_transformers_own(make_model: ModelMaker) -> None:
    model = make_model("llama")
    layout = model.layout([Text("When was the harbour built, and by whom?")])
    found = model.states(layout)
    output = model.backbone.model(input_ids=layout.token_ids[None], use_cache=True)
    for layer, own in enumerate(output.past_key_values.layers):
        torch.testing.assert_close(found.keys[layer], own.keys[0], **CLOSE)
        torch.testing.assert_close(found.values[layer], own.values[0], **CLOSE)
    torch.testing.assert_close(found.logits, output.logits[0, -1], **CLOSE)


def test_a_workspace_gives_the_prompt_alone(make_model: ModelMaker) -> None:
    """Its unwritten entries and its padded rows are no part of it."""
    plain = make_model("llama")
    copy = random_model("llama", F32)
    copy.set_attn_implementation(GROUPED)
    static = KVLinkModel(copy, byte_tokenizer(), byte_spec(), graphs=True)
    layout = plain.layout(prompt(plain, 3))
    found = static.states(layout)
    assert found.keys.shape[2] == len(layout)
    same(found, plain.states(layout, "masked"))
