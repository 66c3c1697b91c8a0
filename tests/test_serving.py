"""OpenAI's API, by OpenAI's own client over real HTTP: every endpoint against the library."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
pytest.importorskip("starlette")

import trust  # noqa: E402
from conftest import WordEmbedder  # noqa: E402
from server import EMBEDDER, READER, TOWNS, Running, make_towns, running  # noqa: E402

from kvlink_rag import KVLinkRAG  # noqa: E402
from kvlink_rag.documents import Passage, Text  # noqa: E402
from kvlink_rag.ingest.sources import FILE_KEY  # noqa: E402
from kvlink_rag.serving.endpoints import ENDPOINTS  # noqa: E402

QUESTION = "Orvale harbour?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("served")
    make_towns(root)
    with running(root) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["kvlink/towns", READER, EMBEDDER]
    assert client.models.retrieve("kvlink/towns").id == "kvlink/towns"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("kvlink/elsewhere")


def test_a_collection_answers_as_the_library_does(server: Running, client: Any) -> None:
    answer = client.chat.completions.create(model="kvlink/towns", messages=MESSAGES, max_tokens=12)
    with server.towns() as rag:
        expected = rag.ask(QUESTION, k=3, max_new_tokens=12)
        prompt = rag.model.layout(
            rag.model.prompt([hit.document for hit in expected.hits], QUESTION)
        )
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == "length"
    sources = answer.model_extra["kvlink"]["sources"]
    assert [s["id"] for s in sources] == [hit.document.id for hit in expected.hits]
    assert [s["text"] for s in sources] == [hit.document.text for hit in expected.hits]
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(prompt) + 12
    assert prompt.reused_tokens <= answer.usage.prompt_tokens_details.cached_tokens < len(prompt)


@pytest.mark.parametrize("model", ["kvlink/towns", READER])
def test_a_stream_is_the_answer_in_pieces(client: Any, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**asked)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len(chunks) > 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])
    assert {c.id for c in chunks} == {chunks[0].id}


def test_the_bare_reader_recognises_passages(server: Running, client: Any) -> None:
    _, title, text = max(TOWNS, key=lambda row: len(row[2]))
    prompt = f"Use this.\n\n{title}\n{text}\n\nQuestion: where is it?"
    answer = client.chat.completions.create(
        model=READER, messages=[{"role": "user", "content": prompt}], max_tokens=6
    )
    with server.towns() as rag:
        expected = rag.complete(prompt, max_new_tokens=6)
        said = "".join(expected)
    assert answer.choices[0].message.content == said
    assert answer.model_extra["kvlink"]["trace"]["passages"] == expected.trace.passages == 1
    assert answer.usage.prompt_tokens_details.cached_tokens >= len(text)


def test_what_stands_before_the_question_is_kept(server: Running, client: Any) -> None:
    with server.towns() as rag:
        found = {name: by_turns(rag, name) for name in ("", *trust.NAMES)}
    earlier = next(name for name in trust.NAMES if found[name] != found[""])
    before: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": earlier},
        {"role": "assistant", "content": "A town."},
    ]
    sent = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *before[1:]]
    answer = client.chat.completions.create(
        model="kvlink/towns", messages=[*sent, *MESSAGES], max_tokens=12
    )
    sources = answer.model_extra["kvlink"]["sources"]
    with server.towns() as rag:
        assert [source["id"] for source in sources] == found[earlier]
        passages = [Passage(document) for document in rag.get([s["id"] for s in sources])]
        last = {"role": "user", "content": [*passages, Text(QUESTION)]}
        parts = rag.model.chat([*before, last])
        expected = rag.model.generate(parts, mode="masked", max_new_tokens=12)
        assert answer.usage.prompt_tokens == len(rag.model.layout(parts))
    assert answer.choices[0].message.content == expected


def by_turns(rag: KVLinkRAG, earlier: str) -> list[str]:
    """Ids of the hits for the question alone and after an earlier one, in turn."""
    both = zip(rag.search(QUESTION, 3), rag.search(f"{earlier} {QUESTION}", 3), strict=True)
    return list(dict.fromkeys(str(hit.document.id) for pair in both for hit in pair))[:3]


def test_sampling_options(client: Any) -> None:
    asked = {"model": READER, "messages": MESSAGES, "max_tokens": 16}
    greedy = client.chat.completions.create(**asked).choices[0].message.content
    hot = {**asked, "temperature": 1.5, "top_p": 0.9}
    seeded = [client.chat.completions.create(**hot, seed=-7) for _ in range(2)]
    assert seeded[0].choices[0].message.content == seeded[1].choices[0].message.content != greedy
    stop = greedy[4:6]
    stopped = client.chat.completions.create(**asked, stop=[stop])
    assert stopped.choices[0].message.content == greedy[: greedy.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    fewer = client.chat.completions.create(
        model="kvlink/towns", messages=MESSAGES, max_tokens=1, extra_body={"k": 1}
    )
    assert len(fewer.model_extra["kvlink"]["sources"]) == 1


def test_an_answer_cites_the_passages_with_its_words(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlink_rag.serving.pieces.cited", lambda *texts: [1])
    asked = {"model": "kvlink/towns", "messages": MESSAGES, "max_tokens": 6}
    answer = client.chat.completions.create(**asked)
    second = answer.model_extra["kvlink"]["sources"][1]
    (citation,) = answer.choices[0].message.annotations
    assert citation.url_citation.title == second["title"]
    assert citation.url_citation.url == f"urn:kvlink:towns:{second['id']}"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    (told,) = [
        d.model_extra["annotations"]
        for c in chunks
        if "annotations" in ((d := c.choices[0].delta).model_extra or {})
    ]
    assert told == [citation.model_dump()]


def test_completions(server: Running, client: Any) -> None:
    prompts = ["Orvale?", "Teldon mill?"]
    answer = client.completions.create(model=READER, prompt=prompts, max_tokens=8)
    with server.towns() as rag:
        expected = ["".join(rag.complete(prompt, max_new_tokens=8)) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 16
    texts = ["", ""]
    for chunk in client.completions.create(model=READER, prompt=prompts, max_tokens=8, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"n": 2},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"presence_penalty": 0.5},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "tool", "content": "4", "tool_call_id": "1"}]},
        {"messages": [{"role": "assistant", "content": "Hello."}]},
        {"max_tokens": 0},
        {"stop": ""},
        {"temperature": 3},
        {"repair": "all of it"},
    ],
    ids=json.dumps,
)
def test_what_is_not_served_is_a_400_in_openais_form(server: Running, asked: Any) -> None:
    body = {"model": "kvlink/towns", "messages": MESSAGES, **asked}
    with server.client() as http:
        answer = http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert any(word in error["message"] for word in (*asked, "role", "last message"))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"background": True}, "background is not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"n": 3}, "n is not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"input": " "}, "the last message is empty"),
        ({"input": [{"role": "user", "content": None}]}, "the last message is empty"),
        ({"tools": [{"type": "web_search"}]}, "file_search"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "at least 1 item"),
        ({"tools": [{"type": "file_search", "vector_store_ids": ["a", "b"]}]}, "at most 1 item"),
        ({"tools": [{"type": "file_search", "vector_store_ids": ["towns"]}]}, "own collection"),
        ({"text": {"format": {"type": "json_object"}}}, "'text'"),
        (
            {
                "tools": [
                    {
                        "type": "file_search",
                        "vector_store_ids": ["towns"],
                        "ranking_options": {"score_threshold": 0.5},
                    }
                ]
            },
            "ranking_options is not supported",
        ),
        ({"input": []}, "at least 1 item"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "expected a message or"),
        ({"input": [{"type": {}, "output": "x"}]}, "expected a message or"),
        ({"input": [{"content": "x"}]}, "role"),
        ({"input": [0]}, "input.0"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "not the user's"),
        ({"input": [{"type": "file_search_call", "id": "fs_1"}]}, "not the user's"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
    ids=str,
)
def test_what_a_response_cannot_be(server: Running, asked: Any, told: str) -> None:
    with server.client() as http:
        answer = http.post("/v1/responses", json={"model": "kvlink/towns", "input": "x", **asked})
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


def test_a_response_is_what_a_chat_says(client: Any) -> None:
    chat = client.chat.completions.create(model="kvlink/towns", messages=MESSAGES, max_tokens=12)
    answer = client.responses.create(model="kvlink/towns", input=QUESTION, max_output_tokens=12)
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == 12
    assert answer.usage.total_tokens == chat.usage.total_tokens
    assert answer.usage.input_tokens_details.cached_tokens > 0
    assert answer.model_extra["kvlink"]["sources"] == chat.model_extra["kvlink"]["sources"]
    (message,) = answer.output
    (text,) = message.content
    cited = [each.model_dump() for each in chat.choices[0].message.annotations]
    assert [each.model_dump() for each in text.annotations] == [
        {"type": "url_citation", **each["url_citation"]} for each in cited
    ]


def test_a_response_keeps_what_stands_before(client: Any) -> None:
    """Instructions, and a conversation with the output of an earlier response in it."""
    first = client.responses.create(model="kvlink/towns", input=QUESTION, max_output_tokens=6)
    answer = client.responses.create(
        model="kvlink/towns",
        instructions="Be brief.",
        input=[
            {"role": "user", "content": QUESTION},
            *first.output,
            {"role": "user", "content": [{"type": "input_text", "text": "And the mill?"}]},
        ],
        max_output_tokens=6,
        metadata={"asked": "twice"},
    )
    chat = client.chat.completions.create(
        model="kvlink/towns",
        messages=[
            {"role": "system", "content": "Be brief."},
            *MESSAGES,
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And the mill?"},
        ],
        max_tokens=6,
    )
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert (answer.instructions, answer.metadata) == ("Be brief.", {"asked": "twice"})


@pytest.mark.parametrize("search", [False, True])
def test_a_response_comes_in_pieces(client: Any, search: bool) -> None:
    """To a stop string, since the client's own helper asks for an end that is no limit."""
    asked: dict[str, Any] = {"model": "kvlink/towns", "input": QUESTION, "max_output_tokens": 16}
    if search:
        tool = {"type": "file_search", "vector_store_ids": ["towns"], "max_num_results": 2}
        asked |= {"model": READER, "tools": [tool], "include": ["file_search_call.results"]}
    stop = client.responses.create(**asked).output_text[8:10]
    asked["extra_body"] = {"stop": [stop]}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:  # the client puts the pieces together itself
        events = list(stream)
        final = stream.get_final_response()
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    pieces = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(pieces) == whole.output_text == final.output_text != ""
    assert final.usage.model_dump() == whole.usage.model_dump() | {
        "input_tokens_details": final.usage.input_tokens_details.model_dump()
    }
    kinds = [item.type for item in final.output]
    assert kinds == [item.type for item in whole.output]
    whiles = [e.type for e in events if e.type.endswith(("item.added", "item.done"))]
    assert whiles == ["response.output_item.added", "response.output_item.done"] * len(kinds)
    added = [e.item.type for e in events if e.type == "response.output_item.added"]
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert added == kinds == [item.type for item in done]
    for one, other in zip(done, final.output, strict=True):
        assert {**one.model_dump(), "id": ""} == {**other.model_dump(), "id": ""} | (
            {"content": one.model_dump()["content"]} if one.type == "message" else {}
        )


