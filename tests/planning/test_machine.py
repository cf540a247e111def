"""A machine is measured, or has the rate of its data sheet."""

import math

import torch

from distill.models.devices import pick_dtype
from distill.planning import machine
from distill.planning.machine import find_machine


def test_this_machine_is_measured_in_the_types_that_are_asked():
    here = find_machine("cpu-2-core", "auto", "float32")
    assert here.kind == "cpu" and here.memory == here.main_memory and (here.memory or 0) > 1e8
    assert "torch." + here.rates["auto"][0] == str(pick_dtype("auto"))
    assert here.rates["float32"][0] == "float32" and here.width("float32") == 4
    assert all(1e8 < rate < 1e14 for _, rate in here.rates.values())
    assert "GFLOP/s in float32" in here.source and "measured now" in here.source


def test_a_machine_that_cannot_be_measured_has_no_seconds(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "randn", full)
    here = machine.measure(["float32"])
    assert math.isnan(here.seconds(1e12, "float32", "train"))
    assert here.source == "its rate could not be measured"


def test_a_gpu_that_is_not_here_has_the_rate_of_its_data_sheet():
    gpu = find_machine("h100", "bfloat16")
    assert gpu.rates["bfloat16"] == ("bfloat16", 989e12) and gpu.memory == 80e9
    assert "data sheet" in gpu.source
    assert gpu.seconds(989e12, "bfloat16", "train") == 1 / machine.GPU_SHARE
    old = find_machine("t4", "bfloat16", "auto")
    assert old.rates["auto"][0] == "float16" and old.width("auto") == 2
    assert "T4 does not compute in bfloat16" in old.notes[-1]
