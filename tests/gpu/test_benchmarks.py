"""The benchmarks measure the program, with the best flags of the others, on a bare machine too."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from distill.models.loading import load_model
from distill.training import adapters, student, train
from distill.training.encode import encode_split
from tests.support.tiny import make_tiny, make_tokenizer
from tests.support.training import causal_model, equal, examples, make_run

SCRIPTS = Path(__file__).parents[2] / "scripts/benchmarks"
sys.path.insert(0, str(SCRIPTS))

import benchmark_train  # noqa: E402

BARE = """
import runpy, sys
import peft, transformers.trainer
blocked = "datasets trl pydantic pydantic_core httpx2 typer rich jinja2 jsonschema lxml".split()
for name in [*sys.modules]:
    if name.partition(".")[0] in blocked:
        del sys.modules[name]
sys.modules.update(dict.fromkeys(blocked))  # importing one of them is an error now
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Products(TorchDispatchMode):
    """Counts the matrix products inside its block by the type that they are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.types = Counter[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm"):
            self.types[args[-1].dtype] += 1
        return func(*args, **(kwargs or {}))


def test_i25_ours_is_the_program_off_the_cpu_too(tmp_path, monkeypatch):
    """In bfloat16 no product of ours is in float32, where PEFT's own forward has most in it."""
    monkeypatch.setattr(student, "fuse", lambda decoder: False)  # as where there is a GPU
    folder, counts = make_tiny(tmp_path / "model", layers=2), {}
    for name, make in {
        "ours": benchmark_train.Ours,
        "plain": lambda model: benchmark_train.plain(model, by_length=True),
    }.items():
        side = make(causal_model(folder, torch.bfloat16))
        with Products() as products:
            side(examples())
        counts[name] = products.types
    assert set(counts["ours"]) == {torch.bfloat16}
    assert counts["plain"][torch.float32] > counts["plain"].total() / 2


def test_i25_ours_takes_the_step_that_the_stage_takes(tmp_path):
    lora = {"r": benchmark_train.RANK, "alpha": benchmark_train.ALPHA}
    rate = {"learning_rate": benchmark_train.RATE, "lr_scheduler_type": "constant"}
    steps = {"max_steps": 1, "tokens_per_step": 10**6, "warmup_steps": 0, "weight_decay": 0.0}
    run = make_run(tmp_path, count=12, lora=lora, **rate, **steps)
    train.main(run)
    ours = benchmark_train.Ours(load_model(run.config.student.model, "float32"))
    samples = encode_split(make_tokenizer(), run, "train", 2048)
    before = adapters.tensors(ours.student.model)
    ours.step(samples)
    after = adapters.tensors(ours.student.model)
    assert not equal(before, after)
    assert equal(after, load_file(run.path("adapter") / adapters.WEIGHTS))


def test_i24_the_gpu_benchmark_runs_with_torch_transformers_and_peft_alone(tmp_path):
    path = tmp_path / "gpu.json"
    script = SCRIPTS / "benchmark_gpu.py"
    words = ["--device", "cpu", "--repeats", "2", "--json", path]
    command = [sys.executable, "-c", BARE, SCRIPTS, script, *words]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "these figures mean nothing" in done.stderr and "not known" in done.stderr
    results = json.loads(path.read_text())
    assert results["gpu"] == "CPU" and results["train"]["peak_rate"] is None
    (size,) = results["train"]["sizes"].values()
    sides = size["sides"]
    assert {"ours", "plain"} <= sides.keys() and size["predicted"] > 0
    for side in sides.values():
        assert len(side["rounds"]) == 2
        for row, own in zip(side["rounds"], sides["ours"]["rounds"], strict=True):
            assert row["tokens"] == own["tokens"] >= 100
            assert row["flops"] * row["seconds"] == pytest.approx(own["flops"] * own["seconds"])
    losses = results["losses"]["sides"]
    assert {"cross-entropy", "cached, kl", "live, kl", "live, jsd"} <= losses.keys()
    assert all(len(row["seconds"]) == 2 for row in losses.values())
    for kind in ("kl", "jsd"):
        same = [row["loss"] for name, row in losses.items() if name.endswith(f", {kind}")]
        assert all(loss == pytest.approx(same[-1], rel=5e-3) for loss in same[1:])
