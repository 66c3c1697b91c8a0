"""The one extra line of an application that keeps its own vector store.

documents → passages → snapshots, without vectors. Knows collections; knows no searches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.runnables.config import run_in_executor

from kvlink_rag.errors import ConfigError
from langchain_kvlink.documents import is_fresh, to_passages

if TYPE_CHECKING:
    from kvlink_rag import KVLinkRAG
    from kvlink_rag.documents import Document as Passage
    from langchain_kvlink.collection import HasCollection


def register_documents(
    target: KVLinkRAG | HasCollection,
    documents: Iterable[Document],
    *,
    show_progress: bool = False,
) -> list[str]:
    """Encode `documents` for an application that keeps its own vector store; their ids.

    target: an open `KVLinkRAG`, or any object of this package, whose collection is meant. The
    documents must be split as they are in that store: a passage is recognised in a prompt where
    its whole text stands there. They are not embedded, and what they hold already costs nothing:
    a document whose id is a random UUID, another one each time a program runs, is known by its
    content instead. Ids may be deleted by `target.collection.delete`. show_progress: a bar on
    stderr. Metadata that is not JSON is kept as text, which a warning tells with its keys. Raises
    `kvlink_rag.errors.DocumentError` (a `ValueError`), and registers none, for a document without
    text; `PassageTooLong`; `ConfigError` for another target.

        register_documents(llm, splits, show_progress=True)
    """
    passages = to_passages(documents, strict=False)
    rag = _collection(target)
    known = _known_by_content(rag, passages)
    rag.register(known, show_progress=show_progress)
    return [str(passage.id) for passage in known]


async def aregister_documents(
    target: KVLinkRAG | HasCollection,
    documents: Iterable[Document],
    *,
    show_progress: bool = False,
) -> list[str]:
    """`register_documents` in a thread of the executor."""
    return await run_in_executor(
        None, register_documents, target, documents, show_progress=show_progress
    )


def _collection(target: Any) -> KVLinkRAG:
    rag: Any = getattr(target, "collection", target)
    if not hasattr(rag, "register"):
        raise ConfigError(
            f"found a {type(target).__name__} to register documents with, expected an open "
            "KVLinkRAG, or a ChatKVLink, KVLinkLLM, KVLinkRetriever, KVLinkVectorStore or "
            "KVLinkDocumentsChain"
        )
    found: KVLinkRAG = rag
    return found


def _known_by_content(rag: KVLinkRAG, passages: Sequence[Passage]) -> list[Passage]:
    """Those with an id made for one run under an id from their content, if not there already."""
    fresh = [str(passage.id) for passage in passages if is_fresh(passage.id)]
    named = set(fresh) - {passage.id for passage in rag.get(fresh, missing_ok=True)}
    return [replace(p, id=None).identified() if p.id in named else p for p in passages]
