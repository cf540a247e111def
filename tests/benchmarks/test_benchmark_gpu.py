"""The benchmark for GPUs in its tiny form, which any machine can run: it measures what it says, and
says when it cannot."""

import json
import sys
from pathlib import Path

import pytest
import torch

from distill.errors import Exit

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts" / "benchmarks"))

import benchmark_gpu as benchmark


def call(folder: Path, *words: str) -> dict:
    path = folder / "found.json"
    assert benchmark.main([*words, "--tiny", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_side_trains_the_same_tokens(tmp_path, capsys):
    sizes = ("--step-tokens", "100", "--micro-batch-tokens", "60", "--batch", "2")
    found = call(tmp_path, "train", "--repeats", "2", "--no-compile", *sizes)
    assert {"ours", "plain, sorted"} <= found["sides"].keys()
    for side in found["sides"].values():
        for row, own in zip(side["rounds"], found["sides"]["ours"]["rounds"], strict=True):
            assert row["tokens"] == own["tokens"] >= 100
            assert row["flops"] * row["seconds"] == pytest.approx(own["flops"] * own["seconds"])
    shown = capsys.readouterr().err
    assert "these figures mean nothing" in shown
    if not torch.cuda.is_available():
        assert found["gpu"] == "CPU" and found["peak_rate"] is None and "not known" in shown


def test_every_loss_of_a_kind_has_the_same_value(tmp_path):
    sides = call(tmp_path, "losses", "--repeats", "3", "--no-compile")["sides"]
    assert {"cross-entropy", "cached, kl", "live, kl", "live, jsd"} <= sides.keys()
    for name, side in sides.items():
        assert len(side["seconds"]) == 3
        own = sides.get(f"live, {name.rpartition(', ')[2]}")
        if own and not name.startswith("cached"):
            assert side["loss"] == pytest.approx(own["loss"], rel=5e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("mode", ["train", "losses"])
def test_without_a_gpu_it_says_so_in_one_line(mode, capsys):
    assert benchmark.main([mode]) == Exit.TRAINING
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_without_a_shape_is_named(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CUDA", True)
    assert benchmark.main(["train", "--model", "nobody/knows"]) == Exit.CONFIG
    assert "nobody/knows" in capsys.readouterr().err
