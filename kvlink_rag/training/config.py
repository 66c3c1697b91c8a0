"""The settings of a fine-tuning run: a YAML file to a checked, frozen value.

Knows names and numbers; loads no model and no data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvlink_rag.datasets.sets import OnBad
from kvlink_rag.errors import ConfigError, MissingExtra
from kvlink_rag.prompt.spec import LONGEST_HEADER

CONFIGS = Path(__file__).parent / "configs"
KINDS = ("qa", "qa_full", "gaps", "text", "text_memory", "chat", "chat_memory", "summary")
INSTRUCTION = (
    "You are a intelligent AI assistant. Please answer questions based on the user's instruction. "
    "Below are some reference documents that may help you in answering the user's question."
)  # as the authors publish it, slip included


@dataclass(frozen=True, slots=True)
class Part:
    """One data set of the mixture.

    kind: its transform (see `transforms`). path: a file, folder or hub id. config, split: of a hub
    data set. weight: its share of the examples, relative to the others'. documents: the most
    passages of a question. fill: that many passages a question, distractors from the set's other
    rows where it has fewer. fewest: draw the number of passages from there to `fill`, and which of
    the row's own stay, in any order (0: all of them, in theirs). questions: the most questions of
    the set that are asked about one set of passages. absent: the share of questions whose passages
    hold no answer, which `absent_answer` of the config answers. answer_words: leave out rows whose
    answer has more words (0: none). column: of the text or the answer, where it is not the
    schema's. first, last: the rows to learn from, from 0, `last` not among them (None: to the end).
    """

    kind: str
    path: str
    weight: float = 1.0
    config: str | None = None
    split: str = "train"
    documents: int = 10
    fill: int = 0
    fewest: int = 0
    questions: int = 16
    absent: float = 0.0
    answer_words: int = 0
    column: str | None = None
    first: int = 0
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Links:
    """Link tokens of a model that has none yet: how many a passage, for how many passages.

    shared: the same ones in every slot, for any number of passages, without memory markers.
    """

    per_passage: int = 5
    passages: int = 48
    shared: bool = False
    passage_template: str = "{title}: {text}\n"
    untitled_template: str = "{text}\n"
    rank: Literal["none", "fixed", "exact"] = "none"


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters (Hu et al., arXiv 2106.09685) instead of all weights."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """A run.

    model: directory or hub id to start from. out: directory of checkpoints, metrics and, in
    `model/`, the result (of adapters: `adapter/`). links: None keeps the spec the model brings.
    links_share: of the examples that have link tokens, the others go without; below 1 the model
    answers with and without them. header: special text that every passage sees before its own (see
    `Spec.header`), such as what opens a message; header_tokens: or so many new tokens, which begin
    as those that prompts open with. tokens_only: learn the new tokens' embeddings and nothing else.
    chat: `llama3`, `template` (the tokenizer's) or `plain` (what a model without a `kvlink.json` is
    asked with). preset: the prompt that is trained and then used. adapter: directory of an adapter
    of the same base, rank and link tokens to go on from; steps and optimiser begin anew. distill:
    the share of the loss that is the divergence from the model's own answer tokens under full
    attention, the rest is that of the answers given. absent_answer: what answers a question that
    the passages do not. batch: sets of passages with their questions a step, over all devices;
    device_batch: of them in memory at once on one. bf16: multiply in bfloat16 where the processor
    does. master: dtype of the weights that are trained. stored: dtype of the result. fsdp:
    transformers' FSDP options, such as "full_shard auto_wrap". on_bad: what happens to examples
    that cannot be used.
    """

    model: str
    out: str
    data: tuple[Part, ...]
    links: Links | None = field(default_factory=Links)
    links_share: float = 1.0
    header: str = ""
    header_tokens: int = 0
    tokens_only: bool = False
    chat: str = "llama3"
    instruction: str = INSTRUCTION
    preset: Literal["evaluation", "training"] = "evaluation"
    lora: Lora | None = None
    adapter: str | None = None
    distill: float = 0.0
    absent_answer: str = "The documents do not say."
    steps: int = 6000
    warmup: int = 600
    batch: int = 64
    device_batch: int = 4
    learning_rate: float = 5e-6
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int = 4096
    bf16: bool = True
    master: Literal["float32", "bfloat16"] = "float32"
    stored: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    gradient_checkpointing: bool = True
    fsdp: str = ""
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    workers: int = 0
    shuffle: int = 1000
    seed: int = 42
    on_bad: OnBad = "skip"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def adapts(self) -> bool:
        """Whether the result is an adapter, and the base stays as it is."""
        return self.lora is not None or self.tokens_only


def load(path: str | Path) -> FinetuneConfig:
    """Read a YAML file, or one of the bundled configs by its name (such as "llama-3.2-1b").

    Raises `ConfigError` naming the file and the setting at fault, and `MissingExtra`.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra.of("pyyaml", "train", "reading a training config") from error
    file = Path(path).expanduser()
    if not file.is_file():
        file = CONFIGS / f"{path}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(each.stem for each in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"no config at {path}; give a YAML file or one of {names}")
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return from_mapping(found)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def from_mapping(found: Any) -> FinetuneConfig:
    """A config from plain data. Raises `ConfigError`."""
    fields = dict(_mapping(found, "the config"))
    if not isinstance(fields.get("data"), list) or not fields["data"]:
        raise ConfigError("data is missing, expected a list of data sets")
    fields["data"] = tuple(_make(Part, part, f"data[{i}]") for i, part in enumerate(fields["data"]))
    for name, kind in (("links", Links), ("lora", Lora)):
        if fields.get(name) is not None:
            fields[name] = _make(kind, fields[name], name)
    made: FinetuneConfig = _make(FinetuneConfig, fields, "the config")
    return made


