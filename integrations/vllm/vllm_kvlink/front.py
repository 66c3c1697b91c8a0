"""A request of OpenAI's API to the same request with its prompt laid out.

    documents named, or passages recognised → parts → layout → token ids, salt, kv_transfer_params

Runs beside vLLM's server: opens the catalog and the tokenizer, loads no weights. Knows bodies of
requests as JSON; knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvlink_rag import Document, KVLinkRAG, Part, Passage, Text
from kvlink_rag.errors import DocumentNotFound, PromptError
from kvlink_rag.prompt.fitting import fit
from kvlink_rag.prompt.format import PromptFormat
from kvlink_rag.prompt.recognition import Recogniser, count_passages

from .handover import KEY, SALT, Handover
from .options import Options

Body = dict[str, Any]

NAMED = "documents"  # ids, in kv_transfer_params
NAMED_XARGS = "kvlink_documents"  # the same for clients that have vllm_xargs alone
ROOM = 256  # tokens left for an answer whose length is not said
NEVER = -100.0  # OpenAI's bias of a token that is not to be said
# Fields that make vLLM render or compute another prompt than the one laid out here.
UNSERVED = (
    *("prompt_logprobs", "echo", "tools", "documents", "chat_template", "chat_template_kwargs"),
    *("continue_final_message", "suffix", "prompt_embeds", "use_beam_search"),
)


class Front:
    """Lays out the prompts of requests over one collection.

    vocabulary, window: of vLLM's model; min_tokens: see `Options`.
    """

    def __init__(self, rag: KVLinkRAG, *, vocabulary: int, window: int, min_tokens: int) -> None:
        format = rag.outline()
        self._rag, self._vocabulary = rag, vocabulary
        self._format: PromptFormat = replace(format, window=min(window, format.window))
        self._recogniser = Recogniser(
            rag.catalog, format.tokenizer, min_tokens=min_tokens, most=format.spec.max_passages
        )
        self._never = [id for id in format.spec.special_ids() if id < vocabulary]

    @classmethod
    def of(cls, vllm_config: Any) -> Front:
        """That of a server, by its `--kv-transfer-config`. Raises `ConfigError`."""
        options = Options.of(vllm_config.kv_transfer_config.kv_connector_extra_config)
        model = vllm_config.model_config
        return cls(
            replace(options, remote="").open(),  # snapshots are the worker's affair
            vocabulary=model.hf_config.vocab_size,
            window=model.max_model_len,
            min_tokens=options.min_tokens,
        )

    def chat(self, body: Body) -> Body:
        """A chat request; as it is where no document is named and none recognised."""
        ids, messages = _named(body), body.get("messages")
        plain = _plain_messages(messages)
        if plain is None:
            _refuse_unless(not ids, "messages", "text of system, user and assistant alone")
            return body
        parts = self._named_parts(plain, ids) if ids else self._recognised(body, plain)
        if parts is None:
            return body
        handover = self._handover(body, parts)
        carried = {"prompt_token_ids": handover.placeholders(self._vocabulary)}
        return self._laid_out(body, handover, carried)

    def completion(self, body: Body) -> Body:
        """A completion request; as it is where no document is named."""
        ids, question = _named(body), body.get("prompt")
        if not ids:
            return body
        if not isinstance(question, str):
            raise PromptError("found no text as prompt, expected the question as one string")
        handover = self._handover(body, self._format.prompt(self._documents(ids), question))
        laid_out = self._laid_out(body, handover, {})
        return {**laid_out, "prompt": handover.placeholders(self._vocabulary)}

    def _named_parts(self, messages: Sequence[Mapping[str, str]], ids: Sequence[str]) -> list[Part]:
        """The prompt over named documents: before the last message, which is the question."""
        documents = self._documents(ids)
        *earlier, last = messages
        if last["role"] != "user" or not last["content"].strip():
            raise PromptError("the last message is no question of the user's, expected one")
        if not earlier:
            return self._format.prompt(documents, last["content"])
        asked = {**last, "content": [*map(Passage, documents), Text(last["content"])]}
        recognised = self._recogniser.recognise_contents([*earlier, asked])
        return self._format.chat(recognised)

    def _documents(self, ids: Sequence[str]) -> list[Document]:
        """Documents by id. Raises `DocumentNotFound`, without the name of the directory."""
        if missing := self._rag.catalog.missing(ids):
            raise DocumentNotFound(f"no document with id {missing[0]!r} in the collection")
        return self._rag.get(ids)

    def _recognised(self, body: Body, messages: Sequence[Mapping[str, str]]) -> list[Part] | None:
        """The prompt with passages that it holds verbatim; None where it holds none."""
        recognised = self._recogniser.recognise_contents(messages)
        if not any(count_passages(message["content"]) for message in recognised):
            return None
        room = body.get("max_completion_tokens") or body.get("max_tokens") or ROOM
        room = room if isinstance(room, int) else ROOM
        return fit(self._format, self._format.chat(recognised), room)

    def _handover(self, body: Body, parts: Sequence[Part]) -> Handover:
        for name in UNSERVED:
            _refuse_unless(not body.get(name), name, "it left out where passages are reused")
        if body.get("add_generation_prompt") is False:
            raise PromptError("found add_generation_prompt=false, expected true")
        return Handover.of(self._format.layout(parts), tenant=body.get("cache_salt") or "")

    def _laid_out(self, body: Body, handover: Handover, carried: Mapping[str, Any]) -> Body:
        """`body` with all but the prompt as vLLM is to have it."""
        transfer = {k: v for k, v in (body.get("kv_transfer_params") or {}).items() if k != NAMED}
        made = {
            **body,
            "cache_salt": handover.salt,
            "kv_transfer_params": {**transfer, **carried, KEY: handover.to_json()},
            "min_tokens": body.get("min_tokens") or 1,  # kvlink_rag says no empty answers either
        }
        if "vllm_xargs" in made:
            xargs = made["vllm_xargs"] or {}
            made["vllm_xargs"] = {k: v for k, v in xargs.items() if k != NAMED_XARGS}
        if self._never:
            said = {str(id): NEVER for id in self._never}
            made["logit_bias"] = {**(body.get("logit_bias") or {}), **said}
        return made


def check_client(body: Mapping[str, Any]) -> None:
    """Raise `PromptError` where a request from outside holds what only this side may write."""
    transfer = body.get("kv_transfer_params")
    if isinstance(transfer, Mapping) and KEY in transfer:
        raise PromptError(
            f"found {KEY} in kv_transfer_params, which is made by the server; name documents with "
            f'"kv_transfer_params": {{"{NAMED}": ["id", …]}}'
        )
    salt = body.get("cache_salt")
    if isinstance(salt, str) and salt.startswith(SALT):
        raise PromptError(
            f"found a cache_salt that begins with {SALT!r}, which is kept for laid-out prompts; "
            "use another"
        )


def _named(body: Mapping[str, Any]) -> list[str]:
    """The ids of documents that a request names. Raises `PromptError` for anything else there."""
    transfer, xargs = (body.get(name) or {} for name in ("kv_transfer_params", "vllm_xargs"))
    if not isinstance(transfer, Mapping) or not isinstance(xargs, Mapping):
        return []  # vLLM says what is wrong with them
    found = transfer.get(NAMED) or xargs.get(NAMED_XARGS) or []
    if not isinstance(found, list) or not all(isinstance(id, str) for id in found):
        raise PromptError(f"found documents {found!r:.80}, expected a list of their ids")
    return found


def _plain_messages(messages: object) -> list[dict[str, str]] | None:
    """Messages as roles and texts; None where they are, or hold, something else."""
    if not isinstance(messages, list) or not messages:
        return None
    plain = [_plain_message(message) for message in messages]
    return [each for each in plain if each is not None] if None not in plain else None


def _plain_message(message: object) -> dict[str, str] | None:
    if not isinstance(message, Mapping) or message.get("tool_calls"):
        return None
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "\n".join(map(str, texts)) if whole else None
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        return None
    return {"role": str(role), "content": content}


def _refuse_unless(fits: bool, name: str, expected: str) -> None:
    if not fits:
        raise PromptError(f"found {name} that cannot be served here, expected {expected}")
