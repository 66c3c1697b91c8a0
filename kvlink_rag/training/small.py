"""Reproduces the bundled models from a seed: `python -m kvlink_rag.training.small --out DIR
[--seed 0]`.

Tokenizer, language model, encoder and demo documents, each a stage that is skipped if its files
are there. A stage that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from kvlink_rag.prompt.tokenizer import PartTokenizer

from . import formats, lm, retriever
from .demo import write_demo
from .names import ENDINGS, STEMS
from .questions import exercise
from .tokenizer import LINKS, SYSTEM, small_spec, train_tokenizer


def corpus(seed: int, worlds: int = 1500) -> Iterator[str]:
    """What the tokenizer is trained on: passages, questions and answers of training worlds, the
    formats, and the stems and endings of names, often enough to become tokens.
    """
    rng, spec = random.Random(f"tokenizer-{seed}"), small_spec()
    for _ in range(worlds):
        task = exercise(rng, 10)
        yield from (spec.render_passage(formats.document(page)) for page in task.pages)
        yield from (text for q in task.questions for text in (q.text, q.answer, f" {q.answer}"))
    for _ in range(worlds // 5):
        yield from (text for intro, _, tail in formats.WRAPPERS for text in (intro, tail))
        yield from (*formats.SYSTEMS, SYSTEM, formats.REPLY, formats.THANKS, *formats.GREETINGS)
    for _ in range(worlds * 2 // 3):
        yield from (stem.capitalize() for stem in STEMS)
        yield from (ending for endings in ENDINGS.values() for ending in endings)


def make_tokenizer(out: Path, seed: int) -> PartTokenizer:
    """The tokenizer in `out`/lm, trained there if it is missing."""
    if not (out / "lm" / "tokenizer.json").exists():
        train_tokenizer(corpus(seed)).save_pretrained(out / "lm")
    return PartTokenizer(AutoTokenizer.from_pretrained(out / "lm"))


def make_lm(directory: Path, work: Path, recipe: lm.Recipe, tokenizer: PartTokenizer) -> None:
    """The language model in `directory` with its spec, trained in `work` if it is missing."""
    if (directory / "model.safetensors").exists():
        return
    lm.train(recipe, tokenizer, work)
    trainer = lm.Trainer(lm.build(recipe.seed), recipe)
    trainer.load(work / "checkpoint.pt")
    save_lm(trainer.model, directory, recipe.links)


def make_compared(out: Path, work: Path, name: str, seed: int) -> None:
    """A language model of another recipe in `out`/name, with a copy of the tokenizer.

    A dependent one begins as the model of the same name without that word does, so it goes on
    from that model's last checkpoint where there is one.
    """
    begun, checkpoint = (work / name.removesuffix(DEPENDENT), work / name / "checkpoint.pt")
    if not checkpoint.exists() and (begun / "checkpoint.pt").exists():
        checkpoint.parent.mkdir(parents=True)
        shutil.copy(begun / "checkpoint.pt", checkpoint)
    tokenizer = make_tokenizer(out, seed)
    AutoTokenizer.from_pretrained(out / "lm").save_pretrained(out / name)
    make_lm(out / name, work / name, replace(COMPARED[name], seed=seed), tokenizer)


def save_lm(model: LlamaForCausalLM, directory: Path, links: int = LINKS) -> None:
    """Weights in float32, generation defaults and `kvlink.json`."""
    model.config._attn_implementation = "sdpa"
    model.to(torch.float32).save_pretrained(directory)
    (directory / "kvlink.json").write_text(small_spec(links).to_json(), encoding="utf-8")


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


DEPENDENT = "-dependent"
_COMPARED = {
    "links-5": lm.Recipe(stages=lm.COMPARED),
    "links-1": lm.Recipe(stages=lm.COMPARED, links=1),
    "links-0": lm.Recipe(stages=lm.COMPARED, links=0),
    "full": lm.Recipe(stages=lm.COMPARED, links=0, full_only=True),
}
COMPARED = _COMPARED | {
    name + DEPENDENT: replace(recipe, stages=lm.COMPARED_DEPENDENT)
    for name, recipe in _COMPARED.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the finished files go")
    parser.add_argument("--work", type=Path, help="where checkpoints go (default: OUT/work)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("lm", "encoder", "demo"), help="one stage")
    parser.add_argument(
        "--compared",
        nargs="+",
        default=[],
        choices=COMPARED,
        metavar="NAME",
        help="instead: language models to compare with, at half the budget, as OUT/NAME: "
        + ", ".join(COMPARED),
    )
    arguments = parser.parse_args()
    work = arguments.work or arguments.out / "work"
    for name in arguments.compared:
        make_compared(arguments.out, work, name, arguments.seed)
    if arguments.compared:
        return
    tokenizer = make_tokenizer(arguments.out, arguments.seed)
    if arguments.only in (None, "demo"):
        write_demo(arguments.out, arguments.seed)
    if arguments.only in (None, "encoder"):
        make_encoder(arguments.out, arguments.seed)
    if arguments.only in (None, "lm"):
        make_lm(arguments.out / "lm", work, lm.Recipe(seed=arguments.seed), tokenizer)


if __name__ == "__main__":
    main()
