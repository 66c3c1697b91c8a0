"""/v1/embeddings: texts, or the token ids that LangChain sends in their place, to vectors.

Ids are those of tiktoken's `cl100k_base`: LangChain's `OpenAIEmbeddings` counts with it whatever
the model, so ids of the embedder's own vocabulary would be other words.
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from kvlink_rag.retrieval.embedder import Embedder, Windowed

from .refusals import Refused, not_found
from .replies import Embedding, Embeddings, EmbeddingUsage
from .requests import EmbeddingsRequest
from .service import Call

ENCODING = "cl100k_base"

logger = logging.getLogger(__name__)


async def embeddings(call: Call) -> Embeddings:
    """Serve /v1/embeddings."""
    body: EmbeddingsRequest = call.body
    service = call.service
    if body.model != service.embedder_name:
        raise not_found("model", body.model)
    return await service.runner.call(
        lambda: _embedded(service.library.embedder, body, service.limits.texts)
    )


def _embedded(embedder: Embedder, body: EmbeddingsRequest, most: int) -> Embeddings:
    texts = _texts(body.input, most)
    if body.dimensions not in (None, embedder.dimension):
        raise Refused(400, f"this embedder has {embedder.dimension} dimensions", "dimensions")
    embed = embedder.embed_queries if body.input_type == "query" else embedder.embed
    vectors = embed(texts).astype("<f4")
    tokens = sum(embedder.count_tokens(texts)) if isinstance(embedder, Windowed) else 0
    coded = body.encoding_format == "base64"
    data = [
        Embedding(
            index=index,
            embedding=base64.b64encode(row.tobytes()).decode() if coded else row.tolist(),
        )
        for index, row in enumerate(vectors)
    ]
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return Embeddings(data=data, model=body.model, usage=usage)


def _texts(given: Any, most: int) -> list[str]:
    """The texts of a request. Raises `Refused`."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        given = [given]
    if len(given) > most:
        raise Refused(400, f"{len(given)} inputs, expected {most} at most", "input")
    return list(given) if isinstance(given[0], str) else [_decoded(ids) for ids in given]


def _decoded(ids: Sequence[int]) -> str:
    encoding = _encoding()
    if encoding is None:
        raise Refused(
            400,
            f"this server has no encoding {ENCODING} to read token ids with; send text "
            "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
            "input",
        )
    try:
        text: str = encoding.decode(ids)
    except KeyError as error:
        raise Refused(400, f"a token id is not one of {ENCODING}; send text", "input") from error
    return text


@cache
def _encoding() -> Any:
    """tiktoken's encoding, or None; tiktoken fetches it where it is not at hand, unless offline."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        logger.warning(
            "token ids are refused: offline, %s is read from TIKTOKEN_CACHE_DIR alone", ENCODING
        )
        return None
    try:
        import tiktoken

        return tiktoken.get_encoding(ENCODING)
    except Exception as error:  # whatever its HTTP client raises
        logger.warning("token ids are refused: the encoding %s cannot be had: %s", ENCODING, error)
        return None
