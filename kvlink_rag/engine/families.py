"""The registry of model families: one row a model type, all that differs between them.

A family joins with a row here and its tiny model in `tests/conftest.py`, where the oracle decides.
Knows configurations as transformers reads them; knows no weights and no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvlink_rag.errors import ModelNotSupported

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that no prompt's length changes


@dataclass(frozen=True, slots=True)
class Family:
    """What the engine must know of the models of one type.

    keys: modules of an attention block that keys go through before RoPE, in order; the first takes
    the hidden states, a later one takes each head, or all heads at once (over_heads). values: the
    module that gives values. Where one module is both, it is fused and gives queries, keys and
    values, in this order. input_norm: what attention's input goes through, if anything.
    heads_first: whether the last of `keys` gives [batch, kv_heads, tokens, head_dim]. one_mask:
    whether all layers take one and the same mask, else one for each of `config.layer_types`.
    slides: whether layers may have a sliding window. embeddings, logits: settings that embeddings
    are multiplied with, and logits divided by, outside their modules. shaping: settings that shape
    keys and values besides those of every family (`identity`). rope_types: the kinds of RoPE for
    which stored keys can be re-encoded. partial: whether RoPE may turn only the first part of each
    head. ropes_by_kind: whether each of `config.layer_types` has a RoPE of its own. turning: the
    setting that says, for each layer, whether it has RoPE at all. without: settings that must be
    off, and why.
    """

    model_type: str
    keys: tuple[str, ...] = ("k_proj",)
    over_heads: bool = False
    heads_first: bool = False
    values: str = "v_proj"
    input_norm: str | None = "input_layernorm"
    one_mask: bool = False
    slides: bool = True
    embeddings: str | None = None
    logits: str | None = None
    shaping: tuple[str, ...] = ()
    rope_types: tuple[str, ...] = ROPE_TYPES
    partial: bool = False
    ropes_by_kind: bool = False
    turning: str | None = None
    without: Mapping[str, str] = field(default_factory=dict)

    def columns(self, width: int) -> tuple[slice, slice]:
        """Where keys, and values, stand in the last dimension of what their modules give.

        width: kv_heads * head_dim of the model.
        """
        if self.values not in self.keys:
            return slice(None), slice(None)
        return slice(-2 * width, -width), slice(-width, None)

    def turning_layers(self, config: Any) -> list[bool] | None:
        """For each layer whether its keys are turned by RoPE; None where all are."""
        if self.turning is None:
            return None
        return [bool(each) for each in getattr(config, self.turning)]


_EXPERTS = ("num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
_NORMED = ("k_proj", "k_norm")

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", one_mask=True, slides=False),
        Family("mistral", one_mask=True),
        Family("qwen2"),
        Family("qwen3", keys=_NORMED),
        Family("qwen3_moe", keys=_NORMED, one_mask=True, shaping=_EXPERTS),
        Family("mixtral", one_mask=True, shaping=_EXPERTS),
        Family("ministral"),
        Family("ministral3", one_mask=True),
        Family(
            "olmo2", keys=_NORMED, over_heads=True, input_norm=None, one_mask=True, slides=False
        ),
        Family(
            "granite",
            one_mask=True,
            slides=False,
            embeddings="embedding_multiplier",
            logits="logits_scaling",
            shaping=("embedding_multiplier", "residual_multiplier", "attention_multiplier"),
        ),
        Family("arcee", one_mask=True, slides=False),
        Family("seed_oss", one_mask=True, slides=False),
        Family("gemma", one_mask=True, slides=False, shaping=("hidden_activation",)),
        Family("starcoder2", one_mask=True, shaping=("norm_epsilon", "use_bias")),
        Family("cwm"),
        Family(
            "gemma3_text",
            keys=_NORMED,
            heads_first=True,
            ropes_by_kind=True,
            shaping=("hidden_activation", "query_pre_attn_scalar"),
            without={
                "use_bidirectional_attention": "passages are encoded causally",
                "attn_logit_softcapping": "our attention has no caps",
                "final_logit_softcapping": "our head has no caps",
            },
        ),
        Family("smollm3", turning="no_rope_layers", shaping=("no_rope_layers",)),
        Family(
            "phi3",
            keys=("qkv_proj",),
            values="qkv_proj",
            one_mask=True,
            shaping=("max_position_embeddings",),  # LongRoPE scales cosines and sines by it
            rope_types=("default", "longrope"),
            partial=True,
        ),
    )
}


def family_of(config: Any) -> Family:
    """The family of a model's configuration. Raises `ModelNotSupported` where it has none."""
    family = FAMILIES.get(config.model_type)
    text = getattr(config, "text_config", None)
    if family is None and text is not None:
        raise ModelNotSupported(
            f"found a multimodal model of type {config.model_type!r}, expected a language model; "
            f"load it with transformers and save its text part (type {text.model_type!r}) as one"
        )
    if family is None:
        raise ModelNotSupported(
            f"found a model of type {config.model_type!r}, expected one of "
            f"{', '.join(FAMILIES)}; reuse is proved for these only"
        )
    return family


def check_supported(config: Any) -> None:
    """Raise `ModelNotSupported` unless reuse is proved for this configuration."""
    family = family_of(config)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        facts = quantised if isinstance(quantised, dict) else quantised.to_dict()
        raise ModelNotSupported(
            f"found a checkpoint quantised by {facts.get('quant_method', 'an unknown method')!s}, "
            "expected plain weights, for which reuse is proved; load the original one, or a GGUF "
            "file of it"
        )
    for name, why in family.without.items():
        if value := getattr(config, name, None):
            raise ModelNotSupported(f"found {name} = {value!r}, expected none: {why}")
    rope = getattr(config, "rope_parameters", None) or {}
    for each in rope.values() if family.ropes_by_kind else [rope]:
        _check_rope(each or {}, family)


def _check_rope(rope: Mapping[str, Any], family: Family) -> None:
    kinds = family.rope_types
    kind = rope.get("rope_type", "default")
    if kind not in kinds or any(isinstance(value, dict) for value in rope.values()):
        raise ModelNotSupported(
            f"found RoPE type {kind!r}, expected one of {', '.join(kinds)}: stored keys can "
            "only be re-encoded where the frequencies do not depend on the prompt's length"
        )
    if not family.partial and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelNotSupported("found a partial rotary factor, expected RoPE over whole heads")


def reach_of(config: Any) -> int:
    """Positions that a prompt may have: those before a model computes otherwise, if it ever does.

    Beyond its original window queries may be scaled by position, so that what a passage's tokens
    see in each other depends on where it stands, or frequencies change with the length (LongRoPE).
    """
    rope = getattr(config, "rope_parameters", None) or {}
    most: int = config.max_position_embeddings
    if rope.get("llama_4_scaling_beta") or rope.get("rope_type") == "longrope":
        return min(most, int(rope.get("original_max_position_embeddings", most)))
    return most


def window_of(config: Any) -> int | None:
    """The sliding window in positions, or None where no layer slides, or no prompt is longer."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not family_of(config).slides or (kinds and "sliding_attention" not in kinds):
        return None
    return None if window is None or window >= reach_of(config) else window


def masks_by_layer(config: Any, make: Callable[[int | None], Any]) -> Any:
    """What a model takes as attention mask: `make(window)`, or one for each kind of layer.

    make: the mask for a sliding window in positions, or for None.
    """
    window = window_of(config)
    if family_of(config).one_mask:
        return make(window)
    masks = {"full_attention": make(None)}
    if "sliding_attention" in config.layer_types:
        masks["sliding_attention"] = masks["full_attention"] if window is None else make(window)
    return masks
