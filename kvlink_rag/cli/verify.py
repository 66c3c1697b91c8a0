"""`kvlink-rag verify`: is reuse exact on this model?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

from kvlink_rag.documents import Document

from . import terminal
from .opening import OPTIONS, Options, collection, directory_of, load, load_model
from .values import Count, Json

# What is laid out where there is no collection: each names something of the other.
_SAMPLES = (
    Document("The harbour of Orvale was built in 1911 by the Tarn company.", title="Orvale"),
    Document("The Tarn company makes cranes. Its seat is in Orvale.", title="Tarn company"),
)
_SHOWN = ("holds", "difference", "tolerance", "same_top_token", "margin", "message")


def verify(
    *,
    k: Annotated[Count, Parameter(name="-k")] = 4,
    every: Annotated[bool, Parameter(name="--all")] = False,
    quality: Annotated[str | None, Parameter(name="--quality")] = None,
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """Is reuse exact on this model?

    Compares the model's output over snapshots with one full prefill that has the same visibility,
    on passages of the collection (on two of its own, if there is no collection at all). Exit
    code 1: they differ. With --quality it asks instead what reuse costs in answers: how far each
    way, also with some of the passages computed again, is from full attention.

    Args:
        k: passages in the prompt that is compared
        every: compare every stored snapshot with what the model encodes now, not a sample
        quality: a file of questions, one a line or JSON lines; each costs a full prefill
        as_json: print JSON
    """
    if quality is not None:
        return _quality(quality, k, as_json, options)
    wanted: dict[str, Any] = {"sample": None} if every else {}
    if directory_of(options).exists():
        with collection(options, models=True) as rag:
            name, found = rag.model_name, rag.verify(k=k, **wanted)
    else:
        model = load_model(options)
        name, found = model.name, model.verify(model.prompt(_SAMPLES, "Where is it?"))
    if as_json:
        price = {"price": asdict(found.price)} if found.price else {}
        terminal.show_json({"model": name, **{f: getattr(found, f) for f in _SHOWN}, **price})
    else:
        terminal.show([f"{name}: {found.message}"])
    return 0 if found.holds else 1


def _quality(path: str, k: int, as_json: bool, options: Options) -> int:
    """What each way costs on the questions in the file `path`."""
    from kvlink_rag.evaluation.quality import measure, questions_in

    questions = questions_in(path)
    with collection(options, models=True) as rag:
        load(rag)
        found = measure(rag, questions, k=k)
        name = rag.model_name
    if as_json:
        terminal.show_json({"model": name, **asdict(found)})
        return 0
    rows = [
        f"{way.name:<12}{way.divergence:>12.4f}{way.agreement:>12.1%}{way.first:>12.1%}"
        f"{way.first_token_ms:>12.0f}"
        for way in found.ways
    ]
    head = f"{'way':<12}{'nats a token':>12}{'agreement':>12}{'first':>12}{'ms':>12}"
    terminal.show(
        [
            f"{name}, {found.questions} questions over {k} passages, against full attention:",
            *(head, *rows),
            f"recommended: {found.recommended} ({found.reason})",
        ]
    )
    return 0
