"""Timing a tiny real model, once; and which suites the teacher is asked."""

from decimal import Decimal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config.teachers import EndpointTeacher, LocalTeacher, RecordedTeacher, Teacher
from distill.economics.costs import reading_and_writing
from distill.evaluation import answering
from distill.evaluation.suites import Suite, why_no_teacher
from distill.records import Message
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling
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


def test_a_few_are_asked_alone_and_many_are_read(tmp_path: Path, responder: LocalResponder) -> None:
    path = tmp_path / "timings/tiny.jsonl"
    found = answering.timed(path, responder, asked(20))
    assert found and found.requests == answering.ALONE and found.seconds > 0
    assert answering.ALONE <= found.output_tokens <= 6 * answering.ALONE
    encoded = [len(responder._encode(request)) for request in asked(20)]
    assert found.read_tokens == sum(encoded) and found.read_seconds > 0
    assert responder.max_batch_size == 3, "the responder is as it was"
    assert answering.timed(tmp_path / "none.jsonl", responder, []) is None
    before = path.read_bytes()
    assert answering.timed(path, responder, []) == found and path.read_bytes() == before


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


def test_reading_and_writing_of_a_real_batch_add_up(
    responder: LocalResponder, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = answering.measured(responder, asked(8), 8, 8)
    usages = [raw.usage for raw in answers]
    monkeypatch.setattr(answering, "SECONDS", 0.0)
    assert len(answering.measured(responder, asked(8), 8, 1)) == 1, "the time is over"
    timing = answering.Timing(
        requests=1, output_tokens=1, seconds=1.0, read_tokens=100, read_seconds=1e-6
    )
    rates = reading_and_writing(usages, timing)
    assert rates
    whole = sum(u.input_tokens * rates[0] + u.output_tokens * rates[1] for u in usages)
    assert whole == pytest.approx(sum(u.seconds for u in usages))
