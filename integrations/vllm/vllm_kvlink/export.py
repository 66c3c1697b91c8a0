"""The directory that vLLM serves: adapters merged, without the rows that were added for KVLink.

vLLM only decodes, so it needs no link tokens, and without their rows it can say none. Knows a model
of kvlink_rag and transformers' files; imports no vLLM.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kvlink_rag import KVLinkModel
from kvlink_rag.errors import ConfigError, KVLinkError


def served_vocabulary(model: KVLinkModel) -> int:
    """How many of the model's rows vLLM is given: all below the first that was added."""
    known = 1 + max(model.tokenizer.hf.get_vocab().values())
    added = [id for id in model.spec.special_ids() if id >= known]
    return min(added, default=model.backbone.vocabulary)


def export(model: KVLinkModel, directory: str | Path) -> int:
    """Write weights, configuration and tokenizer for vLLM; the vocabulary that it has.

    Raises `ConfigError` where there is something in the directory.
    """
    target = Path(directory).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"found something in {target}, expected an empty directory; name another")
    target.mkdir(parents=True, exist_ok=True)
    rows, module = served_vocabulary(model), model.backbone.model
    save_file(_tensors(module, rows), target / "model.safetensors", {"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # to be read by whoever runs vLLM
    config: Any = copy.deepcopy(module.config)
    config.vocab_size, config.architectures = rows, [type(module).__name__]
    config.dtype = model.backbone.dtype
    config.save_pretrained(target)
    if module.generation_config is not None:
        module.generation_config.save_pretrained(target)
    model.tokenizer.hf.save_pretrained(target)
    return rows


def _tensors(module: Any, rows: int) -> dict[str, Tensor]:
    """The module's tensors by name, each memory once, embeddings cut to `rows`."""
    kept: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() in places:
            continue
        places.add(tensor.data_ptr())
        of_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        kept[name] = (tensor[:rows] if of_vocabulary else tensor).contiguous().cpu()
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `vllm-kvlink export MODEL DIRECTORY`."""
    parser = argparse.ArgumentParser(prog="vllm-kvlink", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write the directory that vLLM serves")
    command.add_argument("model", help="as in kvlink-rag: a pair, an adapter, a directory")
    command.add_argument("directory", help="where to; empty or not there yet")
    command.add_argument("--dtype", default="auto", help="such as float32; auto: its own")
    asked = parser.parse_args(arguments)
    try:
        model = KVLinkModel.from_pretrained(asked.model, device="cpu", dtype=asked.dtype)
        rows = export(model, asked.directory)
    except KVLinkError as error:
        print(f"vllm-kvlink: {error}", file=sys.stderr)
        return 1
    name = model.backbone.dtype_name
    print(f"{asked.directory}: {rows} of {model.backbone.vocabulary} rows, {name}")
    print(f"vllm serve {asked.directory} --dtype {name} --kv-transfer-config ...")
    return 0
