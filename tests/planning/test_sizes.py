"""Weights, operations and bytes by formula are those of real tiny models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from distill.models.registry import lookup, shape_from_config
from distill.planning.sizes import (
    adapter_parameters,
    answer_flops,
    attention_flops,
    body_parameters,
    cache_bytes,
    head_parameters,
    training_bytes,
    training_flops,
)
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
    heads = head_parameters(shape) * (1 if shape.tied else 2)
    assert body_parameters(shape) + heads == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("q_proj", "lm_head")])
def test_adapter_parameters_are_peft_s(tmp_path, targets):
    folder = make_tiny(tmp_path, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shape = shape_from_config(model.config.to_dict())
    wrapped = inject(model, 4, 8, 0.0, targets, 0)
    counted = sum(p.numel() for p in parameters(wrapped).values())
    assert adapter_parameters(shape, 4, targets) == counted


def test_forward_flops_are_what_torch_counts(tiny):
    model, shape = tiny
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 96, dtype=torch.long))
    above = attention_flops(shape, 96)  # eager attention computes what the mask hides as well
    expected = answer_flops(shape, 0, 96) + above
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_training_flops_are_what_torch_counts(tiny):
    model, shape = tiny
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs = model.get_input_embeddings()(torch.zeros(1, 96, dtype=torch.long)).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs).logits.sum().backward()
    eager = (6 - 3.5) * attention_flops(shape, 96)  # all of the square, and nothing made again
    expected = training_flops(shape, 0, 0, 96, checkpointing=False) + eager
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_cache_bytes_are_the_cache_s(tiny):
    model, shape = tiny
    cache = model(torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_bytes(shape, 2) == 2 * elements / 10 and cache_bytes(shape, 4) == 4 * elements / 10


def test_training_memory_knows_what_saves_it():
    info = lookup("Qwen/Qwen2.5-1.5B-Instruct")
    assert info
    adapter = adapter_parameters(info.shape, 32, "all-linear")

    def peak(tokens: int, checkpointing: bool, four_bit: bool = False, width: int = 2) -> float:
        return training_bytes(info.shape, adapter, 32, tokens, checkpointing, four_bit, width)

    assert peak(8192, True) < peak(8192, False) / 3
    assert peak(8192, True, four_bit=True) < peak(8192, True) - 1.5e9
    assert peak(8192, True) + 2 * info.shape.parameters < peak(8192, True, width=4)
    assert peak(8192, True) > peak(1024, True) > 2 * info.shape.parameters + 16 * adapter
