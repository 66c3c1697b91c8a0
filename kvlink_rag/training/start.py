"""Initial weights in which copying works from the first step.

From random weights, a model of this size spends millions of tokens before its first induction
head appears. Here the circuit is laid down at the start and left to training: two heads of layer
0 look at the token before, two heads of layer 3 look for the token that followed the present one
earlier and copy it; the final norm is scaled up so that what they copy wins. (Olsson et al. 2022,
"In-context Learning and Induction Heads"; the idea of starting from what training would find:
Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers".) Knows no task.

The residual stream is divided: the first half holds what a token is, the second half what the
one before it was, the last coordinate is the same for all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

EMBEDDING = 0.1
MATCH = 2.2
COPY = 4.0
SHARPNESS = 3.0
NOISE = 0.003
LOCAL = 7.0
FAR = 300
FAST = 5
HEADS = 2
MATCHING_LAYER = 3


@torch.no_grad()
def lay_induction(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Overwrite a new model's attention and embeddings; two heads fit in half the width."""
    config, source = model.config, torch.Generator().manual_seed(seed)
    half, last, size = config.hidden_size // 2, config.hidden_size - 1, config.head_dim
    if HEADS * size > half or model.model.layers[0].self_attn.q_proj.bias is not None:
        raise ValueError(
            f"hidden size {config.hidden_size} with heads of {size}: two heads must fit in half "
            "the hidden size, without biases"
        )
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, EMBEDDING, generator=source)
    embedding[:, half:] = 0
    embedding[:, last] = EMBEDDING * half**0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    frequencies = model.model.rotary_emb.inv_freq
    _look_back(model.model.layers[0].self_attn, frequencies, half, last)
    _match(model.model.layers[MATCHING_LAYER].self_attn, frequencies, half)
    model.model.norm.weight.fill_(SHARPNESS)
    for layer in model.model.layers:
        for weight in layer.parameters():
            if weight.ndim == 2:
                weight.add_(torch.randn(weight.shape, generator=source) * NOISE)


def _look_back(attention: LlamaAttention, frequencies: Tensor, half: int, last: int) -> None:
    """Queries and keys come from the constant coordinate; the rotation makes offset 1 the best."""
    size, turn = attention.head_dim, frequencies[:FAST]
    constant = half**0.5  # of the normalised stream, which the constant shares with the token
    query, key = torch.zeros(size), torch.zeros(size)
    query[:FAST] = LOCAL
    key[:FAST] = LOCAL * turn.cos()
    key[size // 2 : size // 2 + FAST] = LOCAL * turn.sin()
    for head in range(HEADS):
        rows = _clear(attention, head)
        attention.q_proj.weight[rows, last] = query / constant
        attention.k_proj.weight[rows, last] = key / constant
        for i in range(rows.start, min(rows.stop, last - half)):
            attention.v_proj.weight[i, i] = 1
            attention.o_proj.weight[half + i, i] = EMBEDDING * 2**0.5


def _match(attention: LlamaAttention, frequencies: Tensor, half: int) -> None:
    """Query: this token. Key: the token before the other one. Compared where rotation is slow."""
    slow = torch.nonzero(frequencies * FAR < 1)[:, 0].tolist()
    dims = [*slow, *(i + attention.head_dim // 2 for i in slow)]
    for head in range(HEADS):
        rows = _clear(attention, head)
        for at, dim in enumerate(dims, start=rows.start):
            attention.q_proj.weight[rows.start + dim, at] = MATCH
            attention.k_proj.weight[rows.start + dim, half + at] = MATCH
        for i in range(rows.start, rows.stop):
            attention.v_proj.weight[i, i] = 1
            attention.o_proj.weight[i, i] = COPY * EMBEDDING


def _clear(attention: LlamaAttention, head: int) -> slice:
    """Zero one head; returns its rows."""
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[rows] = 0
    attention.o_proj.weight[:, rows] = 0
    return rows
