"""Two processes answer as one does: the same answers, also when both are killed and one goes on; a dead one ends the other."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import Config
from distill.records import Document, Message, Prompt
from distill.run import Run
from distill.store import Log, write_records
from tests.test_train_two_processes import finished, launch
from tests.tiny import make_tiny

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


def alone(words: Sequence[str]) -> str:
    """Do the stage in one process, and return what it says."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


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
    run, words = make_run(tmp_path_factory.mktemp("one"), model)
    alone(words)
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
