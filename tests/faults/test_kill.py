"""The short form of kill_stages.py: one kill in each long stage, a few of a store's writer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "kill_stages.py"
STAGES = ("generate", "train", "evaluate")


@pytest.mark.slow
def test_killed_runs_end_as_if_nobody_had_killed_them(tmp_path):
    figures = tmp_path / "kills.json"
    command = [sys.executable, str(SCRIPT), "--kills", "1", "--real", "0", "--store-kills", "30"]
    command += ["--json", str(figures), "--stages", *STAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(figures.read_text())
    assert found["store"]["kills"] == 30 and found["store"]["records"] > 30
    assert found["store"]["lost"] == found["store"]["wrong"] == 0
    assert [trial["stage"] for trial in found["trials"]] == list(STAGES)
    assert not any(trial["faults"] for trial in found["trials"])
