"""Merging: float32 and one cast, the written model against the evaluated adapter, and what tells them apart."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from distill.errors import DistillError, Exit
from distill.models import registry
from distill.publishing.merge import Conversation, answer_logits, compare, merge, merge_and_compare
from tests.support.tiny import make_tiny

ROWS = [Conversation(ids=tuple(range(3 + n, 40 + 2 * n)), answer=10 + n) for n in range(8)]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request, tmp_path_factory) -> Path:
    return make_tiny(
        tmp_path_factory.mktemp(request.param), request.param, tied=request.param == "llama"
    )


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(registry.load_model(str(base), "float32"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    registry.record_base(folder, str(base))
    return folder


def test_merged_equals_adapter_in_float32(base, adapter, tmp_path):
    registry.load_tokenizer(str(base)).save_pretrained(tmp_path)
    found = merge_and_compare(str(base), None, adapter, tmp_path, ROWS, "float32")
    assert found.same and found.mean_kl < 1e-8 and found.greedy_agreement == 1.0
    assert found.largest_logit_difference < 1e-4 and found.prompts == 8
    assert found.tokens == sum(len(row.ids) - row.answer for row in ROWS)
    assert f"{base}" not in (tmp_path / "config.json").read_text()


def test_the_adapter_does_something(base, adapter):
    plain = answer_logits(registry.load_model(str(base), "float32"), ROWS)
    adapted = PeftModel.from_pretrained(registry.load_model(str(base), "float32"), str(adapter))
    assert compare(plain, answer_logits(adapted, ROWS), 8).mean_kl > 1e-4


def test_cast_once_to_the_dtype_of_the_base(base, adapter, tmp_path):
    half = registry.load_model(str(base), "bfloat16")
    half.save_pretrained(tmp_path / "half")
    registry.load_tokenizer(str(base)).save_pretrained(tmp_path / "half")
    merge(str(tmp_path / "half"), None, adapter, tmp_path / "merged")
    wide = registry.load_model(str(tmp_path / "half"), "float32")
    wanted = PeftModel.from_pretrained(wide, str(adapter)).merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wanted[name].bfloat16()), name


def test_the_comparison_against_float64():
    torch.manual_seed(0)
    before = [torch.randn(5, 11), torch.randn(3, 11)]
    after = [rows + 0.1 * torch.randn_like(rows) for rows in before]
    found = compare(before, after, 2)
    p, q = (torch.cat(rows).double().log_softmax(-1) for rows in (before, after))
    assert found.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum() / 8), rel=1e-4)
    assert found.largest_logit_difference == pytest.approx(
        max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    )
    assert compare(before, before, 2).mean_kl == 0


def test_an_adapter_of_another_base(base, adapter, tmp_path):
    other = make_tiny(tmp_path / "other", seed=9)
    with pytest.raises(DistillError) as caught:
        merge_and_compare(str(other), None, adapter, tmp_path, ROWS)
    assert caught.value.code == Exit.TRAINING


def test_nothing_to_compare_on(base, adapter, tmp_path):
    with pytest.raises(DistillError) as caught:
        merge_and_compare(str(base), None, adapter, tmp_path, [])
    assert caught.value.code == Exit.PUBLISH
