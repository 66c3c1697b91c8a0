"""Documents reach the model through chains: unchanged ones, and `KVLinkDocumentsChain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.chains.retrieval import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kvlink import (
    ChatKVLink,
    KVLinkDocumentsChain,
    KVLinkLLM,
    KVLinkRetriever,
    KVLinkVectorStore,
    aregister_documents,
    document_block,
    register_documents,
)
from langchain_kvlink.documents import to_passages

from kvlink_rag import KVLinkModel, KVLinkRAG, Text
from kvlink_rag import Passage as PassagePart
from kvlink_rag.errors import (
    DocumentError,
    PassageTooLong,
    PromptError,
    SettingsMismatch,
    TooManyPassages,
)

PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Use the context:\n\n{context}"), ("human", "{input}")]
)
QUESTION = "How many lighthouses has Teldon?"


def cost(answer: Any) -> dict[str, Any]:
    trace: dict[str, Any] = answer.response_metadata["trace"]
    return trace


def joined(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def test_an_unchanged_stuff_chain(rag: KVLinkRAG, towns: list[Document]) -> None:
    """Only the LLM was swapped: the documents in its prompt are recognised."""
    llm = ChatKVLink(rag=rag, max_tokens=8)
    register_documents(llm, towns)
    seen: list[Any] = []
    chain = create_stuff_documents_chain(llm | (lambda m: seen.append(m) or m), PROMPT)
    text = chain.invoke({"input": QUESTION, "context": towns[:4]})
    trace = cost(seen[0])
    assert (trace["passages"], trace["snapshots_found"], trace["snapshots_encoded"]) == (4, 4, 0)
    parts = rag.recognise_chat(
        [
            {"role": "system", "content": f"Use the context:\n\n{joined(towns[:4])}"},
            {"role": "user", "content": QUESTION},
        ]
    )
    assert text == rag.model.generate(parts, mode="masked", max_new_tokens=8)


def test_an_lcel_prompt(rag: KVLinkRAG, towns: list[Document]) -> None:
    """A text prompt with {context}, for the chat model and for the LLM."""
    store = KVLinkVectorStore(rag=rag)
    store.add_documents(towns)
    prompt = PromptTemplate.from_template("Context:\n{context}\n\nQuestion: {input}\nAnswer:")
    context = store.as_retriever(search_kwargs={"k": 3}) | joined
    inputs = {"context": context, "input": RunnablePassthrough()}
    answer = (inputs | prompt | ChatKVLink(rag=rag, max_tokens=8)).invoke(QUESTION)
    assert cost(answer)["passages"] == 3
    text = (inputs | prompt | KVLinkLLM(rag=rag, max_tokens=8) | StrOutputParser()).invoke(QUESTION)
    assert text == answer.text


def test_a_foreign_store_and_the_one_extra_line(
    rag: KVLinkRAG, towns: list[Document], embeddings: Embeddings
) -> None:
    store = InMemoryVectorStore(embeddings)
    store.add_documents(towns)
    llm = ChatKVLink(rag=rag, max_tokens=8)
    ids = register_documents(llm, towns)  # the one extra line
    assert ids == [town.id for town in towns]
    assert rag.search("Teldon", 3) == []  # not embedded: the store is theirs
    seen: list[Any] = []
    stuff = create_stuff_documents_chain(llm | (lambda m: seen.append(m) or m), PROMPT)
    chain = create_retrieval_chain(store.as_retriever(search_kwargs={"k": 3}), stuff)
    result = chain.invoke({"input": QUESTION})
    assert result["answer"] == seen[0].text
    assert len(result["context"]) == 3
    assert cost(seen[0])["passages"] == 3


def test_unregistered_documents_are_computed(
    rag: KVLinkRAG, towns: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    llm = ChatKVLink(rag=rag, max_tokens=4)
    register_documents(llm, towns[:1])
    for _ in range(3):  # a prompt or two without a document may well be right
        assert caplog.text == ""
        answer = (PROMPT | llm).invoke({"context": joined(towns[1:] * 2), "input": QUESTION})
        assert cost(answer)["reused_tokens"] == 0
    assert "recognised none" in caplog.text


def test_what_registering_takes(
    rag: KVLinkRAG, towns: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    """Odd metadata does not stop it and is told; it costs nothing twice. Blank pages are errors."""
    store = KVLinkVectorStore(rag=rag)
    store.add_documents(towns[:2])
    odd = Document("The mill of Sarno stands.", metadata={"when": object, "n": (1,), "at": [2]})
    for blank in (Document("  ", id="p7", metadata={"title": "Page 7"}), Document("")):
        with pytest.raises(DocumentError, match=r"document 9 of 10 \(id .* has no text; leave it"):
            register_documents(store, [*towns, blank, odd])
    assert (len(rag), caplog.text) == (2, "")  # none of them
    ids = register_documents(store, [*towns, odd])
    assert "kept as text, under the keys when, n\n" in caplog.text
    assert caplog.records[-1].name == "kvlink_rag.langchain"
    assert [d.metadata["at"] for d in rag.get([ids[-1]])] == [[2]]
    assert len(ids) == len(set(ids)) == len(towns) + 1
    assert register_documents(rag, [*towns, odd]) == ids
    assert [d.id for d in store.similarity_search("Orvale", k=9)] != []
    assert rag.stats().embedded == 2
    with pytest.raises(PassageTooLong, match="split"):
        register_documents(rag, [Document("long " * 1000)])
    for wrong in ("a text", towns[0], ["a text"], None):
        with pytest.raises(DocumentError, match=r"expected a (list of )?langchain_core Document"):
            register_documents(rag, wrong)  # type: ignore[arg-type]


async def test_registering_leaves_the_event_loop_free(
    rag: KVLinkRAG, towns: list[Document], responsive: Any
) -> None:
    responsive.meet(rag, "register")
    assert await responsive.turns(aregister_documents(rag, towns)) == 1
    assert len(rag) == len(towns)


def test_a_retrieval_chain_of_our_own(
    rag: KVLinkRAG, model: KVLinkModel, towns: list[Document]
) -> None:
    """Retriever to engine: the prompt is the spec's, the answer the oracle's."""
    KVLinkVectorStore(rag=rag).add_documents(towns)
    llm = ChatKVLink(rag=rag, max_tokens=8)
    chain = create_retrieval_chain(KVLinkRetriever(rag=rag, k=3), KVLinkDocumentsChain(llm=llm))
    result = chain.invoke({"input": QUESTION})
    parts = model.prompt(to_passages(result["context"]), QUESTION)
    assert len(result["context"]) == 3
    assert result["answer"] == model.generate(parts, mode="masked", max_new_tokens=8)


def test_the_documents_chain_streams(rag: KVLinkRAG, towns: list[Document]) -> None:
    """Pieces come one by one through the whole chain, and no later piece is made before."""
    KVLinkVectorStore(rag=rag).add_documents(towns)
    made = 0
    real = type(rag.model.backbone).forward

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        return real(*arguments, **named)

    llm = ChatKVLink(rag=rag, max_tokens=12)
    chain = create_retrieval_chain(KVLinkRetriever(rag=rag, k=3), KVLinkDocumentsChain(llm=llm))
    answer = chain.invoke({"input": QUESTION})["answer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rag.model.backbone), "forward", counted)
        pieces, before = [], []
        for chunk in chain.stream({"input": QUESTION}):
            if chunk.get("answer"):
                pieces.append(chunk["answer"])
                before.append(made)
    assert "".join(pieces) == answer
    assert len(pieces) > 3
    assert before == sorted(before)
    assert before[0] < before[-1]


async def test_the_documents_chain_async(
    rag: KVLinkRAG, towns: list[Document], responsive: Any
) -> None:
    chain = KVLinkDocumentsChain(llm=ChatKVLink(rag=rag, max_tokens=4))
    input = {"input": QUESTION, "context": towns[:3]}
    text = chain.invoke(input)
    assert await chain.ainvoke(input) == text
    assert "".join([piece async for piece in chain.astream(input)]) == text
    responsive.meet(type(rag.model.backbone), "forward")
    assert await responsive.turns(chain.ainvoke(input)) == 4


def test_a_system_prompt_and_a_history(rag: KVLinkRAG, towns: list[Document]) -> None:
    """With either, the prompt goes through the tokenizer's chat template."""
    chain = KVLinkDocumentsChain(llm=ChatKVLink(rag=rag, max_tokens=6), system="Be brief.")
    history = [HumanMessage("Hello"), AIMessage("Hi")]
    passages = [PassagePart(passage) for passage in to_passages(towns[:2])]
    documents = [{"role": "user", "content": [*passages, Text(QUESTION)]}]
    system = [{"role": "system", "content": "Be brief."}]
    past = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    asked = {"input": QUESTION, "context": towns[:2]}
    for input, conversation in (
        (asked, [*system, *documents]),
        ({**asked, "chat_history": history}, [*system, *past, *documents]),
    ):
        parts = rag.model.chat(conversation)
        expected = rag.model.generate(parts, mode="masked", max_new_tokens=6)
        assert chain.invoke(input) == expected


