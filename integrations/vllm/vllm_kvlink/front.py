"""A client's request to a request that vLLM can schedule, and vLLM's answer to the client's form.

    chat or completion → documents named, retrieved or recognised → parts → layout → token ids

vLLM gets the token ids of the whole prompt as a completion, link tokens as placeholders. Knows a
collection and OpenAI's bodies; knows no vLLM, no HTTP and no weights: only a tokenizer is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlink_rag import Document, KVLinkError, KVLinkRAG, Part, Passage, Text
from kvlink_rag.prompt.fitting import fit
from kvlink_rag.prompt.recognition import Recogniser

from .orders import FIELD, Order, seal_of

DEFAULT_TOKENS = 512  # of a chat answer, where the request does not say
COMPLETION_TOKENS = 16  # of a completion, as OpenAI has it
PASSED_ON = frozenset(
    (
        *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
        *("stream", "stream_options", "n", "user", "frequency_penalty", "presence_penalty"),
        *("repetition_penalty", "logit_bias", "min_tokens", "ignore_eos", "skip_special_tokens"),
        *("include_stop_str_in_output", "priority", "request_id"),
    )
)
OURS = frozenset(
    (
        *("kvlink", "messages", "prompt", "max_tokens", "max_completion_tokens"),
        *("kv_transfer_params", "cache_salt"),
    )
)
NOTHING: tuple[object, ...] = (None, False, [], {}, "", "auto", "none")  # what asks for nothing


class RequestError(KVLinkError):
    """A request that cannot be answered from the collection."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What vLLM is sent, and what the client is told besides. chat: the form of the answer."""

    body: dict[str, Any]
    documents: tuple[Document, ...]
    chat: bool


class Front:
    """The way from requests to prompts over one collection. For any number of threads.

    vocabulary: of the served model; ids beyond it are placeholders. secret: of the seals.
    """

    def __init__(self, rag: KVLinkRAG, vocabulary: int, secret: bytes) -> None:
        self._rag, self._vocabulary, self._secret = rag, vocabulary, secret
        self._format = rag.outline()
        self._placeholder = next(
            i for i in range(vocabulary) if i not in self._format.tokenizer.hf.all_special_ids
        )
        self._never = {str(i): -100 for i in self._format.spec.special_ids() if i < vocabulary}
        self._recogniser = Recogniser(
            rag.catalog, self._format.tokenizer, most=self._format.spec.max_passages
        )

    def schedule(self, body: Mapping[str, Any]) -> Scheduled | None:
        """What vLLM is to be sent, or None where the request is vLLM's own.

        `kvlink` in the body: {"documents": [ids]} or {"k": passages to retrieve}; without it
        passages are recognised, and where there are none, or something is asked for that cannot be
        had over them (tools, say), vLLM answers as ever. Raises `RequestError`, and the
        collection's errors.
        """
        asked = _asked(body)
        messages = _messages(body)
        if messages is None:
            if asked:
                raise RequestError("found token ids or no prompt, expected text or messages")
            return None
        if other := _not_served(body):
            if asked:
                raise RequestError(
                    f"found {other}, which is not served over passages; leave it out"
                )
            return None
        room = _room(body)
        parts = self._parts(messages, asked, room)
        documents = tuple(part.document for part in parts if isinstance(part, Passage))
        if not documents:
            if asked:
                raise RequestError("found no passage to answer from; add documents first")
            return None
        laid = self._format.layout(parts)
        if len(laid) + room > self._format.window:
            raise RequestError(
                f"the prompt has {len(laid)} tokens and its answer {room}, the model's window is "
                f"{self._format.window}; use fewer passages or a smaller max_tokens"
            )
        order = Order(tuple(parts), seal_of(laid, self._secret))
        ids = [i if i < self._vocabulary else self._placeholder for i in laid.token_ids.tolist()]
        sent = {name: value for name, value in body.items() if name in PASSED_ON}
        if self._never:  # link tokens and markers among the model's own
            sent["logit_bias"] = {**(body.get("logit_bias") or {}), **self._never}
        sent |= {
            "prompt": ids,
            "max_tokens": room,
            "cache_salt": order.seal,
            "kv_transfer_params": {FIELD: order.to_json()},
        }
        return Scheduled(sent, documents, "messages" in body)

    def _parts(
        self, messages: list[dict[str, str]], asked: Mapping[str, Any], room: int
    ) -> list[Part]:
        if not asked:
            known = self._recogniser.recognise_contents(messages)
            if not any(isinstance(p, Passage) for m in known for p in _contents(m["content"])):
                return []
            return fit(self._format, self._format.chat(known), room)
        question = messages[-1]["content"]
        documents = self._documents(question, asked)
        if len(messages) == 1:
            return self._format.prompt(documents, question)
        content: list[Part] = [*map(Passage, documents), Text(question)]
        return self._format.chat([*messages[:-1], {"role": "user", "content": content}])

    def _documents(self, question: str, asked: Mapping[str, Any]) -> list[Document]:
        if "documents" in asked:
            return self._rag.get(asked["documents"])
        most = self._format.spec.max_passages
        k = asked["k"] if most is None else min(asked["k"], most)
        return [hit.document for hit in self._rag.search(question, k=k)]


