"""Two processes answer as one does, also when both are killed and one goes on."""

import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState

from distill import launch as launching
from distill.config.tree import Config
from distill.errors import DistillError
from distill.pipeline import STAGES
from distill.records import Document, Message, Prompt
from distill.responders.local import local_model
from distill.responders.local import workers as workers_module
from distill.responders.local.workers import Workers, take_over
from distill.storage import environment
from distill.storage.files import write_records
from distill.storage.log import Log
from distill.storage.repair import repair
from distill.storage.run_folder import Run
from tests.support.launched import alive, finished, launch
from tests.support.mortal import killed_at_every_call
from tests.support.tiny import make_tiny

STAGE = next(stage for stage in STAGES if stage.name == "generate")
COUNT = 60
SMALL = """
import sys
from distill import launch
from distill.planning import preflight
from distill.responders.local import local_model as local
local.PLAN_TOKENS = 160  # so that there are ten plans
preflight.require = lambda *_: None  # no look ahead: these runs have no student
sys.exit(launch.main("generate", sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), "qwen2", hidden=64, tied=False)


def make_run(folder: Path, model: Path, **teacher: Any) -> tuple[Run, list[str]]:
    """Return a run with prompts of many lengths, and the words that start its generation."""
    teacher = {"model": str(model), "max_new_tokens": 32, "n": 2, **teacher}
    if "kind" not in teacher:
        teacher["max_batch_size"] = 5
    config = Config.model_validate(
        {
            "name": "r",
            "runs": folder,
            "corpus": {"path": "x"},
            "teacher": {"temperature": 1.0, **teacher},
            "terms": {"basis": "weights made by this test"},
            "student": {"model": "s"},
        }
    )
    run = Run(config)
    document = Document.make("text", "x", split="train")
    prompts = [
        Prompt.make((Message(role="user", content="word " * (i % 7) + str(i)),), document.id, "t")
        for i in range(COUNT // 2)
    ]
    write_records(run.path("documents.jsonl"), [document])
    write_records(run.path("prompts.jsonl"), prompts)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.resolved()), encoding="utf-8")
    (folder / "small.py").write_text(SMALL, encoding="utf-8")
    return run, [str(folder / "small.py"), str(folder / "config.yaml")]


def start(words: Sequence[str]) -> subprocess.Popen[str]:
    return launch("--multi_gpu", "--num_processes", "2", *words)


def alone(run: Run) -> None:
    """Do the stage in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_model, "PLAN_TOKENS", 160)
        run.perform(STAGE)


