"""Packing, block attention, the tokenizer and a few real training steps."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kvlink_rag.prompt.layout import layout
from kvlink_rag.prompt.tokenizer import PartTokenizer
from kvlink_rag.training import lm
from kvlink_rag.training.blocks import BIN, NAME, arrange, bins_of
from kvlink_rag.training.formats import preset
from kvlink_rag.training.mixture import Mixture, draw_prompt
from kvlink_rag.training.packing import CachedEncoder, Packed, pack
from kvlink_rag.training.questions import exercise
from kvlink_rag.training.small import COMPARED, corpus, make_compared
from kvlink_rag.training.tokenizer import small_spec, special_tokens, train_tokenizer

SPEC = small_spec()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> CachedEncoder:
    """A tokenizer trained on little text, saved and loaded as users load it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus(0, worlds=60)).save_pretrained(directory)
    return CachedEncoder(PartTokenizer(AutoTokenizer.from_pretrained(directory)))


def packed(encoder: CachedEncoder, seed: int = 0, k: int = 4, questions: int = 5) -> Packed:
    task = exercise(random.Random(seed), k, questions=questions)
    asked = [(q.text, q.answer) for q in task.questions]
    return pack(preset(task.pages, SPEC), asked, encoder, SPEC)


def test_special_tokens_have_the_ids_of_the_spec(encoder: CachedEncoder) -> None:
    names = special_tokens()
    ids = [encoder.encode(name, True) for name in names]
    assert ids == [[i] for i in range(len(names))]
    assert SPEC.link_ids(3)[2] == names.index("<|link_3_2|>")
    assert names[SPEC.mem_start or 0] == "<|mem_start|>"


@pytest.mark.parametrize("before", ["", " ", "\n", "(", ". ", "by ", '"', "- "])
def test_a_name_has_the_same_tokens_wherever_it_stands(encoder: CachedEncoder, before: str) -> None:
    alone = encoder.encode("Quorvale")
    assert encoder.encode(f"{before}Quorvale")[-len(alone) :] == alone
    inside = encoder.encode(f"{before}Quorvale, here")
    assert alone in [inside[at : at + len(alone)] for at in range(len(inside))]


def test_group_mask_is_the_rule_written_out_by_hand(encoder: CachedEncoder) -> None:
    """A passage sees itself; other prompt tokens all before them; a question the prompt and
    itself.
    """
    prompt = packed(encoder)
    n = torch.arange(len(prompt))
    seen = prompt.visible(n, n)
    for i in range(len(prompt)):
        for j in range(len(prompt)):
            earlier = bool(prompt.positions[j] <= prompt.positions[i])
            if prompt.segments[i] > 0:
                wanted = earlier and bool(prompt.segments[i] == prompt.segments[j])
                wanted = wanted and bool(prompt.groups[j] == 0)
            elif prompt.groups[i] == 0:
                wanted = earlier and bool(prompt.groups[j] == 0)
            else:
                wanted = bool(prompt.groups[j] == 0) or (
                    earlier and bool(prompt.groups[i] == prompt.groups[j])
                )
            assert bool(seen[i, j]) == wanted, (i, j)


def test_each_question_alone_has_the_layout_of_inference(encoder: CachedEncoder) -> None:
    task = exercise(random.Random(3), 4, questions=4)
    asked = [(q.text, q.answer) for q in task.questions]
    prompt = preset(task.pages, SPEC)
    together = pack(prompt, asked, encoder, SPEC)
    for group, (question, answer) in enumerate(asked, start=1):
        wanted = layout(prompt.ask(question), encoder, SPEC)
        mine = (together.groups == 0) | (together.groups == group)
        ids, positions = together.token_ids[mine], together.positions[mine]
        assert ids[: len(wanted)].tolist() == wanted.token_ids.tolist()
        assert positions[: len(wanted)].tolist() == wanted.positions.tolist()
        assert together.segments[mine][: len(wanted)].tolist() == wanted.segments.tolist()
        learned = together.targets[mine]
        end = encoder.encode("<|end|>", True)
        assert learned[learned >= 0].tolist() == encoder.encode(answer) + end


