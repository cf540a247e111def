"""Memory as a budget: the arithmetic against real tensors, and plans that say what does not fit."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from distill.config.learning import Signals
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.models.arithmetic import (
    LEAST,
    USABLE,
    LoraTraining,
    adapter_parameters,
    answering_bytes,
    capture_bytes,
    reading_bytes,
)
from distill.models.devices import Gpu, gpus
from distill.models.loading import load_model
from distill.models.registry import Shape, shape_from_config, table
from distill.planning import plan as planning
from distill.planning.estimate import RunEstimate, StageMemory
from distill.planning.machine import Machine
from distill.planning.plan import announce
from distill.planning.work import Work, count_work
from distill.records import Message
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Raw, Request, Sampling
from distill.storage.files import write_records
from distill.training import train
from distill.training.batches import Example
from distill.training.soft_labels.capture import read_head, select
from distill.training.student import make_student
from tests.planning.test_work import ROOT, shipped
from tests.planning.test_work import texts as texts  # a fixture
from tests.support.tiny import make_tiny
from tests.support.training import adapted, make_pair, make_run

GB = 1e9
OVERRIDES = ("teacher.kind=recorded", "teacher.model=somebody", "prompts.tasks=[]")
OVERRIDES += ("train.lora.r=16", "corpus.near_duplicate_threshold=null")


def alive() -> dict[int, int]:
    """Return the bytes of the tensors that are alive on the CPU, by where they lie."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


PeakOf = Callable[[Callable[[], object]], float]


