"""Adapters: plain PEFT on disk with equal outputs, float32 masters, and no silent re-initialisation."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill.errors import DistillError, Exit
from distill.training import adapters
from distill.training.student import Batch, make_student
from tests.support.tiny import make_tiny
from tests.training.test_layers import adapted, examples


def test_a_saved_adapter_is_plain_peft_with_equal_outputs(tmp_path):
    folder = make_tiny(tmp_path / "model")
    model = adapted(folder)
    student, _ = make_student(model, fused=True)
    adapters.save_adapter(model, adapters.tensors(model), tmp_path / "adapter", "owner/name")
    batch = Batch.make(examples(1))
    found = torch.nn.functional.linear(student.hidden(batch), student.head()[0])
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    wanted = loaded(input_ids=batch.ids_N[None]).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/name"
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize("fused", [True, False])
def test_masters_stay_float32_and_move_by_less_than_bfloat16_could(tmp_path, fused):
    model = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path), dtype=torch.bfloat16)
    wrapped = adapters.inject(model, 4, 8, 0.0, "all-linear", seed=1)
    adapters.use_working_copies(wrapped)
    student, _ = make_student(wrapped, fused=fused)
    named = adapters.parameters(wrapped)
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = torch.optim.AdamW(list(named.values()), lr=1e-6, weight_decay=0.0)
    for _ in range(2):
        student(Batch.make(examples())).backward()
        optimizer.step()
    for name, p in named.items():
        assert p.dtype == torch.float32
        assert (p != before[name]).float().mean() > 0.9, name


def test_targets_that_match_nothing_stop(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path))
    with pytest.raises(DistillError, match="target_modules") as fault:
        adapters.inject(model, 4, 8, 0.0, ("nothing_proj",), seed=0)
    assert fault.value.code == Exit.TRAINING


def test_an_adapter_out_of_the_losses_reach_is_found(tmp_path):
    model = adapted(make_tiny(tmp_path))
    student, _ = make_student(model)
    student(Batch.make(examples())).backward()
    adapters.check_gradients(model)
    name, parameter = next((n, p) for n, p in adapters.parameters(model).items() if "lora_B" in n)
    parameter.grad.zero_()
    with pytest.raises(DistillError, match="got no gradient") as fault:
        adapters.check_gradients(model)
    assert fault.value.where == name


def test_restoring_puts_every_tensor_back(tmp_path):
    folder = make_tiny(tmp_path)
    model, other = adapted(folder), adapted(folder)
    for parameter in adapters.parameters(other).values():
        parameter.data.add_(1)
    adapters.restore(other, adapters.tensors(model), "x")
    for name, value in adapters.tensors(model).items():
        assert torch.equal(adapters.tensors(other)[name], value)


def test_neither_a_snapshot_nor_what_was_restored_moves_with_the_model(tmp_path):
    model = adapted(make_tiny(tmp_path))
    found = adapters.tensors(model)
    before = {name: value.clone() for name, value in found.items()}
    for _ in range(2):  # the second time after weights were restored from the very snapshot
        for parameter in adapters.parameters(model).values():
            parameter.data.add_(1)
        for name, value in adapters.tensors(model).items():
            assert torch.equal(value, before[name] + 1)
            assert torch.equal(found[name], before[name]), name
        adapters.restore(model, found, "x")


def test_an_adapter_of_another_shape_of_names_is_refused(tmp_path):
    folder = make_tiny(tmp_path)
    few = adapters.tensors(adapted(folder, targets=("q_proj",)))
    with pytest.raises(DistillError, match="another adapter"):
        adapters.restore(adapted(folder), few, "checkpoint")


def test_the_same_seed_gives_the_same_adapter(tmp_path):
    folder = make_tiny(tmp_path)
    one, two = (adapters.tensors(adapted(folder)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