def test_without_documents_the_question_is_asked_alone(rag: KVLinkRAG) -> None:
    chain = KVLinkDocumentsChain(llm=ChatKVLink(rag=rag, max_tokens=6))
    expected = rag.model.generate(rag.model.prompt([], QUESTION), mode="masked", max_new_tokens=6)
    assert chain.invoke({"input": QUESTION, "context": []}) == expected


@pytest.mark.parametrize(
    "input",
    [
        *({}, {"input": "x"}, {"context": []}, "x"),
        *({"input": "", "context": []}, {"input": 3, "context": []}),
        *({"input": "x", "context": "y"}, {"input": "x", "context": ["y"]}),
        *({"input": "x", "context": None}, {"input": "x", "context": Document("y")}),
    ],
)
def test_what_the_documents_chain_refuses(input: Any, rag: KVLinkRAG) -> None:
    with pytest.raises(PromptError):
        KVLinkDocumentsChain(llm=ChatKVLink(rag=rag)).invoke(input)


def test_a_document_without_text_is_named(rag: KVLinkRAG, towns: list[Document]) -> None:
    blank = Document(" ", id="p7", metadata={"title": "Page 7"})
    chain = KVLinkDocumentsChain(llm=ChatKVLink(rag=rag))
    with pytest.raises(PromptError) as error:
        chain.invoke({"input": QUESTION, "context": [*towns[:2], blank]})
    said = str(error.value)
    assert said.startswith("in 'context': document 3 of 3 (id 'p7', title 'Page 7') has no text")
    assert "leave it out" in said
    with pytest.raises(DocumentError, match="id 'p7', title 'Page 7'"):
        document_block(blank)
    with pytest.raises(DocumentError, match="found a str"):
        document_block("a text")  # type: ignore[arg-type]


