"""Huge pages: what the kernel itself says lies under a tensor."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker

from kvlink_rag.disk import huge_pages as pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_huge_pages = pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="no huge pages here"
)


def huge_bytes(address: int) -> int:
    """Bytes of huge pages in the mapping that holds `address`, from smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


@needs_huge_pages
def test_a_large_tensor_gets_huge_pages() -> None:
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    assert pages.prefer_huge(tensor)
    tensor.fill_(1)
    assert huge_bytes(tensor.data_ptr() + (32 << 20)) > 32 << 20


@needs_huge_pages
def test_the_live_cache_has_them(make_model: ModelMaker) -> None:
    backbone = make_model("llama", torch.float32).backbone
    none = torch.empty(0, dtype=torch.int64)
    cache = backbone.new_cache(none, none, capacity=(64 << 20) // backbone.token_bytes * 2)
    keys = cache.buffers[0]
    keys.fill_(1)
    assert huge_bytes(keys.data_ptr() + keys.nbytes // 2) > keys.nbytes // 2


def test_small_tensors_and_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not pages.prefer_huge(torch.empty(pages.LARGE - 1, dtype=torch.uint8))
    assert not pages.prefer_huge(torch.empty(1 << 30, dtype=torch.uint8, device="meta"))
    monkeypatch.setattr(sys, "platform", "darwin")
    pages.find_madvise.cache_clear()
    try:
        assert pages.find_madvise() is None
        assert not pages.prefer_huge(torch.empty(8 << 20, dtype=torch.uint8))
    finally:
        pages.find_madvise.cache_clear()