@pytest.mark.parametrize("mixture", [Mixture(), Mixture(text_share=1), Mixture(varied_share=0.9)])
@pytest.mark.parametrize("reuse", [True, False])
def test_attention_in_blocks_equals_dense_attention(
    encoder: CachedEncoder, mixture: Mixture, reuse: bool
) -> None:
    rng = random.Random(11)
    prompts = [
        draw_prompt(rng, mixture, encoder, SPEC, 5, reuse=reuse, text=mixture.text_share == 1)
        for _ in range(2)
    ]
    model = lm.build()
    batch = arrange(prompts)
    model.config._attn_implementation = NAME
    with torch.no_grad():
        logits, targets = lm.predict(model, batch)
        model.config._attn_implementation = "sdpa"
        dense = torch.cat([_dense(model, prompt) for prompt in prompts])
    wanted = torch.cat([p.targets[p.targets >= 0] for p in prompts])
    chosen = dense.gather(1, wanted[:, None]).flatten().sort().values
    found = logits.gather(1, targets[:, None]).flatten().sort().values
    torch.testing.assert_close(found, chosen, rtol=1e-4, atol=1e-4)


def _dense(model: lm.LlamaForCausalLM, prompt: Packed) -> torch.Tensor:
    n = torch.arange(len(prompt))
    logits = model(
        input_ids=prompt.token_ids[None],
        position_ids=prompt.positions[None],
        attention_mask=prompt.visible(n, n)[None, None],
    ).logits[0]
    return logits[prompt.targets >= 0]


def test_bins_hold_everything_once_and_do_not_overflow() -> None:
    lengths = [random.Random(1).randint(5, 90) for _ in range(40)]
    bins = bins_of(lengths, BIN)
    assert sorted(i for members in bins for i in members) == list(range(40))
    assert all(sum(lengths[i] for i in members) <= BIN for members in bins)
    assert bins_of([300, 4], BIN) == [[0], [1]]


def test_answers_always_start_with_a_visible_character() -> None:
    for seed in range(20):
        for question in exercise(random.Random(seed), 6).questions:
            assert question.answer[0].strip()


def test_training_lowers_the_loss_and_resumes_where_it_stopped(
    encoder: CachedEncoder, tmp_path: Path
) -> None:
    recipe = lm.Recipe(stages=(lm.Stage(6, Mixture(), 6, 7),), warmup=1, rows=1)
    whole = lm.Trainer(lm.build(), recipe)
    batch = arrange([packed(encoder)])
    losses = [whole.step(batch) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5

    first = lm.Trainer(lm.build(), recipe)
    for _ in range(3):
        first.step(batch)
    first.save(tmp_path / "checkpoint.pt")
    second = lm.Trainer(lm.build(seed=9), recipe)
    second.load(tmp_path / "checkpoint.pt")
    assert second.done == 3
    assert [second.step(batch) for _ in range(3)] == pytest.approx(losses[3:], rel=1e-3)


def test_a_dependent_model_goes_on_where_the_model_of_its_name_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recipe begins with the other's, and training starts from the other's checkpoint."""
    plain, longer = COMPARED["links-0"], COMPARED["links-0-dependent"]
    assert longer.stages[: len(plain.stages)] == plain.stages
    assert longer.links == 0
    assert longer.mixture(plain.steps).dependent == 1.0
    assert longer.mixture(plain.steps - 1) == plain.mixture(plain.steps - 1)
    train_tokenizer(corpus(0, worlds=60)).save_pretrained(tmp_path / "lm")
    ended = lm.Trainer(lm.build(), plain)
    ended.done = plain.steps
    (tmp_path / "work" / "links-0").mkdir(parents=True)
    ended.save(tmp_path / "work" / "links-0" / "checkpoint.pt")
    begun = []

    def train(recipe: lm.Recipe, encoder: PartTokenizer, directory: Path) -> None:
        trainer = lm.Trainer(lm.build(1), recipe)
        trainer.load(directory / "checkpoint.pt")
        begun.append(trainer.done)

    monkeypatch.setattr(lm, "train", train)
    make_compared(tmp_path, tmp_path / "work", "links-0-dependent", 0)
    assert begun == [plain.steps]
    assert (tmp_path / "links-0-dependent" / "kvlink.json").exists()
