"""Two adapters of one base to one between them, since a long run loses what it does not train.

    python -m kvlink_rag.training.average runs/first/adapter runs/further/adapter --out runs/between

A run that goes on from an adapter gains on its own data and forgets what else it could; the mean of
both, number by number, keeps most of either (Wortsman et al., arXiv 2109.01903). Knows files only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save as to_bytes

from kvlink_rag.disk import atomic_files
from kvlink_rag.errors import ConfigError, KVLinkError
from kvlink_rag.model.adapter import SETTINGS, WEIGHTS, read_adapter
from kvlink_rag.prompt.spec import SPEC_FILE


def average(first: Path, second: Path, out: Path, share: float = 0.5) -> None:
    """Write to `out` the adapter that is `share` of `second` and the rest of `first`.

    The second must have been trained on from the first, or numbers do not mean the same in both.
    Raises `ConfigError` where base, spec or shapes differ.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}, expected 0 to 1")
    one, other = read_adapter(first), read_adapter(second)
    facts = [
        (each.spec, each.settings.get("lora_alpha"), {n: t.shape for n, t in each.weights.items()})
        for each in (one, other)
    ]
    if facts[0] != facts[1]:
        raise ConfigError(
            f"{first} and {second} differ in base, rank, alpha, prompt or link tokens; give an "
            "adapter and one that was trained on from it"
        )
    mean = {
        name: ((1 - share) * tensor.float() + share * other.weights[name].float())
        .to(tensor.dtype)
        .contiguous()
        for name, tensor in one.weights.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in (SETTINGS, SPEC_FILE):
        shutil.copyfile(second / name, out / name)
    with atomic_files.replaced(out / WEIGHTS) as file:
        atomic_files.write_all(file, memoryview(to_bytes(mean, {"format": "pt"})))


def main(given: Sequence[str] | None = None) -> int:
    """The command in the module's text."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("first", type=Path, help="an adapter's directory")
    options.add_argument("second", type=Path, help="one that was trained on from it")
    options.add_argument("--share", type=float, default=0.5, help="of the second (0.5)")
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args(given)
    try:
        average(arguments.first, arguments.second, arguments.out, arguments.share)
    except KVLinkError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
