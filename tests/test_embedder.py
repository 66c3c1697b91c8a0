"""The embedder against plain transformers, one text at a time."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelMaker
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.disk.digests import tokenizer_digest
from kvlink_rag.errors import ConfigError, SettingsMismatch
from kvlink_rag.retrieval.contriever import ContrieverEmbedder, mean_pooling
from kvlink_rag.retrieval.embedder import Embedder, Windowed, count_cut

WINDOW = 24
WORDS = ["the", "harbour", "of", "orvale", "was", "built", "in", "1911", "[", "]", "cls", "sep"]
TEXTS = [
    "the harbour of Orvale was built in 1911",
    "harbour",
    "",
    "   ",
    "the " * 100,
    "of orvale",
    "[CLS] [SEP] [PAD] harbour",
    "was built in 1911 , unknown words",
]


def make_tokenizer(extra: tuple[str, ...] = (), lower: bool = True) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with BERT's special tokens."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *extra]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_model(seed: int = 0, **changes: Any) -> BertModel:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": WINDOW,
    }
    return BertModel(BertConfig(**{**shape, **changes})).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    make_model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))


def embedder(**options: Any) -> ContrieverEmbedder:
    return ContrieverEmbedder(make_model(), make_tokenizer(), **options)


@torch.inference_mode()
def expected(text: str, window: int = WINDOW) -> np.ndarray:
    """One text alone, without padding: the mean of its last hidden states."""
    words = text.lower().replace("[", " [ ").replace("]", " ] ").replace(",", " , ").split()
    names = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    ids = [2, *[names.get(word, 1) for word in words][: window - 2], 3]
    return make_model()(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_vectors_are_mean_pooled_states_in_order(batch_size: int) -> None:
    found = embedder(batch_size=batch_size).embed(TEXTS)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), 16)
    # float32 sums of at most 24 states in another order: 1e-6 relative, with room
    np.testing.assert_allclose(found, np.stack([expected(t) for t in TEXTS]), atol=1e-5)


def test_a_text_has_one_vector_in_any_company() -> None:
    made = embedder(batch_size=4)
    chance = random.Random(0)
    alone = {text: made.embed([text])[0] for text in TEXTS}
    for _ in range(5):
        texts = chance.choices(TEXTS, k=11)
        for text, vector in zip(texts, made.embed(texts), strict=True):
            np.testing.assert_allclose(vector, alone[text], atol=1e-5)


def test_batches_are_sorted_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    made, shapes = embedder(batch_size=2), []
    original = made._forward

    def note(batch: Any) -> Any:
        shapes.append([len(ids) for ids in batch])
        return original(batch)

    monkeypatch.setattr(made, "_forward", note)
    made.embed(["the " * n for n in (5, 1, 4, 2, 3)])
    assert shapes == [[7, 6], [5, 4], [3]]


def test_no_texts_no_vectors() -> None:
    assert embedder().embed([]).shape == (0, 16)


def test_mean_pooling_is_that_of_the_model_card() -> None:
    torch.manual_seed(1)
    states, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0]])
    states[0, 2:] = torch.inf  # padding must not reach the sum
    pooled = mean_pooling(states, mask)
    for row, count in enumerate([2, 5, 1]):
        torch.testing.assert_close(pooled[row], states[row, :count].mean(0))


def test_special_token_strings_are_plain_text() -> None:
    made = embedder()
    assert made._token_ids(["[CLS] harbour [SEP]"]) == [[2, 13, 15, 14, 6, 13, 16, 14, 3]]
    assert made._token_ids([""]) == [[2, 3]]


def test_long_texts_are_cut_to_the_window() -> None:
    assert [len(ids) for ids in embedder()._token_ids(["the " * 100])] == [WINDOW]
    short = embedder(max_length=6)
    assert short.max_length == 6
    np.testing.assert_allclose(short.embed(["the " * 100])[0], expected("the " * 100, 6), atol=1e-5)


def test_a_lone_surrogate_is_no_error() -> None:
    assert np.isfinite(embedder().embed(["a\ud800b", "\0"])).all()


def test_a_tokenizer_that_adds_nothing_and_a_text_that_has_nothing() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    made = ContrieverEmbedder(make_model(), tokenizer)
    assert made._token_ids(["", "harbour"]) == [[], [6]]
    found = made.embed(["", "harbour"])
    assert not found[0].any()
    assert found[1].any()


def test_questions_are_encoded_as_passages() -> None:
    made: Embedder = embedder()
    np.testing.assert_array_equal(made.embed(TEXTS), made.embed_queries(TEXTS))
    assert made.dimension == 16


def test_threads_share_one_embedder() -> None:
    made, wrong = embedder(batch_size=2), []
    expected_vectors = made.embed(TEXTS)

    def load(count: int) -> None:
        try:
            for _ in range(5):
                np.testing.assert_allclose(
                    made.embed(TEXTS[:count]), expected_vectors[:count], atol=1e-5
                )
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=load, args=(count,)) for count in (1, 3, 5, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_out_of_memory_gives_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = embedder(batch_size=8)
    before, original, sizes = made.embed(TEXTS), made._forward, []

    def narrow(batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(batch)

    monkeypatch.setattr(made, "_forward", narrow)
    np.testing.assert_allclose(made.embed(TEXTS), before, atol=1e-5)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_a_dtype_that_is_too_narrow_is_told() -> None:
    made = embedder()
    made.model.embeddings.word_embeddings.weight.data.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not finite"):
        made.embed(["harbour"])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_length": 0}])
def test_bad_options_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError):
        embedder(**options)


# Loading.


def test_from_pretrained(saved: Path) -> None:
    loaded = ContrieverEmbedder.from_pretrained(saved, device="cpu")
    np.testing.assert_allclose(loaded.embed(TEXTS), embedder().embed(TEXTS), atol=1e-6)
    half = ContrieverEmbedder.from_pretrained(saved, device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.embed(TEXTS).dtype == np.float32
    np.testing.assert_allclose(half.embed(TEXTS), embedder().embed(TEXTS), atol=0.05)
    assert half.fingerprint == loaded.fingerprint


def test_from_pretrained_reads_bin_weights(saved: Path, tmp_path: Path) -> None:
    """facebook/contriever has a pytorch_model.bin only."""
    make_tokenizer().save_pretrained(tmp_path)
    make_model().config.save_pretrained(tmp_path)
    torch.save(make_model().state_dict(), tmp_path / "pytorch_model.bin")
    loaded = ContrieverEmbedder.from_pretrained(tmp_path, device="cpu")
    np.testing.assert_allclose(loaded.embed(TEXTS), embedder().embed(TEXTS), atol=1e-6)
    assert loaded.fingerprint != ContrieverEmbedder.from_pretrained(saved).fingerprint


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_code_in_bin_weights_is_not_run(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    make_model().config.save_pretrained(tmp_path)
    torch.save({"weight": Bomb(str(tmp_path / "ran"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no encoder that can be loaded"):
        ContrieverEmbedder.from_pretrained(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("local", [True, False])
def test_what_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError):
        ContrieverEmbedder.from_pretrained(tmp_path / "missing", local_files_only=local)
    with pytest.raises(ConfigError):
        ContrieverEmbedder.from_pretrained(tmp_path, local_files_only=local)
    if local:
        with pytest.raises(ConfigError, match="not on this machine"):
            ContrieverEmbedder.from_pretrained("nobody/no-such-encoder", local_files_only=True)


def test_it_says_what_it_cuts_off(capfd: pytest.CaptureFixture[str]) -> None:
    encoder = embedder()
    assert isinstance(encoder, Windowed)
    assert encoder.window == WINDOW
    found = encoder.count_tokens(TEXTS)
    plain = [make_tokenizer().tokenize(text, split_special_tokens=True) for text in TEXTS]
    assert found == [len(tokens) + 2 for tokens in plain]  # [CLS] and [SEP]
    more = encoder.embed([f"{text} harbour" for text in TEXTS])
    unread = np.isclose(encoder.embed(TEXTS), more).all(axis=1)  # what is at the end changes none
    assert unread.sum() == count_cut(encoder, TEXTS) == 1
    assert capfd.readouterr().err == ""


# Fingerprints.


def test_equal_encoders_have_equal_fingerprints(saved: Path) -> None:
    assert embedder().fingerprint == embedder(batch_size=1).fingerprint
    first, second = (ContrieverEmbedder.from_pretrained(saved) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    before = first.fingerprint
    first.embed(TEXTS)  # a tokenizer has state; it must not show
    assert ContrieverEmbedder(make_model(), first._tokenizer).fingerprint == embedder().fingerprint
    assert first.fingerprint == before


def test_anything_that_changes_vectors_changes_the_fingerprint() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    others = [
        ContrieverEmbedder(model, tokenizer),
        ContrieverEmbedder(make_model(seed=1), tokenizer),
        ContrieverEmbedder(make_model(num_attention_heads=4), tokenizer),
        ContrieverEmbedder(make_model(hidden_act="relu"), tokenizer),
        ContrieverEmbedder(make_model(layer_norm_eps=1e-3), tokenizer),
        ContrieverEmbedder(model, make_tokenizer(extra=("more",))),
        ContrieverEmbedder(model, make_tokenizer(lower=False)),
        ContrieverEmbedder(model, tokenizer, max_length=8),
    ]
    assert len({other.fingerprint for other in others}) == len(others)


@pytest.mark.parametrize("stored", [True, False])
def test_weights_that_change_in_memory_change_the_fingerprint(saved: Path, stored: bool) -> None:
    encoder = ContrieverEmbedder.from_pretrained(saved, device="cpu") if stored else embedder()
    prints, weight = {encoder.fingerprint}, encoder.model.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.add_(0.1)
    prints.add(encoder.fingerprint)
    weight.data.mul_(1.5)  # which torch does not count
    prints.add(encoder.fingerprint)
    encoder.model.encoder.layer[1] = make_model(seed=5).encoder.layer[1]
    prints.add(encoder.fingerprint)
    assert len(prints) == 4
    handed_over = ContrieverEmbedder(encoder.model, make_tokenizer())
    assert encoder.fingerprint == handed_over.fingerprint  # the same weights, however they came


def test_a_collection_notices_its_encoder_tuned_in_memory(
    tmp_path: Path, make_model: ModelMaker
) -> None:
    encoder, model = embedder(), make_model("llama", torch.float32)
    with KVLinkRAG.open(tmp_path, model=model, embedder=encoder) as rag:
        rag.add([Document("The harbour of Orvale.")])
        assert rag.search("harbour", 1)
        with torch.no_grad():
            encoder.model.encoder.layer[0].output.dense.weight.add_(0.1)
        with pytest.raises(SettingsMismatch, match="embedder"):
            rag.search("harbour", 1)


def test_an_unused_pooler_does_not_show() -> None:
    """Its weights are random where the checkpoint has none."""
    model = make_model()
    model.pooler.dense.weight.data.fill_(7)
    assert ContrieverEmbedder(model, make_tokenizer()).fingerprint == embedder().fingerprint


def test_tokenizer_digest_survives_saving(saved: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(saved)
    assert tokenizer_digest(loaded) == tokenizer_digest(make_tokenizer())
    loaded(["some text"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer_digest(loaded) == tokenizer_digest(make_tokenizer())
    assert tokenizer_digest(make_tokenizer(extra=("more",))) != tokenizer_digest(loaded)
