"""What the stress tests share: a tiny collection, and what must hold of it at all times.

Every answer is compared with the oracle (a masked full prefill that reads nothing from the store),
every document with what was acknowledged, the directory with the list of files it may hold.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import WordEmbedder, byte_spec, byte_tokenizer, random_model

from kvlink_rag import Document, KVLinkModel, KVLinkRAG

NAMES = ("Orvale", "Marnik", "Teldon", "Brisk", "Quill", "Sarno", "Velt", "Hux", "Dorn", "Pell")
WORDS = ("harbour", "mill", "weavers", "tower", "river", "salt", "bridge", "market", "stone")
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
SNAPSHOT = 24_000  # bytes of one of these snapshots, about

Truth = dict[str, tuple[str, str]]  # id -> title, text


@functools.cache
def tiny_model(seed: int = 0) -> KVLinkModel:
    """A random float32 model whose answers still depend on every token it sees."""
    model = random_model("llama", torch.float32, seed=seed, **SMALL)
    made = KVLinkModel(model, byte_tokenizer(), byte_spec(), name=f"tiny-{seed}")
    _ = made.fingerprint
    return made


def open_tiny(directory: Path, *, seed: int = 0, salt: str = "", **arguments: Any) -> KVLinkRAG:
    """The collection in `directory`, opened with the tiny pair."""
    return KVLinkRAG.open(
        directory, model=tiny_model(seed), embedder=WordEmbedder(salt), **arguments
    )


def text_of(chance: random.Random) -> str:
    """A sentence, a different one nearly every time."""
    words = " ".join(chance.choice(WORDS) for _ in range(chance.randrange(3, 9)))
    return f"{words} {chance.randrange(1000)}."


def document_of(chance: random.Random, id: str) -> tuple[str, str, str]:
    """id, title and text of a new version of the document `id`."""
    return id, id.title(), text_of(chance)


def as_documents(rows: list[tuple[str, str, str]]) -> list[Document]:
    """Documents of (id, title, text)."""
    return [Document(text, title=title, id=id) for id, title, text in rows]


def held(rag: KVLinkRAG) -> Truth:
    """What the collection holds."""
    return {str(d.id): (d.title, d.text) for d in rag.documents()}


def wrong_answers(rag: KVLinkRAG, chance: random.Random, questions: int = 1) -> list[str]:
    """Questions, each as a problem if its answer from snapshots is not the oracle's."""
    problems = []
    for _ in range(questions):
        question = f"{chance.choice(NAMES)} {chance.choice(WORDS)}?"
        answer = rag.ask(question, k=3, max_new_tokens=6)
        parts = rag.model.prompt([hit.document for hit in answer.hits], question)
        expected = rag.model.generate(parts, mode="masked", max_new_tokens=6)
        if answer.text != expected:
            problems.append(f"asked {question!r}: {answer.text!r}, the oracle says {expected!r}")
        if not rag.model.verify(parts, reuse=rag.reuse).holds:
            problems.append(f"asked {question!r}: the logits are not the oracle's")
    return problems


def wrong_search(rag: KVLinkRAG, chance: random.Random) -> list[str]:
    """Whether a search gives what brute force over the documents' own texts gives."""
    documents = list(rag.documents())
    if not documents:
        return []
    query = rag.embedder.embed_queries([f"{chance.choice(NAMES)} {chance.choice(WORDS)}"])[0]
    vectors = rag.embedder.embed([f"{d.title} {d.text}" for d in documents])
    best = np.sort(vectors @ query)[::-1][:3]
    found = [hit.score for hit in rag.search_vector(query, 3)]
    same = len(found) == len(best) and np.allclose(found, best, atol=1e-5)
    return [] if same else [f"a search scored {found}, brute force {best.tolist()}"]


def leaks(rag: KVLinkRAG) -> list[str]:
    """Files in the directory that nothing needs; call it after `check(fix=True)`."""
    root = rag.directory
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    own = {"catalog.sqlite", "index.faiss", "write.lock"}
    own |= {f"catalog.sqlite-{end}" for end in ("wal", "shm")}  # while it is open
    own |= {f"snapshots/{name}" for name in ("cache.db", "cache.db-wal", "cache.db-shm", "lock")}
    with contextlib.closing(sqlite3.connect(root / "snapshots" / "cache.db")) as table:
        rows = table.execute("SELECT key, filename FROM Cache").fetchall()
    used = {entry.snapshot_key for entry in rag.catalog.iterate()}
    own |= {f"snapshots/{name}" for key, name in rows if key in used}
    return [f"leaked {name}" for name in sorted(names - own)]


def broken(rag: KVLinkRAG, allowed: list[Truth], chance: random.Random) -> list[str]:
    """What does not hold of a collection whose documents must be one of `allowed`."""
    found = held(rag)
    problems = [] if found in allowed else [f"documents {difference(found, allowed[0])}"]
    problems += wrong_search(rag, chance) + wrong_answers(rag, chance)
    rag.check(fix=True)
    problems += [f"not mended: {line}" for line in rag.check()]
    problems += leaks(rag) + wrong_answers(rag, chance) + wrong_search(rag, chance)
    if held(rag) != found:
        problems.append("check changed documents")
    return problems


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The ids in which two states differ."""
    ids = sorted(set(found) | set(expected))
    return ", ".join(
        f"{id}: found {found.get(id)}, expected {expected.get(id)}"
        for id in ids
        if found.get(id) != expected.get(id)
    )
