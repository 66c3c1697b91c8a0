"""A model whose weights stay learns a header and link tokens, from its own answers.

    passages of a collection → questions → its answers with full attention → rows
    → a run of the trainer that learns the new tokens' embeddings → reuse before and after

Self-distillation: the loss is the divergence from the model's own distributions under full
attention (KV Packet, arXiv 2604.13226; their header stands in the snapshot, ours is hidden from the
question, and link tokens are KVLink's). Everything is kept in one directory as it is made, so that
an interrupted call goes on when repeated. Knows a collection and the trainer; no terminal.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.compare.baselines import plain_spec
from kvlink_rag.compare.divergence import Seen, Way, beside, teach
from kvlink_rag.datasets.rows import Row
from kvlink_rag.datasets.schemas import question_answering
from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.prompt.layout import layout
from kvlink_rag.snapshots.sources import EncodeNow, Reuse

from .config import FinetuneConfig, Links, Lora, Part
from .trainer import finetune

ROWS, HELD, SETTINGS, RUN = "rows.jsonl", "held.jsonl", "adapt.json", "run"
ASKED_OF_A_SET = 4  # questions that the model writes about one set of passages
OF_TWO = 0.25  # of them, the share about two passages
FEWEST = 2  # passages of a question
BEGINNING = 1000  # characters of a passage that others are found by
WRITE = "Write one short question that the text above answers. Write the question only."
WRITE_OF_TWO = "Write one short question that needs both texts above. Write the question only."


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """How much is learned, and from what.

    header, links: new tokens before and behind each passage. lora: also learn low-rank matrices,
    so that the weights do not stay. questions: to learn from; held: besides, to measure on.
    passages: the most of a question. tokens: the most of an answer that is learned from.
    steps, learning_rate: of the run, AdamW, falling linearly to nothing.
    """

    header: int = 8
    links: int = 4
    lora: bool = False
    questions: int = 256
    held: int = 32
    passages: int = 6
    tokens: int = 24
    steps: int = 400
    learning_rate: float = 5e-3
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("questions", "held", "tokens", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}, expected above 0")
        if self.passages < FEWEST:
            raise ConfigError(f"passages is {self.passages}, expected {FEWEST} or more")
        if self.links < 0 or self.header < 0 or not self.links + self.header:
            raise ConfigError("found no header and no links, expected at least one new token")


@dataclass(frozen=True, slots=True)
class Adapted:
    """What came of it: the adapter's directory, and how far reuse is from full attention.

    questions: learned from. before: of the model as it was; after: with the adapter, both from the
    full attention of the untouched model, on `held` questions besides. seconds: of this call.
    """

    directory: Path
    questions: int
    held: int
    before: Way
    after: Way
    seconds: float


def adapt(
    rag: KVLinkRAG,
    out: Path,
    wanted: Adaptation,
    *,
    questions: Sequence[str] = (),
    device: str = "auto",
    advance: Callable[[int], object] = lambda count: None,
) -> Adapted:
    """Adapt the model of `rag` to its passages; the adapter is `out`/run/adapter.

    questions: people's own; without them the model writes some. advance: is told of each question
    that is answered. Raises `ConfigError` for a model that has link tokens, a collection without
    enough passages, and an `out` that holds something else.
    """
    start = time.perf_counter()
    model = rag.model
    _check(rag, model)
    _remember(out, wanted, questions, rag)
    # 1. questions, each over its passages, with what full attention answers
    learned, held = _answered(rag, out, wanted, questions, advance)
    # 2. the new tokens, learned
    directory = finetune(_config(rag, out, wanted, learned), device=device)
    # 3. reuse beside full attention, before and after
    adapted = KVLinkModel.from_pretrained(directory, device=device)
    ways = {"before": model, "after": adapted}
    before, after = beside_full_attention(model, ways, held, wanted.tokens)
    return Adapted(directory, len(learned), len(held), before, after, time.perf_counter() - start)


def _check(rag: KVLinkRAG, model: KVLinkModel) -> None:
    if model.format.tuned:
        raise ConfigError(
            f"{rag.model_name} has a spec of its own (kvlink.json, or an adapter), so someone says "
            "how it reads passages already; adapt the model it was made from"
        )
    if len(rag) < FEWEST:
        raise ConfigError(
            f"found {len(rag)} passages, expected at least {FEWEST}; give more documents"
        )


def _remember(out: Path, wanted: Adaptation, questions: Sequence[str], rag: KVLinkRAG) -> None:
    """Write down what is made here; refuse to go on with anything else."""
    facts = {**dataclasses.asdict(wanted), "model": rag.model_name, "given": list(questions)}
    facts["passages_known"] = len(rag)
    path = out / SETTINGS
    if path.exists() and (found := json.loads(path.read_text("utf-8"))) != facts:
        other = sorted(n for n in {*facts, *found} if facts.get(n) != found.get(n))
        raise ConfigError(
            f"{out} holds an adaptation with another {', '.join(other)}; give another directory"
        )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


Asked = tuple[str, tuple[Document, ...]]  # a question and the passages of its prompt


def asked_by_people(
    rag: KVLinkRAG, questions: Sequence[str], wanted: Adaptation
) -> Iterator[list[Asked]]:
    """Questions as given, over what is retrieved for each, in an order drawn at random."""
    rng = random.Random(wanted.seed)
    for question in rng.sample(questions, len(questions)):
        count = rng.randint(FEWEST, wanted.passages)
        documents = [hit.document for hit in rag.search(question, count)]
        rng.shuffle(documents)
        yield [(question, tuple(documents))]


def asked_by_itself(rag: KVLinkRAG, wanted: Adaptation, first: int) -> Iterator[list[Asked]]:
    """Sets of passages with the questions that the model writes, without end, from set `first` on.

    Each set is a passage drawn at random and those found for it; a question is about one of them,
    a quarter of the questions about two.
    """
    documents = list(rag.documents())
    for number in count(first):
        rng = random.Random(f"{wanted.seed}-{number}")
        drawn = rng.choice(documents)
        size = rng.randint(FEWEST, wanted.passages)
        found = [hit.document for hit in rag.search(drawn.text[:BEGINNING], size)]
        passages = list(dict.fromkeys([drawn, *found]))[:size]
        rng.shuffle(passages)
        about = (passages[i : i + 1 + (rng.random() < OF_TWO)] for i in range(ASKED_OF_A_SET))
        written = [_written(rag.model, each, rng.randrange(1 << 30)) for each in about if each]
        yield [(question, tuple(passages)) for question in written if question]


def _written(model: KVLinkModel, about: Sequence[Document], seed: int) -> str:
    """One question about these texts; "" where the model writes none."""
    texts = "\n\n".join(document.text for document in about)
    asked = f"{texts}\n\n{WRITE if len(about) == 1 else WRITE_OF_TWO}"
    parts = model.chat([{"role": "user", "content": asked}])
    said = model.generate(
        parts, max_new_tokens=40, temperature=0.8, top_p=0.95, seed=seed, stop=["\n"]
    )
    return said.strip().strip('"')


def _answered(
    rag: KVLinkRAG,
    out: Path,
    wanted: Adaptation,
    questions: Sequence[str],
    advance: Callable[[int], object],
) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and to measure on, each with what full attention answers.

    The first sets are held out. What the files hold already is not made again.
    """
    counts = {HELD: wanted.held, ROWS: wanted.questions}
    found = {name: _read(out / name) for name in counts}
    rows = [row for name in counts for row in found[name]]
    advance(len(rows))
    first = 1 + max((row["set"] for row in rows), default=-1)
    sets: Iterator[list[Asked]]
    if questions:
        sets = islice(asked_by_people(rag, questions, wanted), first, None)
    else:
        sets = asked_by_itself(rag, wanted, first)
    for number in count(first):
        name = next((name for name in counts if len(found[name]) < counts[name]), None)
        asked = None if name is None else next(sets, None)
        if name is None or asked is None:
            break
        answered = [_row(rag.model, number, *each, wanted.tokens) for each in asked]
        found[name] += answered
        _append(out / name, answered)
        advance(len(answered))
    if not found[ROWS]:
        raise ConfigError(
            f"found {len(found[HELD])} questions, all of which are held out to measure on; give "
            f"more than {wanted.held}, or hold out fewer"
        )
    return found[ROWS], found[HELD]


