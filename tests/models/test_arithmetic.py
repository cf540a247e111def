"""Weights, operations and bytes by formula are those of real tiny models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from distill.models.arithmetic import (
    adapter_parameters,
    answer_flops,
    attention_flops,
    cache_bytes,
    training_flops,
)
from distill.models.registry import shape_from_config
from distill.training.adapters import inject, parameters
from tests.support.tiny import make_tiny


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


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
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
