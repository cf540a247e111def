"""Adapters: plain PEFT on disk, float32 masters, exact snapshots; and the merged student."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig

from distill.config.learning import Student
from distill.config.tree import Config
from distill.errors import DistillError
from distill.models import loading, registry
from distill.publishing.parity import answer_logits
from distill.storage.files import sha256_files
from distill.storage.run_folder import Run
from distill.training import adapters
from distill.training.adapters import (
    merged_student,
    optimizer_tensors,
    restore_optimizer,
    write_merged,
)
from distill.training.student import Batch, make_student
from tests.support.families import FAMILIES, make_family
from tests.support.tiny import make_tiny
from tests.support.training import adapted, causal_model, equal, examples, gradient

ROWS = [([*range(3 + n, 40 + 2 * n)], 10 + n) for n in range(8)]  # ids, where the answer begins
FILES = {
    *("model.safetensors", "config.json", "generation_config.json", "source.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


def test_a_saved_adapter_is_plain_peft_with_equal_outputs(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    student, _ = make_student(model, fused=True)
    adapters.save_adapter(model, adapters.tensors(model), tmp_path / "adapter", "owner/name")
    batch = Batch.make(examples(1))
    logits = torch.nn.functional.linear(student.hidden(batch), student.head()[0])
    loaded = PeftModel.from_pretrained(causal_model(folder), str(tmp_path / "adapter"))
    expected = loaded(input_ids=batch.ids_N[None]).logits[0]
    assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/name"
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize("fused", [True, False])
def test_masters_stay_float32_and_move_by_less_than_bfloat16_could(
    folder: Path, fused: bool
) -> None:
    model = causal_model(folder, torch.bfloat16)
    wrapped = adapters.inject(model, 4, 8, 0.0, "all-linear", seed=1)
    adapters.adapt(wrapped)
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


def test_an_adapter_that_the_loss_does_not_reach_is_found(folder: Path) -> None:
    model = adapted(folder)
    student, _ = make_student(model)
    student(Batch.make(examples())).backward()
    adapters.check_gradients(model)
    name, parameter = next((n, p) for n, p in adapters.parameters(model).items() if "lora_B" in n)
    gradient(parameter).zero_()
    with pytest.raises(DistillError, match="got no gradient") as error:
        adapters.check_gradients(model)
    assert error.value.where == name


def test_neither_a_snapshot_nor_a_restored_one_moves_with_the_model(folder: Path) -> None:
    model, same = adapted(folder), adapted(folder)
    saved = adapters.tensors(model)
    assert equal(saved, adapters.tensors(same)), "the same seed gives the same adapter"
    before = {name: value.clone() for name, value in saved.items()}
    for _ in range(2):  # the second time after weights were restored from the very snapshot
        for parameter in adapters.parameters(model).values():
            parameter.data.add_(1)
        assert equal(adapters.tensors(model), {name: t + 1 for name, t in before.items()})
        assert equal(saved, before)
        adapters.restore(model, saved, "x")
        assert equal(adapters.tensors(model), before)
    with pytest.raises(DistillError, match="another adapter"):
        adapters.restore(adapted(folder, targets=("q_proj",)), saved, "checkpoint")


Optimized = tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]


def optimized(steps: int) -> Optimized:
    torch.manual_seed(0)
    named = {name: torch.nn.Parameter(torch.randn(3)) for name in ("a", "b")}
    optimizer = torch.optim.AdamW(list(named.values()), 0.1, (0.9, 0.99), fused=True)
    for _ in range(steps):
        step(named, optimizer)
    return named, optimizer


def step(named: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    for p in named.values():
        p.grad = p.detach().sin()
    optimizer.step()


def test_an_optimizer_s_state_is_a_copy_and_complete() -> None:
    named, optimizer = optimized(2)
    saved = optimizer_tensors(optimizer, named)
    before = {name: value.clone() for name, value in saved.items()}
    for _ in range(2):  # the second time after the very snapshot was restored
        step(named, optimizer)
        assert equal(saved, before)
        assert not torch.equal(optimizer.state[named["a"]]["exp_avg"], before["a.exp_avg"])
        restore_optimizer(optimizer, named, saved)


def make_adapter(base: Path, folder: Path, std: float = 0.05) -> Path:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model: Any = get_peft_model(loading.load_model(str(base), "float32"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    registry.record_base(folder, str(base))
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return make_tiny(folder, request.param, tied=request.param == "llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def run(base: Path, adapter: Path, tmp_path: Path) -> Run:
    """Return a run as an earlier distill trained it: with an adapter, and no merged model."""
    tree = {"name": "r", "runs": tmp_path, "corpus": {"source": "python-docs"}}
    tree |= {"teacher": {"kind": "recorded"}, "student": {"model": str(base)}}
    run = Run(Config.model_validate(tree))
    shutil.copytree(adapter, run.path("adapter"))
    return run


def test_the_merged_model_is_the_adapted_one_with_its_base_s_tokenizer(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    write_merged(Student(model=str(base)), adapter, merged)
    assert {path.name for path in merged.iterdir()} == FILES
    assert f"{base}" not in (merged / "config.json").read_text()
    plain = loading.load_model(str(base), "float32")
    before = answer_logits(plain, ROWS)
    adapted = answer_logits(PeftModel.from_pretrained(plain, str(adapter)), ROWS)
    after = answer_logits(loading.load_model(str(merged), "float32"), ROWS)
    assert [len(rows) for rows in after] == [len(ids) - answer for ids, answer in ROWS]
    assert_close(after, adapted, rtol=0, atol=1e-4)
    with pytest.raises(AssertionError):  # the adapter does something
        assert_close(after, before, rtol=0, atol=1e-2)
    old, new = (loading.load_tokenizer(str(path)) for path in (base, merged))
    assert old.get_vocab() == new.get_vocab() and old.chat_template == new.chat_template
    assert old.eos_token == new.eos_token and old.model_max_length == new.model_max_length


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_is_cast_once_to_the_type_of_the_base(
    dtype: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    loading.load_model(str(base), "bfloat16").save_pretrained(half)
    loading.load_tokenizer(str(base)).save_pretrained(half)
    own = shutil.copytree(adapter, tmp_path / "adapter")
    registry.record_base(own, str(half))
    student = Student.model_validate({"model": str(half), "dtype": dtype})
    write_merged(student, own, tmp_path / "merged")
    wide: Any = loading.load_model(str(half), "float32")
    expected = PeftModel.from_pretrained(wide, str(own)).merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged/model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_the_tokenizer_of_the_base_is_released_byte_for_byte(tmp_path: Path) -> None:
    """E2: all of its files, in the form of transformers 4; of another template, that alone."""
    base = make_tiny(tmp_path / "base")
    template, settings = base / "chat_template.jinja", base / "tokenizer_config.json"
    text = template.read_text()
    written = json.loads(settings.read_bytes())
    written |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": text}
    settings.write_text(json.dumps(written, indent=1))  # not as transformers would lay it out
    template.unlink()
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json"):
        (base / name).write_text("{ }" if name.endswith("json") else "pieces")
    own = make_adapter(base, tmp_path / "adapter")
    write_merged(Student(model=str(base)), own, tmp_path / "merged")
    copied = [p for p in base.iterdir() if p.name[:5] in ("token", "added", "speci")]
    assert len(copied) == 5
    for path in copied:
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (tmp_path / "merged/chat_template.jinja").read_text() == text

    switch = "{{ 'think' if thinking else '' }}" + text
    settings.write_text(json.dumps(written | {"chat_template": switch}, indent=1))
    registry.record_base(own, str(base))
    student = Student.model_validate({"model": str(base), "chat_template_kwargs": {"thinking": 1}})
    write_merged(student, own, tmp_path / "other")
    ours = (tmp_path / "other/chat_template.jinja").read_text()
    made = json.loads((tmp_path / "other/tokenizer_config.json").read_bytes())
    assert "think" in ours and ours not in (text, switch)
    assert made == written | {"chat_template": ours}
    for path in copied:
        if path != settings:
            assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_tokenizer_of_transformers_5_is_released_in_words_that_4_knows(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base")
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) | {"extra_special_tokens": ["<|im_start|>"]}
    assert settings["tokenizer_class"] == "TokenizersBackend"
    path.write_text(json.dumps(settings))
    own = make_adapter(base, tmp_path / "adapter")
    write_merged(Student(model=str(base)), own, tmp_path / "merged")
    made = json.loads((tmp_path / "merged/tokenizer_config.json").read_bytes())
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}
    assert made == settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    read: Any = loading.load_tokenizer
    old, new = (read(str(folder)) for folder in (base, tmp_path / "merged"))
    assert old.backend_tokenizer.to_str() == new.backend_tokenizer.to_str()
    assert old.special_tokens_map == new.special_tokens_map


def test_a_tokenizer_beside_a_part_of_its_base_is_read_as_it_was(tmp_path: Path) -> None:
    """By its files alone Qwen 3.5's has another class beside the part for text."""
    base = make_family(tmp_path / "base", "qwen3.5")
    own = make_adapter(base, tmp_path / "adapter")
    write_merged(Student(model=str(base)), own, tmp_path / "merged")
    read: Any = loading.load_tokenizer
    old, new = (read(str(folder)) for folder in (base, tmp_path / "merged"))
    assert old.backend_tokenizer.to_str() == new.backend_tokenizer.to_str()
    made = json.loads((tmp_path / "merged/tokenizer_config.json").read_bytes())
    assert made["tokenizer_class"] == "PreTrainedTokenizerFast"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
