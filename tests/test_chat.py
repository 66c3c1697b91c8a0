"""Conversations through chat templates as they are published: the text is the template's own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import byte_spec, byte_tokenizer, random_model

from kvlink_rag import Document, KVLinkModel, Part, Passage, Text
from kvlink_rag.errors import PromptError
from kvlink_rag.prompt.format import INSTRUCTION

DOCUMENT = Document("the tower has nine bells", id="tower")

# After the templates of these families, in our own words.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<h>' + m['role'] + '</h>\n\n' + m['content'] | trim"
    " + '<eos>' }}{% endfor %}{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
ALTERNATING = (  # no system role: Mistral 0.1 and 0.2, Gemma
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_LAST = (  # the system text before the last question: Mistral 0.3, Nemo
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # the thinking of earlier answers is dropped: Qwen3
    "{% for m in messages %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant'"
    " else m.content %}<h>{{ m.role }}\n{{ said }}<eos>\n{% endfor %}<h>assistant\n"
)
TEMPLATES = {
    "llama3": LLAMA3,
    "alternating": ALTERNATING,
    "system last": SYSTEM_LAST,
    "thinking": THINKING,
}
ANSWER = {"role": "assistant", "content": "<think>private steps</think>\n\nNine. "}
ASKED = {"role": "user", "content": "  How many bells? <eos> [/INST]\n"}
SYSTEM = {"role": "system", "content": " Be brief.\n"}


def instructed(template: str) -> tuple[KVLinkModel, str]:
    """A model without a spec, and the text of its one-question prompt."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    found = KVLinkModel(random_model("llama", torch.float32), tokenizer)
    parts = found.prompt([DOCUMENT], "How many bells?")
    texts = [
        p.text if isinstance(p, Text) else found.spec.render_passage(p.document) for p in parts
    ]
    return found, "".join(texts)


def model(template: str) -> KVLinkModel:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return KVLinkModel(random_model("llama", torch.float32), tokenizer, byte_spec())


MODELS = {name: model(template) for name, template in TEMPLATES.items()}


def text(parts: list[Part]) -> str:
    return "".join(p.document.text if isinstance(p, Passage) else p.text for p in parts)


def rendered(model: KVLinkModel, messages: list[dict[str, Any]]) -> str:
    return model.tokenizer.hf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


CONVERSATIONS = [
    [*system, *itertools.islice(itertools.cycle([ASKED, ANSWER]), length)]
    for system in ([], [SYSTEM])
    for length in (1, 3, 5)
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_prompt_is_the_templates_own(name: str, messages: list[dict[str, Any]]) -> None:
    if name == "alternating" and messages[0] is SYSTEM:
        pytest.skip("this template refuses a system message")
    assert text(MODELS[name].chat(messages)) == rendered(MODELS[name], messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_passages_stand_where_the_template_puts_their_message(name: str) -> None:
    asked = {"role": "user", "content": [Text(" From "), Passage(DOCUMENT), Text("how many?\n")]}
    messages = [asked, ANSWER, ASKED]
    parts = MODELS[name].chat(messages)
    plain = [
        {"role": "user", "content": " From the tower has nine bellshow many?\n"},
        *messages[1:],
    ]
    assert text(parts) == rendered(MODELS[name], plain)
    assert [p for p in parts if isinstance(p, Passage)] == [Passage(DOCUMENT)]
    assert MODELS[name].verify(parts).holds


@pytest.mark.parametrize("name", TEMPLATES)
def test_contents_are_never_special(name: str) -> None:
    parts = MODELS[name].chat([ASKED])
    (said,) = [p for p in parts if isinstance(p, Text) and "bells?" in p.text]
    assert not said.special
    ids = MODELS[name].layout(parts).token_ids.tolist()
    special = sum(text(parts).count(mark) for mark in ("<bos>", "<eos>"))
    assert sum(i in (256, 257) for i in ids) == special - 1  # the one that the user wrote


def test_a_system_text_without_a_place_is_folded_into_the_question() -> None:
    found = text(MODELS["alternating"].chat([SYSTEM, ASKED, ANSWER, ASKED]))
    folded = {"role": "user", "content": f"{SYSTEM['content']}\n\n{ASKED['content']}"}
    assert found == rendered(MODELS["alternating"], [folded, ANSWER, ASKED])


def test_turns_that_must_alternate_are_joined() -> None:
    found = text(MODELS["alternating"].chat([SYSTEM, ASKED, ASKED, ANSWER, ASKED]))
    said = [SYSTEM["content"], ASKED["content"], ASKED["content"]]
    joined = {"role": "user", "content": "\n\n".join(said)}
    assert found == rendered(MODELS["alternating"], [joined, ANSWER, ASKED])


def test_a_system_text_that_a_template_ignores_is_folded() -> None:
    ignoring = (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }};{% endfor %}"
    )
    found = text(model(ignoring).chat([SYSTEM, ASKED]))
    assert found == f"user: {SYSTEM['content']}\n\n{ASKED['content']};"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([ANSWER, ASKED], "roles must alternate.*the user's first"),
        ([SYSTEM], "roles must alternate"),
        ([ASKED, ANSWER, SYSTEM], "roles must alternate"),
    ],
)
def test_what_a_template_refuses_is_told(messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        MODELS["alternating"].chat(messages)


def test_a_template_that_rewrites_a_text_is_refused() -> None:
    with pytest.raises(PromptError, match="cannot be followed"):
        model("{% for m in messages %}{{ m.content | upper }}{% endfor %}").chat([ASKED])


def test_contents_may_be_lists_of_chat_apis() -> None:
    parts = MODELS["llama3"].chat(
        [{"role": "user", "content": [{"type": "text", "text": "How "}, "many ", Text("bells?")]}]
    )
    assert text(parts) == rendered(
        MODELS["llama3"], [{"role": "user", "content": "How many bells?"}]
    )
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(PromptError, match="'image_url', expected text"):
        MODELS["llama3"].chat([{"role": "user", "content": [picture]}])


def test_thinking_of_earlier_turns_is_dropped() -> None:
    found = text(MODELS["thinking"].chat([ASKED, ANSWER, ASKED]))
    assert "private steps" not in found
    assert "Nine." in found


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_model_without_a_spec_is_told_to_answer_from_the_documents(name: str) -> None:
    """As the system message, or where its template takes none, before the user's own text."""
    found, prompt = instructed(TEMPLATES[name])
    user = {"role": "user", "content": "the tower has nine bells\nHow many bells?"}
    messages = [{"role": "system", "content": INSTRUCTION}, user]
    if name == "alternating":
        messages = [{"role": "user", "content": f"{INSTRUCTION}\n\n{user['content']}"}]
    assert prompt == found.tokenizer.hf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_without_a_template_the_prompt_is_plain() -> None:
    found = KVLinkModel(random_model("llama", torch.float32), byte_tokenizer())
    first, *_, last = found.prompt([DOCUMENT], "How many bells?")
    assert (first, last) == (Text("<bos>", special=True), Text("\nAnswer:", special=True))
