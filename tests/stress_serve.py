"""Many clients on one server for minutes, some of which leave before their answer is whole.

    python tests/stress_serve.py --minutes 5 --clients 16

The server is a process of its own over the tiny pair. Clients ask a collection and the bare reader,
streamed and whole, over real HTTP; every answer that comes whole is compared with the same question
asked alone through the library (float32, greedy). One client uploads, searches and erases files
meanwhile. The server's memory and open files are measured after a quarter of the time and at the
end, when nothing may run any more. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import trust
from conftest import WordEmbedder
from server import READER

from kvlink_rag.serving import run
from kvlink_rag.serving.keys import Keys
from kvlink_rag.serving.runner import Limits

DOCUMENTS, QUESTIONS, K, TOKENS = 60, 40, 3, 24
LEAVES = 0.3  # of the answers
MOST_GROWTH = 32 << 20  # bytes; what the allocator may keep
MOST_FILES = 8  # a connection or two
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Question:
    """What is asked, and the answer alone."""

    body: dict[str, Any]
    answer: str


@dataclass
class Load:
    """What the clients share. stop: when they end."""

    url: str
    questions: list[Question]
    stop: float
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def client(self, seed: str) -> None:
        """Ask whatever chance says, until the time is over."""
        chance = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=120) as http:
            while time.monotonic() < self.stop:
                try:
                    kind = self.ask(http, chance)
                except Exception as error:
                    self.tell(f"{type(error).__name__}: {error}")
                    return
                with self.lock:
                    self.counts[kind] += 1

    def ask(self, http: httpx.Client, chance: random.Random) -> str:
        question = chance.choice(self.questions)
        leaves, streams = chance.random() < LEAVES, chance.random() < 0.5
        body = {**question.body, "stream": streams}
        if leaves:
            return leave(self.url, body, chance)
        if not streams:
            answer = http.post(CHAT, json=body)
            if answer.status_code != 200:
                self.tell(f"{answer.status_code}: {answer.text[:200]}")
                return "refused"
            text = answer.json()["choices"][0]["message"]["content"]
        else:
            with http.stream("POST", CHAT, json=body) as response:
                lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
            events = [json.loads(line) for line in lines[:-1]]
            text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
            if lines[-1] != "[DONE]":
                self.tell(f"a stream ended with {lines[-1][:200]}")
        if text != question.answer:
            self.tell(f"{body}: {text!r}, alone {question.answer!r}")
        return "streamed" if streams else "whole"

    def keeper(self) -> None:
        """Upload, index, search and erase, one file after the other."""
        chance = random.Random("keeper")
        with httpx.Client(base_url=self.url, timeout=120) as http:
            store = http.post("/v1/vector_stores", json={"name": "kept"}).json()["id"]
            while time.monotonic() < self.stop:
                word, text = f"word{chance.randrange(10**9)}", trust.text_of(chance)
                named = {"file": (f"{word}.txt", f"{word} {text}".encode())}
                file = http.post("/v1/files", files=named).json()["id"]
                files = f"/v1/vector_stores/{store}/files"
                http.post(files, json={"file_id": file})
                while http.get(f"{files}/{file}").json()["status"] == "in_progress":
                    time.sleep(0.01)
                search = f"/v1/vector_stores/{store}/search"
                found = http.post(search, json={"query": word}).json()["data"]
                if [each["file_id"] for each in found] != [file]:
                    self.tell(f"searching {word} found {found}")
                http.delete(f"/v1/files/{file}")
                if http.post(search, json={"query": word}).json()["data"]:
                    self.tell(f"{word} is found after it was erased")
                with self.lock:
                    self.counts["indexed"] += 1

    def tell(self, what: str) -> None:
        self.wrong.append(what)


def leave(url: str, body: dict[str, Any], chance: random.Random) -> str:
    """Ask on a connection of its own, and close it after some events or a while."""
    events = chance.randrange(1, 20) if body["stream"] else 10**6
    wait = 120.0 if body["stream"] and chance.random() < 0.7 else 0.2 * chance.random()
    try:
        with (
            httpx.Client(base_url=url, timeout=httpx.Timeout(120, read=wait + 1e-3)) as http,
            http.stream("POST", CHAT, json=body) as response,
        ):
            for number, _ in enumerate(response.iter_lines()):
                if number == 2 * events:
                    return "left in the middle"
    except httpx.ReadTimeout:
        return "left waiting"
    return "stayed after all"


def questions(root: Path) -> list[Question]:
    """A collection in `root`, and questions to it and to the reader with their answers."""
    chance = random.Random(15)
    rows = [trust.document_of(chance, f"{trust.NAMES[n % 10]} {n}") for n in range(DOCUMENTS)]
    found = []
    with trust.open_tiny(root / "towns") as rag:
        rag.add(trust.as_documents(rows))
        for number in range(QUESTIONS):
            asked = f"{chance.choice(trust.NAMES)} {chance.choice(trust.WORDS)} {number}?"
            model, content = "kvlink/towns", asked
            if number % 2:
                texts = [f"{title}\n{text}" for _, title, text in chance.sample(rows, 2)]
                model, content = READER, "\n\n".join([*texts, f"Question: {asked}"])
                answer = "".join(rag.complete(content, max_new_tokens=TOKENS))
            else:
                answer = rag.ask(asked, k=K, max_new_tokens=TOKENS).text
            messages = [{"role": "user", "content": content}]
            body = {"model": model, "messages": messages, "max_tokens": TOKENS, "k": K}
            found.append(Question(body, answer))
    return found


def serve(root: Path, at_once: int) -> None:
    """The server's process; it tells its address in its first line."""
    run.serve(
        [root / "towns"],
        root / "data",
        lambda model, embedder: (trust.tiny_model(), WordEmbedder()),
        host="127.0.0.1",
        port=0,
        keys=Keys(),
        limits=Limits(at_once=at_once, waiting=64),
        k=K,
        say=lambda line: print(line, flush=True),
    )


