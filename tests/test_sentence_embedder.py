"""Encoders by their own files: equal to sentence-transformers on the same directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from test_embedder import TEXTS, make_model, make_tokenizer
from transformers import Qwen3Config, Qwen3Model

from kvlink_rag import load_embedder
from kvlink_rag.errors import ConfigError, ModelNotSupported
from kvlink_rag.retrieval.contriever import ContrieverEmbedder
from kvlink_rag.retrieval.recipe import POOLINGS
from kvlink_rag.retrieval.sentence_embedder import SentenceEmbedder

CLOSE = {"rtol": 0, "atol": 1e-5}  # sums in float32 of at most 24 states, in another order


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))


def encoder(
    path: Path,
    pooling: Any = "mean",
    *,
    normalise: bool = False,
    prompts: dict[str, str] | None = None,
    lower: bool = False,
    model: Any = None,
    similarity: str = "dot",
) -> tuple[Path, SentenceTransformer]:
    """A directory that sentence-transformers wrote, and its own model of it."""
    (model or make_model()).save_pretrained(path / "plain")
    make_tokenizer(lower=not lower).save_pretrained(path / "plain")
    first = Transformer(str(path / "plain"), do_lower_case=lower)
    steps = [first, Pooling(16, pooling), *([Normalize()] if normalise else [])]
    facts = {"prompts": prompts, "similarity_fn_name": similarity}
    made = SentenceTransformer(modules=steps, device="cpu", **facts)
    made.save(str(path / "saved"))
    return path / "saved", SentenceTransformer(str(path / "saved"), device="cpu")


def ask(directory: Path, file: str, **changes: Any) -> None:
    """Change what a file of an encoder says."""
    path = directory / file
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **changes}))


def plain(texts: list[str]) -> list[str]:
    """Without special-token strings, which sentence-transformers takes for special tokens."""
    return [text for text in texts if "[CLS]" not in text]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("pooling", [*POOLINGS, ("cls", "mean"), ("mean", "max", "lasttoken")])
def test_every_pooling_is_theirs(tmp_path: Path, pooling: Any, normalise: bool) -> None:
    directory, theirs = encoder(tmp_path, pooling, normalise=normalise)
    ours = load_embedder(directory, device="cpu", batch_size=3)
    texts = plain(TEXTS)
    found = ours.embed(texts)
    np.testing.assert_allclose(found, theirs.encode(texts), **CLOSE)
    np.testing.assert_allclose(ours.embed_queries(texts), found, **CLOSE)
    assert found.shape == (len(texts), ours.dimension)
    assert ours.dimension == theirs.get_embedding_dimension()
    if normalise:
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("switch", ["cls_token", "max_tokens", "mean_sqrt_len_tokens", "lasttoken"])
def test_switches_of_older_files_are_understood(tmp_path: Path, switch: str) -> None:
    directory, _ = encoder(tmp_path)
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    switches = {f"pooling_mode_{name}": name == switch for name in names}
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, **switches})
    )
    theirs = SentenceTransformer(str(directory), device="cpu")
    found = load_embedder(directory, device="cpu").embed(plain(TEXTS))
    np.testing.assert_allclose(found, theirs.encode(plain(TEXTS)), **CLOSE)


def test_questions_and_passages_have_their_prompts(tmp_path: Path) -> None:
    prompts = {"query": "was built in ", "document": "the harbour of "}
    directory, theirs = encoder(tmp_path, normalise=True, prompts=prompts)
    ours = load_embedder(directory, device="cpu")
    texts = plain(TEXTS)
    np.testing.assert_allclose(ours.embed(texts), theirs.encode_document(texts), **CLOSE)
    np.testing.assert_allclose(ours.embed_queries(texts), theirs.encode_query(texts), **CLOSE)
    assert not np.allclose(ours.embed(texts), ours.embed_queries(texts), atol=0.01)


def test_passages_have_the_prompt_whatever_its_name(tmp_path: Path) -> None:
    directory, theirs = encoder(tmp_path, prompts={"query": "of ", "passage": "built "})
    found = load_embedder(directory, device="cpu").embed(plain(TEXTS))
    expected = theirs.encode(plain(TEXTS), prompt_name="passage")
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_the_length_is_that_of_the_files(tmp_path: Path) -> None:
    directory, theirs = encoder(tmp_path)
    whole = load_embedder(directory, device="cpu").embed(plain(TEXTS))
    for length in (6, 12):
        ask(directory, "sentence_bert_config.json", max_seq_length=length)
        theirs = SentenceTransformer(str(directory), device="cpu")
        found = load_embedder(directory, device="cpu").embed(plain(TEXTS))
        np.testing.assert_allclose(found, theirs.encode(plain(TEXTS)), **CLOSE)
        assert not np.allclose(found, whole, atol=1e-3)
    short = SentenceEmbedder.from_pretrained(directory, device="cpu", max_length=6)
    assert short.max_length == 6


def test_lower_case_is_done_where_it_is_asked_for(tmp_path: Path) -> None:
    directory, theirs = encoder(tmp_path, lower=True)
    ask(directory, "sentence_bert_config.json", do_lower_case=True)
    theirs = SentenceTransformer(str(directory), device="cpu")
    texts = ["THE Harbour OF", "the harbour of"]
    found = load_embedder(directory, device="cpu").embed(texts)
    np.testing.assert_allclose(found[0], found[1], **CLOSE)
    np.testing.assert_allclose(found, theirs.encode(texts), **CLOSE)


def test_a_decoder_with_its_last_token(tmp_path: Path) -> None:
    """As Qwen3-Embedding: padding on the other side than theirs makes no difference."""
    torch.manual_seed(2)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = Qwen3Model(Qwen3Config(vocab_size=20, **shape, **heads)).eval()
    directory, theirs = encoder(tmp_path, "lasttoken", normalise=True, model=model)
    found = load_embedder(directory, device="cpu").embed(plain(TEXTS))
    np.testing.assert_allclose(found, theirs.encode(plain(TEXTS)), **CLOSE)


def test_cosine_that_the_files_name_is_an_inner_product_of_unit_vectors(tmp_path: Path) -> None:
    directory, theirs = encoder(tmp_path, similarity="cosine")
    ours = load_embedder(directory, device="cpu")
    texts = plain(TEXTS)
    vectors = ours.embed(texts)
    expected = theirs.similarity(theirs.encode(texts), theirs.encode(texts)).numpy()
    np.testing.assert_allclose(vectors @ vectors.T, expected, **CLOSE)


def test_a_directory_without_a_recipe_is_a_contriever(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found = load_embedder(tmp_path, device="cpu")
    assert isinstance(found, ContrieverEmbedder)
    with pytest.raises(ConfigError, match=r"modules\.json"):
        SentenceEmbedder.from_pretrained(tmp_path)


def test_contriever_does_not_pass_over_what_files_ask_for(tmp_path: Path) -> None:
    directory, _ = encoder(tmp_path / "more", normalise=True)
    with pytest.raises(ConfigError, match="load_embedder"):
        ContrieverEmbedder.from_pretrained(directory)
    plain_mean, _ = encoder(tmp_path / "mean")
    ours, theirs = (
        kind.from_pretrained(plain_mean, device="cpu", max_length=512)
        for kind in (ContrieverEmbedder, SentenceEmbedder)
    )
    assert ours.fingerprint == theirs.fingerprint


def test_what_changes_vectors_changes_the_fingerprint(tmp_path: Path) -> None:
    directory, _ = encoder(tmp_path, normalise=True)
    prints = {load_embedder(directory).fingerprint}
    for file, change in [
        ("config_sentence_transformers.json", {"prompts": {"query": "of "}}),
        ("config_sentence_transformers.json", {"prompts": {"document": "of "}}),
        ("1_Pooling/config.json", {"pooling_mode": "cls"}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("sentence_bert_config.json", {"max_seq_length": 8}),
    ]:
        ask(directory, file, **change)
        prints.add(load_embedder(directory).fingerprint)
    assert len(prints) == 6


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "pools by attention"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, "euclidean"),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "expected a text"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "by name"),
        ("sentence_bert_config.json", {"transformer_task": "text-generation"}, "text-generation"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    directory, _ = encoder(tmp_path)
    ask(directory, file, **change)
    with pytest.raises(ConfigError, match=message):
        load_embedder(directory)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"type": "sentence_transformers.models.Dense", "path": "2_Dense"}, "Dense.*LangChain"),
        ({"type": "custom_st.Transformer", "path": ""}, "foreign"),
        ({"type": "sentence_transformers.models.Normalize", "path": "../.."}, "inside"),
        ("Normalize", "no list of modules"),
    ],
)
def test_other_steps_are_refused(tmp_path: Path, module: Any, message: str) -> None:
    directory, _ = encoder(tmp_path)
    modules = json.loads((directory / "modules.json").read_text())
    (directory / "modules.json").write_text(json.dumps([*modules, module]))
    with pytest.raises(ConfigError, match=message):
        load_embedder(directory)


def test_a_prompt_left_out_of_the_vector_is_refused(tmp_path: Path) -> None:
    directory, _ = encoder(tmp_path, prompts={"query": "of "})
    ask(directory, "1_Pooling/config.json", include_prompt=False)
    with pytest.raises(ModelNotSupported, match="leaves the prompt out"):
        load_embedder(directory)


def test_weights_that_are_missing_are_told(tmp_path: Path) -> None:
    """transformers would take random ones."""
    directory, _ = encoder(tmp_path)
    ask(directory, "config.json", num_hidden_layers=3)
    with pytest.raises(ConfigError, match="not among its weights"):
        load_embedder(directory)


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The checkpoint has a pooler that is not used; transformers would report it."""
    directory, _ = encoder(tmp_path)
    capfd.readouterr()
    load_embedder(directory, device="cpu").embed(["harbour"])
    assert capfd.readouterr() == ("", "")
