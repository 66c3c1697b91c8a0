"""What an encoder's own files ask for: `modules.json` and its kin, of sentence-transformers.

Reads small files only; knows no weights. What they ask for that cannot be done is refused here,
before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink_rag.errors import ConfigError, ModelNotSupported

MODULES = "modules.json"
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

_OTHERWISE = (
    "hand over a LangChain or LlamaIndex embedding object that runs sentence-transformers; a "
    "collection takes those too"
)
# The order in which several are joined. Older files have a switch for each.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_LENGTHS = ("sentence_bert_config.json", "sentence_roberta_config.json")  # one of them
_TASK = "feature-extraction"


@dataclass(frozen=True, slots=True)
class Recipe:
    """From token states to a vector. poolings: one or more of `POOLINGS`, joined.

    folder: of the weights, inside the encoder's directory. max_length: tokens a text; None is the
    model's own. query, passage: put before each text. normalise: vectors have length 1. lower: the
    text is put in lower case first.
    """

    poolings: tuple[str, ...] = ("mean",)
    normalise: bool = False
    max_length: int | None = None
    query: str = ""
    passage: str = ""
    lower: bool = False
    folder: str = ""


def read_recipe(directory: Path) -> Recipe | None:
    """The recipe in `directory`; None where it holds no `modules.json`.

    Raises `ModelNotSupported` for what cannot be done, `ConfigError` for files that say nothing.
    """
    if not (directory / MODULES).is_file():
        return None
    modules = [_kind(directory, module) for module in _modules(directory)]
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelNotSupported(
            f"{directory} asks for the steps {', '.join(kinds)}, expected Transformer, Pooling and "
            f"perhaps Normalize; {_OTHERWISE}"
        )
    weights, pooling = directory / modules[0][1], directory / modules[1][1]
    prompts = _read(directory / "config_sentence_transformers.json")
    lengths = next((found for name in _LENGTHS if (found := _read(weights / name))), {})
    if (task := lengths.get("transformer_task", _TASK)) != _TASK:
        raise ModelNotSupported(f"{weights} is for {task!r}, expected {_TASK!r}; {_OTHERWISE}")
    return Recipe(
        poolings=_poolings(pooling, _has_prompts(prompts)),
        normalise="Normalize" in kinds or _similarity(directory, prompts) == "cosine",
        max_length=_length(weights, lengths),
        query=_prompt(directory, prompts, "query"),
        passage=_prompt(directory, prompts, "document", "passage", "corpus"),
        lower=lengths.get("do_lower_case") is True,
        folder=modules[0][1],
    )


def _modules(directory: Path) -> list[Any]:
    found = _load(directory / MODULES)
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise ConfigError(f"{directory / MODULES} is no list of modules; fetch the encoder again")
    return found


def _kind(directory: Path, module: Mapping[str, Any]) -> tuple[str, str]:
    """Name and folder of one step. Only sentence-transformers' own classes are known."""
    kind, folder = str(module.get("type", "")), module.get("path", "")
    if not kind.startswith("sentence_transformers."):
        raise ModelNotSupported(f"{directory} asks for the step {kind!r}, whose code is foreign")
    if not isinstance(folder, str) or Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ConfigError(f"{directory / MODULES} names the folder {folder!r}, expected one inside")
    return kind.rpartition(".")[2], folder


def _poolings(folder: Path, prompted: bool) -> tuple[str, ...]:
    config = _read(folder / "config.json")
    if not config:
        raise ConfigError(f"{folder} holds no config.json that says how to pool; fetch it again")
    asked = config.get("pooling_mode")
    if asked is None:
        asked = [name for key, name in _SWITCHES.items() if config.get(key)] or ["mean"]
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    if not names or not set(names) <= set(POOLINGS):
        raise ModelNotSupported(f"{folder} pools by {asked}, expected {', '.join(POOLINGS)}")
    if prompted and config.get("include_prompt", True) is False:
        raise ModelNotSupported(f"{folder} leaves the prompt out of the vector; {_OTHERWISE}")
    return names


def _has_prompts(config: Mapping[str, Any]) -> bool:
    prompts = config.get("prompts") or {}
    return isinstance(prompts, dict) and any(prompts.values())


def _prompt(directory: Path, config: Mapping[str, Any], *names: str) -> str:
    """The first of `names` that there is a prompt for; a default one is for neither."""
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise ConfigError(f"{directory}: prompts are {prompts!r}, expected them by name")
    prompt = next((prompts[name] for name in names if prompts.get(name)), "")
    if not isinstance(prompt, str):
        raise ConfigError(f"{directory}: a prompt is {prompt!r}, expected a text")
    return prompt


def _similarity(directory: Path, config: Mapping[str, Any]) -> str | None:
    """How vectors are compared, where the files say so.

    A search goes by the inner product, which is the cosine of vectors of length 1.
    """
    found = config.get("similarity_fn_name")
    if found in (None, "dot", "cosine"):
        return found
    raise ModelNotSupported(
        f"{directory} compares vectors by {found!r}, expected cosine or dot: a search goes by the "
        f"inner product; {_OTHERWISE}"
    )


def _length(weights: Path, config: Mapping[str, Any]) -> int | None:
    length = config.get("max_seq_length")
    if length is None or (isinstance(length, int) and length > 0):
        return length
    raise ConfigError(f"{weights}: max_seq_length is {length!r}, expected a number of tokens")


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file."""
    found = _load(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object; fetch the encoder again")
    return found


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); fetch the encoder again") from error
