"""Answers of a local model on a GPU: how many at once, and what happens where memory ends."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.errors import DistillError, Exit
from distill.models.arithmetic import LIMITS
from distill.records import Message
from distill.responders.local import continuous_batching, local_model
from distill.responders.local.continuous_batching import ContinuousBatch
from distill.responders.local.local_model import PLAN_TOKENS, LocalResponder
from distill.responders.responder import Plan, Raw, Request, Sampling
from distill.responders.store import ResponseStore
from tests.support.asking import answer_all
from tests.support.gpu import Gpu, patch_gpu
from tests.support.tiny import make_tiny, make_tokenizer

DATE = "2026-01-01"
GB = 1 << 30
SHAPE = SimpleNamespace(  # of Qwen2.5 1.5B
    **{"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    **{"hidden_size": 1536, "vocab_size": 151_936, "eos_token_id": 2},
)
SHAPE.get_text_config, SHAPE.max_position_embeddings = lambda: SHAPE, 32_768


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "model", "qwen2")


def requests_to(responder: LocalResponder, count: int, limit: int = 8) -> list[Request]:
    sampling = Sampling(max_new_tokens=limit)
    turns = [(Message(role="user", content="word " * (i % 5) + str(i)),) for i in range(count)]
    return [Request.make(responder.origin, f"p{i}", t, sampling) for i, t in enumerate(turns)]


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, **settings: Any) -> LocalResponder:
    """Return the responder of a model of which only the shape is there."""
    patch_gpu(monkeypatch, gpu)
    device = torch.device("cuda", 0)
    network: Any = SimpleNamespace(device=device, dtype=torch.bfloat16, config=SHAPE)
    return LocalResponder(lambda: network, make_tokenizer(), "m", "o", DATE, **settings)


def sizes(responder: LocalResponder, count: int = 6000, limit: int = 256) -> list[tuple[int, int]]:
    """Return the rows at once, and the requests, of each plan."""
    plans = responder.plan(requests_to(responder, count, limit))
    return [(plan.slots, len(plan.requests)) for plan in plans]


def test_rows_do_not_depend_on_what_the_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = sizes(on_a_gpu(monkeypatch, Gpu(free=18 * GB, reserved=3 * GB, allocated=3 * GB)))
    cached = Gpu(free=3 * GB, reserved=18 * GB, allocated=3 * GB)
    assert sizes(on_a_gpu(monkeypatch, cached)) == empty


def test_plans_are_eight_batches_of_what_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of one batch ends with most of its rows idle, and a step takes as long for one row."""
    small = sizes(on_a_gpu(monkeypatch, Gpu(free=2 * GB)))
    large = sizes(on_a_gpu(monkeypatch, Gpu(free=20 * GB)))
    assert large[0][0] == LIMITS["cuda"].rows > 2 * small[0][0] > 0
    for plans in (small, large):
        assert all(count >= min(8 * rows, PLAN_TOKENS // 256) for rows, count in plans[:-1])
        assert plans[0][1] == max(8 * plans[0][0], PLAN_TOKENS // 256)
    chosen = sizes(on_a_gpu(monkeypatch, Gpu(free=20 * GB), concurrency=64))
    assert chosen[0] == (64, 512)


def test_a_plan_of_a_larger_gpu_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    large = on_a_gpu(monkeypatch, Gpu(free=20 * GB))
    plan = large.plan(requests_to(large, 600, 256))[0]
    assert large.fits(plan)
    assert not on_a_gpu(monkeypatch, Gpu(free=GB)).fits(plan)


def texts(answers: Any) -> list[str]:
    return [answer.text for answer in answers]


def test_unfinished_plans_that_do_not_fit_are_planned_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The setting is lowered after an out-of-memory: what was recorded before does not bind it."""
    responder = LocalResponder.load(str(folder), "float32", concurrency=8)
    requests = requests_to(responder, 12)
    expected = texts(answer_all(responder, requests, tmp_path / "whole"))

    def cut(plan: Plan) -> Iterator[list[Raw]]:
        yield from [next(LocalResponder.ask_plan(responder, plan))]
        raise KeyboardInterrupt

    responder.ask_plan = cut
    with pytest.raises(KeyboardInterrupt):
        answer_all(responder, requests, tmp_path / "cut")
    lowered = LocalResponder.load(str(folder), "float32", concurrency=2)
    capsys.readouterr()
    assert texts(answer_all(lowered, requests, tmp_path / "cut")) == expected
    assert capsys.readouterr().err.count("planned again") == 1
    with ResponseStore(tmp_path / "cut", writable=False) as store:
        plans = [Plan.model_validate(store.get("plan", key)) for key in store.keys("plan")]
    assert [plan.slots for plan in plans] == [8, 2]


def limit_rows(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let a batch of more rows run out of memory in its third step."""
    advance, steps = ContinuousBatch.advance, list[int]()

    def checked(batch: ContinuousBatch) -> Any:
        steps.append(len(batch.live))
        if batch.size > most and len(batch.live) == batch.size and len(steps) % 3 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return advance(batch)

    monkeypatch.setattr(ContinuousBatch, "advance", checked)


def test_out_of_memory_halves_the_rows_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    responder = LocalResponder.load(str(folder), "float32", concurrency=8)
    requests = requests_to(responder, 20)
    expected = texts(answer_all(responder, requests, tmp_path / "a"))
    capsys.readouterr()
    monkeypatch.setattr(local_model, "PLAN_TOKENS", 64)  # three plans
    limit_rows(monkeypatch, 2)
    assert texts(answer_all(responder, requests, tmp_path / "b")) == expected
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of GPU memory" in line]
    assert [line.split("memory ")[1] for line in lines] == [
        "with 8 rows at once, now 4",
        "with 4 rows at once, now 2",
    ]


def test_where_one_row_does_not_fit_one_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responder = LocalResponder.load(str(folder), "float32", concurrency=1)
    monkeypatch.setattr(continuous_batching, "_agrees", lambda *_: True)
    limit_rows(monkeypatch, 0)
    with pytest.raises(DistillError, match="out of GPU memory with one answer") as caught:
        list(responder.ask(requests_to(responder, 2)))
    assert caught.value.code == Exit.TRAINING and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: unspecified launch failure", 719),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_an_error_of_the_gpu_is_not_taken_for_not_supported(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the process answered in padded batches from then on, and did not say so."""
    responder = LocalResponder.load(str(folder), "float32")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(ContinuousBatch, "_forward", fail)
    with pytest.raises(type(error), match="CUDA"):
        list(responder._answers(requests_to(responder, 1), 1))


def test_padded_batches_are_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    responder = LocalResponder.load(str(folder), "float32")

    def fail(*_: object) -> None:
        raise RuntimeError("this attention knows no cache")

    monkeypatch.setattr(ContinuousBatch, "_forward", fail)
    for _ in range(2):
        assert len(list(responder.ask(requests_to(responder, 3)))) == 3
    assert capsys.readouterr().err.count("padded batches") == 1


def test_a_type_that_is_too_narrow_is_an_error(folder: Path) -> None:
    """Models of bfloat16 may overflow in float16, and argmax of NaN is an answer like another."""
    responder = LocalResponder.load(str(folder), "float32")
    with torch.no_grad():
        norm: Any = responder.network.get_decoder().norm
        norm.weight.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(DistillError, match=r"overflows in torch.float32 .*float32") as caught:
        list(responder.ask(requests_to(responder, 1)))
    assert caught.value.code == Exit.TRAINING


def test_what_ends_in_one_step_is_stored_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fsync holds up the thread that feeds the GPU."""
    responder, append, counts = (
        LocalResponder.load(str(folder), "float32"),
        ResponseStore.append,
        [],
    )

    def counted(store: ResponseStore, records: Any) -> int:
        records = list(records)
        counts.append(sum(kind == "response" for kind, *_ in records))
        return append(store, records)

    monkeypatch.setattr(ResponseStore, "append", counted)
    answer_all(responder, requests_to(responder, 6), tmp_path)
    assert sum(counts) == 6 and max(counts) > 3, "most reach their length in the same step"
