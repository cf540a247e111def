"""Timing a tiny real model, once; and which suites the teacher is asked."""

from collections.abc import Iterator
from decimal import Decimal

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config.teachers import EndpointTeacher, LocalTeacher, RecordedTeacher, Teacher
from distill.economics.costs import reading_and_writing
from distill.evaluation import answering
from distill.evaluation.suites import Suite, why_no_teacher
from distill.records import Load, Message, Prompt, Usage
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Plan, Raw, Request, Sampling
from tests.support.tiny import make_tiny


@pytest.fixture(scope="module")
def responder(tmp_path_factory: pytest.TempPathFactory) -> LocalResponder:
    folder = make_tiny(tmp_path_factory.mktemp("models") / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    return LocalResponder(
        model, AutoTokenizer.from_pretrained(folder), "tiny", "o", "2026-01-01", 3
    )


def asked(count: int) -> list[Request]:
    sampling = Sampling(max_new_tokens=6)
    return [
        Request.make("o", f"p{k}", (Message(role="user", content=f"say {k} {k}"),), sampling)
        for k in range(count)
    ]


def prompts(count: int) -> list[Prompt]:
    turns = [(Message(role="user", content=f"say {k} {k}"),) for k in range(count)]
    return [Prompt.make(turn, "d", "t") for turn in turns]


def test_a_model_is_timed_at_a_stated_load(tmp_path, responder, monkeypatch):
    sizes = list[tuple[int, int]]()
    answers = responder.ask_plan

    def seen(plan: Plan) -> Iterator[list[Raw]]:
        sizes.append((plan.slots, len(plan.requests)))
        return answers(plan)

    monkeypatch.setattr(responder, "ask_plan", seen)
    path = tmp_path / "timings/tiny.jsonl"
    found = answering.timed(path, responder, prompts(20))
    assert found and sizes == [(8, 16)] * 3, "the warm-up, reading, and the load"
    (load,) = found.loads
    assert (load.concurrency, load.requests, load.repeats) == (8, 16, 1)
    assert 16 <= load.usage.output_tokens <= 16 * answering.TOKENS and load.usage.seconds > 0
    assert found.read_tokens == load.usage.input_tokens and found.read_seconds > 0
    assert (found.engine, found.requests) == ("distill", 0)
    assert answering.timed(tmp_path / "none.jsonl", responder, []) is None
    before = path.read_bytes()
    assert answering.timed(path, responder, []) == found and path.read_bytes() == before
    few = answering.timed(tmp_path / "few.jsonl", responder, prompts(5))
    assert few and few.loads[0].concurrency == 5, "more requests at once than there are is no load"


def test_a_full_timing_is_repeated_until_it_is_steady(tmp_path, responder, monkeypatch):
    path = tmp_path / "full.jsonl"
    assert answering.timed(path, responder, prompts(70), "quick")
    found = answering.timed(path, responder, prompts(70), "full")
    assert found, "what was timed at fewer loads does not stand"
    of_loads = {load.concurrency: load.requests for load in found.loads}
    assert of_loads == {1: 16, 8: 16, 32: 64}
    assert all(load.range[0] <= 1 <= load.range[1] for load in found.loads)
    paces = iter([9.0, 2.0, 1.0, 1.02, 1.04, 7.0])

    def run(*_: object) -> Load:
        usage = Usage(output_tokens=10, seconds=10 * next(paces))
        return Load(concurrency=1, requests=16, usage=usage)

    monkeypatch.setattr(answering, "measured", run)
    load = answering.steady(responder, [], 1, 1.0, once=False)
    assert load and load.repeats == 5 and load.pace == pytest.approx(1.02)
    assert load.range == (pytest.approx(1 / 1.02), pytest.approx(1.04 / 1.02))


def test_what_memory_does_not_hold_at_once_is_no_load(responder, monkeypatch):
    monkeypatch.setattr(responder, "most_rows", 4)
    assert answering.measured(responder, asked(8), 8, 9.0) is None
    assert answering.measured(responder, asked(8), 4, 9.0)


PAID = EndpointTeacher(model="m", base_url="https://example.org/v1")


@pytest.mark.parametrize(
    ("teacher", "asks", "reason"),
    [
        (PAID, True, "budget_dollars"),
        (PAID.model_copy(update={"budget_dollars": Decimal(1)}), True, None),
        (LocalTeacher(model="m"), True, None),
        (LocalTeacher(model="m"), False, "does not ask the teacher"),
        (RecordedTeacher(model="m"), True, "recorded"),
    ],
)
def test_who_is_asked_a_suite(teacher: Teacher, asks: bool, reason: str | None) -> None:
    why = why_no_teacher(teacher, Suite(name="s", ask_teacher=asks, parts=(), facts={}))
    assert (why is None) if reason is None else reason in (why or "")


def test_reading_and_writing_of_a_real_batch_add_up(responder):
    usages = [raw.usage for raw in responder.ask(asked(8))]
    cut = answering.measured(responder, asked(8), 1, 0.0)
    assert cut and cut.requests == 1, "a warm-up"
    cut = answering.measured(responder, asked(20), 8, 1e-9)
    assert cut and 8 <= cut.requests < 16, "the time is over, and so many were answered"
    timing = answering.Timing(read_tokens=100, read_seconds=1e-6)
    rates = reading_and_writing(usages, timing)
    assert rates
    whole = sum(u.input_tokens * rates[0] + u.output_tokens * rates[1] for u in usages)
    assert whole == pytest.approx(sum(u.seconds for u in usages))
