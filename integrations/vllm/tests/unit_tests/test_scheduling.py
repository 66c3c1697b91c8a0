"""What is handed over, when, and into which pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from vllm_kvlink import Handover
from vllm_kvlink.handover import KEY
from vllm_kvlink.scheduling import Scheduling

HANDOVER = Handover((*range(1, 100), tiny.VOCABULARY + 3, 7), ((5, 40),))


def request(handover: Handover | None = HANDOVER, **changes: Any) -> Any:
    """A request as vLLM has it."""
    facts: dict[str, Any] = {"request_id": "r1", "prompt_token_ids": [1, 2, 3]}
    facts |= {"cache_salt": None, "kv_transfer_params": None, "skip_reading_prefix_cache": None}
    facts |= {"sampling_params": SimpleNamespace(prompt_logprobs=None)}
    if handover is not None:
        facts["prompt_token_ids"] = handover.placeholders(tiny.VOCABULARY)
        facts["cache_salt"] = handover.salt
        facts["kv_transfer_params"] = {KEY: handover.to_json()}
    return SimpleNamespace(**{**facts, **changes})


@pytest.fixture
def scheduling() -> Scheduling:
    return Scheduling(tiny.VOCABULARY)


def test_all_but_the_last_token_comes_from_outside(scheduling: Scheduling) -> None:
    assert scheduling.matched(request(), 0) == 100
    assert scheduling.matched(request(), 0) == 100  # asked again before there was room
    assert scheduling.matched(request(), 32) == 68
    assert scheduling.matched(request(), 128) == 0


def test_other_requests_are_vllms_own(scheduling: Scheduling) -> None:
    assert scheduling.matched(request(None), 0) == 0
    assert scheduling.matched(request(None, cache_salt="mine"), 0) == 0
    scheduling.allocated(request(None), [1, 2], 0)
    assert scheduling.loads([("r1", 0)]) == []


def test_a_load_says_which_tokens_go_where(scheduling: Scheduling) -> None:
    scheduling.matched(request(), 32)
    scheduling.allocated(request(), [4, 2, 9, 7], 68)
    (load,) = scheduling.loads([("r1", 100)])
    assert (load.block_ids, load.first, load.count) == ((4, 2, 9, 7), 32, 68)
    assert load.handover == HANDOVER
    assert scheduling.loads([]) == []


def test_a_preempted_request_is_loaded_again(scheduling: Scheduling) -> None:
    scheduling.matched(request(), 0)
    scheduling.allocated(request(), [1, 2, 3, 4], 100)
    scheduling.loads([("r1", 100)])
    # vLLM took its pages; it comes back with other ones and what it had said behind its prompt
    assert scheduling.matched(request(), 0) == 100
    scheduling.allocated(request(), [8, 9, 5, 6], 100)
    (load,) = scheduling.loads([("r1", 100)])
    assert (load.block_ids, load.first, load.count) == ((8, 9, 5, 6), 0, 100)


def test_vllm_may_not_pass_over_what_is_handed_over(scheduling: Scheduling) -> None:
    """It would, for requests that want their prompt computed."""
    ours = request(skip_reading_prefix_cache=True)
    own = request(None, request_id="r2", skip_reading_prefix_cache=True)
    assert scheduling.matched(ours, 0) == 100
    assert scheduling.matched(own, 0) == 0
    assert (ours.skip_reading_prefix_cache, own.skip_reading_prefix_cache) == (False, True)


def test_a_causal_recomputation_is_never_run(scheduling: Scheduling) -> None:
    scheduling.matched(request(), 0)
    with pytest.raises(RuntimeError, match="compute tokens 64 to 100 of r1 causally"):
        scheduling.loads([("r1", 64)])
    scheduling.finished("r1")
    assert scheduling.loads([("r1", 0)]) == []  # another of that name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cache_salt": None}, "found the cache salt None"),
        ({"sampling_params": SimpleNamespace(prompt_logprobs=1)}, "leave it out"),
        ({"sampling_params": None}, "prompt_logprobs"),
        ({"cache_salt": Handover((1, 2)).salt}, "expected the layout's"),
        ({"prompt_token_ids": [1, 2, 3]}, "not those of its layout"),
        ({"kv_transfer_params": {KEY: {"format": 9}}}, "expected a layout of format 1"),
        ({"kv_transfer_params": None}, "kept for prompts that were laid out"),
    ],
)
def test_what_contradicts_itself_is_refused(
    scheduling: Scheduling, changes: dict[str, Any], told: str
) -> None:
    """It gets pages, so that its load can fail, and nothing to fill them with."""
    wrong = request(**changes)
    tokens = len(wrong.prompt_token_ids) - 1
    assert scheduling.matched(wrong, 0) == tokens
    scheduling.allocated(wrong, [1, 2, 3, 4], tokens)
    (load,) = scheduling.loads([("r1", tokens)])
    assert load.handover is None
    assert told in load.refused
