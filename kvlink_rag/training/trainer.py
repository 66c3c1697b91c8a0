"""A fine-tuning run, top to bottom, on transformers' Trainer.

    prepare → weights → mixture → Trainer (masks and loss are ours) → a model that opens by itself

Optimisation, mixed precision, accumulation, checkpoints, resuming and many devices are the
Trainer's and accelerate's. Here are the masks, the loss, the metrics file and the result.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from kvlink_rag.engine.processor import multiplies_bfloat16
from kvlink_rag.errors import ConfigError, MissingExtra
from kvlink_rag.prompt.tokenizer import PartTokenizer

from .attention import NAME as SEGMENTED
from .batches import FLEX_BLOCK, Batch, Collator, block_masks, plans
from .config import FinetuneConfig
from .losses import full_attention, loss_of
from .prepare import Prepared, load_weights, prepare, save, save_adapter
from .samples import IGNORED
from .stream import Mixture

log = logging.getLogger(__name__)

METRICS, SETTINGS, CHECKPOINTS = "metrics.jsonl", "config.json", "checkpoints"
RESULT, ADAPTER = "model", "adapter"


def finetune(
    config: FinetuneConfig,
    *,
    device: str = "auto",
    resume: str | None = None,
    merge: bool = False,
) -> Path:
    """Run, or go on from the last checkpoint (or `resume`): the directory of the result.

    device: "cpu" forbids CUDA. merge: write the whole model where adapters were trained, too.
    Raises `ConfigError`, `MissingExtra`.
    """
    _need("accelerate")
    out = Path(config.out).expanduser()
    checkpoint = _checkpoint(out, resume)
    _remember(config, out)
    set_seed(config.seed)
    prepared = prepare(config)
    flex = device != "cpu" and torch.cuda.is_available()
    model = load_weights(config, prepared, attention="flex_attention" if flex else SEGMENTED)
    mixture = Mixture(
        config,
        PartTokenizer(prepared.tokenizer),
        prepared.form(config.instruction),
    )
    trainer = KVLinkTrainer(
        model=model,
        args=arguments(config, cpu=not flex),
        train_dataset=mixture,
        data_collator=Collator(FLEX_BLOCK if flex else 1),
        callbacks=[Metrics(out / METRICS), _tensorboard(out)],
    )
    trainer.distill = config.distill
    trainer.never = sorted({*prepared.spec.special_ids(), *prepared.new_ids})
    if config.adapts:
        trainer.add_callback(Adapter(prepared, config, out / ADAPTER))
    trainer.train(resume_from_checkpoint=checkpoint)
    if mixture.skipped.reasons:
        log.warning("skipped: %s", dict(mixture.skipped.reasons))
    return _finish(trainer, prepared, config, out, merge=merge)


def arguments(config: FinetuneConfig, *, cpu: bool) -> TrainingArguments:
    """The config in transformers' words. Raises `ConfigError` where the batch does not divide."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not cpu and "WORLD_SIZE" not in os.environ and torch.cuda.device_count() > 1:
        raise ConfigError(
            f"found {torch.cuda.device_count()} GPUs and one process; start one for each with "
            "torchrun --nproc-per-node N -m kvlink_rag train, or set CUDA_VISIBLE_DEVICES to one"
        )
    if config.batch % (config.device_batch * world):
        raise ConfigError(
            f"batch is {config.batch}, expected a multiple of device_batch ({config.device_batch}) "
            f"times processes ({world})"
        )
    return TrainingArguments(
        output_dir=str(Path(config.out).expanduser() / CHECKPOINTS),
        max_steps=config.steps,
        warmup_steps=config.warmup,
        lr_scheduler_type="linear",
        per_device_train_batch_size=config.device_batch,
        gradient_accumulation_steps=config.batch // (config.device_batch * world),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        bf16=config.bf16 and (not cpu or multiplies_bfloat16()),
        use_cpu=cpu,
        save_steps=config.save_every,
        save_total_limit=config.keep,
        logging_steps=config.log_every,
        logging_first_step=True,
        seed=config.seed,
        dataloader_num_workers=config.workers,
        # each process reads the same stream and takes its own examples: rows differ in length
        accelerator_config={"dispatch_batches": False, "split_batches": False},
        remove_unused_columns=False,
        report_to="none",
        fsdp=config.fsdp or None,
    )


class KVLinkTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, given the masks of KVLink rows and their loss.

    distill: see the config. never: token ids that no answer holds.
    """

    distill: float = 0.0
    never: Sequence[int] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by all tokens of a step
        self._loss_shifts_labels = False  # ours stand at the token that predicts them

    def forward(self, model: Any, batch: Batch) -> Tensor:
        """Logits [n, vocabulary] at the tokens that have a target: the head runs there only."""
        config = self.accelerator.unwrap_model(model).config
        if config._attn_implementation == "flex_attention":
            masks = {"attention_mask": block_masks(config, batch)}
        else:
            masks = {"plan": plans(config, batch)}
        logits: Tensor = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            logits_to_keep=(batch["labels"][0] != IGNORED).nonzero()[:, 0],
            use_cache=False,
            **masks,
        ).logits[0]
        return logits

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        targets = inputs["labels"][inputs["labels"] != IGNORED]
        teacher = self._teacher(model, inputs) if self.distill else None
        logits = self.forward(model, inputs)
        loss = loss_of(logits, targets, teacher, self.distill, self.never)
        loss = loss / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    @torch.no_grad()
    def _teacher(self, model: Any, batch: Batch) -> Tensor:
        """Logits of full attention: of the model as it stands, or, learning from nothing else,
        as it began.
        """
        alone = self.distill == 1
        with self.accelerator.unwrap_model(model).disable_adapter() if alone else nullcontext():
            return self.forward(model, full_attention(batch, self.never))


class Adapter(TrainerCallback):  # type: ignore[misc]
    """The adapter as it can be used, written with each checkpoint."""

    def __init__(self, prepared: Prepared, config: FinetuneConfig, directory: Path) -> None:
        self.prepared, self.config, self.directory = prepared, config, directory

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        if state.is_world_process_zero:
            save_adapter(model, self.prepared, self.directory, self.config)


class Metrics(TrainerCallback):  # type: ignore[misc]
    """One JSON line for each time the Trainer logs; a resumed run leaves out what it repeats."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(line + "\n" for line in kept), "utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _tensorboard(out: Path) -> Any:
    from transformers.integrations import TensorBoardCallback

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra.of("tensorboard", "train", "writing training curves") from error
    return TensorBoardCallback(SummaryWriter(str(out / "tensorboard")))


def _need(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtra.of(package, "train", "training")


def _checkpoint(out: Path, resume: str | None) -> str | None:
    """The checkpoint to go on from: the one named, else the last, else None."""
    if resume is not None:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise ConfigError(f"{resume} is no checkpoint; they are in {out / CHECKPOINTS}")
        return resume
    found: str | None = None
    if (out / CHECKPOINTS).is_dir():
        found = get_last_checkpoint(str(out / CHECKPOINTS))
    return found


def _remember(config: FinetuneConfig, out: Path) -> None:
    """Write the config beside the checkpoints; refuse another one than they were made with."""
    path, wanted = out / SETTINGS, json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        longer = found.get("steps", 0) <= wanted["steps"]
        other = [
            n
            for n in sorted(wanted)
            if found.get(n) != wanted[n] and (n, longer) != ("steps", True)
        ]
        if other:
            raise ConfigError(
                f"{out} holds a run with other settings ({', '.join(other)}); give another out"
            )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=2) + "\n", "utf-8")


def _finish(
    trainer: Any, prepared: Prepared, config: FinetuneConfig, out: Path, *, merge: bool
) -> Path:
    """Write the result once; sharded weights are gathered by the Trainer first."""
    model, directory = trainer.accelerator.unwrap_model(trainer.model), out / RESULT
    if config.adapts:
        if trainer.is_world_process_zero():
            save_adapter(model, prepared, out / ADAPTER, config)
        if not merge:
            return out / ADAPTER
    if trainer.is_fsdp_enabled:
        trainer.save_model(str(directory))
        if trainer.is_world_process_zero():
            model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True)
    if trainer.is_world_process_zero():
        save(model, prepared, directory, config.stored)
    return directory
