"""The tokenizer of a GGUF file as a `tokenizer.json` and its configuration.

`tokenizer.ggml.pre` names the rule that splits text before byte-pair merges; llama.cpp has the
rules in code, not in the file. Those known here are llama.cpp's `llama-vocab.cpp` and equal the
`tokenizer.json` of the models they come from. transformers' own conversion of GGUF files does not
ask for the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from kvlink_rag.errors import ConfigError, ModelNotSupported

from .metadata import GGUFFile

# Kinds of token (`tokenizer.ggml.token_type`).
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3.replace("{DIGITS}", "{1,3}"),),
    "qwen2": (_LLAMA3.replace("{DIGITS}", ""),),
    # what llama.cpp takes where a file names none
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_WHOLE_WORDS = ("llama-bpe",)  # a word of the vocabulary is one token, whatever the merges say
_COMPOSED = ("qwen2",)  # NFC first
_SPACE = "\u2581"
_PROBE = (
    "Don't we'LL  x=1234567, 12.5\n\n\n  na\u00efve e\u0301 $(a_b)\t\r\n "
    "\u65e5\u672c\u8a9e \U0001f469\u200d\U0001f680 "
)


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer. Raises `ModelNotSupported` for a kind or a splitting rule not known here."""
    kind = file.get("tokenizer.ggml.model", str)
    kinds: dict[str, Callable[[GGUFFile], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentences}
    if kind not in kinds:
        raise ModelNotSupported(f"{file.path} has a tokenizer {kind!r}, expected gpt2 or llama")
    tokenizer = kinds[kind](file)
    _add_tokens(tokenizer, file)
    return tokenizer


def check_loaded(tokenizer: Tokenizer, directory: Path) -> None:
    """Raise `ModelNotSupported` unless transformers loads `tokenizer` from `directory` as it is.

    For some architectures it takes a class of its own, whatever the files say.
    """
    from transformers import AutoTokenizer  # seconds of start-up that other commands need not pay

    loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if loaded(_PROBE).input_ids != tokenizer.encode(_PROBE).ids:
        raise ModelNotSupported(
            f"transformers loads the tokenizer as {type(loaded).__name__}, which splits text "
            "otherwise than this file's does; take the model in transformers' own format"
        )


def tokenizer_settings(file: GGUFFile) -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    tokens = _tokens(file)
    found: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.get(
            f"{file.get('general.architecture', str)}.context_length", int
        ),
    }
    for name, number in special_ids(file).items():
        if not 0 <= number < len(tokens):
            raise ConfigError(f"{file.path}: the {name} token has id {number} of {len(tokens)}")
        found[f"{name}_token"] = tokens[number]
    if template := file.get("tokenizer.chat_template", str, ""):
        found["chat_template"] = template
    return found


def special_ids(file: GGUFFile) -> dict[str, int]:
    """Ids of the tokens that have a part to play: bos, eos, pad, unk, as far as there are any."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in names.items()}
    return {name: file.get(key, int) for name, key in keys.items() if key in file.fields}


def end_ids(file: GGUFFile) -> list[int]:
    """Ids that end an answer: of the text, of a turn."""
    keys = ("eos", "eot", "eom")
    found = [f"tokenizer.ggml.{key}_token_id" for key in keys]
    return list(dict.fromkeys(file.get(key, int) for key in found if key in file.fields))


def _byte_level(file: GGUFFile) -> Tokenizer:
    """Byte-pair encoding over bytes: GPT-2 and all that came of it."""
    rule = file.get("tokenizer.ggml.pre", str, "default")
    rule = _SAME.get(rule, rule)
    if rule not in _RULES:
        raise ModelNotSupported(
            f"{file.path} splits text by the rule {rule!r} (tokenizer.ggml.pre), expected one of "
            f"{', '.join(_RULES)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", list)]
    vocabulary = _vocabulary(file)
    model = models.BPE(vocabulary, _known(file, merges, vocabulary))
    model.ignore_merges = rule in _WHOLE_WORDS
    tokenizer = Tokenizer(model)
    if rule in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in _RULES[rule]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    _begin(tokenizer, file, rule in _WHOLE_WORDS)
    return tokenizer


def _sentences(file: GGUFFile) -> Tokenizer:
    """SentencePiece's byte-pair encoding (Llama 2, Mistral): merges are what the scores say."""
    vocabulary = _vocabulary(file)
    scores = file.get("tokenizer.ggml.scores", list)
    model = models.BPE(
        vocabulary,
        _merges(vocabulary, scores, _types(file)),
        unk_token=_tokens(file)[special_ids(file).get("unk", 0)],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefixed = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] * prefixed)])
    _begin(tokenizer, file, True)
    return tokenizer


