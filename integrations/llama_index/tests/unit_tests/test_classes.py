"""What each class is to LlamaIndex, before anything is loaded."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import TextNode, TransformComponent
from llama_index.core.utils import get_tokenizer
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.embeddings.contriever import ContrieverEmbedding
from llama_index.llms.kvlink import KVLink, KVLinkRegister, KVLinkVectorStore
from llama_index.response_synthesizers.kvlink import KVLinkSynthesizer
from llama_index.retrievers.kvlink import KVLinkRetriever

from kvlink_rag import KVLinkModel, KVLinkRAG
from kvlink_rag.errors import ConfigError, SettingsMismatch

ROOT = Path(__file__).parents[2] / "llama_index"


@pytest.mark.parametrize(
    ("made", "base"),
    [
        (KVLink, CustomLLM),
        (KVLink, LLM),
        (KVLinkRetriever, BaseRetriever),
        (KVLinkSynthesizer, BaseSynthesizer),
        (ContrieverEmbedding, BaseEmbedding),
        (KVLinkRegister, TransformComponent),
        (KVLinkVectorStore, BasePydanticVectorStore),
    ],
)
def test_bases(made: type, base: type) -> None:
    assert issubclass(made, base)


def test_namespace_folders_have_no_init() -> None:
    assert sorted(path.parent.name for path in ROOT.rglob("__init__.py")) == [
        "contriever",
        "kvlink",
        "kvlink",
        "kvlink",
    ]
    assert len(list(ROOT.rglob("py.typed"))) == 4


@pytest.mark.parametrize(
    "module",
    [
        "llama_index.llms.kvlink",
        "llama_index.retrievers.kvlink",
        "llama_index.response_synthesizers.kvlink",
        "llama_index.embeddings.contriever",
    ],
)
def test_without_llama_index_the_error_names_the_install_line(module: str) -> None:
    code = (
        "import sys\n"
        "sys.modules['llama_index.core'] = None\n"
        "from kvlink_rag.errors import MissingExtra\n"
        f"try: import {module}\n"
        "except MissingExtra as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(f"{module} needs"), done.stderr
    assert "pip install 'kvlink-rag[llama-index]'" in done.stdout


def test_class_names() -> None:
    assert [c.class_name() for c in (KVLink, KVLinkRegister, ContrieverEmbedding)] == [
        "KVLink",
        "KVLinkRegister",
        "ContrieverEmbedding",
    ]


def test_construction_opens_and_loads_nothing(tmp_path: Path) -> None:
    """All classes but the synthesizer, whose base class asks for the window."""
    code = f"""
import sys
from llama_index.embeddings.contriever import ContrieverEmbedding
from llama_index.llms.kvlink import KVLink, KVLinkRegister, KVLinkVectorStore
from llama_index.retrievers.kvlink import KVLinkRetriever
where = {str(tmp_path / "new")!r}
KVLink(), KVLinkRetriever(), KVLinkRegister(), ContrieverEmbedding()
KVLink(directory=where), KVLinkRetriever(directory=where), KVLinkRegister(directory=where)
KVLinkVectorStore(directory=where)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (tmp_path / "new").exists()


def test_same_words_everywhere(tmp_path: Path) -> None:
    words: dict[str, Any] = {"model": "a/b", "embedder": "c/d", "directory": tmp_path}
    words |= {"device": "cpu", "codec": "int8"}
    llm, register = KVLink(**words), KVLinkRegister(**words)
    KVLinkRetriever(**words)
    for made in (llm, register):
        found = {word: getattr(made, word) for word in words}
        assert found == {**words, "directory": str(tmp_path)}
    embedding = ContrieverEmbedding(embedder="c/d", device="cpu")
    assert (embedding.embedder, embedding.device, embedding.model_name) == ("c/d", "cpu", "c/d")