def responses(run: Run) -> list[dict[str, Any]]:
    """Return the rows of responses.jsonl, whose seconds alone are not the same in every run."""
    rows = [json.loads(line) for line in run.path("responses.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["usage"].pop("seconds") > 0
    return rows


def stored(run: Run) -> dict[str, Any]:
    """Return every record of the store, without measured seconds, in any order."""
    with Log(run.config.store_folder() / "responses", writable=False) as log:
        found = {
            f"{kind} {key}": log.get(kind, key) or {}
            for kind in log.index
            for key in log.keys(kind)
        }
    for body in found.values():
        body.get("usage", {}).pop("seconds", None)
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Run:
    """A run that one process has answered."""
    run, _ = make_run(tmp_path_factory.mktemp("one"), model)
    alone(run)
    return run


def check(run: Run, one: Run) -> None:
    """Hold a run against that of one process: responses, store, nothing left lying about."""
    assert responses(run) == responses(one) and stored(run) == stored(one)
    assert len(responses(run)) == COUNT
    assert not list((run.folder.parent / ".store").glob("responses.parts*"))


def tokens(run: Run) -> tuple[int, int]:
    ledger = run.ledger.entries()
    return sum(e.input_tokens for e in ledger), sum(e.output_tokens for e in ledger)


def test_two_processes_answer_as_one(tmp_path: Path, model: Path, one: Run) -> None:
    run, words = make_run(tmp_path, model)
    process = start(words)
    shown = finished(process)
    assert process.returncode == 0, shown
    check(run, one)
    assert tokens(run) == tokens(one) and len(run.ledger.entries()) == 1
    assert f"teacher: {COUNT}/{COUNT}" in shown and shown.count("generate: done") == 1


def answers_kept(run: Run) -> set[str]:
    """Return the ids of the answers on the disk, in the store or in a process's own log."""
    while True:
        with suppress(FileNotFoundError):  # a log that is taken over goes while we look
            files = [path.read_bytes() for path in run.config.store_folder().rglob("0*.jsonl")]
            lines = [line for data in files for line in data.split(b"\n")[:-1]]
            return {line.decode().split(" ", 3)[2] for line in lines if b" response " in line[:80]}


def wait_for_answers(run: Run, count: int, process: subprocess.Popen[str]) -> list[int]:
    """Wait until so many answers are on the disk; return the process ids of the launched."""
    deadline = time.monotonic() + 120
    while len(answers_kept(run)) < count:
        assert process.poll() is None and time.monotonic() < deadline, finished(process, 1)
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(word) for word in children.split()]


@pytest.mark.slow
def test_killed_processes_lose_nothing_and_one_goes_on(
    tmp_path: Path, model: Path, one: Run
) -> None:
    run, words = make_run(tmp_path, model)
    process = start(words)
    workers = wait_for_answers(run, 5, process)
    os.kill(workers[1], signal.SIGKILL)
    killed, shown = time.monotonic(), finished(process)
    assert process.returncode != 0 and time.monotonic() - killed < 20
    assert f"error: process 1 (pid {workers[1]}): has died (the same command" in shown
    assert not [pid for pid in workers if alive(pid)]

    before = answers_kept(run)
    process = start(words)
    workers = wait_for_answers(run, len(before) + random.randrange(1, 20), process)
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    finished(process)
    kept = answers_kept(run)
    assert before < kept and len(kept) < COUNT
    alone(run)
    check(run, one)
    assert kept <= answers_kept(run)


# --- what lies in the logs of others


def leave(folder: Path) -> None:
    """Write a store of two answers, and two other processes' logs with four, one in both."""
    for name, keys in (("s", "ab"), ("s.parts/1", "bcd"), ("s.parts/12", "e")):
        with Log(folder / name) as log:
            log.append(("response", key, {"text": key}) for key in keys)
    with (folder / "s.parts/1/00000001.jsonl").open("ab") as segment:
        segment.write(b"torn")


def taken(folder: Path) -> set[str]:
    with Log(folder / "s") as log:
        take_over(log)
        return {(log.get("response", key) or {})["text"] for key in log.keys("response")}


def test_kill_at_every_call_of_taking_over(memory: Path) -> None:
    rounds = (memory / str(n) for n in itertools.count())
    folder = next(rounds)

    def check() -> None:
        nonlocal folder
        assert taken(folder) == set("abcde")
        assert {path.name for path in folder.iterdir()} <= {"s", "s.parts"}
        assert not list(folder.glob("s.parts/[0-9]*"))
        folder = next(rounds)
        leave(folder)

    leave(folder)
    assert killed_at_every_call(lambda: taken(folder), check) > 20


def test_a_log_in_use_or_damaged_is_not_taken_over(tmp_path: Path) -> None:
    leave(tmp_path)
    segment = tmp_path / "s.parts" / "12" / "00000001.jsonl"
    with Log(segment.parent), pytest.raises(DistillError, match="lock held by pid"):
        taken(tmp_path)
    segment.write_bytes(segment.read_bytes().replace(b'"e"', b'"f"'))
    with pytest.raises(DistillError, match=r":1: damaged record \(distill repair .*s.parts/12"):
        taken(tmp_path)
    repair(segment.parent)
    assert taken(tmp_path) == set("abcd")
    assert [path.name for path in (tmp_path / "s.parts").iterdir()] == ["12.damaged-1"]


# --- who may come together


def test_fewer_processes_than_asked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "python\0accelerate\0launch\0--cpu\0--num_processes\0002\0"
    monkeypatch.setattr(environment, "launcher_command", lambda: asked)
    with pytest.raises(DistillError, match=r"2 processes were asked for, 1 came .*generate.py"):
        Workers.meet()
    PartialState._reset_state()


def test_other_teachers_are_asked_by_one_process(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(tmp_path, model, kind="canned", answers="a")
    monkeypatch.setattr(Workers, "meet", lambda: Workers(1, [1, 2]))
    with pytest.raises(DistillError, match="one process asks a canned teacher"):
        launching.generate(run, STAGE, set())


def test_machines_and_devices_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(DistillError, match="several machines"):
        workers_module.check_devices(4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DistillError, match="2 processes, 1 GPUs"):
        workers_module.check_devices(2)
