"""The real vLLM decodes what kvlink_rag prefilled: token by token the masked full prefill's answer.

Run by `make test-vllm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from engine_tests.engines import Said, ask, ask_plain, engine, needs_vllm, request, transfer
from vllm_kvlink import Handover, export
from vllm_kvlink.handover import SALT
from vllm_kvlink.scheduling import Scheduling

from kvlink_rag import KVLinkModel, KVLinkRAG

pytestmark = [needs_vllm, pytest.mark.filterwarnings("default")]

V = tiny.VOCABULARY
STEPS = 8
BLOCKS = 32  # pages of 32 tokens; a prompt here takes nine
QUESTIONS = ("When was the harbour of Teldon built?", "How many lamps?", "Which is the oldest one?")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its collection, and the directory that vLLM serves."""
    root = tmp_path_factory.mktemp("served")
    model = KVLinkModel.from_pretrained(tiny.saved(root / "model"), device="cpu", dtype="float32")
    export(model, root / "served")
    with KVLinkRAG.open(
        root / "collection",
        model=root / "model",
        embedder=tiny.NoEmbedder(),
        dtype="float32",
        codec="exact",
    ) as rag:
        rag.register(tiny.documents())
    return root


@pytest.fixture(scope="module")
def llm(place: Path) -> Iterator[Any]:
    config = transfer(place / "collection")
    with engine(place / "served", config, num_gpu_blocks_override=BLOCKS) as running:
        yield running


@pytest.fixture
def handovers(model: KVLinkModel) -> list[Handover]:
    found = tiny.documents()
    return [
        Handover.of(model.layout(model.prompt([*found[i:], *found[:i]], question)))
        for i, question in enumerate(QUESTIONS)
    ]


def check(model: KVLinkModel, handover: Handover, said: Said, steps: int = STEPS) -> None:
    """`said` is what the masked full prefill says, and so are the log-probabilities."""
    ids, first = tiny.greedy(model, handover.layout(model.spec.header), steps)
    assert said.token_ids == ids
    for id, found in said.first.items():
        assert found == pytest.approx(float(first[id]), abs=1e-4)


def test_answers_are_the_masked_prefills(
    model: KVLinkModel, llm: Any, handovers: list[Handover]
) -> None:
    for handover, said in zip(handovers, ask(llm, *handovers, vocabulary=V), strict=True):
        check(model, handover, said)


