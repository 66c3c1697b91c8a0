"""`KVLinkModel` as a user meets it: loading, streaming, chat, limits, threads."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, ModelMaker, byte_spec, byte_tokenizer, random_model
from safetensors.torch import load, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kvlink_rag.model.text_stream
from kvlink_rag import Document, KVLinkModel, Passage, Spec, Text
from kvlink_rag.errors import ConfigError, ModelNotSupported, PromptError, PromptTooLong, SpecError
from kvlink_rag.model.loading import find_spec, load_tokenizer
from kvlink_rag.prompt.published import KVLINK5_LLAMA32

DOCS = [Document("the cat sat on the mat"), Document("a dog"), Document("漢字 and é")]
PARTS = [Text("<bos>", special=True), Passage(DOCS[0]), Text("what?")]


@pytest.fixture(scope="module")
def model(make_model: ModelMaker) -> KVLinkModel:
    return make_model("llama", torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as people have them, with a kvlink.json."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    random_model("llama", torch.float32).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    (directory / "kvlink.json").write_text(byte_spec().to_json())
    return directory


def test_from_pretrained(saved: Path, model: KVLinkModel) -> None:
    loaded = KVLinkModel.from_pretrained(saved, device="cpu")
    assert loaded.spec == byte_spec()
    parts = loaded.prompt(DOCS, "what?")
    assert torch.allclose(loaded.prefill(parts).logits, model.prefill(parts).logits, atol=1e-4)
    assert loaded.fingerprint == KVLinkModel.from_pretrained(saved, device="cpu").fingerprint


def test_from_pretrained_in_another_dtype_and_with_another_spec(saved: Path) -> None:
    loaded = KVLinkModel.from_pretrained(saved, device="cpu", dtype="bfloat16", spec=Spec())
    assert loaded.backbone.dtype == torch.bfloat16
    assert loaded.spec.links_per_passage == 0
    assert loaded.verify(loaded.prompt(DOCS, "what?")).holds


def test_fingerprint_changes_with_weights_and_rope(make_model: ModelMaker) -> None:
    def fingerprint(**overrides: object) -> str:
        seed = overrides.pop("seed", 0)
        hf = random_model("llama", torch.float32, seed=seed, **overrides)  # type: ignore[arg-type]
        return KVLinkModel(hf, byte_tokenizer(), byte_spec()).fingerprint

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    found = [fingerprint(), fingerprint(seed=1), fingerprint(rope_parameters=rope)]
    assert len(set(found)) == 3
    assert fingerprint() == found[0]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere/at/all", "no model directory"),
        ("/nowhere", "no model directory"),
        ("owner/no-such-model", "neither a directory here nor to be had"),
    ],
)
def test_models_that_are_not_there(
    where: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        KVLinkModel.from_pretrained(where)


def test_directories_that_hold_no_model(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        KVLinkModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"expected a tokenizer\.json"):
        KVLinkModel.from_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="safetensors"):
        KVLinkModel.from_pretrained(tmp_path)


def test_a_checkpoint_without_a_tensor_or_with_others_is_refused(tmp_path: Path) -> None:
    random_model("llama", torch.float32).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load(file.read_bytes())  # not mapped, as the file is written over
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != key}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"lack {re.escape(key)}; expected exactly"):
        KVLinkModel.from_pretrained(tmp_path)
    extra = {f"model.layers.0.self_attn.{n}_proj.bias": torch.zeros(4) for n in "qkvo"}
    save_file({**tensors, **extra}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"also hold .*k_proj\.bias.* and 1 more"):
        KVLinkModel.from_pretrained(tmp_path)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file({**tensors, **old}, file, {"format": "pt"})
    assert KVLinkModel.from_pretrained(tmp_path).name == str(tmp_path)


def test_other_architectures_and_rope_types_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(ModelNotSupported, match="gpt2"):
        KVLinkModel.from_pretrained(tmp_path / "gpt2")
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(vocab_size=500, **{**SHAPE, "rope_parameters": dynamic})
    with pytest.raises(ModelNotSupported, match="dynamic"):
        KVLinkModel(LlamaForCausalLM(config), byte_tokenizer())


def test_a_spec_of_another_model_is_refused() -> None:
    with pytest.raises(SpecError, match="belongs to another model"):
        KVLinkModel(random_model("llama", torch.float32), byte_tokenizer(), KVLINK5_LLAMA32)


def test_published_names_bring_their_spec(tmp_path: Path) -> None:
    assert find_spec("Shiyu-Lab/Llama1B-KVLink5", tmp_path) == KVLINK5_LLAMA32
    assert find_spec("someone/else", tmp_path) is None


def test_the_tokenizer_is_taken_from_where_the_spec_says(tmp_path: Path, saved: Path) -> None:
    spec = replace(byte_spec(), tokenizer=str(saved))
    assert len(load_tokenizer(tmp_path, spec)) == len(byte_tokenizer())


def test_stream_pieces_join_to_generate(model: KVLinkModel) -> None:
    parts = model.prompt(DOCS, "what?")
    stream = model.stream(parts, max_new_tokens=30)
    pieces = list(stream)
    assert "".join(pieces) == model.generate(parts, max_new_tokens=30) == stream.text
    assert stream.trace.finish_reason in ("stop", "length")
    assert stream.trace.generated_tokens <= 30


def test_nothing_runs_before_the_first_next(model: KVLinkModel) -> None:
    stream = model.stream(model.prompt(DOCS, "what?"), max_new_tokens=3)
    assert stream.trace.computed_tokens == 0
    next(stream)
    assert stream.trace.computed_tokens > 0
    stream.close()


def test_sampling_is_repeatable_by_seed(model: KVLinkModel) -> None:
    parts = model.prompt(DOCS, "what?")
    say = {"max_new_tokens": 20, "temperature": 1.5}
    first = model.generate(parts, seed=1, **say)
    assert first == model.generate(parts, seed=1, **say)
    assert first != model.generate(parts, seed=2, **say)


def test_a_stop_string_ends_the_answer(model: KVLinkModel) -> None:
    parts = model.prompt(DOCS, "what?")
    text = model.generate(parts, max_new_tokens=40)
    stop = text[5:7]
    got = model.generate(parts, max_new_tokens=40, stop=stop)
    assert got == text[: text.index(stop)]


def test_an_answer_has_a_visible_character(
    model: KVLinkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the model would end at once."""
    tokens = frozenset(range(0, 460, 2))
    monkeypatch.setitem(model.__dict__, "end_ids", tokens)
    for seed in range(5):
        text = model.generate(
            model.prompt(DOCS, "what?"), max_new_tokens=50, temperature=2.0, seed=seed
        )
        assert text.strip()


