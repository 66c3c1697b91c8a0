"""The registry of model families: one row a model type, all that differs between them.

A family joins with a row here and its tiny model in `tests/conftest.py`, where the oracle decides.
Knows configurations as transformers reads them; knows no weights and no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvlink_rag.errors import ModelNotSupported

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that no prompt's length changes


@dataclass(frozen=True, slots=True)
class Family:
    """What the engine must know of the models of one type.

    keys: modules of an attention block that keys go through before RoPE, in order; the first takes
    the hidden states, a later one takes each head. values: the module that gives values.
    one_mask: whether all layers take one and the same mask, else one for each of
    `config.layer_types`. slides: whether layers may have a sliding window. rope_types: the kinds of
    RoPE for which stored keys can be re-encoded.
    """

    model_type: str
    keys: tuple[str, ...] = ("k_proj",)
    values: str = "v_proj"
    one_mask: bool = False
    slides: bool = True
    rope_types: tuple[str, ...] = ROPE_TYPES


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", one_mask=True, slides=False),
        Family("mistral", one_mask=True),
        Family("qwen2"),
        Family("qwen3", keys=("k_proj", "k_norm")),
    )
}


def family_of(config: Any) -> Family:
    """The family of a model's configuration. Raises `ModelNotSupported` where it has none."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelNotSupported(
            f"found a model of type {config.model_type!r}, expected one of "
            f"{', '.join(FAMILIES)}; reuse is proved for these only"
        )
    return family


def check_supported(config: Any) -> None:
    """Raise `ModelNotSupported` unless reuse is proved for this configuration."""
    kinds = family_of(config).rope_types
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in kinds or any(isinstance(value, dict) for value in rope.values()):
        raise ModelNotSupported(
            f"found RoPE type {kind!r}, expected one of {', '.join(kinds)}: stored keys can "
            "only be re-encoded where the frequencies do not depend on the prompt's length"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelNotSupported("found a partial rotary factor, expected RoPE over whole heads")


def window_of(config: Any) -> int | None:
    """The sliding window in positions, or None where no layer slides."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not family_of(config).slides or (kinds and "sliding_attention" not in kinds):
        return None
    return window


def masks_by_layer(config: Any, make: Callable[[int | None], Any]) -> Any:
    """What a model takes as attention mask: `make(window)`, or one for each kind of layer.

    make: the mask for a sliding window in positions, or for None.
    """
    window = window_of(config)
    if family_of(config).one_mask:
        return make(window)
    masks = {"full_attention": make(None)}
    return masks if window is None else {**masks, "sliding_attention": make(window)}