def test_serialised_and_back(tmp_path: Path) -> None:
    llm = KVLink(model="a/b", directory=tmp_path, stop="\n", seed=3, system_prompt="Be brief.")
    for again in (KVLink.from_dict(llm.to_dict()), pickle.loads(pickle.dumps(llm))):  # noqa: S301
        assert again.to_dict() == llm.to_dict()
        assert (again.model, again.stop, again.seed) == ("a/b", ["\n"], 3)
    embedding = ContrieverEmbedding("c/d", embed_batch_size=7)
    again = ContrieverEmbedding.from_dict(embedding.to_dict())
    assert (again.embedder, again.embed_batch_size) == ("c/d", 7)
    register = KVLinkRegister(directory=tmp_path, embed=True)
    assert KVLinkRegister.from_dict(register.to_dict()).to_dict() == register.to_dict()


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        KVLink(temprature=1.0)
    with pytest.raises(TypeError, match="pooling"):
        ContrieverEmbedding(pooling="cls")
    with pytest.raises(TypeError, match="similar"):
        KVLinkRetriever(similar=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="which are one number"):
        KVLinkRetriever(4, similarity_top_k=3)


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}),
        *({"top_k": -1}, {"min_p": 1.1}, {"repetition_penalty": 0.0}),
    ],
)
def test_impossible_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        KVLink(**bad)


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3", None])
def test_k_of_nothing_is_refused(k: int, rag: KVLinkRAG) -> None:
    with pytest.raises(ConfigError, match=f"k is {k!r}, expected a whole number of at least 1"):
        KVLinkRetriever(k)
    if k is not None:
        with pytest.raises(ConfigError, match=f"k is {k!r}"):
            KVLinkRetriever(similarity_top_k=k)
    retriever = KVLinkRetriever(rag=rag)
    retriever.k = k
    with pytest.raises(ConfigError, match=f"k is {k!r}"):
        retriever.retrieve("Orvale")


def test_rag_goes_with_none_of_the_others(rag: KVLinkRAG) -> None:
    with pytest.raises(ConfigError, match="give one"):
        KVLink(rag=rag, model="a/b")
    with pytest.raises(ConfigError, match="give one"):
        KVLinkRetriever(rag=rag, codec="int8")
    for made in (KVLink, KVLinkRetriever, KVLinkRegister, KVLinkVectorStore, KVLinkSynthesizer):
        with pytest.raises(ConfigError, match="rag is a int, expected an open KVLinkRAG"):
            made(rag=5)
    with pytest.raises(TypeError, match="give one"):
        KVLinkSynthesizer(KVLink(rag=rag), codec="int8")
    with pytest.raises(TypeError, match="give one"):
        KVLinkSynthesizer(KVLink(rag=rag), rag=rag)
    with pytest.raises(TypeError, match="expected KVLink"):
        KVLinkSynthesizer("default")  # type: ignore[arg-type]


def test_classes_of_one_directory_share_one_collection(
    tmp_path: Path, model: KVLinkModel, embedder: object
) -> None:
    llm = KVLink(directory=tmp_path, model=model)
    retriever = KVLinkRetriever(directory=str(tmp_path), embedder=embedder)
    register = KVLinkRegister(directory=tmp_path)
    assert llm.rag is register.rag
    assert llm.rag.model is model
    assert retriever.rag.directory == llm.rag.directory
    assert KVLinkRetriever(directory=tmp_path, embedder=embedder).rag is retriever.rag
    assert KVLink(directory=tmp_path / "other", model=model).rag is not llm.rag


def test_one_codec_a_directory(tmp_path: Path, model: KVLinkModel) -> None:
    llm = KVLink(directory=tmp_path, model=model, codec="int8")
    assert llm.rag.codec == "int8"
    KVLinkRegister(directory=tmp_path, codec="int8")([TextNode(text="The harbour of Orvale.")])
    for made in (KVLinkRegister, KVLinkRetriever, KVLink):
        assert made(directory=tmp_path).rag is llm.rag
    assert KVLinkSynthesizer(directory=tmp_path, codec="int8")._kvlink.rag is llm.rag
    with pytest.raises(SettingsMismatch, match="found codec 'exact'"):
        KVLinkRetriever(directory=tmp_path, codec="exact").retrieve("Orvale")


