"""Tiny models of every supported architecture, with random weights and a byte tokenizer."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvlink_rag import KVLinkModel, Spec
from kvlink_rag.pretrained import fetch
from kvlink_rag.pretrained.known import ADAPTERS, PAIRS, SMALL
from kvlink_rag.prompt.spec import PromptPreset

torch.set_num_threads(1)
settings.register_profile(
    "shared", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.load_profile("shared")

MAX_PASSAGES = 40
SHARED_DATA = Path(
    os.environ.get("KVLINK_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data"
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 7168,
    "max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
PHI4_MINI_ROPE = {  # as in its file: 12 of a head's 16 numbers are turned
    "partial_rotary_factor": 0.75,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 7168,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
        "long_factor": [1.0, 1.2, 2.0, 5.0, 11.0, 30.0],
    },
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}  # theirs are beyond 460
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "ministral": (
        transformers.MinistralConfig,
        transformers.MinistralForCausalLM,
        {
            "head_dim": 32,
            "sliding_window": 24,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "ministral3": (
        transformers.Ministral3Config,
        transformers.Ministral3ForCausalLM,
        {"head_dim": 32, "sliding_window": None, "rope_parameters": MINISTRAL3_ROPE},
    ),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM, ENDS),
    "granite": (
        transformers.GraniteConfig,
        transformers.GraniteForCausalLM,
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.5,
            "logits_scaling": 8.0,
        },
    ),
    "arcee": (transformers.ArceeConfig, transformers.ArceeForCausalLM, ENDS),
    "seed_oss": (transformers.SeedOssConfig, transformers.SeedOssForCausalLM, {"head_dim": 32}),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, {"head_dim": 32}),
    "starcoder2": (
        transformers.Starcoder2Config,
        transformers.Starcoder2ForCausalLM,
        {**ENDS, "sliding_window": 24, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "cwm": (
        transformers.CwmConfig,
        transformers.CwmForCausalLM,
        {**ENDS, "head_dim": 32, "sliding_window": 24, "rope_parameters": LLAMA3_ROPE},
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {
            **ENDS,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "smollm3": (
        transformers.SmolLM3Config,
        transformers.SmolLM3ForCausalLM,
        {**ENDS, "no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    ),
    "phi3-window": (
        transformers.Phi3Config,
        transformers.Phi3ForCausalLM,
        {**ENDS, "num_key_value_heads": 4, "sliding_window": 24},
    ),
    "phi4-mini": (
        transformers.Phi3Config,
        transformers.Phi3ForCausalLM,
        {**ENDS, **PHI4_MINI_ROPE, "sliding_window": 262144, "tie_word_embeddings": True},
    ),
}


def byte_tokenizer(slots: int = MAX_PASSAGES, links: int = 5) -> PreTrainedTokenizerFast:
    """One token a byte, then <bos> <eos> <mem_start> <mem_end> and the link tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    names = ["<mem_start>", "<mem_end>"]
    names += [f"<link_{slot}_{k}>" for slot in range(slots) for k in range(links)]
    fast.add_special_tokens({"additional_special_tokens": names})
    return fast


def byte_spec(links: int = 5, slots: int = MAX_PASSAGES) -> Spec:
    """The spec that goes with `byte_tokenizer`."""
    markers = {"mem_start": 258, "mem_end": 259} if links else {}
    return Spec(
        links_per_passage=links,
        first_link_id=260,
        max_passages=slots if links else None,
        presets={"test": PromptPreset(before="<bos>", between="", after="\n")},
        preset="test",
        **markers,
    )


def random_model(family: str, dtype: torch.dtype, *, seed: int = 0, **overrides: Any) -> Any:
    """A tiny causal LM whose attention is sharp enough for a wrong mask to show."""
    config_class, model_class, extra = FAMILIES[family]
    vocabulary = 260 + 5 * MAX_PASSAGES
    shape = {"vocab_size": vocabulary, **SHAPE, **extra, **overrides}
    config = config_class(**copy.deepcopy(shape))  # which writes into what it is given
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                sharp = any(each in name for each in ("q_proj", "k_proj", "qkv_proj"))
                wide = 1.5 if sharp else 1.0
                parameter.normal_(0, wide / parameter.shape[1] ** 0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.5)
    return model.to(dtype).eval()


ModelMaker = Callable[..., KVLinkModel]


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    """`make_model(family, dtype, links=5, seed=0)`: a `KVLinkModel` with random weights."""
    made: dict[Any, KVLinkModel] = {}

    def make(
        family: str = "llama", dtype: torch.dtype = torch.float32, *, links: int = 5, seed: int = 0
    ) -> KVLinkModel:
        key = (family, dtype, links, seed)
        if key not in made:
            model = random_model(family, dtype, seed=seed)
            made[key] = KVLinkModel(
                model, byte_tokenizer(), byte_spec(links), name=f"tiny-{family}"
            )
        return made[key]

    return make


CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="session")
def saved_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a tiny model and a tiny encoder with random weights."""
    root = tmp_path_factory.mktemp("pair")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(root / "encoder")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "lm")
    random_model("llama", torch.float32).save_pretrained(root / "lm")
    (root / "lm" / "kvlink.json").write_text(byte_spec().to_json())
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **shape)
    BertModel(config).save_pretrained(root / "encoder")
    return root / "lm", root / "encoder"


class WordEmbedder:
    """Words hashed into a vector: deterministic, and equal words do bring texts together."""

    dimension = 64
    name = "word-embedder"

    def __init__(self, salt: str = "") -> None:
        self.salt = salt
        self.texts = 0

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.salt.encode()).hexdigest()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += len(texts)
        return np.stack([self._vector(text) for text in texts])

    embed_queries = embed

    def _vector(self, text: str) -> np.ndarray:
        vector = np.zeros(self.dimension, dtype=np.float32)
        for word in re.findall(r"\w+", text.lower()):
            digest = hashlib.sha256((self.salt + word).encode()).digest()
            vector[digest[0] % self.dimension] += 1
            vector[digest[1] % self.dimension] -= 0.5
        return vector / max(1e-6, float(np.linalg.norm(vector)))


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, which is not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no test data at {SHARED_DATA}; set KVLINK_TEST_DATA")
    return SHARED_DATA


# The default pair, as the user of these tests has it.
SMALL_PLACES = {model: fetch.place_of(model) for model in PAIRS[SMALL]}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the default pair, in a cache of the test's own; skips where it is not here.

    For tests of what only real weights show; all others take random ones, which are quick.
    """
    if not all(place.is_dir() for place in SMALL_PLACES.values()):
        pytest.skip("the pair small is not here; fetch it with: kvlink-rag models get small")
    if not (ADAPTERS[SMALL] / "adapter_model.safetensors").is_file():
        pytest.skip(f"the adapter of the pair small is not in {ADAPTERS[SMALL]}")
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "small-cache"))
    for model, place in SMALL_PLACES.items():
        target = fetch.place_of(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(place, target_is_directory=True)
    return SMALL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That several machines mount."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def url(folder: Path) -> str:
    """Of a tier in `folder`."""
    return f"file://{folder}?namespace=team"
