"""The machine: measured in a child process in the type that is used, else of a data sheet, else unknown."""

import json
import math
import sys

import pytest

from distill.models.loading import pick_dtype
from distill.models.registry import shape_of
from distill.planning import machine
from distill.planning.machine import BANDWIDTH, Machine, devices, find_machine


def test_this_machine_is_measured_in_the_types_that_are_asked():
    found = find_machine("cpu-2-core", "auto", "float32")
    assert found.kind == "cpu" and found.memory and found.memory > 1e8
    assert "torch." + found.rates["auto"][0] == str(pick_dtype("auto"))
    assert found.rates["float32"][0] == "float32" and found.width("float32") == 4
    assert all(1e8 < rate < 1e14 for _, rate in found.rates.values())
    assert "GFLOP/s in float32" in found.source and "measured now" in found.source


def test_a_machine_that_cannot_be_measured_has_no_seconds(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    find_machine.cache_clear()
    found = find_machine(None, "float32")
    find_machine.cache_clear()
    assert math.isnan(found.seconds(1e12, "float32", "train"))
    assert found.source == "its rate could not be measured" and found.memory is None


def test_a_gpu_that_is_not_here_has_the_rate_of_its_data_sheet():
    found = find_machine("h100", "bfloat16")
    assert found.rates["bfloat16"] == ("bfloat16", 989e12) and found.memory == 80e9
    assert "data sheet" in found.source
    assert found.seconds(989e12, "bfloat16", "train") == 1 / machine.GPU_SHARE


def test_few_answers_take_the_reading_of_the_weights_many_the_operations():
    shape = shape_of("qwen2.5-coder-0.5b-instruct")
    assert shape
    cpu = Machine(name="x", kind="cpu", rates={"auto": ("bfloat16", 858e9)}, source="")
    one, many = (cpu.answering(shape, "auto", "generate", 100, 100, n) for n in (1, 640))
    assert one > 100 * 2 * shape.parameters / BANDWIDTH["cpu"]
    assert 20 * one < many < 100 * one and not cpu.answering(shape, "auto", "generate", 9, 9, 0)


def test_every_device_names_its_source():
    assert all(row["source"] and row["tflops"] > 0 for row in devices())


def test_a_measurement_is_one_line_of_json(capsys):
    machine.measure(["float32"], seconds=0.01)
    facts = json.loads(capsys.readouterr().out)
    assert facts["rates"]["float32"][1] == pytest.approx(1e11, rel=1e3)
