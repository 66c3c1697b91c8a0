"""`kvlink-rag train`: tune a model to link tokens, or say what that would take."""

from __future__ import annotations

from . import terminal
from .opening import OPTIONS, Options, importing
from .values import Json

RESUMES = True  # an interrupted run goes on when repeated


def train(
    config: str,
    /,
    *,
    dry_run: bool = False,
    tflops: float = 300.0,
    resume: str | None = None,
    merge: bool = False,
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """Tune a model to link tokens.

    Follows the KVLink paper's recipe, as a config says. An interrupted run goes on from its last
    checkpoint. Several devices: torchrun --nproc-per-node N -m kvlink_rag train CONFIG. Needs
    kvlink-rag[train].

    Args:
        config: a YAML file, or a bundled one such as llama-3.2-1b
        dry_run: only say examples, tokens, memory and time
        tflops: a device's, for --dry-run
        resume: a checkpoint other than the last
        merge: write the whole model, not the adapter alone
        as_json: print JSON (--dry-run)
    """
    with importing(options):
        from kvlink_rag.training.config import load
        from kvlink_rag.training.dry_run import estimate, lines
        from kvlink_rag.training.trainer import ADAPTER, finetune
    loaded = load(config)
    if dry_run:
        found = estimate(loaded, tflops=tflops)
        terminal.show_json(found.to_dict()) if as_json else terminal.show(lines(found))
        return 0
    directory = finetune(loaded, device=options.device, resume=resume, merge=merge)
    what = "adapter" if directory.name == ADAPTER else "tuned model"
    terminal.show([f"the {what} is in {directory}"])
    return 0
