"""Trains the small language model: Muon on matrices, AdamW on the rest, two processes of one
thread each.

Each step draws its batch from (seed, step, worker) alone, so that a run can stop and go on from
its last checkpoint with the same data. Gradients are averaged over workers with gloo. Knows
nothing of files outside the run directory.
"""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from ..layout import PartEncoder
from .blocks import NAME, Batch, arrange
from .formats import preset
from .mixture import Mixture, draw
from .packing import CachedEncoder, pack
from .questions import exercise
from .start import lay_induction
from .tokenizer import VOCABULARY, small_spec

WINDOW = 8192


_EARLY = Mixture(varied_share=0.04, turns_share=0.02, text_share=0.06)
_NAMES = replace(
    _EARLY,
    usual_pages=(5, 6),
    usual_share=0.9,
    most_pages=8,
    full_share=0.45,
    learn="all",
    absent=0.1,
)
_WIDER = replace(
    _EARLY,
    usual_pages=(6, 8, 10),
    usual_share=0.8,
    most_pages=12,
    full_share=0.3,
    learn="questions",
)
_PLAIN = replace(
    _EARLY,
    usual_pages=(3, 4, 5, 6),
    usual_share=0.9,
    most_pages=8,
    full_share=0.3,
    plain=0.85,
    absent=0.1,
)
_MIXED = replace(_EARLY, usual_pages=(5, 6, 8), most_pages=12, plain=0.4)


@dataclass(frozen=True, slots=True)
class Stage:
    """What is learned up to step `until`, and the line that the learning rate follows meanwhile:
    flat up to step `flat`, then linear, to reach zero at step `end`.
    """

    until: int
    mixture: Mixture
    flat: int
    end: int


# As it was run; the plan changed at steps 900 and 1300 (docs/experiments_small_model.md).
STAGES = (
    Stage(570, _NAMES, 665, 1900),
    Stage(855, _WIDER, 665, 1900),
    Stage(900, Mixture(), 665, 1900),
    Stage(1035, _WIDER, 805, 2300),
    Stage(1300, Mixture(), 805, 2300),
    Stage(1700, _PLAIN, 1620, 2700),
    Stage(1900, _MIXED, 1620, 2700),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a run depends on besides the code."""

    seed: int = 0
    stages: tuple[Stage, ...] = STAGES
    warmup: int = 50
    matrix_rate: float = 0.02
    other_rate: float = 0.004
    matrix_decay: float = 0.01
    workers: int = 2
    rows: int = 4
    check_every: int = 250
    save_every: int = 100

    @property
    def steps(self) -> int:
        """Where the last stage ends."""
        return self.stages[-1].until

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return next(stage for stage in self.stages if step < stage.until)

    def rate(self, step: int) -> float:
        """The factor on both learning rates at a step."""
        stage = self.stage(step)
        return min(1.0, (step + 1) / self.warmup, (stage.end - step) / (stage.end - stage.flat))

    def mixture(self, step: int) -> Mixture:
        """What a step's batch is drawn from."""
        return replace(self.stage(step).mixture, rows=self.rows)


def build(seed: int = 0) -> LlamaForCausalLM:
    """The bundled model's architecture, 2.1M parameters, with initial weights that copy."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=160,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=32,
            intermediate_size=432,
            max_position_embeddings=WINDOW,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    lay_induction(model, seed)
    return model


def predict(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [learned tokens, vocabulary] and their targets [learned tokens]."""
    hidden = model.model(
        input_ids=batch.token_ids, position_ids=batch.positions, plan=batch.plan, use_cache=False
    ).last_hidden_state
    learned = batch.targets >= 0
    return model.lm_head(hidden[learned]), batch.targets[learned]


class Trainer:
    """A float32 model, its bfloat16 working copy and its optimisers; `step` learns from one
    batch.
    """

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe) -> None:
        self.model, self.recipe, self.done = model, recipe, 0
        model.config._attn_implementation = NAME
        self.fast = copy.deepcopy(model).to(torch.bfloat16)
        named = dict(model.named_parameters())
        matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.matrix_decay),
            torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, batch: Batch) -> float:
        """One update; returns the mean loss of this worker's learned tokens."""
        logits, targets = predict(self.fast, batch)
        loss = cross_entropy(logits.float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self._average()
        self._update()
        self._refresh()
        return float(loss.detach())

    def _average(self) -> None:
        """The mean bfloat16 gradient over workers, as one message, becomes the float32 gradient."""
        fast = dict(self.fast.named_parameters())
        grads = [g for p in fast.values() if (g := p.grad) is not None]
        flat = torch.cat([g.flatten().float() for g in grads])
        if dist.is_initialized():
            dist.all_reduce(flat)
            flat.div_(dist.get_world_size())
        pieces = torch.split(flat, [g.numel() for g in grads])
        for name, piece in zip(fast, pieces, strict=True):
            parameter = self.model.get_parameter(name)
            parameter.grad = piece.view_as(parameter)
        self.fast.zero_grad()

    @torch.no_grad()
    def _refresh(self) -> None:
        """The working copy follows the float32 weights."""
        for name, parameter in self.fast.named_parameters():
            parameter.copy_(self.model.get_parameter(name))

    def _update(self) -> None:
        factor = self.recipe.rate(self.done)
        rates = (self.recipe.matrix_rate, self.recipe.other_rate)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1

    def save(self, path: Path) -> None:
        """Write all state; the old file stays until the new one is whole."""
        state = {"model": self.model.state_dict(), "done": self.done}
        state["optimizers"] = [o.state_dict() for o in self.optimizers]
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.done = state["done"]
        self._refresh()
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, encoder: PartEncoder, *, k: int = 10, prompts: int = 12, seed: int = 1
) -> dict[str, float]:
    """Share of held-out questions whose whole answer is the most likely one, token for token.

    Greedy decoding gives exactly the wanted answer if and only if every wanted token is the most
    likely one after those before it, so one packed prefill counts many questions.
    """
    right: dict[str, list[bool]] = {}
    rng, spec = random.Random(f"check-{seed}"), small_spec()
    for _ in range(prompts):
        task = exercise(rng, k, questions=20, split="heldout")
        asked = [(q.text, q.answer) for q in task.questions]
        packed = pack(preset(task.pages, spec), asked, encoder, spec)
        batch = arrange([packed])
        logits, targets = predict(model, batch)
        groups = batch.groups[batch.targets >= 0]
        wrong = set(groups[logits.argmax(-1) != targets].tolist())
        for index, question in enumerate(task.questions, start=1):
            name = question.dependence or question.kind
            right.setdefault(name, []).append(index not in wrong)
    return {name: sum(hits) / len(hits) for name, hits in sorted(right.items())}


