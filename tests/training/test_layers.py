"""Fused layers against plain PEFT in float32: the same losses and the same gradients, sample by sample."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from distill.records import Example
from distill.training import adapters
from distill.training.fused_layers import fusible, unfuse
from distill.training.student import Batch, make_student
from tests.support.tiny import make_tiny

LENGTHS = (5, 1, 17, 33, 40)


def examples(count: int = len(LENGTHS)) -> list[Example]:
    made = []
    for number, length in enumerate(LENGTHS[:count]):
        ids = tuple((7 * min(number, 3) + 3 * place) % 250 + 3 for place in range(length))
        weights = tuple(float(place >= length // 2) for place in range(length))
        made.append(Example(id=str(number), response_id="r", input_ids=ids, weights=weights))
    return made


def adapted(folder, targets="all-linear", dropout=0.0):
    """A tiny model with an adapter whose B is not zero."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrapped = adapters.inject(model, 4, 8, dropout, targets, seed=1)
    torch.manual_seed(2)
    for name, parameter in adapters.parameters(wrapped).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in adapters.parameters(model).items()}


def plain(model) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by transformers and PEFT alone, one sample at a time."""
    total = 0.0
    for example in examples():
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        loss = (losses * torch.tensor(example.weights[1:])).sum()
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj", "down_proj")])
@pytest.mark.parametrize("fused", [True, False])
def test_packed_and_fused_equals_plain_peft_sample_by_sample(tmp_path, family, targets, fused):
    folder = make_tiny(tmp_path, family=family)
    if family == "qwen2":
        give_biases(folder)
    wanted_loss, wanted = plain(adapted(folder, targets))
    model = adapted(folder, targets)
    student, notes = make_student(model, packing=True, fused=fused)
    assert student.packing and not notes
    assert fused == ("forward" in vars(student.decoder().layers[0]))
    batch = student.batch(examples())
    assert len(batch.ids_N) < sum(LENGTHS)  # two samples share their beginning
    loss = student(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted_loss, rel=1e-5)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def give_biases(folder) -> None:
    """Qwen2's biases are zero in a fresh model, which would hide a forgotten one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    folder, found = make_tiny(tmp_path), []
    for checkpointing in (False, True):
        model = adapted(folder)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        student, _ = make_student(model.train(), fused=True)
        student(Batch.make(examples())).backward()
        found.append(gradients(model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=0)


def test_dropout_and_other_kinds_are_left_to_transformers(tmp_path):
    folder = make_tiny(tmp_path)
    assert not fusible(adapted(folder, dropout=0.5).get_base_model().model.layers[0])
    layer = adapted(folder).get_base_model().model.layers[0]
    assert fusible(layer)
    layer.mlp.act_fn = torch.nn.GELU()
    assert not fusible(layer)


def test_unfused_layers_compute_as_before(tmp_path):
    model = adapted(make_tiny(tmp_path))
    ids = torch.arange(9)[None]
    before = model(input_ids=ids).logits
    student, _ = make_student(model, fused=True)
    unfuse(student.decoder())
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_a_step_of_bfloat16_is_near_the_float32_one(tmp_path):
    folder = make_tiny(tmp_path, hidden=64)
    _, wanted = plain(adapted(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    reference = adapters.parameters(adapted(folder))
    for name, parameter in adapters.parameters(wrapped).items():
        parameter.data = reference[name].data.clone()
    student, _ = make_student(wrapped, fused=True)
    student(Batch.make(examples())).backward()
    for name, found in gradients(wrapped).items():
        assert found.dtype == torch.float32
        assert (found - wanted[name]).norm() < 0.1 * wanted[name].norm(), name
