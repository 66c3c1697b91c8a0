"""The public face: names, laziness, no network and no telemetry at import."""

from __future__ import annotations

import subprocess
import sys

import kvlink_rag

PUBLIC = {
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
}


def test_public_names_are_locked() -> None:
    assert set(kvlink_rag.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(kvlink_rag, name) is not None
    assert set(dir(kvlink_rag)) == PUBLIC


def test_unknown_names_raise() -> None:
    assert not hasattr(kvlink_rag, "Chunk")


def test_importing_opens_no_socket_and_loads_no_torch() -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = refuse\n"
        "socket.create_connection = refuse\n"
        "import kvlink_rag\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "kvlink_rag.KVLinkRAG, kvlink_rag.KVLinkModel\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
