"""The merged student: float32 and one cast, whose adapter it is, and a folder that is complete or not there."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from distill.config import Config, Student
from distill.errors import DistillError, Exit
from distill.models import loading, registry
from distill.publishing.fidelity import Conversation, answer_logits, compare_models
from distill.storage.files import sha256_files
from distill.storage.run_folder import Run
from distill.training import adapters
from distill.training.adapters import merged_student, write_merged
from tests.support.tiny import make_tiny

ROWS = [Conversation(ids=tuple(range(3 + n, 40 + 2 * n)), answer=10 + n) for n in range(8)]
FILES = {
    *("model.safetensors", "config.json", "generation_config.json", "source.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}


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


def test_the_merged_model_says_what_the_adapter_says(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    write_merged(Student(model=str(base)), adapter, tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == FILES
    assert f"{base}" not in (tmp_path / "merged/config.json").read_text()
    plain = loading.load_model(str(base), "float32")
    before = answer_logits(plain, ROWS)
    adapted = answer_logits(PeftModel.from_pretrained(plain, str(adapter)), ROWS)
    after = answer_logits(loading.load_model(str(tmp_path / "merged"), "float32"), ROWS)
    found = compare_models(adapted, after)
    assert found.same and found.mean_kl < 1e-8 and found.greedy_agreement == 1.0
    assert found.largest_logit_difference < 1e-4 and found.prompts == 8
    assert found.tokens == sum(len(row.ids) - row.answer for row in ROWS)
    assert compare_models(before, after).mean_kl > 1e-4, "the adapter does nothing"


def test_the_tokenizer_of_the_merged_model_is_that_of_its_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    write_merged(Student(model=str(base)), adapter, tmp_path / "merged")
    old, new = (loading.load_tokenizer(str(f)) for f in (base, tmp_path / "merged"))
    assert old.chat_template == new.chat_template and old.get_vocab() == new.get_vocab()
    assert old.model_max_length == new.model_max_length


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cast_once_to_the_type_of_the_base(
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


def test_an_adapter_of_another_base(adapter: Path, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", seed=9)
    with pytest.raises(DistillError) as caught:
        write_merged(Student(model=str(other)), adapter, tmp_path / "merged")
    assert caught.value.code == Exit.TRAINING
    assert not (tmp_path / "merged").exists()


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


@pytest.mark.parametrize("moment", ["model", "tokenizer", "rename"])
def test_a_kill_leaves_no_half_of_a_merged_model(
    run: Run, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for a kill: nothing handles it."""

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(Path, "replace", kill)
        elif moment == "tokenizer":
            patch.setattr(adapters, "write_json", kill)
        else:
            patch.setattr(adapters.os, "fsync", kill)
        with pytest.raises(Killed):
            merged_student(run.config.student, run)
    assert not run.path("merged").exists()
    (run.folder / f".merged.{2**22}").mkdir()  # above the ids that Linux gives
    merged_student(run.config.student, run)
    assert {path.name for path in run.path("merged").iterdir()} == FILES
    assert list(run.folder.glob(".merged*")) == []


def test_a_full_disk_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters.os, "fsync", full)
    with pytest.raises(DistillError, match="No space left") as caught:
        merged_student(run.config.student, run)
    assert caught.value.code == Exit.STATE and list(run.folder.glob(".merged*")) == []
