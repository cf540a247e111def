"""Training on a GPU, without one: memory that is freed and halved, facts, and no wait for the GPU.

Tensors on `meta` stand for those on a GPU: the code asks only whether a device is a CPU, and what
waits for a GPU (`item`, `tolist`, a mask as an index) raises there.
"""

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from distill.config.learning import SOFT, Loss, Signals
from distill.errors import DistillError, Exit
from distill.models.arithmetic import (
    CAPTURE_BYTES,
    MICRO_BATCH_TOKENS,
    READ_TOKENS,
    LoraTraining,
    Towards,
    capture_bytes,
    logit_rows,
    loss_bytes,
    row_bytes,
)
from distill.pipeline import STAGES
from distill.responders.local.local_model import sample_ids, seeded
from distill.storage.run_folder import differences
from distill.training import adapters, attention, prepare, student, train
from distill.training.losses import Live, cross_entropy, soft_loss
from distill.training.soft_labels import capture
from distill.training.soft_labels.cache import Signal
from distill.training.soft_labels.capture import read_head, select
from distill.training.soft_labels.labels import CachedLabels
from distill.training.student import Batch, StudentModel
from tests.support.tiny import make_tokenizer
from tests.support.training import (
    TRAIN,
    assert_close,
    causal_model,
    examples,
    killed_at,
    make_run,
    make_soft_run,
    outcome,
    training,
)

