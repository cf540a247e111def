"""The plan: formulas against real tiny models, ranges that hold, and no figure where nothing is known."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from distill.cli import main
from distill.config import Config
from distill.config_file import load_config
from distill.devices import find_device, float32_rate, table
from distill.errors import DistillError, Exit
from distill.estimates import (
    Span,
    adapter_parameters,
    answer_flops,
    attention_flops,
    body_parameters,
    cache_bytes,
    head_parameters,
    training_bytes,
    training_flops,
)
from distill.models import lookup, shape_from_config
from distill.plan import START, memory, plan, rows
from distill.scope import scope
from distill.tables import bytes_of, count, duration
from distill.training.adapters import inject, parameters
from tests.tiny import make_tiny

ROOT = Path(__file__).parent.parent


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
    ids = torch.zeros(1, 96, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    expected = answer_flops(shape, 0, 96) + attention_flops(
        shape, 96
    )  # eager: above the diagonal too
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
    assert cache_bytes(shape) == 2 * elements / 10


def test_training_memory_knows_what_saves_it():
    info = lookup("Qwen/Qwen2.5-1.5B-Instruct")
    assert info
    adapter = adapter_parameters(info.shape, 32, "all-linear")

    def peak(tokens: int, checkpointing: bool, four_bit: bool = False) -> float:
        return training_bytes(info.shape, adapter, 32, tokens, checkpointing, four_bit)

    assert peak(8192, True) < peak(8192, False) / 3
    assert peak(8192, True, four_bit=True) < peak(8192, True) - 1.5e9
    assert peak(1024, True) < peak(8192, True)
    assert peak(1024, True) > 2 * info.shape.parameters + 16 * adapter


def quickstart(*overrides: str) -> Config:
    return load_config(ROOT / "configs/quickstart.yaml", overrides)


def test_the_quickstart_s_counts_are_exact(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    work = scope(quickstart())
    assert {split: span.low for split, span in work.prompts.items()} == {
        "train": 240,
        "validation": 24,
        "heldout": 66,
    }
    assert work.documents.low == work.documents.high >= 330 and work.asked == Span(330, 330)
    assert not list(tmp_path.iterdir())
    lines = rows(quickstart(), work, find_device("cpu-2-core")[0])
    assert [line.stage for line in lines] == [
        *("corpus", "prompts", "generate", "filter", "train", "evaluate", "report")
    ]
    for line in lines:
        assert line.seconds and 0 <= line.seconds.low < line.seconds.high < 6 * 3600
        assert line.tokens is None or 0 < line.tokens.low < line.tokens.high


def shown(config: Config) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(plan(config))
    return capture.get()


@pytest.fixture
def texts(tmp_path) -> Path:
    """Return a folder of a few texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    words = [f"w{n}" for n in range(3000)]
    for n in range(40):
        paragraph = " ".join(words[n * 70 : n * 70 + 70])
        (folder / f"{n}.txt").write_text(f"Chapter {n}. {paragraph}.\n")
    return folder


@pytest.mark.parametrize("name", ["folder", "one-gpu"])
def test_shipped_configs_are_planned_from_real_texts(texts, name):
    said = shown(load_config(ROOT / f"configs/{name}.yaml", [f"corpus.path={texts}"]))
    assert "40 documents" in said and "in the cache" in said or "download" in said


def test_one_gpu_fits_its_gpu(texts):
    config = load_config(ROOT / "configs/one-gpu.yaml", [f"corpus.path={texts}"])
    device, why = find_device(config.evaluation.machine)
    assert device and device.memory == 24e9 and "gpu-24gb" in why
    peaks = dict(memory(config, scope(config), device, device.memory))
    assert len(peaks) == 2 and max(peaks.values()) < 0.9 * device.memory
    assert "A10G" in shown(config) and "fits" in shown(config)


def test_a_hub_dataset_is_planned_from_its_caps_alone():
    config = load_config(ROOT / "configs/gsm8k.yaml")
    work = scope(config)
    assert work.prompts["train"].high == 2000 and work.prompts["heldout"].high == 400
    with pytest.raises(DistillError) as caught:
        scope(load_config(ROOT / "configs/gsm8k.yaml", ["prompts.train=null"]))
    assert caught.value.code == Exit.INPUT and "corpus.limit" in str(caught.value)


