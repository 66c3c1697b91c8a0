"""A model made ready for tuning: weights, tokenizer, and a spec with ids for its link tokens.

Ids are the tokenizer's reserved ones where it has enough (Llama-3: exactly the published ids),
else new tokens at the end of the vocabulary. Their embeddings begin at the mean of all others plus
a little noise, the same in every slot: a link token is first of all "the k-th after a passage", and
what a slot adds is learned. Where nothing but the new tokens is learned they begin as tokens that
the model knows: a header as what opens prompts, link tokens as the end of a line. Output rows,
where they are not tied, begin at the mean of all others, so that a link token is never likely.
Knows transformers and peft.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from transformers import AutoModelForCausalLM

from kvlink_rag.disk import atomic_files
from kvlink_rag.disk.digests import tokenizer_digest, weights_digest
from kvlink_rag.engine.families import check_supported, reach_of
from kvlink_rag.errors import ConfigError, MissingExtra
from kvlink_rag.model.adapter import Adapter, read_adapter
from kvlink_rag.model.loading import find_spec, load_config, load_tokenizer
from kvlink_rag.pretrained.model_files import resolve
from kvlink_rag.prompt.format import default_spec
from kvlink_rag.prompt.spec import SPEC_FILE, Base, Spec
from kvlink_rag.prompt.tokenizer import PartTokenizer

from .chat import Chat, find_chat
from .config import FinetuneConfig, Links, Lora
from .transforms import Format

NOISE = 0.1  # of the embeddings' own spread
RESERVED = re.compile(r"reserved[_ -]?special[_ -]?token")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run needs besides its data.

    new_ids: token ids whose embeddings are set here; like: those that begin as another token's.
    """

    tokenizer: Any
    spec: Spec
    chat: Chat
    new_ids: tuple[int, ...]
    directory: Path
    like: Mapping[int, int] = field(default_factory=dict)

    def form(self, instruction: str) -> Format:
        """How samples are written."""
        return Format(self.spec, self.chat, instruction, opening=self.tokenizer.bos_token or "")


def prepare(config: FinetuneConfig) -> Prepared:
    """Tokenizer and spec of a run, without weights. Raises `ConfigError` and its kin."""
    directory = resolve(config.model, role="reader")
    shape = load_config(directory)
    check_supported(shape)
    if config.max_length > (reach := reach_of(shape)):
        raise ConfigError(
            f"max_length is {config.max_length}, and {config.model} has {reach} positions that it "
            "computes alike; lower it"
        )
    brought = find_spec(config.model, directory)
    tokenizer = load_tokenizer(directory, brought)
    chat = find_chat(config.chat, tokenizer)
    base = _base(config, directory, tokenizer)
    if config.links is None:
        if brought is None:
            raise ConfigError(f"{config.model} brings no kvlink.json; give links to the config")
        spec = replace(brought, base=base)
        return Prepared(tokenizer, _with_header(spec, tokenizer, config), chat, (), directory)
    if brought is not None:
        raise ConfigError(
            f"{config.model} brings link tokens of its own, which links would begin anew; set "
            "links: null to tune it further"
        )
    known = PartTokenizer(tokenizer)  # as the base knows text
    opening = known.encode(chat.presets(config.instruction)[config.preset].before, special=True)
    line = (known.encode("\n") or opening or [0])[-1]
    spec = replace(with_tokens(tokenizer, config.links, chat, config), base=base)
    header = spec.header if config.header_tokens else ()
    new_ids = (*spec.special_ids(), *header)
    like: dict[int, int] = {}
    if config.tokens_only:
        like = dict.fromkeys(spec.special_ids(), line)
    if opening:
        like |= {id: opening[i % len(opening)] for i, id in enumerate(header)}
    return Prepared(
        tokenizer, _with_header(spec, tokenizer, config), chat, new_ids, directory, like
    )


def _with_header(spec: Spec, tokenizer: Any, config: FinetuneConfig) -> Spec:
    """`spec` with the config's header of known text, or, without any, that of a plain prompt."""
    if not config.header:
        plain = config.chat == "plain" and not spec.header
        return replace(spec, header=default_spec(tokenizer).header) if plain else spec
    return replace(spec, header=tuple(PartTokenizer(tokenizer).encode(config.header, special=True)))


