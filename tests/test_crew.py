"""Two processes answer as one does: the same answers, also when both are killed and one goes on; a dead one ends the other."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import Config
from distill.generation import local
from distill.records import Document, Message, Prompt
from distill.run import Run
from distill.stages import STAGES
from distill.store import Log, write_records
from tests.test_train_two_processes import alive, finished, launch
from tests.tiny import make_tiny

STAGE = next(stage for stage in STAGES if stage.name == "generate")
COUNT = 60
SMALL = """
import sys
from distill.generation import local
from distill.launch import main
local.PLAN_TOKENS = 160  # so that there are ten plans
sys.exit(main("generate", sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), "qwen2", hidden=64, tied=False)


def make_run(folder: Path, model: Path, **teacher: Any) -> tuple[Run, list[str]]:
    """Return a run in `folder` with prompts of many lengths, and the words that start its generation."""
    teacher = {"model": str(model), "max_new_tokens": 32, "slots": 5, "n": 2, **teacher}
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
    document = Document.make("text", "x", {"split": "train"})
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
        patch.setattr(local, "PLAN_TOKENS", 160)
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
            f"{kind} {key}": log.get(kind, key) for kind in log.index for key in log.keys(kind)
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
    """Hold a run against that of one process: responses, store, tokens accounted for, nothing left lying about."""
    assert responses(run) == responses(one) and stored(run) == stored(one)
    assert len(responses(run)) == COUNT
    assert not list((run.folder.parent / ".store").glob("responses.parts*"))


def tokens(run: Run) -> tuple[int, int]:
    ledger = run.ledger()
    return sum(e.input_tokens for e in ledger), sum(e.output_tokens for e in ledger)


def test_two_processes_answer_as_one(tmp_path: Path, model: Path, one: Run) -> None:
    run, words = make_run(tmp_path, model)
    process = start(words)
    shown = finished(process)
    assert process.returncode == 0, shown
    check(run, one)
    assert tokens(run) == tokens(one) and len(run.ledger()) == 1
    assert f"teacher: {COUNT}/{COUNT}" in shown and shown.count("generate: done") == 1


def answers_kept(run: Run) -> set[str]:
    """Return the ids of the answers that are on the disk, in the store or in a process's own log."""
    lines = (
        line
        for path in run.config.store_folder().rglob("0*.jsonl")
        for line in path.read_bytes().split(b"\n")[:-1]
    )
    return {line.decode().split(" ", 3)[2] for line in lines if b" response " in line[:80]}


def wait_for_answers(run: Run, count: int, process: subprocess.Popen[str]) -> list[int]:
    """Wait until so many answers are on the disk; return the process ids of the launched."""
    deadline = time.monotonic() + 120
    while len(answers_kept(run)) < count:
        assert process.poll() is None and time.monotonic() < deadline, finished(process, 1)
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(word) for word in children.split()]


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