OLDER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # a family's own fields; what 4 reads
    "qwen2.5": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}},
        {"rope_theta": 7e5, "rope_scaling": None},
    ),
    "llama3": (
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
    ),
    "phi3": (
        {"rope_parameters": LONG | {"rope_type": "longrope", "rope_theta": 1e4}},
        {"rope_theta": 1e4, "partial_rotary_factor": 1.0,
         "rope_scaling": LONG | {"type": "longrope"}},
    ),
    "gemma3-text": (
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 9e3},
                             "full_attention": {"rope_type": "linear", "factor": 8.0,
                                                "rope_theta": 2e6}}},
        {"rope_theta": 2e6, "rope_local_base_freq": 9e3, "sliding_window_pattern": 2,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", OLDER)
def test_the_config_says_positions_and_type_in_both_spellings(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E1: one that knows only the older computes with the same."""
    own, older = OLDER[family]
    kind, fields, vision = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, (kind, fields | own, vision))
    base = make_family(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter")
    write_merged(Student(model=str(base)), adapter, tmp_path / "merged")
    tree = json.loads((tmp_path / "merged/config.json").read_bytes())
    assert {key: tree.get(key, "missing") for key in older} == older
    assert tree["torch_dtype"] == tree["dtype"] == "float32"
    before, after = (AutoConfig.from_pretrained(tmp_path / n) for n in ("base", "merged"))
    for theirs in (before, after):
        theirs.rope_parameters.pop("type", None)
    assert before.rope_parameters == after.rope_parameters and before.dtype == after.dtype


def test_a_run_without_a_merged_model_gets_it_from_its_adapter_once(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = merged_student(run.config.student, run)
    assert folder == run.path("merged") and {path.name for path in folder.iterdir()} == FILES
    before = sha256_files(run.folder, ["merged"])
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "write_merged", None)
        merged_student(run.config.student, run)
    shutil.rmtree(run.path("adapter"))
    make_adapter(base, run.path("adapter"), std=0.1)
    merged_student(run.config.student, run)
    after = sha256_files(run.folder, ["merged"])
    weights = "merged/model.safetensors"
    assert before[weights] != after[weights], "the merged model of another adapter was taken"