def _base(config: FinetuneConfig, directory: Path, tokenizer: Any) -> Base | None:
    """What an adapter will belong to; nothing where all weights are trained."""
    if not config.adapts:
        return None
    return Base(config.model, weights_digest(directory), tokenizer_digest(tokenizer))


def with_tokens(tokenizer: Any, links: Links, chat: Chat, config: FinetuneConfig) -> Spec:
    """The spec of a model that has none; `tokenizer` gets new tokens where it must."""
    names = _names(links, config.header_tokens)
    reserved = [] if links.shared or config.header_tokens else reserved_ids(tokenizer)
    if len(reserved) < len(names):
        reserved = _new_tokens(tokenizer, names)
    count = links.per_passage * (1 if links.shared else links.passages)
    return Spec(
        links_per_passage=links.per_passage,
        first_link_id=reserved[0] if count else 0,
        links_shared=links.shared and count > 0,
        mem_start=None if links.shared else reserved[-2],
        mem_end=None if links.shared else reserved[-1],
        max_passages=links.passages if count and not links.shared else None,
        header=tuple(reserved[count : count + config.header_tokens]),
        passage_template=links.passage_template,
        untitled_template=links.untitled_template,
        rank=links.rank,
        presets=chat.presets(config.instruction),
        preset=config.preset,
    )


def reserved_ids(tokenizer: Any) -> list[int]:
    """The longest run of consecutive ids that the tokenizer calls reserved."""
    named = {i for i, t in tokenizer.added_tokens_decoder.items() if RESERVED.search(str(t))}
    longest: list[int] = []
    run: list[int] = []
    for token in sorted(named):
        run = [*run, token] if run and token == run[-1] + 1 else [token]
        longest = max(longest, run, key=len)
    return longest


def _names(links: Links, header: int) -> list[str]:
    """What the new tokens are called: link tokens, then the header, then the markers."""
    slots = [""] if links.shared else [f"{slot}_" for slot in range(links.passages)]
    names = [f"<|link_{slot}{k}|>" for slot in slots for k in range(links.per_passage)]
    names += [f"<|header_{k}|>" for k in range(header)]
    return names if links.shared else [*names, "<|mem_start|>", "<|mem_end|>"]


def _new_tokens(tokenizer: Any, names: list[str]) -> list[int]:
    tokenizer.add_tokens(names, special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)
    if ids != list(range(ids[0], ids[0] + len(names))):
        raise ConfigError("the tokenizer has some link tokens already; start from one without")
    return ids


def load_weights(config: FinetuneConfig, prepared: Prepared, *, attention: str) -> Any:
    """The model in training mode, its link tokens' embeddings set, its adapters added."""
    model = AutoModelForCausalLM.from_pretrained(
        prepared.directory,
        dtype=getattr(torch, config.master),
        use_safetensors=True,
        attn_implementation=attention,
    )
    size = model.get_input_embeddings().weight.shape[0]
    needed = max((len(prepared.tokenizer), *(i + 1 for i in prepared.new_ids)))
    if needed > size:
        model.resize_token_embeddings(needed, mean_resizing=False)
    if prepared.new_ids:
        begin_tokens(model, prepared.spec, config.seed, prepared.like)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        # its name until transformers 5.2x, and after
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
    if not config.adapts:
        return model
    if prepared.new_ids and model.config.tie_word_embeddings:
        _untie(model, size)
    model = _with_adapters(model, config.lora, prepared.new_ids)
    if config.adapter is not None:
        _go_on_from(model, read_adapter(config.adapter), prepared)
    return model


