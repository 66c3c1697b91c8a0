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

from kvlink_rag.prompt.layout import PartEncoder
from kvlink_rag.prompt.spec import Spec

from .blocks import NAME, Batch, arrange
from .formats import preset
from .mixture import Mixture, draw
from .packing import CachedEncoder, pack
from .questions import exercise
from .start import lay_induction
from .tokenizer import LINKS, VOCABULARY, small_spec
from .world import SIZES

WINDOW = 8192


# One fact a page, said and asked with the same words: here the choice of the passage is learned.
_LOOKUP = Mixture(
    usual_pages=(6, 7, 8),
    usual_share=1.0,
    varied_share=0.0,
    full_share=0.5,
    text_share=0.0,
    gap_share=0.0,
    bare_share=0.0,
    turns_share=0.0,
    absent=0.1,
    plain=1.0,
    sizes=(1,),
    dependent=0.0,
)
# Pages of two to five facts in all phrasings.
_PAGES = replace(
    _LOOKUP, usual_pages=(5, 6, 8, 10), full_share=0.4, absent=0.15, plain=0.3, sizes=SIZES
)
# All formats, distances and dependences.
_ALL = Mixture(
    usual_share=0.75, varied_share=0.12, full_share=0.25, text_share=0.08, bare_share=0.03
)


@dataclass(frozen=True, slots=True)
class Stage:
    """What is learned up to step `until`, and the line that the learning rate follows meanwhile:
    flat up to step `flat`, then linear, to reach zero at step `end`.
    """

    until: int
    mixture: Mixture
    flat: int
    end: int


def _plan(lookup: int, pages: int, everything: int, end: int) -> tuple[Stage, ...]:
    """Where each stage ends; the learning rate falls from two fifths of the run on."""
    untils = {lookup: _LOOKUP, pages: _PAGES, everything: _ALL, end: Mixture()}
    return tuple(Stage(until, mixture, end * 2 // 5, end) for until, mixture in untils.items())


# The bundled model; the rate starts anew, at a half, where names of any spelling come in.
STAGES = (
    *_plan(1200, 3000, 6000, 10_000),
    Stage(12_500, Mixture(strange=0.5), 7500, 12_500),
)
COMPARED = _plan(1200, 2400, 3000, 5000)  # models that it is compared with, at half its budget
# The same, then worlds whose pages all depend on each other, and few pages as often as ten.
_DEPENDENT = Mixture(
    dependent=1.0, across=0.6, usual_pages=(2, 3, 4, 6, 8, 10), usual_share=0.9, varied_share=0.05
)
COMPARED_DEPENDENT = (*COMPARED, Stage(5800, _DEPENDENT, 5400, 5800))


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a run depends on besides the code.

    links: link tokens a passage. full_only: ordinary causal attention throughout.
    """

    seed: int = 0
    links: int = LINKS
    full_only: bool = False
    stages: tuple[Stage, ...] = STAGES
    warmup: int = 50
    matrix_rate: float = 0.005
    other_rate: float = 0.001
    matrix_decay: float = 0.1
    workers: int = 1
    rows: int = 2
    check_every: int = 500
    save_every: int = 250

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
        drawn = replace(self.stage(step).mixture, rows=self.rows)
        return replace(drawn, full_share=1.0) if self.full_only else drawn


def build(seed: int = 0) -> LlamaForCausalLM:
    """The bundled model's architecture, 2.2M parameters, with initial weights that copy."""
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
    model: LlamaForCausalLM,
    encoder: PartEncoder,
    spec: Spec,
    *,
    reuse: bool = True,
    k: int = 10,
    prompts: int = 12,
    seed: int = 1,
) -> dict[str, float]:
    """Share of held-out questions whose whole answer is the most likely one, token for token.

    Greedy decoding gives exactly the wanted answer if and only if every wanted token is the most
    likely one after those before it, so one packed prefill counts many questions.
    """
    right: dict[str, list[bool]] = {}
    rng = random.Random(f"check-{seed}")
    for _ in range(prompts):
        task = exercise(rng, k, questions=20, split="heldout")
        asked = [(q.text, q.answer) for q in task.questions]
        packed = pack(preset(task.pages, spec), asked, encoder, spec, reuse=reuse)
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
    recipe, losses, start = trainer.recipe, [], time.monotonic()
    spec = small_spec(recipe.links)
    while trainer.done < recipe.steps:
        rng = random.Random(f"{recipe.seed}-{trainer.done}-{rank}")
        losses.append(trainer.step(draw(rng, recipe.mixture(trainer.done), encoder, spec)))
        if trainer.done % 50 == 0 or trainer.done == recipe.steps:
            mean, seconds = sum(losses) / len(losses), time.monotonic() - start
            line, losses = f"step {trainer.done} loss {mean:.4f} s {seconds:.0f}", []
            if rank == 0 and (
                trainer.done % recipe.check_every == 0 or trainer.done == recipe.steps
            ):
                scores = exact_match(trainer.fast, encoder, spec, reuse=not recipe.full_only)
                line += " " + " ".join(f"{name} {score:.3f}" for name, score in scores.items())
            yield line
