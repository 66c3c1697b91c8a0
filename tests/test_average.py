"""Two adapters to one between them, on that of the pair `small`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvlink_rag.errors import ConfigError
from kvlink_rag.model.adapter import WEIGHTS, read_adapter
from kvlink_rag.pretrained.known import ADAPTERS, SMALL
from kvlink_rag.training.average import average, main


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter, and one whose numbers are all 0.5 more."""
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        shutil.copytree(ADAPTERS[SMALL], place)
    numbers = load_file(first / WEIGHTS)
    save_file({n: (t.float() + 0.5).to(t.dtype) for n, t in numbers.items()}, second / WEIGHTS)
    return first, second


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_numbers_lie_between(pair: tuple[Path, Path], tmp_path: Path, share: float) -> None:
    first, second = pair
    out = tmp_path / "out"
    assert main([str(first), str(second), "--share", str(share), "--out", str(out)]) == 0
    one, found = load_file(first / WEIGHTS), read_adapter(out)
    for name, tensor in found.weights.items():
        assert load_file(out / WEIGHTS)[name].dtype == one[name].dtype
        wanted = one[name].float() + 0.5 * share
        torch.testing.assert_close(tensor.float(), wanted, rtol=2e-2, atol=4e-3)
    assert found.spec == read_adapter(second).spec


def test_what_does_not_go_together(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair
    with pytest.raises(ConfigError, match="share is 2"):
        average(first, second, tmp_path / "out", 2)
    settings = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))
    assert main([str(first), str(second), "--out", str(tmp_path / "out")]) == 1
    assert "differ in base, rank, alpha" in capsys.readouterr().err
    assert main([str(first), str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "holds no adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
