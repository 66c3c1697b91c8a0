"""Orders keep a prompt as it was laid out, and their seals tell prompts apart."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from towns import DOCUMENTS, QUESTION
from vllm_kvlink.orders import SECRET, Order, OrderError, read_order, same, seal_of, secret_in

from kvlink_rag import Document, KVLinkRAG, Layout


def find(ids: Sequence[str]) -> list[Document]:
    by_id = {document.id: document for document in DOCUMENTS}
    return [by_id[each] for each in ids]


def laid(rag: KVLinkRAG, documents: Sequence[Document] = DOCUMENTS[:3]) -> Layout:
    return rag.model.layout(rag.model.prompt(documents, QUESTION))


def test_an_order_comes_back_through_json(rag: KVLinkRAG) -> None:
    parts = tuple(rag.model.prompt(DOCUMENTS[:3], f"{QUESTION} <bos> \ud7ff \u2028"))
    order = Order(parts, "kvlink:seal")
    given = json.loads(json.dumps(order.to_json()))
    assert read_order(given, find) == order
    assert DOCUMENTS[0].text not in json.dumps(given)


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        {},
        {"parts": "x", "seal": "x"},
        {"parts": [{"text": "x", "special": False}]},
        {"parts": [{"text": "x"}], "seal": "x"},
        {"parts": [{"text": 1, "special": False}], "seal": "x"},
        {"parts": [{"passage": 3}], "seal": "x"},
        {"parts": [3], "seal": "x"},
        {"parts": [{"text": "x", "special": 1}], "seal": "x"},
    ],
    ids=str,
)
def test_what_is_no_order(given: Any) -> None:
    with pytest.raises(OrderError, match="expected"):
        read_order(given, find)


def test_a_seal_is_of_everything_in_a_layout(rag: KVLinkRAG) -> None:
    one = laid(rag)
    secret = b"s" * 32
    seal = seal_of(one, secret)
    assert same(seal, seal_of(laid(rag), secret))
    others = [seal_of(one, b"t" * 32), seal_of(laid(rag, DOCUMENTS[1:4]), secret)]
    for name in ("token_ids", "positions", "segments"):
        numbers = getattr(one, name).clone()
        numbers[5] += 1
        others.append(seal_of(replace(one, **{name: numbers}), secret))
    others.append(seal_of(replace(one, header=(1, 2)), secret))
    longer = torch.cat([one.token_ids, one.positions[:1]])
    others.append(seal_of(replace(one, token_ids=longer, positions=one.positions[1:]), secret))
    assert len({seal, *others}) == len(others) + 1
    assert not any(same(seal, other) for other in others)
    assert not same("\ud800", seal)


def test_all_who_ask_get_one_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(lambda _: secret_in(tmp_path), range(64)))
    assert len(found) == 1
    assert len(found.pop()) == 32
    assert [path.name for path in tmp_path.iterdir()] == [SECRET]
    assert stat.S_IMODE((tmp_path / SECRET).stat().st_mode) == 0o600


def test_a_secret_that_is_broken_is_told(tmp_path: Path) -> None:
    (tmp_path / SECRET).write_bytes(b"short")
    with pytest.raises(OrderError, match=r"found 5 bytes .* expected 32; remove it"):
        secret_in(tmp_path)
