"""Codecs that keep keys and values in 8 or 4 bits, and putting them back in place.

Keys are quantised before RoPE with a scale for each channel, where their outliers stand (KVQuant,
Hooper et al., arXiv 2401.18079; KIVI, Liu et al., arXiv 2402.02750), values with a scale for each
token. De-quantising is part of assembly: slab by slab, straight into the live cache. The bytes
stand in `docs/formats.md`. Knows tensors; knows no file and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.engine.rope import rotate_into
from kvlink_rag.errors import ConfigError

from .snapshot import SLAB, Shape, TensorLayout

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
_FLOAT8_BIAS = 256.0  # between e4m3's exponents and float16's, see `_float8_values`

Parts = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantise.

    levels: the largest code of an integer codec (the smallest is 0); None: float8 e4m3.
    group: about how many neighbours share a scale, tokens of a key's channel and numbers of a
    token's value; None: all of the passage, all of the head.
    """

    name: str
    levels: int | None
    group: int | None = None

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.levels == 15

    def key_groups(self, tokens: int) -> list[slice]:
        """The tokens that share a key's scales, as even as can be."""
        count = 1 if self.group is None else max(1, tokens // self.group)
        size = math.ceil(tokens / count)
        return [slice(a, min(a + size, tokens)) for a in range(0, tokens, size)]

    def value_groups(self, head_dim: int) -> int:
        """How many scales the value of one token and head has."""
        count = 1 if self.group is None else math.ceil(head_dim / self.group)
        return count if head_dim % count == 0 else 1

    def layout(self, shape: Shape) -> TensorLayout:
        """Names, dtypes and shapes of the tensors for a passage of `shape`, in the file's order."""
        layers, heads, tokens, dim = shape
        scales = {
            "key_scales": [layers, heads, len(self.key_groups(tokens)), dim],
            "value_scales": [layers, heads, tokens, self.value_groups(dim)],
        }
        if self.levels is not None:
            names = ("key_scales", "key_lows", "value_scales", "value_lows")
            scales = {n: scales[n.replace("lows", "scales")] for n in names}
        codes = [layers, heads, tokens, dim // 2 if self.packed else dim]
        dtype = FLOAT8 if self.levels is None else torch.uint8
        return {
            "token_ids": (torch.int64, [tokens]),
            **{name: (torch.bfloat16, sizes) for name, sizes in scales.items()},
            "keys": (dtype, codes),
            "values": (dtype, codes),
        }


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (Scheme("int8", 255), Scheme("int4", 15, group=64), Scheme("fp8", None))
}


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A passage's keys before RoPE and values, quantised: the tensors of `Scheme.layout`.

    Raises `ConfigError` where the tensors are not those of `codec`.
    """

    codec: str
    tensors: Parts

    def __post_init__(self) -> None:
        shape = self._found_shape()
        expected = SCHEMES[self.codec].layout(shape) if shape else {}
        found = {name: (t.dtype, list(t.shape)) for name, t in self.tensors.items()}
        if found != expected or list(found) != list(expected) or not shape or 0 in shape:
            raise ConfigError(f"not a snapshot of codec {self.codec}: found tensors {found}")

    @property
    def token_ids(self) -> Tensor:
        """int64 [tokens]."""
        return self.tensors["token_ids"]

    @property
    def shape(self) -> Shape:
        """(layers, kv_heads, tokens, head_dim)."""
        layers, heads, tokens, width = self.tensors["keys"].shape
        return layers, heads, tokens, width * (2 if SCHEMES[self.codec].packed else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def codec_for(self, dtype: torch.dtype) -> str:
        """Its codec, whatever a model computes in."""
        return self.codec

    def moved(self, move: Callable[[Tensor], Tensor]) -> Quantised:
        """The snapshot of what `move` makes of all tensors but the token ids."""
        moved = {n: t if n == "token_ids" else move(t) for n, t in self.tensors.items()}
        return Quantised(self.codec, moved)

    def part(self, layers: slice) -> Quantised:
        """Some layers, as views."""
        return self if layers == slice(None) else self.moved(lambda tensor: tensor[layers])

    def fill(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Write the keys, rotated by `cos` and `sin`, and the values in place; see `Snapshot.fill`.

        keys, values: [layers, kv_heads, tokens, head_dim], of any device and dtype. Computed in
        float32 and rounded once; never more than a slab beside what is written.
        """
        parts = {
            name: tensor.to(keys.device, non_blocking=True)
            for name, tensor in self.tensors.items()
            if name != "token_ids"
        }
        slab = SLAB if keys.device.type == "cpu" else self.shape[2]  # there, fewer kernels
        for at, group in self._slabs(slab):
            plain = self._keys(parts, at, group).to(keys.dtype)
            rotate_into(keys[:, :, at], plain, cos[..., at, :], sin[..., at, :])
            values[:, :, at] = self._values(parts, at)

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, [layers, kv_heads, tokens, head_dim] each, in `dtype`."""
        keys, values = (torch.empty(self.shape, dtype=dtype) for _ in "kv")
        for at, group in self._slabs(SLAB):
            keys[:, :, at] = self._keys(self.tensors, at, group)
            values[:, :, at] = self._values(self.tensors, at)
        return keys, values

    def _slabs(self, most: int) -> Iterator[tuple[slice, int]]:
        """Stretches of at most `most` tokens, and the number of the group of keys of each."""
        for number, group in enumerate(SCHEMES[self.codec].key_groups(self.shape[2])):
            for start in range(group.start, group.stop, most):
                yield slice(start, min(start + most, group.stop)), number

    def _keys(self, parts: Parts, at: slice, group: int) -> Tensor:
        """float32 [layers, kv_heads, tokens of `at`, head_dim]."""
        keys = self._numbers(parts["keys"][:, :, at])
        keys.mul_(parts["key_scales"][:, :, group : group + 1])
        if "key_lows" in parts:
            keys.add_(parts["key_lows"][:, :, group : group + 1])
        return keys

    def _values(self, parts: Parts, at: slice) -> Tensor:
        """float32 [layers, kv_heads, tokens of `at`, head_dim]."""
        values = self._numbers(parts["values"][:, :, at])
        groups = values.view(*values.shape[:3], parts["value_scales"].shape[3], -1)
        groups.mul_(parts["value_scales"][:, :, at, :, None])
        if "value_lows" in parts:
            groups.add_(parts["value_lows"][:, :, at, :, None])
        return values

    def _numbers(self, codes: Tensor) -> Tensor:
        """Codes as float32, unpacked."""
        scheme = SCHEMES[self.codec]
        if scheme.levels is None:
            return _float8_values(codes)
        if not scheme.packed:
            return codes.float()
        half = codes.shape[-1]
        numbers = torch.empty(*codes.shape[:-1], 2 * half, device=codes.device)
        numbers[..., :half] = codes & 15
        numbers[..., half:] = codes >> 4
        return numbers

    def _found_shape(self) -> Shape | None:
        keys = self.tensors.get("keys")
        return self.shape if keys is not None and keys.dim() == 4 else None


def quantise(codec: str, keys: Tensor, values: Tensor, token_ids: Tensor) -> Quantised:
    """Quantise a passage: keys and values of any float dtype [layers, kv_heads, tokens, head_dim].

    Raises `ConfigError` for an unknown codec, an odd head_dim, and numbers that are not finite.
    """
    if codec not in SCHEMES:
        raise ConfigError(f"found codec {codec!r}, expected one of {', '.join(SCHEMES)}")
    how = SCHEMES[codec]
    if how.packed and keys.shape[-1] % 2:
        raise ConfigError(f"found a head_dim of {keys.shape[-1]}, expected an even one for {codec}")
    groups = [_codes(how, keys[:, :, at].float(), 2) for at in how.key_groups(keys.shape[2])]
    parts = {f"key_{n}" if n else "keys": torch.cat([g[n] for g in groups], 2) for n in groups[0]}
    rows = values.float().view(*values.shape[:3], how.value_groups(values.shape[3]), -1)
    for name, found in _codes(how, rows, 4).items():
        parts[f"value_{name}" if name else "values"] = (
            found.squeeze(4) if name else found.view(values.shape)
        )
    if how.packed:
        parts |= {name: _pack(parts[name]) for name in ("keys", "values")}
    parts["token_ids"] = token_ids
    order = how.layout((*keys.shape[:2], len(token_ids), keys.shape[3]))
    return Quantised(codec, {name: parts[name].contiguous() for name in order})


def _codes(scheme: Scheme, numbers: Tensor, dim: int) -> Parts:
    """Codes (under ""), and `scales` and `lows` that all of `dim` share; float32 numbers."""
    highest = numbers.amax(dim, keepdim=True)
    if scheme.levels is None:
        scales = _up(torch.maximum(highest, -numbers.amin(dim, keepdim=True)) / FLOAT8_MAX)
        codes = (numbers / scales.float()).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
        found = {"": codes, "scales": scales}
    else:
        lows = 0.0 - _up(-numbers.amin(dim, keepdim=True), zero=0.0)
        scales = _up((highest - lows.float()) / scheme.levels)
        codes = ((numbers - lows.float()) / scales.float()).round().clamp(0, scheme.levels)
        found = {"": codes.to(torch.uint8), "scales": scales, "lows": lows}
    if not all(bool(found[name].isfinite().all()) for name in found if name):
        raise ConfigError("found keys or values that are not finite; the model is broken")
    return found


def _up(numbers: Tensor, zero: float = 1.0) -> Tensor:
    """float32 to the nearest bfloat16 that is not smaller; `zero` for 0."""
    near = numbers.bfloat16()
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    rounded = torch.where(near.float() < numbers, above, near)
    return torch.where(numbers == 0, torch.full_like(near, zero), rounded)


def _pack(codes: Tensor) -> Tensor:
    """Codes below 16 [..., n] to bytes [..., n / 2]: the first half in the low bits."""
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << 4


def _float8_values(codes: Tensor) -> Tensor:
    """float8 e4m3 to float32, many times as fast as torch on CPUs.

    e4m3's sign, exponent and fraction at float16's places are the number over 2**8, zero and
    subnormal ones too. There are no NaNs among the codes.
    """
    wide = (codes.view(torch.int8).short() << 7).bitwise_and_(-0x4001)  # the sign came twice
    return wide.view(torch.float16).float().mul_(_FLOAT8_BIAS)