def train(recipe: Recipe, encoder: PartEncoder, directory: Path) -> None:
    """Run the recipe from the directory's checkpoint, or from the start, with worker processes."""
    directory.mkdir(parents=True, exist_ok=True)
    spawn(_worker, (recipe, encoder, directory), nprocs=recipe.workers)  # type: ignore[no-untyped-call]


def _worker(rank: int, recipe: Recipe, encoder: PartEncoder, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{(directory / f'meeting-{os.getppid()}').absolute()}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=recipe.workers)
    trainer = Trainer(build(recipe.seed), recipe)
    checkpoint = directory / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    for report in run(trainer, CachedEncoder(encoder), rank):
        if rank == 0:
            print(report, flush=True)
            if trainer.done % recipe.save_every == 0 or trainer.done == recipe.steps:
                trainer.save(checkpoint)
    dist.destroy_process_group()


def run(trainer: Trainer, encoder: PartEncoder, rank: int = 0) -> Iterator[str]:
    """Train to the recipe's end; yields a line of log now and then."""
    recipe, losses, start, spec = trainer.recipe, [], time.monotonic(), small_spec()
    while trainer.done < recipe.steps:
        rng = random.Random(f"{recipe.seed}-{trainer.done}-{rank}")
        losses.append(trainer.step(draw(rng, recipe.mixture(trainer.done), encoder, spec)))
        if trainer.done % 50 == 0 or trainer.done == recipe.steps:
            mean, seconds = sum(losses) / len(losses), time.monotonic() - start
            line, losses = f"step {trainer.done} loss {mean:.4f} s {seconds:.0f}", []
            if rank == 0 and (
                trainer.done % recipe.check_every == 0 or trainer.done == recipe.steps
            ):
                scores = exact_match(trainer.fast, encoder)
                line += " " + " ".join(f"{name} {score:.3f}" for name, score in scores.items())
            yield line