def test_a_second_request_takes_vllms_own_pages(
    model: KVLinkModel, llm: Any, handovers: list[Handover], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same layout again: all whole pages are vLLM's, the connector loads the rest."""
    (first,) = ask(llm, handovers[0], vocabulary=V)
    loaded = spy(monkeypatch)
    (again,) = ask(llm, handovers[0], vocabulary=V)
    tokens = len(handovers[0].token_ids) - 1
    assert loaded == [(0, tokens % 32)] or tokens % 32 == 0
    assert again == first
    check(model, handovers[0], again)


def test_layouts_of_the_same_ids_are_kept_apart(
    model: KVLinkModel, llm: Any, handovers: list[Handover]
) -> None:
    """Whoever was there first, plain requests among them, poisons no other's pages."""
    one = handovers[1]
    start = next(i for i, id in enumerate(one.token_ids) if id > V + 1)
    ids = (*one.token_ids[:start], one.token_ids[start] + 4, *one.token_ids[start + 1 :])
    other_link = dataclasses.replace(one, token_ids=ids)
    as_text = dataclasses.replace(one, passages=one.passages[1:])
    same = one.placeholders(V)
    assert other_link.placeholders(V) == as_text.placeholders(V) == same
    plain = ask_plain(llm, same)
    for handover in (one, other_link, as_text, one, other_link):
        (said,) = ask(llm, handover, vocabulary=V)
        check(model, handover, said)
        assert said.first != plain.first
    assert ask_plain(llm, same) == plain


def test_without_its_salt_a_layout_is_poisoned(
    model: KVLinkModel, llm: Any, handovers: list[Handover], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above guards against is real: with one salt for all, a wrong answer."""
    monkeypatch.setattr(Handover, "salt", SALT + "the same for all")
    one = handovers[2]
    as_text = dataclasses.replace(one, passages=())
    ask(llm, one, vocabulary=V)
    (said,) = ask(llm, as_text, vocabulary=V)
    with pytest.raises(AssertionError):
        check(model, as_text, said)
    llm.reset_prefix_cache()


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every load from here on: the request's preemptions so far, and the tokens loaded."""
    loaded = []
    allocated = Scheduling.allocated

    def noted(self: Any, request: Any, block_ids: Any, external: int) -> None:
        if external:
            loaded.append((request.num_preemptions, external))
        allocated(self, request, block_ids, external)

    monkeypatch.setattr(Scheduling, "allocated", noted)
    return loaded


def test_a_preempted_request_is_loaded_again(
    model: KVLinkModel, llm: Any, handovers: list[Handover], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts fit, their answers do not: one is put back, and goes on where it was."""
    llm.reset_prefix_cache()
    loaded = spy(monkeypatch)
    steps = 150
    said = ask(llm, *handovers, vocabulary=V, steps=steps)
    again = [tokens for preemptions, tokens in loaded if preemptions]
    assert again, "no request was preempted: give the engine fewer pages"
    assert max(again) > 32
    for handover, one in zip(handovers, said, strict=True):
        check(model, handover, one, steps)


@pytest.mark.parametrize("what", ["salt", "ids", "layout"])
def test_a_request_that_contradicts_itself_ends_and_the_engine_goes_on(
    model: KVLinkModel, llm: Any, handovers: list[Handover], what: str
) -> None:
    from vllm import SamplingParams

    one = handovers[0]
    forged = {
        "salt": request(one.placeholders(V), handovers[1].salt),
        "ids": request([5] * len(one.token_ids), one.salt),
        "layout": request(one.placeholders(V), one.salt),
    }[what]
    layout = {} if what == "layout" else {"kvlink_layout": one.to_json()}
    sampling = SamplingParams(
        temperature=0, max_tokens=4, extra_args={"kv_transfer_params": layout}
    )
    (found,) = llm.generate([forged], [sampling], use_tqdm=False)
    assert found.outputs[0].finish_reason == "error"
    assert not found.outputs[0].token_ids
    (said,) = ask(llm, one, vocabulary=V)
    check(model, one, said)


def test_a_prefill_that_fails_ends_its_request_alone(
    model: KVLinkModel, llm: Any, handovers: list[Handover]
) -> None:
    """An id beyond the model that prefills is known only there."""
    wrong = dataclasses.replace(handovers[0], token_ids=(9999, *handovers[0].token_ids[1:]))
    bad, good = ask(llm, wrong, handovers[1], vocabulary=V)
    assert bad.why == "error"
    check(model, handovers[1], good)


def test_a_request_for_the_prompts_log_probabilities_ends_alone(
    model: KVLinkModel, llm: Any, handovers: list[Handover]
) -> None:
    """vLLM would compute the placeholders for it."""
    from vllm import SamplingParams

    one = handovers[0]
    carried = {"kv_transfer_params": {"kvlink_layout": one.to_json()}}
    sampling = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1, extra_args=carried)
    prompt = request(one.placeholders(V), one.salt)
    (found,) = llm.generate([prompt], [sampling], use_tqdm=False)
    assert found.outputs[0].finish_reason == "error"
    (said,) = ask(llm, one, vocabulary=V)
    check(model, one, said)


def test_tenants_share_no_pages(llm: Any, handovers: list[Handover], monkeypatch: Any) -> None:
    ask(llm, handovers[0], vocabulary=V)
    loaded = spy(monkeypatch)
    ask(llm, dataclasses.replace(handovers[0], tenant="another"), vocabulary=V)
    assert loaded == [(0, len(handovers[0].token_ids) - 1)]