def measure(process: int) -> tuple[int, int]:
    """Bytes resident and files open."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{process}/fd"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        serve(arguments.serve, arguments.at_once)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        asked = questions(root)
        command = [sys.executable, __file__, "--serve", directory]
        command += ["--at-once", str(arguments.at_once)]
        path = os.pathsep.join(filter(None, sys.path))
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        ) as server:
            assert server.stdout is not None
            url = server.stdout.readline().split("/v1")[0]
            load = Load(url, asked, time.monotonic() + arguments.minutes * 60)
            try:
                summary = _run(load, server.pid, arguments)
            finally:
                server.send_signal(signal.SIGTERM)
            if server.wait():
                load.tell(f"the server ended with {server.returncode}")
    for line in load.wrong:
        print(f"FAILED: {line}")
    print(json.dumps({**summary, "failures": len(load.wrong)}))
    return bool(load.wrong)


def _run(load: Load, process: int, arguments: argparse.Namespace) -> dict[str, Any]:
    names = [f"{arguments.seed} {number}" for number in range(arguments.clients - 1)]
    threads = [threading.Thread(target=load.client, args=(name,)) for name in names]
    threads.append(threading.Thread(target=load.keeper))
    for thread in threads:
        thread.start()
    time.sleep(arguments.minutes * 15)
    early = measure(process)
    for thread in threads:
        thread.join()
    metrics = ""
    for _ in range(600):  # what was left ends at its next token
        metrics = httpx.get(f"{load.url}/metrics").text
        if "kvlink_server_running 0.0" in metrics and "kvlink_server_waiting 0.0" in metrics:
            break
        time.sleep(0.05)
    else:
        load.tell("requests still run although every client has left")
    late = measure(process)
    if late[0] - early[0] > MOST_GROWTH:
        load.tell(f"memory grew from {early[0]} to {late[0]} bytes")
    if late[1] - early[1] > MOST_FILES:
        load.tell(f"open files grew from {early[1]} to {late[1]}")
    left = re.search(r"^kvlink_server_left_total (\S+)", metrics, re.MULTILINE)
    answers = load.counts["streamed"] + load.counts["whole"]
    return {
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "calls": dict(sorted(load.counts.items())),
        "answers_a_second": round(answers / (arguments.minutes * 60), 1),
        "left_noticed": float(left[1]) if left else 0.0,
        "megabytes_early_late": [early[0] >> 20, late[0] >> 20],
        "open_files_early_late": [early[1], late[1]],
    }


if __name__ == "__main__":
    sys.exit(main())