def _row(
    model: KVLinkModel, number: int, question: str, documents: Sequence[Document], tokens: int
) -> Row:
    parts = model.prompt(documents, question)
    said = model.generate(parts, mode="full", max_new_tokens=tokens).strip()
    passages = [{"title": document.title, "text": document.text} for document in documents]
    return {"set": number, "question": question, "answers": [said], "ctxs": passages}


def _append(path: Path, rows: Sequence[Row]) -> None:
    """Add `rows` to the file in one write."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as stream:
        stream.write("".join(lines))


def _read(path: Path) -> list[Row]:
    """The rows of a file that may end in a part of one, which is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _config(
    rag: KVLinkRAG, out: Path, wanted: Adaptation, learned: Sequence[Row]
) -> FinetuneConfig:
    """The run: one set of passages a step, with all that is asked about it."""
    most = max(len(row["ctxs"]) for row in learned)
    return FinetuneConfig(
        model=rag.model_name,
        out=str(out / RUN),
        data=(Part("qa", str(out / ROWS), documents=most, questions=ASKED_OF_A_SET),),
        links=Links(per_passage=wanted.links, shared=True),
        header_tokens=wanted.header,
        tokens_only=not wanted.lora,
        lora=Lora(rank=16, alpha=16) if wanted.lora else None,
        chat="plain",
        distill=1.0,
        steps=wanted.steps,
        warmup=max(1, wanted.steps // 20),
        batch=1,
        device_batch=1,
        learning_rate=wanted.learning_rate,
        gradient_checkpointing=False,
        max_length=rag.model.window,
        stored="float32" if not wanted.lora else "bfloat16",
        save_every=25,
        seed=wanted.seed,
    )


def beside_full_attention(
    teacher: KVLinkModel,
    models: Mapping[str, KVLinkModel],
    rows: Sequence[Row],
    tokens: int,
) -> list[Way]:
    """How far reuse by each of `models` is from the full attention of `teacher`, over `rows`.

    Snapshots are encoded beforehand. All of one vocabulary; link tokens are the models' own.
    """
    sources = {name: Reuse(EncodeNow(model.encoder)) for name, model in models.items()}
    seen: dict[str, list[Seen]] = {name: [] for name in models}
    for number, row in enumerate(rows):
        example = question_answering(row, number)
        parts = teacher.prompt(example.documents, example.question)
        plain = layout(parts, teacher.tokenizer, plain_spec(teacher.spec))
        taught = teach(teacher, plain, Reuse(EncodeNow(teacher.encoder)), tokens)
        for name, model in models.items():
            prompt = model.layout(model.prompt(example.documents, example.question))
            seen[name].append(beside(model, prompt, sources[name], taught))
    return [Way.of(name, each) for name, each in seen.items()]


def report(found: Adapted) -> dict[str, Any]:
    """What came of it as plain data."""
    return {**dataclasses.asdict(found), "directory": str(found.directory)}
