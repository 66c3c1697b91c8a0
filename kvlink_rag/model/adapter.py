"""Adapters: a few megabytes that turn a base model into a KVLink model, merged as it is loaded.

An adapter is a directory of peft's own files (`adapter_config.json`, `adapter_model.safetensors`:
low-rank matrices, Hu et al., arXiv 2106.09685, and the rows of new tokens, or those alone) and a
`kvlink.json` whose `base` says which weights and which tokenizer they belong to. Knows files and
weights; no prompts, and not peft, which is not needed to use one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kvlink_rag.disk.digests import tokenizer_digest, weights_digest
from kvlink_rag.errors import ConfigError
from kvlink_rag.pretrained.known import ADAPTERS
from kvlink_rag.prompt.spec import SPEC_FILE, Base, Spec

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ANY_BASE = "any"
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_ROWS = ".trainable_tokens_delta"
_INSIDE = ".token_adapter"  # where rows stand beside low-rank matrices
_TOKENS = "TRAINABLE_TOKENS"  # peft's name for rows alone
_PLAIN: dict[
    str, tuple[Any, ...]
] = {  # settings of peft that change what is merged, and the values that do not
    "peft_type": ("LORA", _TOKENS),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter as read, its weights float of any kind, by peft's names.

    base: of its spec. digest: SHA-256 over what snapshots depend on: the low-rank matrices, what
    scales them, and the rows of a header. links: over the other rows, which are in runs that were
    computed for a question and in no snapshot.
    """

    directory: Path
    spec: Spec
    base: Base
    settings: Mapping[str, Any]
    weights: Mapping[str, Tensor] = field(repr=False)

    @cached_property
    def digest(self) -> str:
        facts = [self._scale if self._low_rank else None]
        return self._digest(facts, header=True)

    @cached_property
    def links(self) -> str:
        return self._digest([], header=False)

    def _digest(self, facts: list[Any], *, header: bool) -> str:
        found = hashlib.sha256(json.dumps(facts).encode())
        for name, tensor in sorted(self.weights.items()):
            if name.endswith(_ROWS):
                ids = self._row_ids(name)
                wanted = [i for i, id in enumerate(ids) if (id in self.spec.header) == header]
                found.update(json.dumps([name, [ids[i] for i in wanted]]).encode())
                found.update(_bytes(tensor[wanted]))
            elif header:
                found.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
                found.update(_bytes(tensor))
        return found.hexdigest()

    def _row_ids(self, name: str) -> list[int]:
        """The token ids of the rows under `name`; none for those of a head tied to them."""
        if self.settings["peft_type"] == _TOKENS:
            return list(self.settings["token_indices"])
        place = name.removesuffix(_ROWS).removesuffix(_INSIDE).rpartition(".")[2]
        return list((self.settings.get("trainable_token_indices") or {}).get(place) or ())

    def check(self, directory: Path, tokenizer: Any, *, adapter_base: str | None) -> str:
        """What is to be said of an adapter on the base in `directory`: "" where all is well.

        Raises `ConfigError` for other weights or another tokenizer than it was trained on, unless
        `adapter_base` is "any".
        """
        found = {
            "weights": weights_digest(directory) == self.base.weights,
            "tokenizer": tokenizer_digest(tokenizer) == self.base.tokenizer,
        }
        other = " and ".join(name for name, same in found.items() if not same)
        if not other:
            return ""
        told = (
            f"the adapter {self.directory} was trained on {self.base.name}, and the base in "
            f"{directory} has another {other}"
        )
        if adapter_base == ANY_BASE:
            return f"{told}: answers may be wrong"
        raise ConfigError(
            f"{told}; give the base it was trained on, or say adapter_base={ANY_BASE!r} to load it "
            "all the same"
        )

    @torch.no_grad()
    def merge_into(self, model: Any) -> None:
        """Add the low-rank products to the weights of `model` and set the rows of new tokens.

        The embeddings grow where the spec's ids need it. Raises `ConfigError` where shapes differ.
        """
        needed = max((*self.spec.special_ids(), *self.spec.header, -1)) + 1
        if needed > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(needed, mean_resizing=False)
        for name, tensor in self.weights.items():
            try:
                self._merge(model, name, tensor)
            except (AttributeError, RuntimeError, LookupError) as error:
                raise ConfigError(
                    f"{self.directory / WEIGHTS}: {name} does not fit the base "
                    f"({str(error).splitlines()[0]}); give the base it was trained on"
                ) from error

    def _merge(self, model: Any, name: str, tensor: Tensor) -> None:
        path = name.removeprefix(_PREFIX)
        if path.endswith(_DOWN):
            up = self.weights[name.removesuffix(_DOWN) + _UP]
            weight = model.get_submodule(path.removesuffix(_DOWN)).weight
            product = self._scale * (up.float() @ tensor.float())
            weight.copy_(weight.float() + product.to(weight.device))
        elif path.endswith(_ROWS):
            if ids := self._row_ids(name):
                weight = model.get_submodule(path.removesuffix(_ROWS).removesuffix(_INSIDE)).weight
                weight[torch.tensor(ids)] = tensor.to(weight.device, weight.dtype)
        elif not path.endswith(_UP):
            raise LookupError("neither a low-rank matrix nor rows of new tokens")

    @property
    def _low_rank(self) -> bool:
        return bool(self.settings["peft_type"] != _TOKENS)

    @property
    def _scale(self) -> float:
        rank = self.settings["r"]
        return float(self.settings["lora_alpha"] / (rank**0.5 if self._rslora else rank))

    @property
    def _rslora(self) -> bool:
        return bool(self.settings.get("use_rslora"))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a directory that holds an adapter."""
    return (Path(path).expanduser() / SETTINGS).is_file()


def find_adapter(
    path_or_id: str | Path, adapter: str | Path | None
) -> tuple[str | Path, Adapter | None]:
    """The base to load, and the adapter to merge into it, if any.

    The path of an adapter alone means the base that its `kvlink.json` names; the name of a pair,
    its reader with the adapter that comes with this package.
    """
    if adapter is None:
        adapter = ADAPTERS.get(str(path_or_id))
    if adapter is not None:
        return path_or_id, read_adapter(adapter)
    if is_adapter(path_or_id):
        found = read_adapter(path_or_id)
        return found.base.name, found
    return path_or_id, None


def read_adapter(path: str | Path) -> Adapter:
    """Read the adapter in the directory `path`. Raises `ConfigError`, `SpecError`."""
    directory = Path(path).expanduser()
    if missing := [n for n in (SETTINGS, WEIGHTS, SPEC_FILE) if not (directory / n).is_file()]:
        raise ConfigError(
            f"{directory} holds no adapter of kvlink-rag: there is no {', '.join(missing)} in it; "
            "an adapter of peft alone is merged with peft (merge_and_unload) and saved as a model"
        )
    spec = Spec.load(directory / SPEC_FILE)
    if spec.base is None:
        raise ConfigError(f"{directory / SPEC_FILE} names no base, expected the adapter's")
    settings = _settings(directory)
    data = (directory / WEIGHTS).read_bytes()
    try:
        weights = load(data)
    except SafetensorError as error:
        raise ConfigError(
            f"{directory / WEIGHTS} cannot be read ({error}); copy it again"
        ) from error
    return Adapter(directory, spec, spec.base, settings, weights)


def _settings(directory: Path) -> dict[str, Any]:
    """peft's settings. Raises `ConfigError` for those whose merging is not built."""
    try:
        settings = {"peft_type": "LORA", **json.loads((directory / SETTINGS).read_text("utf-8"))}
        if settings["peft_type"] == _TOKENS:
            settings["token_indices"] = [int(id) for id in settings["token_indices"]]
        else:
            settings["r"], settings["lora_alpha"] = int(settings["r"]), settings["lora_alpha"] / 1
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{directory / SETTINGS} holds no settings of peft ({error!r})"
        ) from error
    for name, plain in _PLAIN.items():
        if settings.get(name, plain[0]) not in plain:
            raise ConfigError(
                f"{directory / SETTINGS}: {name} is {settings[name]!r}, expected {plain[0]!r}; "
                "merge it with peft (merge_and_unload) and save the whole model"
            )
    return settings
