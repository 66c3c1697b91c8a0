"""Reproduces the bundled models from a seed: `python -m kvlink_rag.training.small --out DIR
[--seed 0]`.

Tokenizer, language model, encoder and demo documents, each a stage that is skipped if its files
are there. A stage that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from ..tokens import PartTokenizer
from . import formats, lm, retriever
from .demo import write_demo
from .questions import exercise
from .tokenizer import SYSTEM, small_spec, train_tokenizer


def corpus(seed: int, worlds: int = 1500) -> Iterator[str]:
    """What the tokenizer is trained on: passages, questions and answers of training worlds, and
    the formats.
    """
    rng, spec = random.Random(f"tokenizer-{seed}"), small_spec()
    for _ in range(worlds):
        task = exercise(rng, 10)
        yield from (spec.render_passage(formats.document(page)) for page in task.pages)
        yield from (text for q in task.questions for text in (q.text, q.answer, f" {q.answer}"))
    for _ in range(worlds // 5):
        yield from (text for intro, _, tail in formats.WRAPPERS for text in (intro, tail))
        yield from (*formats.SYSTEMS, SYSTEM, formats.REPLY, formats.THANKS, *formats.GREETINGS)


def make_tokenizer(out: Path, seed: int) -> PartTokenizer:
    """The tokenizer in `out`/lm, trained there if it is missing."""
    if not (out / "lm" / "tokenizer.json").exists():
        train_tokenizer(corpus(seed)).save_pretrained(out / "lm")
    return PartTokenizer(AutoTokenizer.from_pretrained(out / "lm"))


def make_lm(out: Path, work: Path, recipe: lm.Recipe, tokenizer: PartTokenizer) -> None:
    """The language model in `out`/lm with its spec, trained in `work` if it is missing."""
    if (out / "lm" / "model.safetensors").exists():
        return
    lm.train(recipe, tokenizer, work)
    trainer = lm.Trainer(lm.build(recipe.seed), recipe)
    trainer.load(work / "checkpoint.pt")
    save_lm(trainer.model, out / "lm")


def save_lm(model: LlamaForCausalLM, directory: Path) -> None:
    """Weights in float32, generation defaults and `kvlink.json`."""
    model.config._attn_implementation = "sdpa"
    model.to(torch.float32).save_pretrained(directory)
    (directory / "kvlink.json").write_text(small_spec().to_json(), encoding="utf-8")


def make_encoder(out: Path, seed: int) -> None:
    """The encoder in `out`/encoder with a copy of the tokenizer, trained if it is missing."""
    if (out / "encoder" / "model.safetensors").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(out / "lm")
    tokenizer.chat_template, tokenizer.model_max_length = None, retriever.POSITIONS
    model = retriever.build(len(tokenizer), seed)
    for line in retriever.train(model, tokenizer, retriever.Recipe(seed=seed)):
        print(line, flush=True)
    world = retriever.large_world(random.Random("recall"), "heldout", 600)
    print(retriever.recalls(model, tokenizer, world), flush=True)
    model.save_pretrained(out / "encoder")
    tokenizer.save_pretrained(out / "encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the finished files go")
    parser.add_argument("--work", type=Path, help="where checkpoints go (default: OUT/work)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("lm", "encoder", "demo"), help="one stage")
    arguments = parser.parse_args()
    work = arguments.work or arguments.out / "work"
    tokenizer = make_tokenizer(arguments.out, arguments.seed)
    if arguments.only in (None, "demo"):
        write_demo(arguments.out, arguments.seed)
    if arguments.only in (None, "encoder"):
        make_encoder(arguments.out, arguments.seed)
    if arguments.only in (None, "lm"):
        make_lm(arguments.out, work, lm.Recipe(seed=arguments.seed), tokenizer)


if __name__ == "__main__":
    main()