def test_a_tier_that_machines_share(
    tmp_path: Path, model: KVLinkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word for all classes; it may hold a password, so no serialised form has it."""
    tier = tmp_path / "tier"
    tier.mkdir()
    monkeypatch.setenv("KVLINK_REMOTE_SECRET", "0123456789abcdef" * 4)
    words: dict[str, Any] = {"directory": tmp_path / "one", "remote": f"file://{tier}"}
    llm = KVLink(**words, model=model)
    opened = llm.rag
    KVLinkRegister(**words)([TextNode(text="The harbour of Orvale.")])
    assert KVLinkRetriever(directory=tmp_path / "one").rag is opened
    opened.close()
    assert [path for path in tier.rglob("*") if path.is_file()]
    assert str(tier) not in str(llm.to_dict()) + repr(llm)
    again = pickle.loads(pickle.dumps(KVLinkRegister(**words)))  # noqa: S301
    assert again._collection.remote == words["remote"]
    with pytest.raises(ConfigError, match="found rag and one of"):
        KVLink(rag=opened, remote="")
    with pytest.raises(ValueError, match="remote") as caught:
        KVLink(remote=["redis://:secret@cache"])
    assert "secret" not in str(caught.value)


def test_context_window_and_tokenizer(rag: KVLinkRAG, model: KVLinkModel) -> None:
    llm = KVLink(rag=rag, max_new_tokens=20)
    seen = llm.metadata
    # <bos><user> and <eos><assistant>, 12 slots of 2 link tokens, two markers
    assert seen.context_window == model.window - 4 - 12 * 2 - 2
    assert (seen.num_output, seen.is_chat_model, seen.model_name) == (20, True, model.name)
    assert not seen.is_function_calling_model
    assert llm.tokenizer("a<eos>é") == model.tokenizer.encode("a<eos>é")
    assert len(llm.tokenizer("a<eos>é")) == 8


def test_nothing_of_the_process_changes(rag: KVLinkRAG, tmp_path: Path) -> None:
    """Whatever is made, in whatever order: splitters and other LLMs count as before."""
    text = " ".join(f"The lighthouse keeper of pier {n} sleeps." for n in range(60))
    splitter = TokenTextSplitter(chunk_size=100, chunk_overlap=0)
    before = splitter.split_text(text)
    theirs = get_tokenizer()
    KVLink(rag=rag), KVLink(model="no/such-model", directory=tmp_path / "x")
    KVLinkRegister(rag=rag), KVLinkRetriever(rag=rag), KVLinkSynthesizer(rag=rag)
    KVLink.from_dict(KVLink(rag=rag).to_dict()), KVLinkVectorStore(rag=rag)
    assert get_tokenizer() is theirs
    assert TokenTextSplitter(chunk_size=100, chunk_overlap=0).split_text(text) == before
    assert MockLLM().complete("Hello").text == "Hello"


def test_counting_as_the_model_does_is_one_line(rag: KVLinkRAG, model: KVLinkModel) -> None:
    Settings.tokenizer = KVLink(rag=rag).tokenizer
    assert len(get_tokenizer()("lighthouse keeper")) == 17
    assert len(get_tokenizer()("lighthouse keeper")) == 17  # by then without the collection


def test_imports_go_one_way() -> None:
    """No circle of files, imports inside functions and for type checkers counted."""
    imports = {}
    for path in ROOT.rglob("*.py"):
        found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        names = {str(node.module) for node in found}
        names |= {f"{node.module}.{name.name}" for node in found for name in node.names}
        imports[".".join(path.relative_to(ROOT.parent).with_suffix("").parts)] = names
    ours = set(imports)
    list(TopologicalSorter({n: names & ours for n, names in imports.items()}).static_order())
