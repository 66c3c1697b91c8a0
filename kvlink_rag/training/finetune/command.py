"""`kvlink-rag train`: from arguments to a tuned model, or to what a run would be."""

from __future__ import annotations

import argparse
import json
import sys

from .config import load
from .dry_run import estimate, lines
from .trainer import ADAPTER, finetune


def run(arguments: argparse.Namespace) -> int:
    """Train, or with --dry-run only say what training would be."""
    config = load(arguments.config)
    if arguments.dry_run:
        found = estimate(config, tflops=arguments.tflops)
        told = [json.dumps(found.to_dict(), indent=2)] if arguments.json else lines(found)
        sys.stdout.write("\n".join(told) + "\n")
        return 0
    directory = finetune(
        config, device=arguments.device, resume=arguments.resume, merge=arguments.merge
    )
    what = "adapter" if directory.name == ADAPTER else "tuned model"
    sys.stdout.write(f"the {what} is in {directory}\n")
    return 0
