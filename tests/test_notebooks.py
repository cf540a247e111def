"""docs/notebooks.md: its cells run as they stand, and go on where their machine was taken away."""

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.errors import DistillError
from distill.storage import files
from tests.support.tiny import make_tiny

DOC = (Path(__file__).parent.parent / "docs/notebooks.md").read_text()
SHELL = """\
import sys, types
shown = []
display = types.ModuleType("IPython.display")  # of a notebook: keeps what it is told to show
display.display = shown.append
display.HTML = display.Markdown = str
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": display}
"""
CONFIG = """\
name: quickstart
corpus: {path: rows.jsonl, format: prompts, split: {validation: 2, heldout: 4}}
prompts: {tasks: [chat]}
teacher: {kind: recorded, model: somebody/one, license: CC0-1.0, max_new_tokens: 8}
student: {model: ./student, dtype: float32}
train:
  {max_steps: 12, save_steps: 1, tokens_per_step: 64, max_length: 512, bf16: false, lora: {r: 2}}
evaluation: {bootstrap_samples: 100}
"""


@pytest.fixture
def notebook(tmp_path: Path) -> list[str]:
    """Write what the cells find where they run, with tiny models; return how they are started."""
    make_tiny(tmp_path / "student")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.yaml").write_text(CONFIG)
    rows = [{"prompt": f"What is {n}?", "answer": f"It is the number {n}."} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cells = re.findall(r"```python\n(.*?)```", DOC, re.S)
    assert len(cells) == 3 and cells[0].startswith("%pip install ")
    code = "\n".join(cells).partition("\n")[2]
    (tmp_path / "cells.py").write_text(f"{SHELL}{code}\nprint(*shown, sep='\\n')\n")
    return [sys.executable, "cells.py"]


def test_the_cells_run_and_go_on_after_the_machine_was_taken_away(
    tmp_path: Path, notebook: list[str]
) -> None:
    first = subprocess.Popen(notebook, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/quickstart/checkpoints/step-*")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (tmp_path / "runs/quickstart/.lock").exists(), "left behind"
    done = subprocess.run(notebook, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate: done before, reused" in done.stderr
    assert "# quickstart: scorecard" in done.stdout and "<div><iframe srcdoc=" in done.stdout
    ledger = (tmp_path / "runs/quickstart/ledger.jsonl").read_text()
    assert '"note":"killed"' in ledger


def test_a_drive_without_locks_and_without_fsync_of_folders_is_used_and_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(handle: int, *_: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) or _:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files.os, "fsync", refuse)
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.folder_lock(tmp_path):
        files.write_json(tmp_path / "a.json", {"a": 1})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert capsys.readouterr().err.count("has no locks") == 1
    monkeypatch.setattr(files.os, "fsync", lambda handle: os.close(99_999))
    with pytest.raises(DistillError, match="Bad file descriptor"):
        files.write_json(tmp_path / "a.json", {})