def test_a_response_searches_a_store(server: Running, client: Any) -> None:
    """OpenAI's own tool, over a collection: the answer is that of the collection's model."""
    tool = {"type": "file_search", "vector_store_ids": ["towns"], "max_num_results": 2}
    asked: Any = {"model": READER, "input": QUESTION, "tools": [tool], "max_output_tokens": 8}
    answer = client.responses.create(**asked, include=["file_search_call.results"])
    call, message = answer.output
    with server.towns() as rag:
        expected = rag.ask(QUESTION, k=2, max_new_tokens=8)
    assert message.content[0].text == expected.text
    assert call.queries == [QUESTION]
    assert [found.text for found in call.results] == [h.document.text for h in expected.hits]
    assert [found.score for found in call.results] == [h.score for h in expected.hits]
    assert client.responses.create(**asked).output[0].results is None
    missing = {**tool, "vector_store_ids": ["elsewhere"]}
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**{**asked, "tools": [missing]})


def test_a_search_cites_the_file(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the passage is of an uploaded one; what this model says has no words of any passage."""
    monkeypatch.setattr("kvlink_rag.serving.pieces.cited", lambda *given: [0])
    file = client.files.create(file=("q.txt", b"The quarry of Zubrin."), purpose="assistants")
    store = client.vector_stores.create(name="quarries")
    client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id)
    for searched in (store.id, "towns"):
        tool: Any = {"type": "file_search", "vector_store_ids": [searched]}
        asked: Any = {"model": READER, "input": QUESTION, "tools": [tool], "max_output_tokens": 4}
        told = client.responses.create(**asked)
        (cited,) = told.output[1].content[0].annotations
        if searched == "towns":
            assert cited.type == "url_citation"
        else:
            assert cited.model_dump() == {
                "type": "file_citation",
                "file_id": file.id,
                "filename": "q.txt",
                "index": len(told.output_text),
            }
        *_, last = client.responses.create(**asked, stream=True)
        assert last.response.output[1].content[0].annotations == [cited]
    client.vector_stores.delete(store.id)


@pytest.mark.parametrize(
    "nothing",
    [
        {"reasoning": {"effort": None, "summary": None}},
        {"reasoning": {"effort": "none", "summary": None}},
        {"previous_response_id": ""},
        {"include": ["reasoning.encrypted_content"]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "file_search"}},
        {"max_tool_calls": 1, "parallel_tool_calls": True, "store": True, "service_tier": "auto"},
    ],
    ids=json.dumps,
)
def test_a_response_is_made_where_nothing_more_is_asked(client: Any, nothing: Any) -> None:
    tools = [{"type": "file_search", "vector_store_ids": ["towns"], "max_num_results": 1}]
    answer = client.responses.create(
        model=READER, input=QUESTION, tools=tools, max_output_tokens=2, extra_body=nothing
    )
    assert [item.type for item in answer.output] == ["file_search_call", "message"]


def test_a_response_without_the_tool_searches_nothing(client: Any) -> None:
    tools: Any = [{"type": "file_search", "vector_store_ids": ["towns"]}]
    asked: Any = {"model": READER, "input": QUESTION, "max_output_tokens": 4}
    answer = client.responses.create(**asked, tools=tools, tool_choice="none")
    assert [item.type for item in answer.output] == ["message"]
    assert answer.tool_choice == "none"
    assert answer.output_text == client.responses.create(**asked).output_text


def test_events_hold_no_end_of_a_line(server: Running) -> None:
    """U+2028 ends one for some clients, httpx's `iter_lines` among them."""
    asked = {
        "model": READER,
        "input": "x",
        "instructions": "a\u2028b\u0085c",
        "max_output_tokens": 2,
        "stream": True,
    }
    with server.client() as http, http.stream("POST", "/v1/responses", json=asked) as answer:
        lines = [line for line in answer.iter_lines() if line]
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert len(lines) == 2 * len(events)
    assert events[0]["response"]["instructions"] == asked["instructions"]


def test_a_million_wrong_parts_are_told_at_once(server: Running) -> None:
    """To the first of them: what looked at all would keep the server from everybody else."""
    bad = [0] * 300_000
    bodies = {
        "/v1/responses": {"model": READER, "input": [{"role": "user", "content": bad}]},
        "/v1/chat/completions": {
            "model": READER,
            "messages": [{"role": "user", "content": [0] * 900}] * 300,
        },
        "/v1/embeddings": {"model": EMBEDDER, "input": [{} for _ in bad]},
        "/v1/vector_stores": {"metadata": {f"k{n}": 0 for n in range(100_000)}},
    }
    for path, body in bodies.items():
        with pytest.raises(pydantic.ValidationError) as caught:
            next(e for e in ENDPOINTS if e.path == path and e.body).body.model_validate_json(
                json.dumps(body)
            )
        assert caught.value.error_count() < 20
        with server.client() as http:
            assert http.post(path, json=body).status_code == 400


def test_a_response_that_fails_midway_says_so(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("told to nobody")

    monkeypatch.setattr("kvlink_rag.serving.pieces._whole", broken)
    asked: Any = {"model": READER, "input": "x", "max_output_tokens": 4, "stream": True}
    *_, last = client.responses.create(**asked)
    assert (last.type, last.code) == ("error", "internal_error")
    assert last.message == "the server failed; its log says how"


def test_a_prompt_beyond_the_window_is_told(client: Any) -> None:
    messages = [{"role": "user", "content": "mill " * 2000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=READER, messages=messages, max_tokens=4, stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    for create, field in (
        (client.responses.create, "input"),
        (client.completions.create, "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create(model=READER, **{field: "mill " * 2000})
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", field)


def test_embeddings(client: Any) -> None:
    texts = ["Orvale harbour", "salt"]
    expected = WordEmbedder().embed(texts)
    found = client.embeddings.create(model=EMBEDDER, input=texts)  # asks for base64
    assert np.allclose([row.embedding for row in found.data], expected)
    plain = client.embeddings.create(model=EMBEDDER, input=texts[0], encoding_format="float")
    assert np.allclose(plain.data[0].embedding, expected[0])
    raw = client.embeddings.with_raw_response.create(
        model=EMBEDDER, input=texts, encoding_format="base64"
    )
    coded = json.loads(raw.text)["data"][1]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(coded), "<f4"), expected[1])
    with pytest.raises(openai.BadRequestError, match="64 dimensions"):
        client.embeddings.create(model=EMBEDDER, input="a", dimensions=7)


def test_token_ids_are_those_that_langchain_sends(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Encoding:
        def decode(self, ids: list[int]) -> str:
            return " ".join({1: "Orvale", 2: "salt"}[i] for i in ids)

    monkeypatch.setattr("kvlink_rag.serving.embeddings._encoding", Encoding)
    for given, texts in (([1, 2], ["Orvale salt"]), ([[1], [2, 2]], ["Orvale", "salt salt"])):
        found = client.embeddings.create(model=EMBEDDER, input=given)
        assert np.allclose([row.embedding for row in found.data], WordEmbedder().embed(texts))
    with pytest.raises(openai.BadRequestError, match="token id"):
        client.embeddings.create(model=EMBEDDER, input=[99])


# Files and vector stores


def test_a_store_from_upload_to_erasure(server: Running, client: Any, tmp_path: Path) -> None:
    path = tmp_path / "quarry.md"
    path.write_text("# Quarry\n\nThe quarry of Zubrin gives slate number 7741.\n")
    file = client.files.create(file=path, purpose="assistants")
    assert (file.filename, file.bytes) == ("quarry.md", path.stat().st_size)
    assert client.files.content(file.id).read() == path.read_bytes()
    assert file.id in [each.id for each in client.files.list()]

    store = client.vector_stores.create(name="stones", metadata={"of": "tests"})
    assert store.status == "completed"
    held = client.vector_stores.files.create_and_poll(
        file.id, vector_store_id=store.id, attributes={"year": 1911}, poll_interval_ms=10
    )
    assert (held.status, held.last_error, held.attributes) == ("completed", None, {"year": 1911})
    store = client.vector_stores.retrieve(store.id)
    assert (store.file_counts.completed, store.file_counts.total) == (1, 1)
    assert store.usage_bytes > 0

    (hit,) = client.vector_stores.search(store.id, query="quarry of Zubrin")
    assert "7741" in hit.content[0].text
    assert (hit.file_id, hit.filename) == (file.id, "quarry.md")
    assert hit.attributes["year"] == 1911
    assert FILE_KEY not in hit.attributes
    for kind, value, count in (("eq", 1911, 1), ("gt", 1911, 0), ("lte", 1911, 1), ("ne", 1, 1)):
        filters = {"type": kind, "key": "year", "value": value}
        found = client.vector_stores.search(store.id, query="quarry", filters=filters)
        assert len(found.data) == count, kind

    answer = client.chat.completions.create(
        model="kvlink/stones", messages=[{"role": "user", "content": "Zubrin?"}], max_tokens=4
    )
    (source,) = answer.model_extra["kvlink"]["sources"]
    assert (source["file_id"], source["filename"]) == (file.id, "quarry.md")
    assert str(server.root) not in answer.model_dump_json()
    renamed = client.vector_stores.update(store.id, name="rocks")
    assert renamed.name == "rocks"
    assert client.models.retrieve("kvlink/rocks").id == "kvlink/rocks"

    data = server.root / "data"
    assert holding(data, b"7741")
    assert holding(data, b"quarry.md")
    assert client.vector_stores.delete(store.id).deleted
    assert not holding(data, b"7741")
    assert not holding(data, b"quarry.md")
    assert not (data / "stores" / store.id).exists()
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.retrieve(store.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_deleting_a_file_takes_it_out_of_every_store(
    server: Running, client: Any, tmp_path: Path
) -> None:
    path = tmp_path / "wells.txt"
    path.write_text("The wells of Krumm hold brine number 5512.")
    file = client.files.create(file=path, purpose="assistants")
    stores = [client.vector_stores.create(name="w", file_ids=[file.id]) for _ in range(2)]
    for store in stores:
        client.vector_stores.files.poll(file.id, vector_store_id=store.id, poll_interval_ms=10)
    assert len(holding(server.root / "data", b"5512")) >= 3  # the original and two catalogs
    client.vector_stores.files.delete(file.id, vector_store_id=stores[0].id)
    assert client.vector_stores.search(stores[0].id, query="Krumm").data == []
    assert client.files.retrieve(file.id).id == file.id
    client.files.delete(file.id)
    assert client.vector_stores.search(stores[1].id, query="Krumm").data == []
    assert not holding(server.root / "data", b"5512")
    for store in stores:
        client.vector_stores.delete(store.id)


def test_files_that_cannot_be_read_say_why(client: Any, tmp_path: Path) -> None:
    store = client.vector_stores.create(name="bad")
    for name, content, word in (
        ("a.png", b"\x89PNG", "known kind"),
        ("b.pdf", b"%PDF-1.7 none", "PDF"),
        ("c.md", b"", "no text"),
    ):
        (tmp_path / name).write_bytes(content)
        held = client.vector_stores.files.upload_and_poll(
            vector_store_id=store.id, file=tmp_path / name, poll_interval_ms=10
        )
        assert held.status == "failed", name
        assert word in held.last_error.message
    failed = client.vector_stores.files.list(store.id, filter="failed")
    assert len(failed.data) == 3
    client.vector_stores.delete(store.id)


def test_lists_come_in_pages(client: Any) -> None:
    made = [client.vector_stores.create(name=f"page {n}").id for n in range(5)]
    assert [s.id for s in client.vector_stores.list(limit=2)][:5] == made[::-1]
    first = client.vector_stores.list(limit=2, order="asc")
    assert first.has_more
    assert first.data[0].id == "towns"
    last = client.vector_stores.list(limit=2, before=made[0])
    assert [s.id for s in last.data] == made[2:0:-1]
    for id in made:
        client.vector_stores.delete(id)


def test_a_given_collection_is_searched_and_stays(server: Running, client: Any) -> None:
    with server.towns() as rag:
        expected = [hit.document.text for hit in rag.search(QUESTION, 3)]
    found = client.vector_stores.search("towns", query=QUESTION, max_num_results=3)
    assert [hit.content[0].text for hit in found] == expected
    with pytest.raises(openai.BadRequestError, match="not deleted here"):
        client.vector_stores.delete("towns")
    assert len(trust.NAMES) == client.vector_stores.retrieve("towns").model_extra["kvlink_passages"]


def test_what_is_half_done_is_finished_by_the_next_server(tmp_path: Path) -> None:
    make_towns(tmp_path)
    with running(tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        file = client.files.create(file=("a.txt", b"The kiln of Ostrava."), purpose="assistants")
        left = client.files.create(file=("b.txt", b"The mine of Ostrava."), purpose="assistants")
        stores = [client.vector_stores.create(name=name) for name in ("kept", "leaving")]
        records = server.service.library.records
        records.leave_store(stores[1].id)
        records.leave_file(left.id)
        server.service.shelf._stopping = True  # as if killed before the file's turn
        client.vector_stores.files.create(stores[0].id, file_id=file.id)
        client.close()
    with running(tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        held = client.vector_stores.files.poll(
            file.id, vector_store_id=stores[0].id, poll_interval_ms=10
        )
        assert held.status == "completed"
        assert [s.id for s in client.vector_stores.list()] == [stores[0].id, "towns"]
        assert [f.id for f in client.files.list()] == [file.id]
        assert not (tmp_path / "data" / "files" / left.id).exists()
        client.close()


def holding(root: Path, text: bytes) -> list[Path]:
    """Files below `root` that hold `text`."""
    return [p for p in root.rglob("*") if p.is_file() and text in p.read_bytes()]
