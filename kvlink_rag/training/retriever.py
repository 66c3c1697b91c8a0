"""Trains the small encoder: BERT-shaped, mean pooling, inner product, in-batch negatives
(Contriever's kind).

Each pair is a question and a page that answers it. Second-round pairs put the text of the first
page behind the question and ask for the page of the second hop, as in multi-hop dense retrieval.
Every batch comes from one large world, so that most other pages of the batch are distractors of
the same type. Knows no index and no file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from kvlink_rag.retrieval.rounds import embedded_text, followed

from .facts import KINDS
from .formats import document
from .names import Split
from .questions import one_hop, two_hop, two_hop_facts
from .world import Builder, Page, World

POSITIONS = 512


@dataclass(frozen=True, slots=True)
class Recipe:
    """The encoder's run: `batch` pairs a step from a new world of `pages` pages of each kind."""

    seed: int = 0
    steps: int = 1000
    batch: int = 96
    rate: float = 2e-3
    temperature: float = 0.05
    longest: int = 160

    def factor(self, step: int) -> float:
        """Warm-up over 5 %, then a linear decay."""
        return min((step + 1) / (0.05 * self.steps), (self.steps - step) / (0.95 * self.steps), 1.0)


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, the page it should find, and the pages that would be right as well (left out of
    the loss).
    """

    query: str
    page: Page
    also: tuple[str, ...] = ()


def build(vocabulary: int, seed: int = 0) -> BertModel:
    """Random weights: 3 layers of 128, 512 positions."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=POSITIONS,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
    )
    return BertModel(config, add_pooling_layer=False)


def embed(
    model: BertModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    longest: int = POSITIONS,
) -> Tensor:
    """float32 [texts, hidden]: the mean of the last hidden states over the attention mask."""
    inputs = tokenizer(
        list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    mask = inputs["attention_mask"]
    hidden = model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state.float()
    pooled: Tensor = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return pooled


def page_text(page: Page) -> str:
    """What is embedded for a page, as the engine does it."""
    return embedded_text(document(page))


def second_query(question: str, first: Page) -> str:
    """What the second round asks with, as the engine does it."""
    return followed(question, document(first))


def large_world(rng: random.Random, split: Split, pages: int) -> World:
    """A world of about `pages` pages over all kinds, linked among themselves, none dependent."""
    counts = {kind: pages // len(KINDS) for kind in KINDS}
    return Builder(rng, split, counts, linked=0.9).build()


def pairs(world: World, rng: random.Random, n: int) -> list[Pair]:
    """Two in five one-hop, two in five the first round of two-hop, one in five the second round."""
    hops = list(two_hop_facts(world))
    found: list[Pair] = []
    ones = rng.sample(list(world.stated.values()), n)
    for index in range(n):
        first, second = rng.choice(hops)
        question = two_hop(world, first, second, rng)
        here, there = (world.pages[i] for i in question.gold)
        if index % 5 < 2:
            found.append(
                Pair(one_hop(world, ones[index][0], rng).text, world.pages[ones[index][1]])
            )
        elif index % 5 < 4:
            found.append(Pair(question.text, here, (there.id,)))
        else:
            found.append(Pair(second_query(question.text, here), there, (here.id,)))
    return found


def loss_of(
    model: BertModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Pair], recipe: Recipe
) -> Tensor:
    """Each query against all pages of the batch; pages that are right as well do not count
    against it.
    """
    with torch.autocast("cpu", torch.bfloat16):
        queries = embed(model, tokenizer, [p.query for p in batch], recipe.longest)
        pages = embed(model, tokenizer, [page_text(p.page) for p in batch], recipe.longest)
    scores = queries @ pages.T / recipe.temperature / queries.shape[1] ** 0.5
    same = torch.tensor(
        [[q is not p and p.page.id in (q.page.id, *q.also) for p in batch] for q in batch]
    )
    return cross_entropy(scores.masked_fill(same, -torch.inf), torch.arange(len(batch)))


def train(model: BertModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Iterator[str]:
    """Train in place; yields a line of log now and then."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    losses: list[float] = []
    for step in range(recipe.steps):
        rng = random.Random(f"encoder-{recipe.seed}-{step}")
        batch = pairs(large_world(rng, "train", 240), rng, recipe.batch)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * recipe.factor(step)
        loss = loss_of(model, tokenizer, batch, recipe)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 25 == 0:
            yield f"encoder step {step + 1} loss {sum(losses) / len(losses):.4f}"
            losses = []


@torch.no_grad()
def recalls(
    model: BertModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    *,
    n: int = 500,
    k: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """recall@k over all pages: one-hop, any gold page of two-hop, and the second page in a
    second round.
    """
    rng, ids = random.Random(seed), list(world.pages)
    index = torch.cat(
        [
            embed(model, tokenizer, [page_text(world.pages[i]) for i in ids[at : at + 64]])
            for at in range(0, len(ids), 64)
        ]
    )
    hits: dict[str, list[bool]] = {
        "one-hop": [],
        "two-hop first": [],
        "two-hop second": [],
        "two-hop both": [],
    }
    hops, facts = list(two_hop_facts(world)), [fact for fact, _ in world.stated.values()]

    def top(query: str, k: int) -> list[str]:
        scores = index @ embed(model, tokenizer, [query])[0]
        return [ids[i] for i in scores.topk(k).indices.tolist()]

    for _ in range(n):
        question = one_hop(world, rng.choice(facts), rng)
        hits["one-hop"].append(question.gold[0] in top(question.text, k))
        question = two_hop(world, *rng.choice(hops), rng)
        first = top(question.text, k)
        hits["two-hop first"].append(bool(set(question.gold) & set(first)))
        second = top(second_query(question.text, world.pages[question.gold[0]]), k)
        hits["two-hop second"].append(question.gold[1] in second)
        round_two = {
            i for hit in first[:3] for i in top(second_query(question.text, world.pages[hit]), 3)
        }
        hits["two-hop both"].append(set(question.gold) <= {*first, *round_two})
    return {name: sum(found) / len(found) for name, found in hits.items()}
