"""What a run will be, said before it starts: examples, tokens, memory, time. No weights are read.

Memory and time are estimates from the model's shape, and say what they assume.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kvlink_rag.model.loading import load_config
from kvlink_rag.prompt.tokenizer import PartTokenizer
from kvlink_rag.quantities import number, size

from .batches import Collator
from .config import FinetuneConfig
from .prepare import prepare
from .stream import Mixture

DRAWN = 256
EFFICIENCY_NOTE = "at {tflops:g} TFLOP/s a device, which you may set with --tflops"
ADAM_BYTES = 8  # two moments, float32


@dataclass(frozen=True, slots=True)
class Kind:
    """What one data set gives: means over the examples drawn from it."""

    kind: str
    path: str
    drawn: int
    tokens: float
    learned: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A run. Bytes are for one device, fill: the share of a row that is not padding."""

    kinds: tuple[Kind, ...]
    skipped: dict[str, int]
    steps: int
    examples: int
    tokens: int
    fill: float
    parameters: int
    trained: int
    devices: int
    weight_bytes: int
    activation_bytes: int
    seconds: float
    tflops: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return asdict(self)


def estimate(config: FinetuneConfig, *, tflops: float, drawn: int = DRAWN) -> Estimate:
    """Draw `drawn` examples from the mixture and work the rest out. Raises as `finetune` does."""
    prepared = prepare(config)
    encoder = PartTokenizer(prepared.tokenizer)
    mixture = Mixture(config, encoder, prepared.form(config.instruction))
    found = list(islice(mixture.draw(), drawn))
    batches = [
        [each.sample for each in found[at : at + config.device_batch]]
        for at in range(0, len(found), config.device_batch)
    ]
    labels = [Collator()(batch)["labels"] for batch in batches]
    mean = sum(len(each.sample) for each in found) / len(found)
    shape = load_config(prepared.directory)
    parameters = _parameters(shape)
    rows = len(prepared.new_ids) * shape.hidden_size
    trained = _adapted(config, shape) + rows if config.adapts else parameters
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    shards = devices if config.fsdp else 1
    examples = config.steps * config.batch
    passes = 8 if config.gradient_checkpointing else 6  # FLOPs a parameter and token
    padded = sum(r.numel() for r in labels) / sum(int((r > 0).sum()) for r in labels)
    return Estimate(
        kinds=tuple(_kind(config, found, i) for i in range(len(config.data))),
        skipped=dict(mixture.skipped.reasons),
        steps=config.steps,
        examples=examples,
        tokens=int(examples * mean),
        fill=1 / padded,
        parameters=parameters,
        trained=trained,
        devices=devices,
        weight_bytes=_weights(config, parameters, trained) // shards,
        activation_bytes=_activations(config, shape, max(r.numel() for r in labels)),
        seconds=passes * parameters * examples * mean * padded / (devices * tflops * 1e12),
        tflops=tflops,
    )


def lines(found: Estimate) -> list[str]:
    """The estimate for people."""
    kinds = [
        f"  {each.kind:12} {each.drawn:4} drawn, {each.tokens:7,.0f} tokens each, "
        f"{each.learned:7,.0f} learned  {each.path}"
        for each in found.kinds
    ]
    skipped = ", ".join(f"{count} ({reason})" for reason, count in found.skipped.items())
    return [
        f"{number(found.steps, 'step')}, {number(found.examples, 'example')}, about "
        f"{number(found.tokens, 'token')}; rows are {100 * found.fill:.0f} % full",
        *kinds,
        f"  skipped: {skipped or 'none'}",
        f"{number(found.parameters, 'parameter')}, {found.trained:,} trained",
        f"memory a device, of {found.devices}: {size(found.weight_bytes)} for weights, gradients "
        f"and optimizer, about {size(found.activation_bytes)} for activations and logits",
        f"about {found.seconds / 3600:,.1f} hours {EFFICIENCY_NOTE.format(tflops=found.tflops)}",
    ]


def _kind(config: FinetuneConfig, found: Sequence[Any], place: int) -> Kind:
    part = config.data[place]
    own = [each.sample for each in found if each.part == place]
    count = max(1, len(own))
    tokens, learned = sum(map(len, own)) / count, sum(each.learned for each in own) / count
    return Kind(part.kind, part.path, len(own), tokens, learned)


def _parameters(shape: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    return sum(p.numel() for p in model.parameters())


def _adapted(config: FinetuneConfig, shape: Any) -> int:
    """Parameters of LoRA on all linear layers (fewer where targets names fewer)."""
    if config.lora is None:
        return 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    targets = config.lora.targets
    matrices = [
        module
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (isinstance(targets, str) or name.rpartition(".")[2] in targets)
    ]
    return sum(config.lora.rank * (m.in_features + m.out_features) for m in matrices)


def _weights(config: FinetuneConfig, parameters: int, trained: int) -> int:
    width = 4 if config.master == "float32" else 2
    return parameters * width + trained * (width + (ADAM_BYTES if width == 4 else 4))


def _activations(config: FinetuneConfig, shape: Any, tokens: int) -> int:
    """One hidden state a layer with checkpointing, about 34 without (Korthikanti et al. 2022)."""
    width = 2 if config.bf16 else 4
    kept = 1 if config.gradient_checkpointing else 17
    hidden = tokens * shape.hidden_size * width
    logits = tokens * shape.vocab_size * (4 + width)
    return int(hidden * (shape.num_hidden_layers * kept + 17) + logits)