def test_limits_and_arguments(model: KVLinkModel) -> None:
    with pytest.raises(PromptTooLong, match="8192"):
        model.prefill([Text("x" * 9000)])
    with pytest.raises(ConfigError, match="mode"):
        model.prefill([Text("x")], mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device"):
        KVLinkModel.from_pretrained(device="warp")
    with pytest.raises(ConfigError, match="dtype"):
        KVLinkModel.from_pretrained(dtype="float3")
    near = model.stream([Text("x" * 8190)], max_new_tokens=50)
    list(near)
    assert near.trace.generated_tokens <= 2


def test_a_model_without_a_spec_works_with_no_links() -> None:
    plain = KVLinkModel(random_model("qwen3", torch.float32), byte_tokenizer())
    parts = plain.prompt(DOCS, "what?")
    laid = plain.layout(parts)
    assert laid.token_ids.max() < 260
    assert plain.verify(parts).holds


CHATML = (
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chatty() -> KVLinkModel:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return KVLinkModel(random_model("llama", torch.float32), tokenizer, byte_spec())


def test_chat_goes_through_the_template(chatty: KVLinkModel) -> None:
    parts = chatty.chat(
        [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [Passage(DOCS[0]), Text("what? <eos>")]},
        ]
    )
    ids = chatty.layout(parts).token_ids.tolist()
    plain = chatty.tokenizer.encode
    expected = [256, *plain("system\n"), *plain("be kind"), 257, 256, *plain("user\n"), 258]
    expected += [*plain("the cat sat on the mat\n"), *range(260, 265), 259, *plain("what? <eos>")]
    expected += [257, 256, *plain("assistant\n")]
    assert ids == expected
    assert chatty.verify(parts).holds


def test_a_later_turn_changes_nothing_before_it(chatty: KVLinkModel) -> None:
    first = [{"role": "user", "content": [Passage(DOCS[0]), Text("one?")]}]
    more = [
        *first,
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [Passage(DOCS[1]), Text("two?")]},
    ]
    one, two = chatty.layout(chatty.chat(first)), chatty.layout(chatty.chat(more))
    assert two.token_ids[: len(one)].tolist() == one.token_ids.tolist()
    list(chatty.stream(chatty.chat(first), max_new_tokens=2))
    trace = chatty.prefill(chatty.chat(more)).trace
    assert trace.prefix_tokens > 0
    assert chatty.verify(chatty.chat(more)).holds