def test_soft_labels_have_a_line_and_a_size(monkeypatch):
    path, loss = ROOT / "configs/gsm8k.yaml", "train.loss={ce: 0.5, forward_kl: 0.5}"
    sample = f"corpus.path={ROOT / 'data/gsm8k/sample.jsonl'}"
    assert "signals" not in shown(load_config(path, [sample]))
    config = load_config(path, [sample, loss])
    assert "signals" in shown(config) and "the teacher's distributions" in shown(config)
    monkeypatch.setattr("distill.plan.shutil.disk_usage", lambda folder: Free(1000))
    assert "only 1.0 kB free" in shown(config)


class Free(NamedTuple):
    """A disk with little room."""

    free: int


def test_rounds_on_policy_and_a_live_teacher_are_in_the_plan():
    place = [f"corpus.path={ROOT / 'data/gsm8k/sample.jsonl'}"]
    config = load_config(ROOT / "configs/gsm8k.yaml", place)
    live = ["train.loss={ce: 0.5, forward_kl: 0.5, teacher: live}", "on_policy.rounds=3"]
    more = load_config(ROOT / "configs/gsm8k.yaml", [*place, *live])
    work, device = scope(config), find_device("h100")[0]
    before, after = ({row.stage: row for row in rows(c, work, device)} for c in (config, more))
    assert "refine" not in before and "signals" not in after
    assert after["refine"].work.startswith("3 rounds")
    one, two = before["train"].seconds, after["train"].seconds
    assert one and two and two.high - START.high > 1.3 * (one.high - START.high)


def test_a_large_folder_is_planned_from_its_bytes(texts, monkeypatch):
    config = load_config(
        ROOT / "configs/folder.yaml", [f"corpus.path={texts}", "corpus.chunk.max_chars=400"]
    )
    read = scope(config)
    monkeypatch.setattr("distill.scope.LARGE", 1000)
    unread = scope(config)
    assert unread.documents.low <= read.documents.low <= unread.documents.high
    for split, span in read.prompts.items():
        assert unread.prompts[split].low <= span.high and span.low <= unread.prompts[split].high


def nvidia(folder: Path, name: str, monkeypatch) -> None:
    """Put an nvidia-smi on the path that names a GPU."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{name}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_known_gpu_has_its_source_and_an_unknown_one_no_figure(tmp_path, monkeypatch):
    nvidia(tmp_path, "NVIDIA H100 80GB HBM3", monkeypatch)
    device, _ = find_device("cpu-2-core")
    assert device and device.rate == Span(0.15 * 989e12, 0.40 * 989e12)
    assert "data sheet" in device.source
    nvidia(tmp_path, "NVIDIA Z9 Imaginary", monkeypatch)
    said = shown(quickstart())
    assert "not known" in said and "Z9 Imaginary, which configs/devices.yaml lacks" in said
    assert "cost:" not in said


def test_longer_names_are_matched_first(tmp_path, monkeypatch):
    nvidia(tmp_path, "NVIDIA L40S", monkeypatch)
    device, _ = find_device(None)
    assert device and device.name == "L40S"


def test_every_device_names_its_source():
    assert all(row["source"] and row["tflops"] > 0 for row in table())


def test_the_cpu_is_measured():
    assert 1e8 < float32_rate(seconds=0.05) < 1e14


def test_what_cannot_be_planned_says_so(capsys, tmp_path):
    place = str(ROOT / "configs/quickstart.yaml")
    assert main(["plan", place, "student.model=some/model"]) == Exit.CONFIG
    assert "configs/models.yaml" in capsys.readouterr().err
    assert main(["plan", str(ROOT / "configs/folder.yaml"), "corpus.path=./none"]) == Exit.INPUT
    assert capsys.readouterr().err.startswith("error: none: does not exist")


def test_answers_that_exist_take_no_teacher(texts):
    config = quickstart("teacher={kind: recorded, model: somebody}")
    line = rows(config, scope(config), find_device(None)[0])[2]
    assert "none made" in line.work and line.tokens is None


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (count(Span(330, 330)), "330"),
        (count(Span(12345, 98765)), "12,000 to 99,000"),
        (duration(Span(3, 250)), "3 s to 4 min"),
        (duration(Span(7200, 7200)), "2.0 h to 2.0 h"),
        (duration(None), "not known"),
        (bytes_of(Span(0, 0)), "0 B"),
        (bytes_of(Span(1.5e6, 2.5e9)), "1.5 MB to 2.5 GB"),
    ],
)
def test_ranges_are_written_shortly(written, text):
    assert written == text