@pytest.fixture
def peak_of() -> PeakOf:
    """Return what measures the bytes of this test's tensors at the peak of some work."""
    others = alive().keys()

    def measure(work: Callable[[], object]) -> float:
        now = most = float(sum(size for place, size in alive().items() if place not in others))
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            work()
        events: Any = profile.profiler.kineto_results.events()  # pyright: ignore
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        for _, change in changes:
            most = max(most, now := now + change)
        return most

    return measure


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("llama", {"gradient_checkpointing": True}),
        ("llama", {"lora": {"r": 8, "alpha": 16, "dropout": 0.1}}),
    ],
)
def test_the_peak_of_a_training_here_is_the_predicted_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    peak_of: PeakOf,
    family: str,
    changes: dict[str, Any],
) -> None:
    folder = make_tiny(tmp_path / "model", family, hidden=64, layers=4)
    settings = {"tokens_per_step": 4096, "micro_batch_tokens": 2048, "max_steps": 2, **changes}
    run = make_run(tmp_path, **{"lora": {"r": 8, "alpha": 16}, **settings})
    pairs = [make_pair(f"{n:03} " + "ab" * (40 + n), "yes " * 30) for n in range(30)]
    write_records(run.path("dataset/train.jsonl"), pairs)
    run.path("dataset/validation.jsonl").unlink()
    real, peaks, tokens = train.Loop.train, list[float](), list[int]()

    def measured(loop: Any) -> None:
        examples = loop.parts.examples
        for step in loop.parts.plan:
            for batch in loop.parts.batches(examples, step.samples):
                tokens.append(sum(len(examples[i].input_ids) for i in batch))
        peaks.append(peak_of(lambda: real(loop)))

    monkeypatch.setattr(train.Loop, "train", measured)
    train.main(run)
    shape = shape_from_config(json.loads((folder / "config.json").read_text()))
    length, saving = max(tokens) / 8, "gradient_checkpointing" in changes
    training = LoraTraining(shape, 8, kind="cpu", width=4, checkpointing=saving, length=length)
    training = training._replace(dropout=0.1 if "lora" in changes else 0.0)
    predicted = training.parts(max(tokens))
    above = 0.2 if training.dropout else 0.15  # layers are not fused then
    assert sum(predicted.values()) == pytest.approx(peaks[0], rel=above), predicted


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "o_proj", "down_proj")])
def test_what_a_layer_keeps_on_a_gpu_is_what_it_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: Any, dropout: float
) -> None:
    """The layers as a GPU computes them, in bfloat16, with a common attention kernel."""
    folder, tokens = make_tiny(tmp_path, hidden=64, layers=4), 512
    wrapped = adapted(folder, targets, dropout).train()
    # the operation that a GPU has for it, whose mask has a byte a number
    native = torch.native_dropout
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, on, _: native(x, p, on)[0])
    for parameter in wrapped.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    train.adapters.adapt(wrapped)
    own = {p.untyped_storage().data_ptr() for p in wrapped.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    wrapped.config._attn_implementation = "sdpa"
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder = wrapped.get_base_model().get_decoder()
        decoder(input_ids=torch.arange(tokens)[None] % 250, use_cache=False)
    shape = shape_from_config(json.loads((folder / "config.json").read_text()))
    training = LoraTraining(shape, 4, targets, dropout=dropout)
    copies = 2 * adapter_parameters(shape, 4, targets)
    expected = training.parts(tokens)["activations"] + copies
    measured = sum(storage.nbytes() for storage in saved.values())
    assert expected == pytest.approx(measured, rel=0.15)


def test_a_student_in_shards_holds_its_part_and_what_is_gathered() -> None:
    whole, eighth = (LoraTraining(STUDENTS["7B"], 16, shards=n).parts(512) for n in (1, 8))
    shape = STUDENTS["7B"]
    ends = 2 * (shape.parameters - shape.body)
    layers = 2 * 2 * shape.body / shape.layers
    assert eighth["weights"] == pytest.approx(whole["weights"] / 8 + ends + layers)
    assert eighth["adapter and optimizer"] < whole["adapter and optimizer"] / 4
    assert LoraTraining(STUDENTS["7B"], 16, shards=2).parts(1)["weights"] <= whole["weights"]


def test_a_plan_of_several_gpus_says_that_it_is_of_each(work: Work) -> None:
    machine = machine_of(gpus()[0])
    rows = memory_of(work, STUDENTS["0.5B"], machine, "train.num_processes=8")
    assert rows["train"].line().startswith("memory of each GPU, with all of the student")
    assert memory_of(work, STUDENTS["0.5B"], machine)["train"].place == "memory"


@pytest.mark.parametrize("method", ["nucleus", "sampled"])
def test_the_signals_stage_is_planned_with_a_capture(work: Work, method: str) -> None:
    teacher = ("teacher.kind=local", "teacher.model=Qwen/Qwen2.5-1.5B-Instruct")
    words = (*teacher, "terms.basis=ours", f"signals.method={method}", "train.loss.ce=0.5")
    machine = machine_of(gpus()[0])
    rows = memory_of(work, STUDENTS["0.5B"], machine, *words, "train.loss.forward_kl=0.5")
    logits = capture_bytes(151_936, 2, "cuda", method)
    assert rows["signals"].parts["logits"] == logits > 1.3e9
    assert max(rows["evaluate"].parts.values()) < rows["signals"].peak


LLAMA_8B = Shape(
    **{"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128},
    **{"intermediate": 14336, "vocab": 128256, "tied": False, "context": 131072},
    parameters=8_030_261_248,
)
STUDENTS = {
    "135M": table()["smollm2-135m-instruct"].shape,
    "0.5B": table()["Qwen/Qwen2.5-Coder-0.5B-Instruct"].shape,
    "1.5B": table()["Qwen/Qwen2.5-1.5B-Instruct"].shape,
    "7B": table()["Qwen/Qwen2.5-7B-Instruct"].shape,
    "8B": LLAMA_8B,
}


def machine_of(gpu: Gpu) -> Machine:
    """Return a machine with a GPU of the table and 64 GB beside it."""
    dtype = ("bfloat16" if gpu.bf16 else "float16", gpu.tflops * 1e12)
    sizes: dict[str, Any] = {"memory": gpu.gigabytes * GB, "main_memory": 64 * GB}
    return Machine(name=gpu.match, kind="cuda", rates={"auto": dtype}, source="", **sizes)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Return the amount of work of a student on recorded answers, counted once."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = '{"messages": [{"role": "user", "content": "Why %d?"}, %s]}\n'
    answer = '{"role": "assistant", "content": "because it is so"}'
    rows.write_text("".join(turns % (n, answer) for n in range(40)))
    return count_work(shipped("folder", f"corpus.path={rows}", *OVERRIDES))


def memory_of(work: Work, shape: Shape, machine: Machine, *words: str) -> dict[str, StageMemory]:
    """Return what each stage of a student's run holds on a machine."""
    config = load_config(ROOT / "configs/folder.yaml", ["corpus.path=./x", *OVERRIDES, *words])
    estimate = RunEstimate(config, work, None, machine)
    estimate.student = shape
    estimate.adapter = adapter_parameters(shape, config.train.lora.r, "all-linear")
    return {row.stage: row for row in estimate.memory()}


@pytest.mark.parametrize("gpu", gpus(), ids=lambda gpu: gpu.machine)
def test_every_gpu_and_student_is_planned_by_the_sum_of_its_parts(work: Work, gpu: Gpu) -> None:
    machine = machine_of(gpu)
    for shape in STUDENTS.values():
        for four_bit in ("false", "true"):
            words = (f"student.load_in_4bit={four_bit}", "train.gradient_checkpointing=true")
            rows = memory_of(work, shape, machine, *words)
            assert list(rows) == ["train", "merge", "evaluate"]
            parts = rows["train"].parts
            share = parts["weights"] / rows["evaluate"].parts["weights"]
            assert share < 0.6 if four_bit == "true" else share == 1
            # of a micro-batch: of each layer its input, and all of one at a time
            tokens = parts["activations"] / ((2 * shape.layers + 8) * shape.hidden)
            assert round(tokens) in (4096, 2560, 1280, 640, 512), (
                "a step, as far as memory holds it"
            )
            for row in rows.values():
                room = 64 * GB if row.stage == "merge" else gpu.gigabytes * GB
                assert row.fits == (sum(row.parts.values()) <= room), row
                assert row.peak == sum(row.parts.values())


# On GPUs of so many GB: does a student's training fit, and its evaluation?


def test_a_micro_batch_is_halved_until_it_fits() -> None:
    training = LoraTraining(STUDENTS["7B"], 16)
    whole = sum(training.parts(8192).values()) / USABLE
    assert training.micro_batch(1.01 * whole, 8192 * 4 // 5 + 1) == 8192
    tokens = training.micro_batch(24 * GB, 6554)
    assert LEAST <= tokens < 8192 and sum(training.parts(tokens).values()) <= USABLE * 24 * GB
    assert training.micro_batch(1 * GB, 6554) == LEAST


def test_what_cannot_fit_stops_before_anything_is_bought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], texts: Path
) -> None:
    def small(memory: float) -> None:
        machine = Machine(
            **{"name": "x", "kind": "cuda", "memory": 24 * GB, "free": memory, "source": ""},
            notes=("GPU: the rest is held by python (pid 7)",),
        )
        monkeypatch.setattr(planning, "measure", lambda *_: machine)

    run = shipped("folder", f"corpus.path={texts}", f"runs={tmp_path}")
    small(0.2 * GB)
    with pytest.raises(DistillError) as caught:
        announce(run)
    assert caught.value.code == Exit.TRAINING and "DOES NOT FIT: " in str(caught.value)
    assert "weights" in str(caught.value) and "\n" not in str(caught.value)
    small(2 * GB)  # the weights would fit
    announce(run)
    said = capsys.readouterr().err
    assert "run: memory: DOES NOT FIT: generate" in said and "held by python (pid 7)" in said
    assert not (tmp_path / "folder").exists(), "something was made"


def test_the_peak_of_answering_here_is_the_predicted_one(tmp_path: Path, peak_of: PeakOf) -> None:
    folder = make_tiny(tmp_path / "m", hidden=64, layers=4)
    teacher = LocalResponder.load(str(folder), "float32", concurrency=32)
    turns = [(Message(role="user", content=f"{n:03} " + "ab" * 100),) for n in range(48)]
    sampling = Sampling(max_new_tokens=100)
    requests = [Request.make(teacher.origin, f"p{n}", t, sampling) for n, t in enumerate(turns)]
    assert teacher.network
    answers: list[Raw] = []
    peak = peak_of(lambda: answers.extend(teacher.ask(requests)))
    shape = shape_from_config(json.loads((folder / "config.json").read_text()))
    tokens = answers[0].usage.input_tokens + 100
    predicted = answering_bytes(shape, 4, "cpu", 32, tokens)
    assert sum(predicted.values()) == pytest.approx(peak, rel=0.15), predicted


def test_the_peak_of_a_capture_here_is_the_predicted_one(tmp_path: Path, peak_of: PeakOf) -> None:
    folder = make_tiny(tmp_path / "m", hidden=64, layers=4)
    network = load_model(str(folder), "float32")
    student, _ = make_student(network)
    examples = [
        Example(
            id=str(n),
            response_id="r",
            input_ids=tuple((n + 3 * i) % 250 + 3 for i in range(256)),
            weights=(0.0, *(1.0,) * 255),
        )
        for n in range(8)
    ]

    @torch.inference_mode()
    def read() -> None:
        for _, logs_SV in read_head(student, student.batch(examples), 260):
            select(logs_SV, torch.zeros(len(logs_SV), dtype=torch.float64), settings)

    shape = shape_from_config(json.loads((folder / "config.json").read_text()))
    for method in ("nucleus", "sampled"):
        settings = Signals(method=method)
        predicted = reading_bytes(shape, 4, "cpu", capture_bytes(260, 4, "cpu", method))
        assert sum(predicted.values()) == pytest.approx(peak_of(read), rel=0.15), predicted
