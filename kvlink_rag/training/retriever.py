"""Fine-tunes Contriever on (question, passage) pairs.

    python -m kvlink_rag.training.retriever --data pairs.jsonl --out runs/contriever

Each question must find its passage among all of the batch (in-batch negatives; Izacard et al.,
arXiv 2112.09118, section 3). Passages that are equal do not count against each other. Embedded
exactly as the collection will: mean pooling, inner product, title before text.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments, set_seed

from kvlink_rag.datasets.rows import Row, Source, rows
from kvlink_rag.datasets.schemas import question_answering
from kvlink_rag.datasets.sets import Skipped
from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError, DocumentError, ExampleError, KVLinkError
from kvlink_rag.pretrained.model_files import resolve
from kvlink_rag.retrieval.contriever import mean_pooling
from kvlink_rag.retrieval.rounds import embedded_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and the text of a passage that answers it, as it is embedded."""

    question: str
    passage: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """batch: pairs a step, each other's negatives. longest: tokens a text."""

    steps: int = 1000
    batch: int = 64
    learning_rate: float = 1e-5
    temperature: float = 0.05
    longest: int = 256
    seed: int = 0
    bf16: bool = False


def read_pairs(source: Source, skipped: Skipped) -> Iterator[Pair]:
    """Rows with `question` and `passage` (and `title`), or of any question-answering schema that
    says which documents are gold (an only document is).
    """
    for number, row in enumerate(rows(source)):
        try:
            yield from _pairs(row, number)
        except (ExampleError, DocumentError) as error:
            skipped("pair", ExampleError(f"{source}, row {number}: {error}"))


def _pairs(row: Row | ExampleError, number: int) -> list[Pair]:
    if isinstance(row, ExampleError):
        raise row
    if "passage" in row:
        gold = [Document(row["passage"], title=row.get("title") or "")]
        question = row.get("question")
        if not isinstance(question, str):
            raise ExampleError(f"no usable column 'question'; found {', '.join(sorted(row))}")
    else:
        example = question_answering(row, number)
        question, places = example.question, example.gold or range(len(example.documents) == 1)
        gold = [example.documents[i] for i in places]
    if not gold:
        raise ExampleError("no document is marked as gold")
    return [Pair(question, embedded_text(document)) for document in gold]


def train(model_name: str, pairs: Sequence[Pair], out: Path, recipe: Recipe) -> Path:
    """Tune and write the encoder; the directory that `ContrieverEmbedder.from_pretrained` opens.

    Raises `ConfigError` where there are fewer pairs than a batch needs.
    """
    if len(pairs) < 2:
        raise ConfigError(f"found {len(pairs)} pairs, expected at least 2; look at the data's gold")
    set_seed(recipe.seed)
    directory = resolve(
        model_name, role="embedder", files=["*.json", "*.txt", "*.safetensors", "*.bin"]
    )
    model, tokenizer = (
        AutoModel.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    trainer = _PairTrainer(
        model=model,
        args=_arguments(recipe, len(pairs), out),
        train_dataset=list(pairs),
        data_collator=_Collator(tokenizer, min(recipe.longest, tokenizer.model_max_length)),
    )
    trainer.temperature = recipe.temperature
    trainer.train()
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return out / "model"


def _arguments(recipe: Recipe, pairs: int, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=min(recipe.batch, pairs),
        dataloader_drop_last=True,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.steps // 20,
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=max(1, recipe.steps // 20),
        remove_unused_columns=False,
        report_to="none",
    )


@dataclass(frozen=True, slots=True)
class _Collator:
    tokenizer: Any
    longest: int

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Token ids of questions and passages; `same`: passages that are another pair's too."""
        passages = [pair.passage for pair in pairs]
        equal = [[a == b for b in passages] for a in passages]
        same = torch.tensor(equal) & ~torch.eye(len(pairs), dtype=torch.bool)
        return {
            "questions": self._ids([pair.question for pair in pairs]),
            "passages": self._ids(passages),
            "same": same,
        }

    def _ids(self, texts: list[str]) -> dict[str, Tensor]:
        found = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        return {name: found[name] for name in ("input_ids", "attention_mask")}


class _PairTrainer(Trainer):  # type: ignore[misc]
    temperature = 1.0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Each question against all passages of the batch."""
        questions, passages = (
            mean_pooling(
                model(**inputs[side]).last_hidden_state.float(), inputs[side]["attention_mask"]
            )
            for side in ("questions", "passages")
        )
        scores = (questions @ passages.T / self.temperature).masked_fill(inputs["same"], -torch.inf)
        loss = cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        return (loss, scores) if return_outputs else loss


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    standard = Recipe()
    parser = argparse.ArgumentParser(description="Fine-tune Contriever on questions and passages.")
    parser.add_argument("--model", default="facebook/contriever", help="a directory or hub id")
    parser.add_argument("--data", required=True, help="a file, folder or hub id with pairs")
    parser.add_argument("--split", default="train", help="of a hub data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=standard.steps)
    parser.add_argument("--batch", type=int, default=standard.batch)
    parser.add_argument("--learning-rate", type=float, default=standard.learning_rate)
    parser.add_argument("--temperature", type=float, default=standard.temperature)
    parser.add_argument("--longest", type=int, default=standard.longest, help="tokens a text")
    parser.add_argument("--seed", type=int, default=standard.seed)
    parser.add_argument("--bf16", action="store_true")
    given = vars(parser.parse_args(argv))
    source, out = Source(given.pop("data"), None, given.pop("split")), given.pop("out")
    model, skipped = given.pop("model"), Skipped()
    try:
        pairs = list(read_pairs(source, skipped))
        directory = train(model, pairs, out, Recipe(**given))
    except KVLinkError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    told = f"; skipped: {dict(skipped.reasons)}" if skipped.reasons else ""
    sys.stdout.write(f"{len(pairs):,} pairs{told}; the encoder is in {directory}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