VOCABULARY, HIDDEN, WIDER = 151_936, 64, 96
EXACT = {**TRAIN, "lora": {"r": 4, "alpha": 8}}  # without dropout, whose samples are a pass's
STAGE = {stage.name: stage for stage in STAGES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run of several micro-batches a step."""
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder, **EXACT)
    run.perform(STAGE["train"])
    return folder


def test_nothing_of_the_student_is_alive_after_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, load = list[weakref.ref[torch.Tensor]](), prepare.load_adapted

    def spied(*given: Any) -> Any:
        model = load(*given)
        weights.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    monkeypatch.setattr(prepare, "load_adapted", spied)
    run = make_run(tmp_path, max_steps=1, lora={"r": 4, "dropout": 0.1})  # and so not fused
    train.main(run)
    assert weights and not any(weight() is not None for weight in weights)


@pytest.mark.parametrize(
    ("key", "value"), [("micro_batch_tokens", 200), ("gradient_checkpointing", True)]
)
def test_a_key_of_memory_may_change_between_two_commands(
    folder: Path, key: str, value: object
) -> None:
    name = f"lowered-{key}"
    run = make_run(folder, name, **EXACT)
    with killed_at(6):
        run.perform(STAGE["train"])
    run = make_run(folder, name, **{**EXACT, key: value})
    run.perform(STAGE["train"])
    assert_close(outcome(run), outcome(make_run(folder, **EXACT)))
    (note,) = training(run)["notes"]
    assert note.startswith(f"from step 1 on train.{key} was")
    run = make_run(folder, name, **EXACT)
    assert not run.perform(STAGE["train"]), "the finished stage is done under either setting"


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the manual.")


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return what lets a pass of more than so many tokens run out of memory."""
    forward = StudentModel.forward

    def shrink(tokens: int) -> None:
        def checked(self: StudentModel, batch: Batch) -> torch.Tensor:
            loss = forward(self, batch)
            return out_of_memory() or loss if len(batch.ids_N) > tokens else loss

        monkeypatch.setattr(StudentModel, "forward", checked)

    return shrink


def test_out_of_memory_halves_the_micro_batch_once_and_goes_on(
    folder: Path, small_gpu: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(folder, "small", **{**EXACT, "micro_batch_tokens": 600, "eval_steps": None})
    small_gpu(400)
    run.perform(STAGE["train"])
    (note,) = training(run)["notes"]
    assert note.startswith("out of GPU memory in step 1: micro-batches from there on of")
    assert capsys.readouterr().err.count("out of GPU memory") == 1
    expected = outcome(make_run(folder, **EXACT))
    last = expected["validation"][-1:]  # the small one has no other
    assert_close(outcome(run), {**expected, "validation": last})


def test_where_halves_do_not_fit_either_one_line_names_the_key(
    tmp_path: Path, small_gpu: Callable[[int], None]
) -> None:
    run = make_run(tmp_path)
    small_gpu(10)
    with pytest.raises(DistillError, match=r"train\.micro_batch_tokens") as error:
        run.perform(STAGE["train"])
    assert error.value.code == Exit.TRAINING and "\n" not in str(error.value)


def test_a_capture_that_runs_out_of_memory_goes_on_with_shorter_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, read, passes = make_soft_run(tmp_path), capture.capture, list[int]()

    def small(*given: Any) -> Any:
        passes.append(given[-1])
        return out_of_memory() or read(*given) if given[-1] == READ_TOKENS else read(*given)

    monkeypatch.setattr(capture, "capture", small)
    capture.main(run)
    assert passes == [READ_TOKENS, READ_TOKENS // 4]
    assert capsys.readouterr().err.count("out of GPU memory: 512 tokens a pass") == 1


def test_float16_makes_the_gradients_of_the_sum_and_scales_them_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4 computes in it: of a mean over thousands of tokens they are below its least number."""
    rows, upstream, forward = [], list[float](), StudentModel.forward

    def spied(self: StudentModel, batch: Batch) -> torch.Tensor:
        loss = forward(self, batch)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: upstream.append(float(gradient)))
        return loss

    monkeypatch.setattr(StudentModel, "forward", spied)
    for dtype in (torch.float32, torch.float16):
        upstream.clear()
        monkeypatch.setattr(prepare.loading, "pick_dtype", lambda name="auto", own=dtype: own)
        run = make_run(tmp_path, f"{dtype}", max_steps=2, eval_steps=None, lora=EXACT["lora"])
        train.main(run)
        rows.append(training(run)["history"])
    assert upstream == [1.0, 1.0]
    for one, half in zip(*rows, strict=True):
        assert half["loss"] == pytest.approx(one["loss"], rel=2e-3)
        assert half["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)


def test_another_gpu_or_cuda_is_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tokenizer = make_run(tmp_path), make_tokenizer()

    def facts(gpu: str, cuda: str) -> dict[str, Any]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return prepare.pinned_facts(run.config, tokenizer, "torch.bfloat16", [], [])

    assert not {"gpu", "cuda"} & facts("A100", "12.8").keys()
    monkeypatch.setattr(prepare.loading, "device", lambda: torch.device("cuda"))
    former = facts("NVIDIA A100-SXM4-80GB", "12.8")
    assert former["gpu"] == "NVIDIA A100-SXM4-80GB" and not differences(former, former)
    assert differences(former, facts("NVIDIA L4", "12.8")) == [
        "gpu was NVIDIA A100-SXM4-80GB, is NVIDIA L4"
    ]
    assert differences(former, facts("NVIDIA A100-SXM4-80GB", "13.0")) == ["cuda was 12.8, is 13.0"]


def test_another_cpu_or_count_of_threads_stops_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H20: on another processor, or by other instructions of the same one."""
    run = make_run(tmp_path, save_steps=1)
    with killed_at(4):
        train.main(run)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OLDER")
        patch.setattr(torch, "get_num_threads", lambda: 77)
        with pytest.raises(DistillError, match=r"instructions was .*, is OLDER; threads was") as e:
            train.main(run)
        assert e.value.code == Exit.TRAINING
    monkeypatch.setattr(prepare, "processor", lambda: "another CPU")
    with pytest.raises(DistillError, match=r"processor was .*, is another CPU") as error:
        train.main(run)
    assert error.value.code == Exit.TRAINING


def test_a_live_teacher_is_counted_in_its_own_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = {"ce": 0.5, "forward_kl": 0.5, "teacher": "live"}
    lora = {"r": 4, "dropout": 0.1}
    run, seen = make_soft_run(tmp_path, train={"loss": loss, "lora": lora}), list[Any]()

    def spied(*given: Any, **named: Any) -> LoraTraining:
        seen.append(LoraTraining(*given, **named))
        return seen[-1]

    monkeypatch.setattr(prepare, "LoraTraining", spied)
    monkeypatch.setattr(prepare.loading, "device", lambda: torch.device("cuda"))
    properties = SimpleNamespace(total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    model: Any = causal_model(tmp_path / "model", torch.bfloat16)
    tokens = prepare.micro_batch_tokens(run.config, model)
    assert tokens == max(MICRO_BATCH_TOKENS, run.config.train.tokens_per_step * 5 // 4)
    teacher = causal_model(tmp_path / "teacher")
    assert seen[0].teacher == 4 * sum(p.numel() for p in teacher.parameters())
    assert (seen[0].width, seen[0].dropout, seen[0].shards) == (2, 0.1, 1)


def test_the_attention_of_a_student_in_shards_is_that_of_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is in main memory until it is cut."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    devices, run = list[torch.device](), make_run(tmp_path, micro_batch_tokens=300)
    monkeypatch.setattr(prepare.loading, "device", lambda: torch.device("meta"))

    def apart(device: torch.device, *_: Any) -> str:
        devices.append(device)
        return "no kernel"

    monkeypatch.setattr(student, "why_apart", apart)
    note, _ = prepare.Preparation(run).notes
    assert note.endswith("slower: no kernel") and devices == [torch.device("meta")]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_choosing_a_token_takes_what_a_row_is_planned_with(top_p: float) -> None:
    logits = torch.zeros(4, 30_000, dtype=torch.bfloat16)
    logits[:, :8] = 20  # the nucleus
    with Alive() as alive:
        sample_ids(logits, 1.0, top_p, [seeded("k", n) for n in range(4)])
    planned = 4 * row_bytes(0, 30_000, 2, "cuda", 0)
    assert alive.peak + logits.nbytes <= 1.01 * planned
    assert top_p < 1 or alive.peak + logits.nbytes == pytest.approx(planned, rel=0.05)


# What a GPU is given, on `meta`


class Alive(TorchDispatchMode):
    """Count the bytes that are alive of what operations make, the most there were, and operations.

    Views launch nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self.casts = self.operations = 0
        self.seen = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += not func.is_view and func is not torch.ops.aten._unsafe_view.default
        self.casts += func is torch.ops.aten._to_copy.default
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in self.seen:
                self.seen.add(id(storage))
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cached_labels(tokens: int, settings: Loss, answers: int = 1) -> CachedLabels:
    """Return labels of answers of so many tokens, with lists of 20 ids each."""
    counts, entries = np.full(tokens, 20, np.uint16), 20 * tokens
    arrays = (counts, np.arange(entries, dtype=np.uint32) % 250, np.zeros(entries, np.uint8))
    signal = Signal(*arrays, np.full(tokens, 0.01, np.float32), np.zeros((0, tokens), np.float32))
    return CachedLabels({f"r{n}": signal for n in range(answers)}, "", settings, None)


@pytest.mark.parametrize("towards", ["tokens", "cached", "live"])
@pytest.mark.parametrize("parts", [("forward_kl",), SOFT], ids="+".join)
def test_a_loss_waits_for_no_gpu_and_takes_what_is_planned(
    towards: Towards, parts: tuple[str, ...]
) -> None:
    """At the vocabulary of Qwen2.5, whose logits in one piece would take 1.2 GB in float32."""
    positions = 2048
    hidden, targets = on_meta(positions, HIDDEN).requires_grad_(), on_meta(positions).long()
    inputs = (hidden, on_meta(VOCABULARY, HIDDEN), targets, on_meta(positions).float())
    soft: Any = cached_labels(positions, Loss()).targets(["r0"], "meta")
    if towards == "live":
        soft = Live(on_meta(positions, WIDER), on_meta(VOCABULARY, WIDER), VOCABULARY)
    with Alive() as alive:
        mix = dict.fromkeys(("ce", *parts), 0.2)
        total = (
            cross_entropy(*inputs)[0] if towards == "tokens" else soft_loss(*inputs, soft, mix)[0]
        )
        total.backward()
    planned = loss_bytes(VOCABULARY, 2, "cuda", towards)
    assert 0.7 * planned < alive.peak <= planned < 1.3e9


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> StudentModel:
    """Return a student in bfloat16 on a device that is no CPU, with an adapter and soft labels."""
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    with torch.device("meta"):
        model = causal_model(LlamaConfig(**shape, **heads), torch.bfloat16)
        wrapped = adapters.inject(model, 4, 8, 0.0, "all-linear", seed=1)
    adapters.adapt(wrapped)
    wrapped.set_attn_implementation(attention.NAME)
    monkeypatch.setattr(attention, "why_apart", lambda *_: "")  # a trial on the device
    return StudentModel(wrapped)


def test_a_step_on_a_gpu_waits_for_nothing_and_casts_its_adapters_once(
    on_gpu: StudentModel,
) -> None:
    lists, counts = examples(3), []
    supervised = sum(bool(w) for w in lists[0].weights)
    on_gpu.labels = cached_labels(supervised, Loss(ce=0.5, forward_kl=0.5), 3)
    rows = [e._replace(response_id=f"r{n}") for n, e in enumerate([lists[0]] * 3)]

    def step(passes: int) -> tuple[int, int]:
        with Alive() as alive:
            for _ in range(passes):
                on_gpu(on_gpu.batch(rows))[0].backward()
        return alive.operations, alive.casts

    step(1)  # makes what is made once
    plain = step(2)
    with adapters.cast_once(on_gpu.model):
        counts = step(2)
    modules = 2 * 2 * 7  # in two passes of two layers
    assert plain[1] - counts[1] == 2 * modules, "A's and B's casts"
    assert plain[0] - counts[0] == 4 * modules, "B's scale, and a sum, too"
    assert all(p.grad is not None for p in adapters.parameters(on_gpu.model).values())


def test_cast_once_gives_the_gradients_of_a_cast_a_pass() -> None:
    gradients = list[dict[str, torch.Tensor]]()
    for once in (False, True):
        model = causal_model(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64))
        wrapped = adapters.inject(model, 4, 8, 0.0, "all-linear", seed=1)
        for name, parameter in adapters.parameters(wrapped).items():
            torch.manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.1)
        adapters.adapt(wrapped)
        student = StudentModel(wrapped, packing=False)
        facts = {"device": torch.device("meta"), "dtype": torch.float32}
        on_gpu: Any = SimpleNamespace(**facts, modules=wrapped.modules)
        with adapters.cast_once(on_gpu) if once else torch.enable_grad():
            student(Batch.make(examples())).backward()
        named = adapters.parameters(wrapped)
        gradients.append({n: p.grad for n, p in named.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "temperatures", "inside"),
    [("nucleus", (), 0), ("nucleus", (2.0,), 4), ("sampled", (), 8)],
)
def test_a_capture_takes_what_is_planned(
    method: Any, temperatures: tuple[float, ...], inside: int
) -> None:
    """Of a number `inside` kernels: a GPU's cast to float64, the exponentials of logsumexp."""
    states, head = on_meta(2048, HIDDEN), on_meta(VOCABULARY, HIDDEN)
    reader: Any = SimpleNamespace(states=lambda batch: states, head=lambda: (head, None))
    settings = Signals(method=method, temperatures=temperatures)
    with torch.inference_mode(), Alive() as alive:
        for _, logs_SV in read_head(reader, Batch.make([]), VOCABULARY):
            select(logs_SV, torch.zeros(logs_SV.shape[0], dtype=torch.float64), settings)
    planned = capture_bytes(VOCABULARY, 2, "cuda", method, bool(temperatures))
    inner = inside * logit_rows(CAPTURE_BYTES, 4, VOCABULARY, "cuda") * VOCABULARY
    assert alive.peak + inner == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("method", ["nucleus", "sampled"])
def test_a_capture_s_pass_reads_the_head_in_few_parts_and_copies_once(method: Any) -> None:
    """Of 32 MiB each, as on a CPU, it would be 20 parts; what chooses the ids waits for none."""
    states, head = on_meta(1024, HIDDEN), on_meta(VOCABULARY, HIDDEN)
    reader: Any = SimpleNamespace(states=lambda batch: states, head=lambda: (head, None))
    settings, rows = Signals(method=method), 0
    parts = list(read_head(reader, Batch.make([]), VOCABULARY))
    assert len(parts) == 2
    for part, logs_SV in parts:
        offsets = torch.zeros(logs_SV.shape[0], dtype=torch.float64)
        assert part.start == rows
        rows += len(select(logs_SV, offsets, settings))
    assert rows == 1024
