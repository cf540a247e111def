"""Weights, operations and bytes by formula are those of real tiny models; a machine is measured."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from distill.models.loading import pick_dtype
from distill.models.registry import shape_from_config, shape_of
from distill.planning import machine
from distill.planning.machine import (
    adapter_parameters,
    answer_flops,
    attention_flops,
    cache_bytes,
    devices,
    find_machine,
    training_bytes,
    training_flops,
)
from distill.training.adapters import inject, parameters
from tests.support.tiny import make_tiny


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
    assert all(row["source"] and row["tflops"] > 0 for row in devices())


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def tiny(request, tmp_path_factory):
    """Return a tiny model and its shape."""
    folder = make_tiny(tmp_path_factory.mktemp("m"), request.param, tied=request.param == "llama")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model, shape_from_config(AutoConfig.from_pretrained(folder).to_dict())


def test_parameters_are_the_model_s(tiny):
    model, shape = tiny
    heads = shape.head * (1 if shape.tied else 2)
    assert shape.body + heads == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("q_proj", "lm_head")])
def test_adapter_parameters_are_peft_s(tmp_path, targets):
    folder = make_tiny(tmp_path, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shape = shape_from_config(model.config.to_dict())
    wrapped = inject(model, 4, 8, 0.0, targets, 0)
    counted = sum(p.numel() for p in parameters(wrapped).values())
    assert adapter_parameters(shape, 4, targets) == counted


def test_flops_are_what_torch_counts(tiny):
    model, shape = tiny
    above = attention_flops(shape, 96)  # eager attention computes what the mask hides as well
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 96, dtype=torch.long))
    assert answer_flops(shape, 0, 96) + above == pytest.approx(counter.get_total_flops(), rel=0.02)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs = model.get_input_embeddings()(torch.zeros(1, 96, dtype=torch.long)).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs).logits.sum().backward()
    expected = training_flops(shape, 0, 0, 96, checkpointing=False)
    expected += (6 - 3.5) * above  # all of the square, and nothing made again
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_cache_bytes_are_the_cache_s(tiny):
    model, shape = tiny
    cache = model(torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_bytes(shape, 2) == 2 * elements / 10 and cache_bytes(shape, 4) == 4 * elements / 10


def test_training_memory_knows_what_saves_it():
    shape = shape_of("Qwen/Qwen2.5-1.5B-Instruct")
    adapter = adapter_parameters(shape, 32, "all-linear")

    def peak(tokens: int, checkpointing: bool, four_bit: bool = False, width: int = 2) -> float:
        return training_bytes(shape, adapter, 32, tokens, checkpointing, four_bit, width)

    assert peak(8192, True) < peak(8192, False) / 3
    assert peak(8192, True, four_bit=True) < peak(8192, True) - 1.5e9
    assert peak(8192, True) + 2 * shape.parameters < peak(8192, True, width=4)
    assert peak(8192, True) > peak(1024, True) > 2 * shape.parameters + 16 * adapter