MANY = [Document(f"Number {n} of many passages.", id=f"{n}") for n in range(13)]


def test_more_documents_than_slots(rag: KVLinkRAG) -> None:
    """Handed over, they are an error, by the chain and by blocks alike."""
    llm = ChatKVLink(rag=rag)
    blocks: list[Any] = [document_block(d) for d in MANY]
    for ask in (
        lambda: KVLinkDocumentsChain(llm=llm).invoke({"input": "x", "context": MANY}),
        lambda: llm.invoke([HumanMessage([*blocks, "x"])]),
    ):
        with pytest.raises(TooManyPassages, match="found 13 passages in the prompt, expected at m"):
            ask()


def test_more_recognised_documents_than_slots(
    rag: KVLinkRAG, caplog: pytest.LogCaptureFixture
) -> None:
    """In an unchanged chain they are computed as text, which the log and the trace tell."""
    llm = ChatKVLink(rag=rag, max_tokens=4)
    register_documents(llm, MANY)
    prompt = PROMPT.invoke({"context": joined(MANY), "input": QUESTION})
    trace = cost(llm.invoke(prompt))
    assert (trace["passages"], trace["passages_as_text"]) == (12, 1)
    assert "1 of the 13 passages in the prompt are computed as text" in caplog.text
    assert "retrieve fewer" in caplog.text


