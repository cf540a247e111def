"""H11: runs that use one store at the same time buy each question once, also after kills."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill.records import Response
from distill.responders.store import ResponseStore
from distill.storage.files import folder_lock, read_records
from distill.storage.log import Log, segments
from distill.storage.run_folder import open_run
from tests.responders.test_ask import Counting, plain
from tests.support.asking import answer_all
from tests.support.buying import account_of, make_run
from tests.support.fake_teacher import KEY, FakeTeacher, Reply, text_of
from tests.support.mortal import in_child

ROOT = Path(__file__).parent.parent.parent


class Runs:
    """Two runs on one store, each a process of the command."""

    def __init__(self, folder: Path, teacher: FakeTeacher, counts: dict[str, int]) -> None:
        self.teacher, self.store, self.counts = teacher, folder / "store/responses", counts
        self.processes = dict[str, subprocess.Popen[bytes]]()
        self.configs = dict[str, Path]()
        for name, count in counts.items():
            (folder / name).mkdir()
            path = make_run(folder / name, teacher, count, concurrency=3)
            tree = json.loads(path.read_text()) | {"store": str(folder / "store")}
            path.write_text(json.dumps(tree))
            self.configs[name] = path

    def start(self, name: str) -> None:
        command = [sys.executable, "-m", "tests.support.buying", str(self.configs[name])]
        environment = {**os.environ, "TEACHER_KEY": KEY}
        with self.configs[name].with_name("said").open("a") as said:
            self.processes[name] = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=said)

    def said(self, name: str) -> str:
        """Return what a run has said so far."""
        return self.configs[name].with_name("said").read_text()

    def end(self, name: str) -> str:
        """Return what a run said; it must end well, with all its answers."""
        assert self.processes[name].wait(60) == 0, self.said(name)
        path = open_run(self.configs[name]).path("responses.jsonl")
        texts = [response.text for response in read_records(path, Response)]
        assert texts == [text_of(f"q{i} please") for i in range(self.counts[name])]
        return self.said(name)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def wait_for(self, requests: int) -> None:
        wait_until(lambda: len(self.teacher.payloads) >= requests)


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def teacher() -> Iterator[FakeTeacher]:
    with FakeTeacher(lambda number, payload: Reply(delay=0.05)) as teacher:
        yield teacher


def test_h11_each_question_is_paid_once_and_the_second_run_waits(
    tmp_path: Path, teacher: FakeTeacher
) -> None:
    waits = threading.Event()  # until then the first answer of the first run does not come
    teacher.script = lambda number, payload: Reply(hold=None if number else waits.is_set)
    runs = Runs(tmp_path, teacher, {"a": 40, "b": 60})
    runs.start("a")
    runs.wait_for(1)
    runs.start("b")
    wait_until(lambda: "waiting for 40 answers that another run is getting" in runs.said("b"))
    waits.set()
    runs.end("b")
    runs.end("a")
    assert set(teacher.asked.values()) == {1} and len(teacher.asked) == 60
    assert {path.name for path in segments(runs.store)} == {"00000001.jsonl", "w2-00000001.jsonl"}
    assert account_of(runs.store).settled == teacher.bill


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_h11_the_second_buys_what_the_first_did_not(
    tmp_path: Path, teacher: FakeTeacher, kind: signal.Signals
) -> None:
    runs = Runs(tmp_path, teacher, {"a": 40, "b": 40})
    runs.start("a")
    runs.wait_for(1)
    runs.start("b")
    runs.wait_for(15)
    runs.processes["a"].send_signal(kind)
    runs.processes["a"].wait(60)
    runs.end("b")
    again = sum(teacher.bills.values()) - 40
    assert again <= (3 if kind == signal.SIGKILL else 0)  # what was in flight
    assert account_of(runs.store).unknown >= again
    runs.start("a")
    runs.end("a")
    assert sum(teacher.bills.values()) == 40 + again


def test_h11_kills_of_either_lose_nothing(tmp_path: Path, teacher: FakeTeacher) -> None:
    chance, stored = random.Random(11), set[str]()
    runs = Runs(tmp_path, teacher, {"a": 50, "b": 50})
    runs.start("a")
    runs.start("b")
    for name in "abab":
        requests = len(teacher.payloads)
        runs.wait_for(min(requests + chance.randint(1, 8), 50))
        runs.kill(name)
        with ResponseStore(runs.store, writable=False) as log:
            now = set(log.keys("response"))
        assert stored <= now
        stored = now
        runs.start(name)
    runs.end("a")
    runs.end("b")
    again = sum(teacher.bills.values()) - 50
    account = account_of(runs.store)
    assert again <= account.unknown <= 3 * 4
    assert account.settled <= teacher.bill <= account.settled + account.unknown_most


def test_h11_a_torn_tail_belongs_to_its_writer(tmp_path: Path) -> None:
    """Another's line that is being written is neither read nor moved."""
    with Log(tmp_path, writable=False) as first, Log(tmp_path, writable=False) as second:
        with first.writing(shared=True), second.writing(shared=True):
            assert (first.writer, second.writer) == ("", "w2")
            first.append([("response", "a", 1)])
            with (tmp_path / "00000001.jsonl").open("ab") as file:
                file.write(b"half a line")
            assert second.claim(["a", "b"]) == {"a", "b"}
            assert second.get("response", "a") == 1 and not (tmp_path / "torn").exists()
            assert (tmp_path / "00000001.jsonl").read_bytes().endswith(b"half a line")
            assert first.claim(["b", "c"]) == {"c"}
            assert in_child(lambda: folder_lock(tmp_path).__enter__()) == 5  # a repair, say
        with second.writing(shared=True):
            assert second.claim(["b"]) == {"b"}  # whoever claimed it has ended
            assert second.writer == "" and list((tmp_path / "torn").iterdir())


def test_h11_a_claim_ends_with_its_go(tmp_path: Path) -> None:
    """What came to nothing for one run is asked for by the other."""
    with Log(tmp_path, writable=False) as other, other.writing(shared=True):
        other.claim([plain(3)[0].id])
        other.claim([])
        assert len(answer_all(Counting(), plain(3), tmp_path)) == 3