def _merges(
    vocabulary: dict[str, int], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Every way to join two words into one, the word with the best score first.

    Never into a control token: a text must not spell one.
    """
    found = [
        (-scores[number], -cut, word[:cut], word[cut:])
        for word, number in vocabulary.items()
        if types[number] == _NORMAL
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    found.sort(key=lambda each: each[:2])
    return [(first, second) for _, _, first, second in found]


def _known(
    file: GGUFFile, merges: list[tuple[str, ...]], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """`merges` as pairs, each of words that there are. Raises `ConfigError`."""
    pairs = [(merge[0], merge[1]) for merge in merges if len(merge) == 2]
    for first, second in pairs:
        if not {first, second, first + second} <= vocabulary.keys():
            raise ConfigError(f"{file.path} merges {first!r} and {second!r}, which are no tokens")
    if len(pairs) != len(merges):
        raise ConfigError(f"{file.path} has a merge that is not of two words; convert it again")
    return pairs


def _begin(tokenizer: Tokenizer, file: GGUFFile, default: bool) -> None:
    """Whether a text that is tokenised with special tokens begins with the bos token."""
    number = special_ids(file).get("bos")
    if number is None or not file.get("tokenizer.ggml.add_bos_token", bool, default):
        return
    bos = _tokens(file)[number]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, number)],
    )


def _vocabulary(file: GGUFFile) -> dict[str, int]:
    """Words and their ids, those at the end that are never merged (`_own`) apart."""
    tokens = _tokens(file)
    words = tokens[: _own(file)]
    vocabulary = {word: number for number, word in enumerate(words)}
    if len(vocabulary) != len(words):
        raise ConfigError(f"{file.path} has a token twice, expected each once; convert it again")
    return vocabulary


def _own(file: GGUFFile) -> int:
    """How many tokens belong to the vocabulary: the special ones behind them are added apart."""
    count = len(_types(file))
    while count and _types(file)[count - 1] in (_CONTROL, _USER, _UNUSED):
        count -= 1
    return count


def _add_tokens(tokenizer: Tokenizer, file: GGUFFile) -> None:
    """Tokens that are found in the text as they stand. Padding at the end is left out."""
    types, own = _types(file), _own(file)
    while types and types[-1] == _UNUSED:
        types = types[:-1]
    for number, (word, kind) in enumerate(zip(_tokens(file), types, strict=False)):
        if number >= own or kind in (_UNKNOWN, _CONTROL, _USER):
            token = AddedToken(word, special=kind != _USER, normalized=False)
            (tokenizer.add_tokens if kind == _USER else tokenizer.add_special_tokens)([token])
            if tokenizer.token_to_id(word) != number:
                raise ConfigError(f"{file.path} has the token {word!r} twice; convert it again")


def _tokens(file: GGUFFile) -> list[str]:
    return file.get("tokenizer.ggml.tokens", list)


def _types(file: GGUFFile) -> list[int]:
    tokens = _tokens(file)
    types = file.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ConfigError(f"{file.path} has {len(types)} kinds of {len(tokens)} tokens")
    return types