def _mapping(found: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ConfigError(f"{place} is {type(found).__name__}, expected settings with values")
    return found


def _make(kind: Any, found: Any, place: str) -> Any:
    """`kind` from plain data; YAML reads 5e-6 as text, so floats may be that."""
    fields = dict(_mapping(found, place))
    known = {each.name: each for each in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - set(known)):
        raise ConfigError(f"{place}: unknown settings {unknown}; known are {sorted(known)}")
    for name, value in fields.items():
        default = known[name].default
        if isinstance(default, float) and isinstance(value, str | int):
            fields[name] = _number(value, f"{place}: {name}")
        elif type(default) is int and type(value) is not int:
            raise ConfigError(f"{place}: {name} is {value!r}, expected a whole number")
        elif isinstance(default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{place}: {name} is {value!r}, expected true or false")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ConfigError(f"{place}: {error}") from error


def _number(value: str | int, name: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{name} is {value!r}, expected a number") from error


def _check(config: FinetuneConfig) -> None:
    for name in (
        "steps",
        "batch",
        "device_batch",
        "max_length",
        "save_every",
        "log_every",
        "shuffle",
    ):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}, expected 1 or more")
    if config.workers < 0:
        raise ConfigError(f"workers is {config.workers}, expected 0 or more")
    if config.batch % config.device_batch:
        raise ConfigError(
            f"batch is {config.batch}, expected a multiple of device_batch ({config.device_batch})"
        )
    for part in config.data:
        if part.kind not in KINDS:
            raise ConfigError(f"kind is {part.kind!r}, expected one of {', '.join(KINDS)}")
        if part.fill > part.documents:
            raise ConfigError(
                f"fill is {part.fill}, expected at most documents ({part.documents}); raise that"
            )
        if not 0 <= part.fewest <= part.fill:
            raise ConfigError(f"fewest is {part.fewest}, expected 0 to fill ({part.fill})")
        if part.questions < 1:
            raise ConfigError(f"questions is {part.questions}, expected 1 or more")
        if not 0 <= part.absent < 1:
            raise ConfigError(f"absent is {part.absent}, expected 0 or more and less than 1")
        if not part.weight > 0:
            raise ConfigError(f"the weight of {part.path} is {part.weight}, expected above 0")
    if config.lora is not None and config.fsdp:
        raise ConfigError(
            "found lora and fsdp, expected one: merging sharded adapters is not built"
        )
    if config.adapter is not None and not config.adapts:
        raise ConfigError("found adapter without lora; give the rank and alpha it was trained with")
    if config.tokens_only and (config.lora is not None or config.links is None):
        raise ConfigError("tokens_only learns new tokens and nothing else: give links and no lora")
    new = config.header_tokens + (config.links.per_passage if config.links else 0)
    if config.tokens_only and not new:
        raise ConfigError("tokens_only found no new tokens to learn; give links or header_tokens")
    if config.header and config.header_tokens:
        raise ConfigError("found header and header_tokens, expected one: text, or new tokens")
    if not 0 <= config.header_tokens <= LONGEST_HEADER:
        raise ConfigError(
            f"header_tokens is {config.header_tokens}, expected 0 to {LONGEST_HEADER}"
        )
    for name in ("distill", "links_share"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} is {getattr(config, name)}, expected 0 to 1")
    choices = {
        "chat": ("llama3", "template", "plain"),
        "preset": ("evaluation", "training"),
        "master": ("float32", "bfloat16"),
        "stored": ("float32", "bfloat16", "float16"),
        "on_bad": ("skip", "refuse"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name} is {getattr(config, name)!r}, expected one of {allowed}")
