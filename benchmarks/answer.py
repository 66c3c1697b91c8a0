"""The whole answer: from the question to its last token, beside full prefill and llama.cpp.

    python benchmarks/answer.py --model small --gguf SmolLM2-135M-Instruct.Q4_1.gguf --threads 2

Each round asks one prompt of each kind, one after the other, greedily, for `--new-tokens` tokens:
    reuse   snapshots from files in the page cache, the system prompt's run kept
    int8    the same, generated tokens with weights in 8 bits (`weights="int8"`); on a CPU
    full    our engine without snapshots: one causal prefill, then the same decoding
    F16 …   llama.cpp (`xllamacpp`) over the same token ids without link tokens, with and without
            flash attention, nothing kept between prompts; of a GGUF file of the same base, written
            again in each of `--types`
Where xllamacpp or a GGUF file is missing, its rows are. Without `--model` a shape with random
weights, and no llama.cpp. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measuring import Row, finish, load, median, parser, refuse, show
from ways import laid_out

from kvlink_rag import KVLinkModel, Layout, Trace
from kvlink_rag.compare.baselines import plain_spec
from kvlink_rag.engine.quick_weights import QuickWeights
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.prompt.layout import layout
from kvlink_rag.snapshots.sources import Reuse

COLUMNS = (
    *("size", "tokens", "way", "first_s", "answer_s", "tokens_per_s"),
    *("answer_over_reuse", "rate_over_reuse"),
)
KEPT = 64  # entries of llama.cpp's cache beyond prompt and answer

Answer = Callable[[], tuple[float, float]]  # seconds to the first token, and to the last


def main() -> None:
    arguments = parse()
    model = load(arguments)
    on_cpu = model.backbone.device.type == "cpu"
    quick = QuickWeights(model.backbone.model) if on_cpu else None
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        files = written(arguments, Path(directory))
        for size in arguments.sizes:
            rows += measure(model, Path(directory) / size, size, quick, files, arguments)
    show(rows, COLUMNS)
    finish(arguments, rows)


def measure(
    model: KVLinkModel,
    directory: Path,
    size: str,
    quick: QuickWeights | None,
    files: dict[str, Path],
    arguments: argparse.Namespace,
) -> list[Row]:
    """Medians over rounds; ratios to reuse within each round."""
    laid, prompt = laid_out(model, directory, size)
    linked = model.layout(prompt)
    plain = layout(prompt, model.tokenizer, plain_spec(model.spec))
    new = arguments.new_tokens
    ways: dict[str, Answer] = {
        "reuse": lambda: ours(model, linked, "reuse", laid.at("cached"), new),
        "full": lambda: ours(model, plain, "full", laid.at("cached", system_prompt=False), new),
    }
    if quick is not None:
        ways["int8"] = lambda: ours(model, linked, "reuse", laid.at("cached"), new, quick)
    for name, path in files.items():
        ways |= theirs(name, path, plain.token_ids.tolist(), new, arguments.threads)
    rounds = [{name: ask() for name, ask in ways.items()} for _ in range(arguments.rounds + 1)][1:]
    laid.close()
    return [row(model, size, len(plain), name, rounds, new) for name in ways]


def row(
    model: KVLinkModel,
    size: str,
    tokens: int,
    name: str,
    rounds: Sequence[dict[str, tuple[float, float]]],
    new: int,
) -> Row:
    firsts, whole = zip(*(each[name] for each in rounds), strict=True)
    rates = [(new - 1) / (last - first) for first, last in zip(firsts, whole, strict=True)]
    reuse = [(new - 1) / (each["reuse"][1] - each["reuse"][0]) for each in rounds]
    return {
        "model": model.name,
        "size": size,
        "tokens": tokens,
        "way": name,
        "new_tokens": new,
        "first_s": round(median(firsts), 4),
        "answer_s": round(median(whole), 4),
        "tokens_per_s": round(median(rates), 2),
        "answer_over_reuse": round(median(each[name][1] / each["reuse"][1] for each in rounds), 3),
        "rate_over_reuse": round(median(a / b for a, b in zip(rates, reuse, strict=True)), 3),
    }


def ours(
    model: KVLinkModel,
    prompt: Layout,
    mode: Any,
    reuse: Reuse,
    new: int,
    quick: QuickWeights | None = None,
) -> tuple[float, float]:
    """One answer of so many tokens, whatever they say."""
    model.backbone.quick = quick
    start = time.perf_counter()
    run = PromptRun(model.backbone, prompt, Trace(mode=mode), reuse)
    logits = run.start(new)
    token = int(logits.argmax())
    first = time.perf_counter() - start
    for _ in range(new - 1):
        token = int(run.step(token).argmax())
    last = time.perf_counter() - start
    run.end()
    model.backbone.quick = None
    if mode == "reuse" and run.trace.snapshots_encoded:
        refuse(f"a snapshot was encoded, not read ({run.trace})")
    return first, last


def theirs(name: str, path: Path, ids: Sequence[int], new: int, threads: int) -> dict[str, Answer]:
    """llama.cpp over the same ids, with flash attention and without."""
    import xllamacpp

    kinds = xllamacpp.llama_flash_attn_type
    flash = {
        name: kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        f"{name} flash": kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    }
    found = {}
    for label, kind in flash.items():
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = len(ids) + new + KEPT
        settings.n_parallel, settings.verbosity, settings.cache_ram_mib = 1, -1, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.flash_attn_type = kind
        found[label] = _asking(xllamacpp.Server(settings), list(ids), new)
    return found


def _asking(server: Any, ids: list[int], new: int) -> Answer:
    request = {
        "prompt": ids,
        "max_tokens": new,
        "temperature": 0,
        "stream": True,
        "cache_prompt": False,
        "ignore_eos": True,
    }

    def ask() -> tuple[float, float]:
        start, times = time.perf_counter(), []

        def heard(piece: dict[str, Any]) -> bool:
            if piece["choices"][0]["finish_reason"] is None:
                times.append(time.perf_counter() - start)
            return False

        server.handle_completions(request, heard)
        if len(times) < 2:
            refuse(f"llama.cpp gave {len(times)} pieces, expected {new}")
        return times[0], times[-1]

    return ask


def written(arguments: argparse.Namespace, directory: Path) -> dict[str, Path]:
    """The GGUF file in each type that was asked for; none where it or xllamacpp is missing."""
    if arguments.gguf is None:
        return {}
    if find_spec("xllamacpp") is None:
        refuse("found no xllamacpp; pip install xllamacpp, or leave --gguf out")
    source = Path(arguments.gguf).expanduser()
    return {
        name: source if name == "own" else rewritten(source, name, directory / f"{name}.gguf")
        for name in arguments.types
    }


def rewritten(source: Path, name: str, path: Path) -> Path:
    """A GGUF file with the same tensors, matrices in the type `name`."""
    import gguf

    reader, kind = gguf.GGUFReader(source), gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(
            field.name, field.contents(), field.types[0], field.types[-1] if array else None
        )
    for tensor in reader.tensors:
        plain = gguf.dequantize(tensor.data, tensor.tensor_type)
        used = kind if plain.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(plain, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=3)
    options.add_argument("--sizes", nargs="+", default=["10x200", "25x200"], metavar="PxT")
    options.add_argument("--new-tokens", type=int, default=32)
    options.add_argument("--gguf", help="a GGUF file of the same base, for llama.cpp")
    options.add_argument(
        "--types",
        nargs="+",
        default=["F16", "Q8_0", "Q4_0"],
        help="of its matrices: F32, F16, BF16, Q8_0, Q4_0, …, or own (the file as it is)",
    )
    return options.parse_args()


if __name__ == "__main__":
    main()
