"""The page at `/`, in a real browser: Chromium without a window, driven by Playwright."""

from __future__ import annotations

import importlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
from server import Running, make_towns, running

from kvlink_rag import Document
from kvlink_rag.serving import shelf
from kvlink_rag.trace import Trace

CHAT = "**/v1/chat/completions"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("page")
    make_towns(root)
    with running(root) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium here (Debian's package: chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(server: Running, browser: Any) -> Iterator[Any]:
    """The page, open; whatever it says to the console is an error of the test."""
    opened = browser.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(server.url)
    opened.wait_for_selector("#collection option", state="attached")
    yield opened
    opened.close()
    assert said == []


def shows(page: Any, place: str) -> Any:
    """What is expected there sooner or later."""
    return importlib.import_module("playwright.sync_api").expect(page.locator(place))


def test_the_files_are_sent_with_a_policy(server: Running) -> None:
    with server.client() as client:
        home = client.get("/")
        assert home.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in home.headers["content-security-policy"]
        for name in ("style.css", "app.js", "api.js", "view.js"):
            assert client.get(f"/page/{name}").status_code == 200
        for name in ("../page.py", "..%2fpage.py", "page.py", "other.js"):
            assert client.get(f"/page/{name}").status_code == 404
        assert client.post("/", json={}).status_code == 405


def test_the_page_needs_no_key_and_asks_for_one(tmp_path: Path, browser: Any) -> None:
    make_towns(tmp_path)
    key = "k" * 24
    with running(tmp_path, keys=f"{key}=towns") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#key-form:not([hidden])")
        assert "key is needed" in page.inner_text("#error")
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector("#collection option", state="attached")
        assert page.locator("#collection option").all_inner_texts() == ["towns"]
        assert page.locator("#key-form").is_hidden()
        page.close()


def test_a_question_is_answered_with_its_sources_by_keyboard(page: Any, server: Running) -> None:
    page.focus("#question")
    page.keyboard.type("Where is the harbour?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer .stages")
    assert "to the first token" in page.inner_text(".answer .first")
    assert page.inner_text(".answer .text") != ""
    with server.towns() as rag:
        texts = {document.text for document in rag.documents()}
    assert page.locator("#sources li").count() == 3
    page.locator("#sources summary").first.click()
    assert page.locator("#sources blockquote").first.inner_text().strip() in {
        text.strip() for text in texts
    }
    assert page.locator("#ask").is_enabled()
    assert page.inner_text("#error") == ""


def test_compare_shows_both_times(page: Any) -> None:
    page.check("#compare")
    page.fill("#question", "Which town has a crane?")
    page.click("#ask")
    shows(page, ".answer .stages").to_have_count(2)
    titles = page.locator(".answer h3").all_inner_texts()
    assert titles == ["Reuse of snapshots", "Full prefill"]
    facts = page.locator(".answer .quiet").all_inner_texts()
    assert " 0 reused" not in facts[0]
    assert " 0 reused" in facts[1]
    shows(page, "#status").to_contain_text("First token after")
    assert "earlier question" not in facts[1]
    page.click("#ask")  # the same again: what it left is told apart from the snapshots
    shows(page, "#status").not_to_contain_text("First token after")
    shows(page, "#status").to_contain_text("First token after")
    again = page.locator(".answer .quiet").all_inner_texts()
    assert "earlier question" in again[0]
    assert "earlier question" not in again[1]


def test_a_collection_is_made_and_filled(page: Any, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=\"document.title='broken'\"> <b>The ferry</b> costs 12 crowns."
    (tmp_path / "ferry.txt").write_text(hostile)
    (tmp_path / "picture.xyz").write_bytes(b"\0")
    page.fill("#new-name", "ferries")
    page.press("#new-name", "Enter")
    shows(page, "#collection").to_have_value("kvlink/ferries")
    shows(page, "#collection-facts").to_contain_text("0 passages")
    page.set_input_files("#files", [tmp_path / "ferry.txt", tmp_path / "picture.xyz"])
    shows(page, "#uploads li.failed").to_have_count(1)
    shows(page, "#uploads").to_contain_text("done")
    shows(page, "#collection-facts").to_contain_text("1 passages")
    page.fill("#question", "What does the ferry cost?")
    page.click("#ask")
    page.wait_for_selector("#sources summary")
    page.click("#sources summary")
    assert page.inner_text("#sources blockquote").strip() == hostile
    assert page.locator("#sources blockquote img").count() == 0
    assert "ferry.txt" in page.inner_text("#sources summary")
    assert page.title() == "kvlink-rag"


def test_narrow_and_dark_screens_have_all_of_it(server: Running, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme="dark")
    page.goto(server.url)
    page.wait_for_selector("#collection option", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(22, 24, 28)"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')]"
        ".filter(e => !(e.labels?.length || e.innerText.trim())).length"
    )
    assert unnamed == 0
    page.close()


class Unfinished:
    """An answer of one piece, then of nothing until it may end."""

    def __init__(self) -> None:
        self.trace, self.text, self.may_end = Trace(), "", threading.Event()
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[str]:
        yield "Half"
        assert self.may_end.wait(60)
        yield " an answer"

    def close(self) -> None:
        self.closed.set()


def test_an_answer_is_stopped_by_keyboard(
    page: Any, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Unfinished()
    monkeypatch.setattr("kvlink_rag.serving.pieces.from_collection", lambda *a, **n: answer)
    left = threading.Event()
    monkeypatch.setattr(server.service.tally.left, "inc", left.set)
    page.fill("#question", "Where is the harbour?")
    page.press("#question", "Enter")
    shows(page, ".answer .text").to_have_text("Half")
    shows(page, ".answer").to_have_attribute("aria-busy", "true")
    page.focus("#question")
    page.keyboard.press("Enter")  # one answer at a time
    page.focus("#stop")
    page.keyboard.press("Enter")
    shows(page, ".answer .first").to_have_text("stopped")
    shows(page, "#ask").to_be_focused()
    shows(page, "#stop").to_be_hidden()
    assert page.locator(".answer").count() == 1
    assert page.locator("[aria-busy]").count() == 0
    assert page.inner_text(".answer .text") == "Half"
    assert page.inner_text("#error") == page.inner_text("#status") == ""
    assert left.wait(60)
    answer.may_end.set()
    assert answer.closed.wait(60)


def test_a_connection_that_ends_is_told(server: Running, browser: Any) -> None:
    half = 'data: {"choices": [{"delta": {"content": "Half"}}]}\n\n'
    page = browser.new_page()
    page.goto(server.url)
    page.wait_for_selector("#collection option", state="attached")
    page.route(CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=half))
    page.fill("#question", "Where is the harbour?")
    page.click("#ask")
    shows(page, "#error").to_have_text("The connection ended before the answer did.")
    shows(page, ".answer .text").to_have_text("Half")
    shows(page, ".answer .first").to_have_text("no answer")
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.abort())
    page.click("#ask")
    shows(page, "#error").to_contain_text("The server does not answer")
    page.unroute(CHAT)
    page.click("#ask")
    page.wait_for_selector(".answer .stages")
    assert page.inner_text("#error") == ""
    page.close()


def test_passages_are_counted_as_they_come(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, ingest = threading.Event(), shelf.ingest

    def held(*given: Any, **named: Any) -> Any:
        report = ingest(*given, **named)
        assert may_end.wait(60)
        return report

    monkeypatch.setattr(shelf, "ingest", held)
    (tmp_path / "mill.txt").write_text("The mill of Ulm grinds rye.")
    page.fill("#new-name", "mills")
    page.press("#new-name", "Enter")
    shows(page, "#collection").to_have_value("kvlink/mills")
    page.set_input_files("#files", [tmp_path / "mill.txt"])
    shows(page, "#uploads").to_contain_text("reading and encoding, 1 passages so far")
    page.select_option("#collection", "kvlink/towns")
    may_end.set()
    shows(page, "#uploads").to_contain_text("done")
    shows(page, "#collection").to_have_value("kvlink/towns")  # which a person chose meanwhile


def test_a_source_says_where_it_is_from(page: Any, server: Running) -> None:
    text = "הנמל נבנה quayside crane"
    with server.towns() as rag:
        rag.add([Document(text, metadata={"source": "/srv/docs/quay.pdf", "page": 7})])
    page.fill("#question", "quayside crane")
    page.click("#ask")
    source = page.locator("#sources li", has_text="quay.pdf, page 7")
    source.locator("summary").click()
    assert "/srv" not in page.inner_text("#sources")
    assert source.locator("blockquote").inner_text() == text
    assert (
        source.evaluate("e => getComputedStyle(e.querySelector('blockquote')).direction") == "rtl"
    )


def test_a_file_dropped_beside_its_place_does_not_open(page: Any) -> None:
    stays = page.evaluate(
        "['dragover', 'drop'].every(kind =>"
        " !document.body.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true})))"
    )
    assert stays


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(server: Running, browser: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = browser.new_page(color_scheme=scheme)
    page.goto(server.url)
    page.wait_for_selector("#collection option", state="attached")
    page.fill("#question", "Where is the harbour?")
    page.click("#ask")
    page.wait_for_selector("#sources summary")
    page.click("#sources li:first-child summary")
    page.evaluate("document.getElementById('key-form').hidden = false")
    found = axe.run(page)
    assert found.response["testEngine"]["name"] == "axe-core"
    assert [each["id"] for each in found.response["violations"]] == []
    page.close()