def test_chat_templates_that_lose_messages_are_refused(chatty: KVLinkModel) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    lossy = KVLinkModel(chatty.backbone.model, tokenizer, byte_spec())
    with pytest.raises(PromptError, match="drops"):
        lossy.chat([{"role": role, "content": "a"} for role in ("user", "assistant", "user")])
    with pytest.raises(PromptError, match="content is int"):
        lossy.chat([{"role": "user", "content": 3}])


def test_chat_without_a_template_uses_the_preset(model: KVLinkModel) -> None:
    parts = model.chat([{"role": "user", "content": "hi"}])
    assert parts == [Text("<bos>", special=True), Text("hi"), Text("\n", special=True)]


def test_an_answer_that_ended_leaves_its_memory_to_the_next(make_model: ModelMaker) -> None:
    model = make_model("llama", torch.float32)
    backbone = model.backbone
    parts = [model.prompt([document], "what?") for document in DOCS]
    alone = [model.generate(p, max_new_tokens=8) for p in parts]
    first = backbone._spare
    assert first is not None
    for buffer in first:
        buffer.fill_(torch.nan)  # whatever was left there must not be seen
    assert [model.generate(p, max_new_tokens=8) for p in parts] == alone
    again = backbone._spare
    assert again is not None
    assert again[0].data_ptr() == first[0].data_ptr()
    for buffer in again:
        buffer.fill_(torch.nan)
    assert model.generate(parts[0], max_new_tokens=8, mode="masked") == alone[0]


def test_two_answers_under_way_never_share_memory(make_model: ModelMaker) -> None:
    model = make_model("llama", torch.float32)
    parts = [model.prompt([document], "what?") for document in DOCS]
    alone = [model.generate(p, max_new_tokens=8) for p in parts]
    streams = [model.stream(p, max_new_tokens=8) for p in parts]
    texts = [""] * len(streams)
    for _ in range(9):  # a piece of each in turn
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
    assert texts == alone


def test_a_cache_that_was_given_back_is_of_no_use(model: KVLinkModel) -> None:
    backbone, none = model.backbone, torch.empty(0, dtype=torch.int64)
    cache = backbone.new_cache(none, none, capacity=100)
    backbone.give_back(cache)
    assert len(cache.layers) == 0
    small, large = (backbone.new_cache(none, none, capacity=n) for n in (10, 101))
    taken = {c.buffers[0].data_ptr() for c in (small, large)}
    assert cache.buffers[0].data_ptr() not in taken  # one too large by far, one too small
    fits = backbone.new_cache(none, none, capacity=30)
    assert fits.buffers[0].data_ptr() == cache.buffers[0].data_ptr()


def test_threads_share_one_model(model: KVLinkModel) -> None:
    prompts = [model.prompt([d, DOCS[0]], f"question {i}?") for i, d in enumerate(DOCS * 4)]
    expected = [model.generate(p, max_new_tokens=10, mode="masked") for p in prompts]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda p: model.generate(p, max_new_tokens=10), prompts))
    assert got == expected


@pytest.mark.parametrize("stop", ["<mem_end>", "<mem_end>\n"])
def test_a_stop_string_that_is_a_special_token_stops(
    model: KVLinkModel, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    said = iter([40, 41, 259, *[42] * 50])
    monkeypatch.setattr(kvlink_rag.model.text_stream, "sample", lambda *arguments: next(said))
    stream = model.stream(PARTS, max_new_tokens=20, stop=[stop])
    assert "".join(stream) == model.tokenizer.decode([40, 41])
    assert (stream.trace.generated_tokens, stream.trace.finish_reason) == (3, "stop")


def test_ids_that_are_no_text_are_never_said(model: KVLinkModel) -> None:
    """Link tokens, markers, and rows of a padded vocabulary, however likely they are."""
    padded = random_model("llama", torch.float32, vocab_size=512)
    with torch.no_grad():
        padded.lm_head.weight[258:] = 50 * padded.lm_head.weight[:254].abs().max()
    likely = KVLinkModel(padded, byte_tokenizer(), byte_spec())
    logits = likely.prefill(PARTS).logits
    assert int(logits.argmax()) >= 258
    stream = likely.stream(PARTS, max_new_tokens=8, temperature=5.0, seed=1)
    text = "".join(stream)
    assert stream.trace.generated_tokens > 0
    assert text
    assert set(likely.never_ids) == set(range(258, 512))