def answered(answer: Mapping[str, Any], scheduled: Scheduled) -> dict[str, Any]:
    """vLLM's completion as the client asked for it, its sources beside it."""
    made = _of_client(answer, scheduled)
    made["kvlink"] = {"sources": _sources(scheduled)}
    return made


def streamed(
    event: Mapping[str, Any], scheduled: Scheduled, first: bool
) -> Iterator[dict[str, Any]]:
    """One of vLLM's chunks as the client's; the first of them brings role and sources."""
    if first:
        opening = {key: event[key] for key in ("id", "created", "model") if key in event}
        opening |= {"kvlink": {"sources": _sources(scheduled)}, "choices": []}
        if scheduled.chat:
            delta = {"role": "assistant", "content": ""}
            opening["choices"] = [{"index": 0, "delta": delta, "finish_reason": None}]
        yield opening | {"object": _object(scheduled, chunk=True)}
    yield _of_client(event, scheduled, chunk=True) if "choices" in event else dict(event)


def _of_client(
    answer: Mapping[str, Any], scheduled: Scheduled, *, chunk: bool = False
) -> dict[str, Any]:
    made = {key: value for key, value in answer.items() if key != "kv_transfer_params"}
    if not scheduled.chat:
        return made
    made["object"] = _object(scheduled, chunk=chunk)
    made["choices"] = [_choice(each, chunk=chunk) for each in answer["choices"]]
    return made


def _choice(choice: Mapping[str, Any], *, chunk: bool) -> dict[str, Any]:
    text = choice.get("text") or ""
    said = (
        {"delta": {"content": text}}
        if chunk
        else {"message": {"role": "assistant", "content": text}}
    )
    kept = {key: choice.get(key) for key in ("index", "finish_reason", "stop_reason")}
    return {**kept, **said, "logprobs": None}


def _object(scheduled: Scheduled, *, chunk: bool) -> str:
    if not scheduled.chat:
        return "text_completion"
    return "chat.completion.chunk" if chunk else "chat.completion"


def _sources(scheduled: Scheduled) -> list[dict[str, Any]]:
    return [
        {"id": each.identified().id, "title": each.title, "text": each.text}
        for each in scheduled.documents
    ]


# Bodies


def _asked(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The field `kvlink` of a body, empty where there is none. Raises `RequestError`."""
    asked = body.get("kvlink")
    if asked is None:
        return {}
    wanted = "kvlink: {'documents': [ids]} or {'k': passages}"
    if not isinstance(asked, dict) or len(asked) != 1:
        raise RequestError(f"found kvlink={json.dumps(asked)[:80]}, expected {wanted}")
    ids, k = asked.get("documents"), asked.get("k")
    if isinstance(ids, list) and ids and all(isinstance(i, str) for i in ids):
        return asked
    if isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= 100:
        return asked
    raise RequestError(f"found kvlink={json.dumps(asked)[:80]}, expected {wanted}")


def _messages(body: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """The conversation in plain texts, or None where it is of another kind."""
    if "messages" not in body:
        prompt = body.get("prompt")
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else None
    messages = body["messages"]
    if not isinstance(messages, list) or not messages:
        return None
    plain = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return None
        if (text := _text(message.get("content"))) is None:
            return None
        plain.append({"role": message["role"], "content": text})
    return plain if plain[-1]["role"] == "user" else None


def _text(content: object) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "\n".join(map(str, texts)) if whole else None


def _contents(content: str | Sequence[Part]) -> Sequence[Part]:
    return [Text(content)] if isinstance(content, str) else content


def _room(body: Mapping[str, Any]) -> int:
    default = DEFAULT_TOKENS if "messages" in body else COMPLETION_TOKENS
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if value is not None:
            if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
                return value
            raise RequestError(f"found {name}={value!r}, expected 1 or more")
    return default


def _not_served(body: Mapping[str, Any]) -> str:
    """A field that asks for what cannot be had over a prompt that vLLM does not compute, or ""."""
    known = PASSED_ON | OURS
    return next(
        (name for name, value in body.items() if name not in known and value not in NOTHING), ""
    )
