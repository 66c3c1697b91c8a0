"""KVLink retrieval: documents are encoded once and kept on disk, answers start at once.

    from kvlink_rag import Document, KVLinkRAG

    with KVLinkRAG.open("my-collection") as rag:
        rag.add([Document("The harbour of Orvale was built in 1911.", title="Orvale")])
        print(rag.ask("When was the harbour of Orvale built?").text)

The public names are those in `__all__`; they are loaded on first use, so that importing the
package costs nothing and touches no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from kvlink_rag.collection.answering import Answer, AnswerStream
    from kvlink_rag.collection.conversation import Conversation
    from kvlink_rag.collection.opened import shared_collection
    from kvlink_rag.collection.passage_writer import PassageWriter
    from kvlink_rag.collection.prometheus import CollectionMetrics
    from kvlink_rag.collection.rag import KVLinkRAG
    from kvlink_rag.ingest.splitter import split_document
    from kvlink_rag.model.model import KVLinkModel, Prefill
    from kvlink_rag.model.prompt_states import PromptStates
    from kvlink_rag.model.text_stream import TextStream
    from kvlink_rag.model.verify import Verification
    from kvlink_rag.prompt.layout import Layout
    from kvlink_rag.prompt.spec import PromptPreset, Spec
    from kvlink_rag.retrieval.contriever import ContrieverEmbedder
    from kvlink_rag.retrieval.embedder import Embedder
    from kvlink_rag.retrieval.embedder_kinds import load_embedder

    from .documents import Document, Hit, Part, Passage, Text
    from .errors import KVLinkError
    from .trace import Trace

_HOME = {
    "Answer": "collection.answering",
    "AnswerStream": "collection.answering",
    "CollectionMetrics": "collection.prometheus",
    "ContrieverEmbedder": "retrieval.contriever",
    "Conversation": "collection.conversation",
    "Document": "documents",
    "Embedder": "retrieval.embedder",
    "Hit": "documents",
    "KVLinkError": "errors",
    "KVLinkModel": "model.model",
    "KVLinkRAG": "collection.rag",
    "Layout": "prompt.layout",
    "Part": "documents",
    "Passage": "documents",
    "PassageWriter": "collection.passage_writer",
    "Prefill": "model.model",
    "PromptPreset": "prompt.spec",
    "PromptStates": "model.prompt_states",
    "Spec": "prompt.spec",
    "Text": "documents",
    "TextStream": "model.text_stream",
    "Trace": "trace",
    "Verification": "model.verify",
    "load_embedder": "retrieval.embedder_kinds",
    "shared_collection": "collection.opened",
    "split_document": "ingest.splitter",
}

__all__ = [
    "Answer",
    "AnswerStream",
    "CollectionMetrics",
    "ContrieverEmbedder",
    "Conversation",
    "Document",
    "Embedder",
    "Hit",
    "KVLinkError",
    "KVLinkModel",
    "KVLinkRAG",
    "Layout",
    "Part",
    "Passage",
    "PassageWriter",
    "Prefill",
    "PromptPreset",
    "PromptStates",
    "Spec",
    "Text",
    "TextStream",
    "Trace",
    "Verification",
    "__version__",
    "load_embedder",
    "shared_collection",
    "split_document",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
