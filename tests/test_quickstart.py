"""The command on a real model: SmolLM2 is fetched, verified, asked, trained a little, compared and
reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distill.errors import DistillError
from distill.models.registry import fetch

ROOT = Path(__file__).parent.parent
MODEL = "smollm2-135m-instruct"
SMALL = (
    f"teacher.model={MODEL}",
    "teacher.max_new_tokens=24",
    "corpus.limit=16",
    "corpus.split={validation: 2, heldout: 3}",
    "prompts.train=9",
    "prompts.validation=2",
    "prompts.heldout=3",
    "filters={truncated: false, wrong_format: false, failed_checker: false}",
    "train.max_steps=2",
    "train.num_train_epochs=4",
)


def distill(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill", "run", str(ROOT / "configs/quickstart.yaml")]
    words = [*command, f"runs={folder}", *SMALL]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.models
@pytest.mark.slow
def test_the_real_smollm2_goes_through_the_whole_loop(tmp_path):
    try:
        fetch(MODEL)
    except DistillError as error:
        pytest.skip(f"the model cannot be fetched here: {error}")
    first = distill(tmp_path)
    assert first.returncode == 0, first.stderr
    card = json.loads((tmp_path / "quickstart/scorecard.json").read_text())
    loss = card["agreement"]["nats_per_token"]
    assert loss["student"] < loss["base"]
    training = json.loads((tmp_path / "quickstart/training.json").read_text())
    assert training["steps"] == 2 and training["base"]["hub_id"].endswith("SmolLM2-135M-Instruct")
    again = distill(tmp_path)
    assert again.returncode == 0 and again.stdout == first.stdout
    assert again.stderr.count("reused") == 7