def test_an_empty_question(rag: KVLinkRAG, towns: list[Document]) -> None:
    llm = ChatKVLink(rag=rag)
    prompt = PROMPT.invoke({"context": joined(towns), "input": " "})
    with pytest.raises(PromptError, match="last message is the user's and empty"):
        llm.invoke(prompt)
    with pytest.raises(PromptError, match="expected a question"):
        KVLinkDocumentsChain(llm=llm).invoke({"input": " ", "context": towns})
    with pytest.raises(PromptError, match="the question is ''"):
        llm.invoke([HumanMessage([document_block(towns[0])])], use_preset=True)


def test_a_codec_is_passed_on(
    tmp_path: Path, model: KVLinkModel, embeddings: Embeddings, towns: list[Document]
) -> None:
    """All classes take the same word; one directory has one codec."""
    words: dict[str, Any] = {"directory": tmp_path, "codec": "int8"}
    store = KVLinkVectorStore.from_documents(towns, embeddings, model=model, **words)
    assert store.collection.codec == "int8"
    for made in (ChatKVLink(**words), KVLinkLLM(**words), KVLinkRetriever(**words)):
        assert made.collection is store.collection
    assert ChatKVLink(directory=tmp_path).collection is store.collection
    with pytest.raises(SettingsMismatch, match="found codec 'exact'"):
        KVLinkVectorStore(directory=tmp_path, codec="exact").add_texts(["x"])
    with pytest.raises(SettingsMismatch, match="found codec 'exact'"):
        ChatKVLink(directory=tmp_path, codec="exact").invoke("x")


def test_a_tier_that_machines_share(
    tmp_path: Path,
    model: KVLinkModel,
    embeddings: Embeddings,
    towns: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One word for all classes; it may hold a password, so no serialised form has it."""
    tier = tmp_path / "tier"
    tier.mkdir()
    monkeypatch.setenv("KVLINK_REMOTE_SECRET", "0123456789abcdef" * 4)
    words: dict[str, Any] = {"directory": tmp_path / "one", "remote": f"file://{tier}"}
    store = KVLinkVectorStore.from_documents(towns, embeddings, model=model, **words)
    llm = ChatKVLink(**words)
    assert llm.collection is store.collection
    assert ChatKVLink(directory=tmp_path / "one").collection is store.collection
    assert ChatKVLink(directory=tmp_path / "one", remote="").collection is not store.collection
    store.collection.close()
    assert [path for path in tier.rglob("*") if path.is_file()]
    assert str(tier) not in str(llm.model_dump()) + repr(llm) + str(llm.facts())
    opened = store.collection
    with pytest.raises(ValueError, match="found rag= and one of"):
        ChatKVLink(rag=opened, remote="")
    with pytest.raises(ValueError, match="expected an open KVLinkRAG") as caught:
        ChatKVLink(rag=5, remote="redis://:secret@cache")
    assert "secret" not in str(caught.value)


def test_objects_that_name_one_directory_share_it(
    tmp_path: Path, model: KVLinkModel, embeddings: Embeddings, towns: list[Document]
) -> None:
    """Store, retriever and LLM by name only, as an application has them; default directory too."""
    for directory in (tmp_path / "named", None):
        store = KVLinkVectorStore.from_documents(
            towns, embeddings, model=model, directory=directory
        )
        llm = ChatKVLink(directory=directory, max_tokens=4)
        retriever = KVLinkRetriever(directory=directory, k=2)
        assert llm.collection is retriever.collection is store.collection
        chain = {"context": retriever | joined, "input": RunnablePassthrough()} | PROMPT | llm
        assert cost(chain.invoke(QUESTION))["passages"] == 2
