"""The small models' tokenizer: byte-level BPE in which a word is spelled the same wherever it
stands.

A leading space belongs to lower-case words only. Before a capital it is a token of its own (or
part of the full stop before it), so that a name has the same tokens after a space, a newline or
a bracket: copying names that were never seen is what the model has to do. Any Unicode text can
be encoded. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvlink_rag.prompt.spec import PromptPreset, Spec

VOCABULARY = 2048
SLOTS = 32
LINKS = 5
ROLES = (
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|mem_start|>",
    "<|mem_end|>",
)
SYSTEM = "You answer questions from the documents."
NOTICE = (
    "This is the bundled demonstration model, trained on generated text only; name a real one, "
    "such as Shiyu-Lab/Llama1B-KVLink5, for real use."
)
CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WORDS = r"[.,:;?!]+ (?=\p{Lu})| ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\n|\s|\p{L}+"


def special_tokens() -> list[str]:
    """Role tokens and memory markers, then the link tokens slot by slot: ids count up from 0."""
    links = [f"<|link_{slot}_{k}|>" for slot in range(SLOTS) for k in range(LINKS)]
    return [*ROLES, *links]


def small_spec(links: int = LINKS) -> Spec:
    """The spec of the bundled model; ids follow `special_tokens`. Fewer `links` than five are for
    models that it is compared with.
    """
    return Spec(
        links_per_passage=links,
        first_link_id=len(ROLES),
        mem_start=ROLES.index("<|mem_start|>"),
        mem_end=ROLES.index("<|mem_end|>"),
        max_passages=SLOTS,
        presets={
            "chat": PromptPreset(
                before=f"<|bos|><|system|>{SYSTEM}<|end|><|user|>", after="<|end|><|assistant|>"
            )
        },
        preset="chat",
        notice=NOTICE,
    )


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY` tokens, specials included, trained on `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrapped(backend)


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=special_tokens()[2:],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
