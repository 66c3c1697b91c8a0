"""Measures a small model: `python -m kvlink_rag.training.evaluate_small --model DIR --n 1000`.

Held-out questions about names that training never saw, each over ten pages that hold the gold
ones among distractors of the same types; one masked prefill of the engine's layout, then greedy
decoding. The last line printed is JSON. Reuse from stored snapshots is measured elsewhere,
through the engine itself.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from kvlink_rag.engine.live_cache import as_argument
from kvlink_rag.prompt.layout import Layout, layout, visibility
from kvlink_rag.prompt.spec import SPEC_FILE, Spec
from kvlink_rag.prompt.tokenizer import PartTokenizer

from .formats import Prompt, preset, varied
from .questions import (
    Question,
    absent_around,
    context,
    exercise,
    final_answer,
    one_hop,
    two_hop,
    two_hop_facts,
)
from .retriever import large_world
from .world import Page, World


@dataclass(frozen=True, slots=True)
class Asked:
    """A question in its context: the pages in prompt order."""

    question: Question
    pages: tuple[Page, ...]


def held_out(n: int, *, k: int = 10, seed: int = 0, pages: int = 600) -> Iterator[Asked]:
    """n questions over one held-out world: four in ten one-hop, four in ten two-hop, the rest
    absent.
    """
    rng = random.Random(f"held-out-{seed}")
    world = large_world(rng, "heldout", pages)
    facts, hops = [fact for fact, _ in world.stated.values()], list(two_hop_facts(world))
    for index in range(n):
        if index % 5 < 2:
            question = one_hop(world, rng.choice(facts), rng)
        elif index % 5 < 4:
            question = two_hop(world, *rng.choice(hops), rng)
        else:
            question = absent(world, rng)
        yield Asked(question, context(world, question, k, rng))


def absent(world: World, rng: random.Random) -> Question:
    """A question that a left-out page would answer: half of them two-hop, where there are any."""
    lost = rng.choice(list(world.pages))
    here = set(world.pages) - {lost}
    about = world.pages[lost].about
    near = [(f, page) for f, page in world.stated.values() if page == lost or f.value == about]
    found = [q for f, page in near for q in absent_around(world, f, page, here, rng)]
    found = [q for q in found if lost in q.missing]
    hops = [q for q in found if len(q.kinds) > 1]
    return rng.choice(hops if hops and rng.random() < 0.5 else found)


def dependent(n: int, *, k: int = 10, seed: int = 0) -> Iterator[Asked]:
    """Questions whose answer hangs on another passage: continuations, "the same as", table rows."""
    rng, found = random.Random(f"dependent-{seed}"), 0
    while found < n:
        task = exercise(rng, k, split="heldout")
        for question in task.questions:
            if question.dependence and found < n:
                found += 1
                yield Asked(question, task.pages)


@torch.no_grad()
def greedy(model: LlamaForCausalLM, laid_out: Layout, most: int = 48) -> list[int]:
    """Token ids of the answer: one masked full prefill, then one token at a time (all of segment
    0).
    """
    where, segments = laid_out.positions, laid_out.segments
    seen = visibility(where, segments, where, segments)[None, None]
    cache = DynamicCache(config=model.config)
    ids, positions, mask = laid_out.token_ids[None], where[None], seen
    answer: list[int] = []
    for _ in range(most):
        logits = model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **as_argument(cache, model),
        ).logits
        token = int(logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        answer.append(token)
        ids, positions = torch.tensor([[token]]), where[-1:][None] + len(answer)
        mask = torch.ones(1, 1, 1, len(laid_out) + len(answer), dtype=torch.bool)
    return answer


def answer_of(
    model: LlamaForCausalLM, tokenizer: PartTokenizer, spec: Spec, prompt: Prompt, question: str
) -> str:
    return tokenizer.decode(greedy(model, layout(prompt.ask(question), tokenizer, spec)))


def right(question: Question, answer: str) -> bool:
    """Whether the final answers are the same."""
    return final_answer(answer) == final_answer(question.answer)


def measure(
    model: LlamaForCausalLM,
    tokenizer: PartTokenizer,
    spec: Spec,
    asked: Iterator[Asked],
    *,
    formats: random.Random | None = None,
    show: int = 0,
) -> dict[str, tuple[float, int]]:
    """Share of right final answers and number of questions by kind; `formats` draws other
    prompts.
    """
    hits: dict[str, list[bool]] = {}
    for each in asked:
        question = each.question
        prompt = preset(each.pages, spec)
        if formats is not None:
            prompt = varied(each.pages, formats, reuse=formats.random() < 0.5, spec=spec)
        answer = answer_of(model, tokenizer, spec, prompt, question.text)
        hit = right(question, answer)
        if not hit and show > 0:
            show -= 1
            print(
                f"wrong ({question.kind}): {question.text} -> {answer} (wanted: {question.answer})"
            )
        hits.setdefault(question.dependence or question.kind, []).append(hit)
    return {name: (sum(found) / len(found), len(found)) for name, found in sorted(hits.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=10, help="wrong answers to print")
    parser.add_argument(
        "--quick", action="store_true", help="the marks only, not dependence and formats"
    )
    arguments = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = PartTokenizer(AutoTokenizer.from_pretrained(arguments.model))
    spec = Spec.load(arguments.model / SPEC_FILE)
    n, k, seed = arguments.n, arguments.k, arguments.seed
    rows = {
        "marks": measure(model, tokenizer, spec, held_out(n, k=k, seed=seed), show=arguments.show)
    }
    if not arguments.quick:
        rows["dependent"] = measure(model, tokenizer, spec, dependent(n // 5, k=k, seed=seed))
        other = held_out(n // 5, k=k, seed=seed + 1)
        rows["formats"] = measure(model, tokenizer, spec, other, formats=random.Random(seed))
    print(json.dumps({"model": arguments.model.name, "n": n, "k": k, "seed": seed, "rows": rows}))


if __name__ == "__main__":
    main()
