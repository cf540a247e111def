"""Paid answers and finished runs stay: those that commit 07339c8 left are opened by the command
line, which asks nothing.

That commit made tests/fixtures/old of scripts/tiny_runs.py. Nothing there is ever made again for a
new release of distill: where a test here fails, users lose what they paid for. Every command runs
in a copy, in a process of its own.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from distill.storage.files import sha256_files

OLD = Path(__file__).parent / "fixtures/old"
PORT = 18_765  # where their teacher answered; the address is part of the key of every paid answer
NAMES = ("chat", "completions", "local", "soft")
UNPUBLISHED = {  # their student is a folder: of unknown license, or without a name to publish under
    "completions": (10, "publish.licen"),
    "soft": (9, "is a folder"),
}
ANEW = {
    "config.json",
    "manifest.json",
    ".lock",
}  # what every command may write, in a newer form too
STAGES = ("corpus", "prompts", "generate", "filter", "signals")
DRIVER = """
import json, os, sys
from distill.cli import main
codes = []
for number, words in enumerate(json.loads(sys.argv[1])):
    log = os.open(f"{number}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    codes.append(main(words))
    sys.stdout.flush()
open("codes.json", "w").write(json.dumps(codes))
"""


class Done(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    said: str


class Listener:
    """Counts who calls the address of the paid teacher; nobody is answered."""

    def __init__(self) -> None:
        self.calls = 0
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def __enter__(self) -> "Listener":
        try:
            self.socket.bind(("127.0.0.1", PORT))
        except OSError:  # another run of these tests listens, and counts; here every request fails
            return self
        self.socket.listen()
        threading.Thread(target=self._count, daemon=True).start()
        return self

    def _count(self) -> None:
        while True:
            try:
                caller, _ = self.socket.accept()
            except OSError:
                return
            self.calls += 1
            caller.close()

    def __exit__(self, *error: object) -> None:
        self.socket.close()


def distill(folder: Path, commands: Sequence[Sequence[str]]) -> tuple[list[Done], int]:
    """Perform commands of distill one after another in a folder; return how they ended, and how
    often the teacher was called."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_ENDPOINT"},
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
        "TINY_KEY": "any",
    }
    with Listener() as listener:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(commands)], cwd=folder, env=environment
        )
        assert done.returncode == 0
    logs = [(folder / f"{number}.log").read_text() for number in range(len(commands))]
    codes = json.loads((folder / "codes.json").read_text())
    return [Done(*both) for both in zip(codes, logs, strict=True)], listener.calls


def copied(folder: Path) -> Path:
    return shutil.copytree(OLD, folder / "elsewhere")


def answers_in(store: Path) -> list[str]:
    """Return the keys of what was asked and of what was answered, with repeats."""
    lines = [
        line for path in sorted(store.glob("*.jsonl")) for line in path.read_bytes().split(b"\n")
    ]
    words = [line.split(b" ", 3) for line in lines if line]
    return sorted(f"{kind} {key}" for _, kind, key, _ in words if kind in (b"intent", b"response"))


def signals_in(folder: Path) -> dict[str, str]:
    """Return the hashes of the distributions that are kept."""
    files = sha256_files(folder / "runs/.store/signals", ["."])
    return {name: file for name, file in files.items() if name.endswith(".signals")}


def commands_on(name: str) -> dict[str, list[str]]:
    """Return what a user may do with a finished run."""
    return {
        "run of the folder": ["run", f"runs/{name}"],
        "run of the config": ["run", f"{name}.yaml"],
        "run with a key as it was called": ["run", f"{name}.yaml", "evaluation.utilisation=0.5"],
        "status": ["status", f"runs/{name}"],
        "plan": ["plan", f"{name}.yaml"],
        "report": ["report", f"{name}.yaml"],
        "verify": ["verify", f"runs/{name}"],
        "publish": ["publish", f"runs/{name}"],
        "verify with its release": ["verify", f"runs/{name}"],
        "publish its answers": [
            "publish",
            f"runs/{name}",
            "--dataset",
            "publish.corpus_license=MIT",
        ],
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def session(place: Path) -> tuple[list[Done], int]:
    """Do all that a user may do with each finished run, in one copy."""
    return distill(place, [words for name in NAMES for words in commands_on(name).values()])


@pytest.fixture(scope="module")
def done(session: tuple[list[Done], int]) -> dict[tuple[str, str], Done]:
    """Return how each command on each run ended."""
    keys = [(name, what) for name in NAMES for what in commands_on(name)]
    return dict(zip(keys, session[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", commands_on(""))
def test_a_finished_run_is_used(done: dict[tuple[str, str], Done], name: str, what: str) -> None:
    code, words = UNPUBLISHED.get(name, (0, "")) if what == "publish" else (0, "")
    assert done[name, what].code == code and words in done[name, what].said, done[name, what]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_finished_run_is_made_again(
    done: dict[tuple[str, str], Done], place: Path, name: str
) -> None:
    before, after = (sha256_files(folder / "runs" / name, ["."]) for folder in (OLD, place))
    made = {file for file in before if file not in ANEW and not file.startswith("release/")}
    assert {f for f in made if after.get(f) != before[f]} == set()
    assert len([f for f in made if f.startswith("stages/")]) >= 7
    if name not in UNPUBLISHED:
        adapter = "adapter/adapter_model.safetensors"
        assert after[f"release/{adapter}"] == before[adapter]
        assert "release/model.safetensors" in after


def test_commands_on_finished_runs_ask_nothing_and_leave_the_store_alone(
    session: tuple[list[Done], int], place: Path
) -> None:
    assert session[1] == 0, "the paid teacher was called"
    store = "runs/.store/responses"
    assert answers_in(place / store) == answers_in(OLD / store)
    assert signals_in(place) == signals_in(OLD)


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Repair the old store, then ask everything of the finished runs again under new names."""
    folder = copied(tmp_path_factory.mktemp("again"))
    stages = [[s, f"{name}.yaml", f"name={name}-again"] for name in NAMES for s in STAGES]
    ends, calls = distill(folder, [["repair", "runs/.store/responses"], *stages])
    assert [one for one in ends if one.code] == []
    return folder, calls


@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_that_asks_the_same_finds_every_answer(
    again: tuple[Path, int], name: str
) -> None:
    for split in ("train", "validation", "heldout"):
        old, new = (
            (again[0] / "runs" / run / f"dataset/{split}.jsonl").read_text().splitlines()
            for run in (name, f"{name}-again")
        )
        assert [texts(line) for line in old] == [texts(line) for line in new] and old
        if name != "soft":  # a model in a folder may get another key, under which its answers stay
            assert old == new


def texts(line: str) -> tuple:
    """Return what a row of the dataset teaches."""
    row = json.loads(line)
    return row["prompt"], row["response"]["text"], row["response"]["stop"]


def test_asking_the_same_again_adds_no_answer_and_no_distribution(again: tuple[Path, int]) -> None:
    folder, calls = again
    store = "runs/.store/responses"
    assert calls == 0, "the paid teacher was called"
    assert answers_in(folder / store) == answers_in(OLD / store)
    assert signals_in(folder) == signals_in(OLD)
