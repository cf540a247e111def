"""Two processes take the steps of one: the same losses and gradients; and fewer than asked, or a dead one, stop the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from distill.training import train
from tests.training.test_labels import make_run as make_soft_run
from tests.training.test_train import make_run, outcome

ROOT = Path(__file__).resolve().parent.parent.parent


def write_config(run, folder: Path) -> Path:
    path = folder / f"{run.config.name}.yaml"
    path.write_text(yaml.safe_dump(run.config.resolved()), encoding="utf-8")
    return path


def launch(*words: str) -> subprocess.Popen:
    """Start `accelerate launch WORDS` in a session of its own, on a free port."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen, seconds: float = 150) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


COPIES, SHARDS = ("--multi_gpu",), ("--config_file", "configs/accelerate/fsdp2.yaml")


@pytest.mark.parametrize("way", [COPIES, SHARDS], ids=["copies", "shards"])
def test_two_processes_give_the_losses_and_gradients_of_one(tmp_path, way):
    """With soft labels, whose cross-entropy is the loss of text alone."""
    settings = {"micro_batch_tokens": 300, "num_train_epochs": 1, "lora": {"r": 4, "alpha": 8}}
    one = make_soft_run(tmp_path, "one", **settings)
    train.main(one.config, one)
    two = make_soft_run(tmp_path, "two", num_processes=2, **settings)
    config = write_config(two, tmp_path)
    process = launch(*way, "--num_processes", "2", "scripts/train.py", str(config))
    shown = finished(process)
    assert process.returncode == 0, shown
    assert ("sharded over 2 processes" in shown) == (way is SHARDS)
    assert two.path("stages/train.json").exists() and len(two.ledger.entries()) == 1
    for row, other in zip(outcome(one)["history"], outcome(two)["history"], strict=True):
        assert row.keys() == other.keys()
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        for part in ("ce", "forward_kl"):
            assert row[part] == pytest.approx(other[part], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert row["tokens"] == other["tokens"]
    for row, other in zip(outcome(one)["validation"], outcome(two)["validation"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_launcher_that_starts_one_process_of_two_is_stopped(tmp_path):
    config = write_config(make_run(tmp_path), tmp_path)
    process = launch("--cpu", "--num_processes", "2", "scripts/train.py", str(config))
    assert "2 processes were asked for, 1 came" in finished(process)
    assert process.returncode != 0


def test_when_one_process_dies_none_is_left(tmp_path):
    run = make_run(tmp_path, num_train_epochs=1000, eval_steps=None)
    config = write_config(run, tmp_path)
    process = launch("--multi_gpu", "--num_processes", "2", "scripts/train.py", str(config))
    workers = wait_for_workers(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    finished(process, 60)
    assert process.returncode != 0
    assert not [pid for pid in workers if alive(pid)]


def test_when_the_launcher_dies_none_is_left(tmp_path):
    run = make_run(tmp_path, num_train_epochs=1000, eval_steps=None)
    config = write_config(run, tmp_path)
    process = launch("--multi_gpu", "--num_processes", "2", "scripts/train.py", str(config))
    workers = wait_for_workers(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    finished(process, 60)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if alive(pid)]


def wait_for_workers(launcher: int) -> list[int]:
    """Return the two workers' process ids once both hold the run's model (they ask to die with their parent)."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [int(word) for word in children.read_text().split()]
        if len(found) == 2 and all(_training(pid) for pid in found):
            return found
        time.sleep(0.2)
    raise AssertionError("the workers did not start")


def _training(pid: int) -> bool:
    """Tell whether a worker has connected to the other: it holds several sockets by then."""
    try:
        links = [os.readlink(p) for p in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return sum(link.startswith("socket") for link in links) >= 3


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
