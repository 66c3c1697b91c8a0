"""Construction: the same words everywhere, nothing loaded, nothing dropped silently."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import langchain_kvlink
import pytest
from langchain_kvlink import (
    ChatKVLink,
    ContrieverEmbeddings,
    KVLinkDocumentsChain,
    KVLinkLLM,
    KVLinkRetriever,
    KVLinkVectorStore,
)
from pydantic import ValidationError

from kvlink_rag import KVLinkRAG

WORDS = [ChatKVLink, KVLinkLLM, KVLinkRetriever]


def test_the_public_names() -> None:
    assert langchain_kvlink.__all__ == [
        "ChatKVLink",
        "ContrieverEmbeddings",
        "KVLinkDocumentsChain",
        "KVLinkLLM",
        "KVLinkRetriever",
        "KVLinkVectorStore",
        "aregister_documents",
        "document_block",
        "register_documents",
    ]


def test_importing_and_constructing_loads_no_torch() -> None:
    """Nor transformers, beyond what langchain-core itself loads (transformers, in 1.0)."""
    code = (
        "import sys, langchain_core.language_models.chat_models, langchain_core.vectorstores\n"
        "theirs = set(sys.modules)\n"
        "import langchain_kvlink as k\n"
        "k.ChatKVLink(); k.KVLinkLLM(); k.KVLinkRetriever(); k.ContrieverEmbeddings()\n"
        "k.KVLinkDocumentsChain(); k.KVLinkVectorStore().as_retriever()\n"
        "heavy = {'torch', 'transformers', 'faiss', 'kvlink_rag.model.model'}\n"
        "heavy.add('kvlink_rag.collection.rag')\n"
        "assert not heavy & (set(sys.modules) - theirs), heavy & (set(sys.modules) - theirs)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_go_one_way() -> None:
    """No circle of files, imports inside functions and for type checkers counted."""
    folder = Path(langchain_kvlink.__file__).parent
    imports = {}
    for path in folder.glob("*.py"):
        found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        names = [str(node.module) for node in found]
        imports[path.stem] = {n.rpartition(".")[2] for n in names if n.startswith(folder.name)}
    assert list(TopologicalSorter(imports).static_order())[-1] == "__init__"


def test_without_langchain_the_error_names_the_install_line() -> None:
    code = (
        "import sys\n"
        "sys.modules['langchain_core'] = None\n"
        "from kvlink_rag.errors import MissingExtra\n"
        "try: import langchain_kvlink\n"
        "except MissingExtra as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'kvlink-rag[langchain]'" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", WORDS)
def test_no_argument_is_the_default_pair(kind: Any, tmp_path: Path) -> None:
    made = kind()
    assert (made.model, made.embedder, made.directory, made.device) == (None, None, None, "auto")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", [*WORDS, ContrieverEmbeddings, KVLinkDocumentsChain])
def test_an_unknown_argument_is_refused(kind: Any) -> None:
    with pytest.raises(ValidationError, match="temperatur"):
        kind(temperatur=0.5)


def test_what_only_a_remote_model_knows_is_dropped() -> None:
    llm = ChatKVLink(timeout=60, max_retries=2, api_key="x", base_url="y")  # type: ignore[call-arg]
    assert llm.model_dump() == ChatKVLink().model_dump()


@pytest.mark.parametrize("kind", [*WORDS, KVLinkVectorStore])
@pytest.mark.parametrize(
    "words",
    [{"model": "m"}, {"embedder": "e"}, {"directory": "d"}, {"device": "cpu"}, {"codec": "int8"}],
)
def test_an_open_collection_and_words_for_another(
    kind: Any, words: dict[str, str], rag: KVLinkRAG
) -> None:
    with pytest.raises(ValueError, match="give rag= alone"):
        kind(rag=rag, **words)


@pytest.mark.parametrize("kind", [*WORDS, ContrieverEmbeddings, KVLinkDocumentsChain])
def test_copies_are_equal(kind: Any) -> None:
    made = kind()
    for copied in (made.model_copy(), copy.deepcopy(made)):
        assert copied == made


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}, {"top_k": -1}),
        *({"min_p": 1.1}, {"repetition_penalty": 0}, {"repetition_penalty": float("inf")}),
    ],
)
@pytest.mark.parametrize("kind", [ChatKVLink, KVLinkLLM])
def test_impossible_sampling(kind: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**bad)


def test_impossible_retrieval() -> None:
    for bad in ({"k": 0}, {"k": 2.5}, {"k": True}, {"k": "3"}, {"rounds": 3}, {"rounds": True}):
        with pytest.raises(ValidationError):
            KVLinkRetriever(**bad)  # type: ignore[arg-type]


def test_what_traces_and_caches_see(rag: KVLinkRAG) -> None:
    llm = ChatKVLink(temperature=0.5, max_tokens=7, stop=["x"], seed=3)
    params = llm._get_ls_params()
    assert params["ls_provider"] == "kvlink"
    assert params["ls_model_name"] == "small"
    assert params["ls_temperature"] == 0.5
    assert params["ls_max_tokens"] == 7
    assert params["ls_stop"] == ["x"]
    assert llm._get_llm_string() == llm._get_llm_string()
    for other in (
        {"seed": 4},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"repair": "first:4"},
        {"stop": None},
        {"model": "m"},
        {"directory": "d"},
        {"codec": "fp8"},
    ):
        assert llm.model_copy(update=other)._get_llm_string() != llm._get_llm_string()
    assert ChatKVLink(rag=rag)._get_ls_params()["ls_model_name"] == "tiny"
    assert "KVLinkRAG" not in repr(ChatKVLink(rag=rag))
