"""The benchmark of soft labels on tiny models: what it compares is trained alike, and its ratios
are what they say."""

import json
import sys
from pathlib import Path

import pytest

from distill.storage.files import write_json, write_records
from tests.support.training import make_soft_run, pairs

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts" / "benchmarks"))

import benchmark_soft_labels as benchmark


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with 16 training samples."""
    run = make_soft_run(tmp_path, train={"learning_rate": 1e-2})
    write_records(run.path("dataset/train.jsonl"), pairs(16))
    write_json(run.path("config.json"), run.config.resolved())
    return run.folder


def call(folder: Path, mode: str, *more: str) -> dict:
    path = folder / f"{mode}.json"
    benchmark.main([mode, str(folder), "--json", str(path), *more])
    return json.loads(path.read_text())


def test_students_of_the_cache_of_the_teacher_and_of_a_plain_loss_learn_the_same(folder):
    asked = ("--samples", "10", "--held", "4", "--steps", "6", "--step-tokens", "300")
    part = call(folder, "parity", *asked, "--sides", "live")["sides"]
    sides = call(folder, "parity", *asked)["sides"]
    assert sides["live"] == part["live"] and len(sides["live"]["losses"]) == 6
    before, live = sides["live"]["before"], sides["live"]["after"]
    assert live["loss"] < 0.97 * before["loss"]
    assert live["loss"] == pytest.approx(0.5 * live["ce"] + 0.5 * live["forward_kl"], rel=1e-5)
    plain = sides["live, plain loss"]
    assert plain["losses"] == pytest.approx(sides["live"]["losses"], rel=3e-3)
    assert plain["after"] == pytest.approx(live, rel=3e-3)
    assert sides["cached"]["before"] == before
    assert sides["cached"]["after"] != live
    assert sides["cached"]["after"] == pytest.approx(live, rel=0.01)


def test_trl_trains_on_the_same_ids(folder, capsys):
    pytest.importorskip("trl")
    task = json.dumps(["GKD", 4, 2, False, True])
    benchmark.main(["speed", str(folder), "--samples", "4", "--child", task])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["trl"].startswith("1.16") and found["seconds"] > 0
