"""The endpoint responder against a real server on a loopback port: faults C1 to C13, and what the store then holds."""

from pathlib import Path
from typing import Any

from distill.config import Teacher
from distill.generation.budget import account
from distill.generation.endpoint import EndpointResponder
from distill.generation.generate import answer_all
from distill.generation.purchase import origin_of
from distill.generation.responder import Request, Sampling
from distill.records import Message, Response
from distill.store import Log
from tests.fake_teacher import PRICE, FakeTeacher, Reply, Script

KEY = "canary-3141592653589793"
MODEL = "fake-1"


def settings(teacher: FakeTeacher | str, **changes: Any) -> Teacher:
    url = teacher if isinstance(teacher, str) else teacher.url
    given = {
        "kind": "endpoint",
        "model": MODEL,
        "base_url": url,
        "max_new_tokens": 20,
        "first_wait": 0.01,
        "max_retries": 3,
        "read_timeout": 0.5,
        "total_timeout": 2,
        "drain_timeout": 2,
        **changes,
    }
    return Teacher.model_validate(given)


def asks(teacher: Teacher, count: int, **sampling: Any) -> list[Request]:
    drawn = Sampling(max_new_tokens=teacher.max_new_tokens, **sampling)
    return [
        Request.make(
            origin_of(teacher), f"p{i}", (Message(role="user", content=f"q{i} please"),), drawn
        )
        for i in range(count)
    ]


def buy(teacher: FakeTeacher, store: Path, count: int = 1, **changes: Any) -> list[Response]:
    """Buy some answers, and hold the store's account against the teacher's bill, whatever happens."""
    asked = settings(teacher, **changes)
    try:
        responder = EndpointResponder(asked, PRICE, "run")
        return answer_all(responder, asks(asked, count), store, "x")
    finally:
        if store.exists():
            hold_account(teacher, store)


def hold_account(teacher: FakeTeacher, store: Path) -> None:
    """Assert settled <= bill <= settled + the maximum of the unknown, and an intent for every request."""
    with Log(store, writable=False) as log:
        found = account(log, PRICE)
    assert found.settled <= teacher.bill <= found.settled + found.unknown_most
    if not found.unknown:
        assert found.settled == teacher.bill
    assert found.attempts >= len(teacher.payloads)


def always(**reply: Any) -> Script:
    return lambda number, payload: Reply(**reply)


def first(count: int, **reply: Any) -> Script:
    return lambda number, payload: Reply(**reply) if number < count else Reply()


def test_answers_come_in_order_and_are_paid_once(tmp_path: Path) -> None:
    with FakeTeacher() as teacher:
        found = buy(teacher, tmp_path, 20)
        again = buy(teacher, tmp_path, 20)
    assert [r.text for r in found] == [f"the answer to q{i} please" for i in range(20)]
    assert again == found and len(teacher.payloads) == 20
    assert {r.stop for r in found} == {"end"} and {r.model for r in found} == {MODEL}