def _go_on_from(model: Any, adapter: Adapter, prepared: Prepared) -> None:
    """Give the adapters of `model` the numbers of `adapter`. Raises `ConfigError`."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    base = prepared.spec.base
    assert base is not None
    if (adapter.base.weights, adapter.base.tokenizer) != (base.weights, base.tokenizer):
        raise ConfigError(
            f"{adapter.directory} was trained on {adapter.base.name}, and the model in "
            f"{prepared.directory} has other weights or another tokenizer; give that base"
        )
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    alpha = getattr(model.peft_config["default"], "lora_alpha", None)
    if (
        shapes != {name: tuple(tensor.shape) for name, tensor in adapter.weights.items()}
        or adapter.settings.get("lora_alpha") != alpha
        or adapter.spec.special_ids() != prepared.spec.special_ids()
    ):
        raise ConfigError(
            f"{adapter.directory} has another rank, alpha, targets or link tokens than the config; "
            f"its rank is {adapter.settings.get('r')}, its alpha "
            f"{adapter.settings.get('lora_alpha')}"
        )
    set_peft_model_state_dict(model, dict(adapter.weights))


def _untie(model: Any, vocabulary: int) -> None:
    """Give a model with tied embeddings a head of its own, over the base's vocabulary only.

    The rows of new tokens are trained where tokens go in; none is ever predicted.
    """
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach()[:vocabulary].clone())
    head.out_features = vocabulary
    model.config.tie_word_embeddings = False


@torch.no_grad()
def begin_tokens(model: Any, spec: Spec, seed: int, like: Mapping[int, int]) -> None:
    """Set the embeddings (and output rows) of the spec's tokens, as the module's text says.

    like: ids whose embeddings begin as another's.
    """
    ids = spec.special_ids()
    inside, outside = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    others = torch.ones(len(inside), dtype=torch.bool)
    others[ids] = False
    kinds = _kinds(spec) or [0]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(max(kinds) + 1, inside.shape[1], generator=generator)
    begun = inside[others].float().mean(0) + NOISE * inside[others].float().std(0) * noise
    if ids:
        inside[ids] = begun[kinds].to(inside.dtype)
    for id, known in like.items():
        inside[id] = inside[known]
    if outside is not inside:
        outside[ids] = outside[others].float().mean(0).to(outside.dtype)


def _kinds(spec: Spec) -> list[int]:
    """For each id of `spec.special_ids()`: 0 and 1 the markers, then k + 2 for the k-th link."""
    slots = spec.link_slots
    markers = [] if spec.mem_start is None else [0, 1]
    return markers + [k + 2 for _ in range(slots) for k in range(spec.links_per_passage)]


def _with_adapters(model: Any, lora: Lora | None, new_ids: Sequence[int]) -> Any:
    """LoRA on the matrices, if any, and the rows of new tokens themselves."""
    try:
        from peft import LoraConfig, TrainableTokensConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra.of("peft", "train", "adapters") from error
    if lora is None:
        rows = TrainableTokensConfig(
            token_indices=list(new_ids), target_modules=["embed_tokens"], task_type="CAUSAL_LM"
        )
        return get_peft_model(model, rows)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    adapters = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        trainable_token_indices={"embed_tokens": list(new_ids)} if new_ids else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


def save(model: Any, prepared: Prepared, directory: Path, dtype: str) -> None:
    """An ordinary Hugging Face directory and its `kvlink.json`; adapters are merged."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
        _tie_again(model, prepared.directory)
    model.config.use_cache = True
    directory.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    prepared.tokenizer.save_pretrained(directory)
    (directory / SPEC_FILE).write_text(replace(prepared.spec, base=None).to_json(), "utf-8")


def _tie_again(model: Any, base: Path) -> None:
    """Undo `_untie` where it was done."""
    if load_config(base).tie_word_embeddings:
        model.config.tie_word_embeddings = True
        head, inside = model.get_output_embeddings(), model.get_input_embeddings()
        head.weight, head.out_features = inside.weight, len(inside.weight)


def save_adapter(model: Any, prepared: Prepared, directory: Path, config: FinetuneConfig) -> None:
    """The adapter in peft's files and its `kvlink.json`: each file whole, or as it was."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    dtype = getattr(torch, config.stored)
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in state.items()}
    facts = {**model.peft_config["default"].to_dict(), "base_model_name_or_path": config.model}
    facts = {name: _plain(value) for name, value in facts.items()} | {"inference_mode": True}
    files = {
        "adapter_model.safetensors": to_bytes(tensors, {"format": "pt"}),
        "adapter_config.json": (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode(),
        SPEC_FILE: prepared.spec.to_json().encode(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with atomic_files.replaced(directory / name) as file:
            atomic_files.write_all(file, memoryview(data))
            os.fchmod(file.fileno(), 0o644)  # to be handed on, unlike files of a collection


def _plain(value: Any) -> Any:
    """A setting of peft as JSON takes it."""
    return sorted(value) if isinstance(value, set) else value
