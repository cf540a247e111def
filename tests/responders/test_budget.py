"""Money: reservations, maxima, and the account that the store gives of every attempt."""

import json
import random
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from distill.config.tree import Config
from distill.records import Response, Usage
from distill.responders.endpoint.budget import (
    Budget,
    account,
    attempts,
    charge,
    enter_account,
    most_dollars,
)
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.wire import Reply, pack
from distill.responders.store import ResponseStore
from distill.storage.run_folder import Run, Stage
from tests.support.buying import asks, settings
from tests.support.fake_teacher import PRICE, FakeTeacher, answer


def test_a_maximum_bounds_every_bill():
    chance = random.Random(0)
    for _ in range(200):
        question, cap = chance.randrange(1, 5000), chance.randrange(1, 900)
        read = chance.randrange(0, question + 1)
        usage = Usage(
            input_tokens=read,
            cached_input_tokens=chance.randrange(0, read + 1),
            output_tokens=chance.randrange(0, cap + 1),
        )
        most = most_dollars(PRICE, question, cap)
        assert most is not None and PRICE.of(usage) <= most
    assert most_dollars(None, 1, 1) is None


INTENT = {"most": "0.02", "question": 4000, "cap": 500}
CHARGES = {  # stated, read, written: paid, perhaps, doubt; the price says 0.0045 of 1000 and 100
    "by the price": ((None, 1000, 100), ("0.0045", "0", "")),
    "by the server": (("0.004", 1000, 100), ("0.004", "0.0005", "")),
    "dearer by the server": (("0.02", 1000, 100), ("0.02", "0", "")),
    "ten times apart": (("0.00045", 1000, 100), ("0.00045", "0.00405", "")),
    "nothing": (("0", 1000, 100), (None, "0.0045", "states")),
    "next to nothing": (("0.0000001", 1000, 100), (None, "0.0045", "states")),
    "a hundred times": (("0.45", 1000, 100), (None, "0.45", "states")),
    "without sense": (("1e30", 1000, 100), (None, "0.02", "states")),
    "above its maximum": (("0.03", 1000, 100), (None, "0.03", "cost")),
    "more tokens written": ((None, 1000, 501), (None, "0.02", "counts 501 tokens written")),
    "more tokens read": ((None, 4257, 10), (None, "0.02", "counts 4,257 tokens read")),
    "many more": ((None, 1000, 70_000), (None, "1.053", "counts 70,000 tokens written")),
    "a billion": ((None, 1000, 999_999_999), (None, "0.02", "counts 999,999,999")),
    "not counted": (("0.5", 0, 0), (None, "0.5", "answered without a count")),
}


@pytest.mark.parametrize("name", CHARGES)
def test_what_a_server_states_is_held_against_the_price(name):
    (stated, read, written), (paid, perhaps, doubt) = CHARGES[name]
    usage = Usage(input_tokens=read, output_tokens=written)
    reply = Reply(stop="end", usage=usage, dollars=stated and Decimal(stated))
    found = charge(PRICE, reply, INTENT)
    assert found.paid == (paid and Decimal(paid)) and found.perhaps == Decimal(perhaps)
    assert found.doubt.startswith(doubt) and bool(found.doubt) == bool(doubt)


def test_without_a_price_or_a_cap_what_a_server_states_counts():
    reply = Reply(stop="end", usage=Usage(input_tokens=1000, output_tokens=100))
    assert charge(None, reply, {}).paid is None and not charge(None, reply, {}).doubt
    stated = reply.model_copy(update={"dollars": Decimal("0.5")})
    assert charge(None, stated, {}).paid == Decimal("0.5")
    reply = Reply(stop="end", usage=Usage(input_tokens=1000, output_tokens=10_000))
    assert charge(PRICE, reply, {**INTENT, "cap": None}).paid == Decimal("0.153")
    assert charge(PRICE, reply, {"most": "0.02"}).doubt  # as it was stored before caps were


def test_a_budget_never_holds_more_than_its_limit():
    chance = random.Random(1)
    budget, flying, spent = Budget(Decimal("1.00")), list[Decimal](), Decimal(0)
    for _ in range(2000):
        most = Decimal(chance.randrange(1, 9)) / 100
        if chance.random() < 0.6 and budget.reserve(most):
            flying.append(most)
        elif flying:
            most = flying.pop(chance.randrange(len(flying)))
            if chance.random() < 0.5:
                budget.settle(most, most * Decimal(chance.randrange(0, 11)) / 10)
            else:
                budget.settle(most, Decimal(0), most)
        spent = budget.settled + budget.unknown + budget.reserved
        assert spent <= 1
        assert budget.reserved == sum(flying) and not budget.exceeded()
    assert spent > Decimal("0.9")


def intent(log: ResponseStore, key: str, number: int, run: str = "mine") -> str:
    """Store the intent of an attempt that can cost a cent, and return the response's id."""
    identifier = Response.make_id(key, 0)
    log.append([("intent", f"{identifier}.{number}", {"model": "m", "run": run, "most": "0.01"})])
    return identifier


def respond(log: ResponseStore, key: str, number: int, data: bytes, status: int = 200) -> None:
    body = {"status": status, "attempt": number, "question": 50, **pack(data)}
    raw = {"key": key, "sample": 0, "model": "m", "stop": None, "usage": {}, "body": body}
    log.append([("response", Response.make_id(key, 0), raw)])


def outcome(log: ResponseStore, identifier: str, number: int, billed: str) -> None:
    log.append([("outcome", f"{identifier}.{number}", {"what": billed, "billed": billed})])


@pytest.fixture
def log(tmp_path: Path) -> Any:
    """Return a log with one attempt of every kind."""
    with ResponseStore(tmp_path / "runs/.store/responses") as log:
        one = intent(log, "paid", 0)
        outcome(log, one, 0, "no")
        intent(log, "paid", 1)
        outcome(log, one, 1, "unknown")
        intent(log, "paid", 2)
        question = {"model": "m", "messages": [{"role": "user", "content": "one two"}]}
        respond(log, "paid", 2, answer(question))
        intent(log, "killed", 0)
        intent(log, "unreadable", 0)
        respond(log, "unreadable", 0, b"{")
        intent(log, "another's", 0, "yours")
        yield log


def test_the_account_tells_settled_from_unknown(log):
    found = account(log, {"m": PRICE}, "mine")
    assert (found.attempts, found.unknown, found.unknown_most) == (5, 3, Decimal("0.03"))
    usage = Usage(input_tokens=7, output_tokens=5)
    assert found.settled == PRICE.of(usage) and found.output_tokens == 5
    assert account(log, {"m": PRICE}).unknown == 4
    assert account(log, {"m": None}, "mine").unpriced == 1
    unknown = (a for a in attempts(log, {"m": None}, "mine") if a.billed == "unknown")
    whats = {a.what for a in unknown}
    assert whats == {"unknown", "no word of how it ended", "answered without a count of tokens"}


def test_the_ledger_holds_the_account_once(log, tmp_path):
    row = {**PRICE.model_dump(mode="json"), "model": "m", "date": str(date.today())}
    (tmp_path / "prices.yaml").write_text(json.dumps({"tokens": [row]}))
    judge = {"kind": "endpoint", "model": "j", "base_url": "http://127.0.0.1:1/v1"}
    config = Config.model_validate(
        {
            "name": "mine",
            "runs": tmp_path / "runs",
            "corpus": {"path": "x"},
            "teacher": {**judge, "model": "m"},
            "student": {"model": "s"},
            "evaluation": {"prices": tmp_path / "prices.yaml", "judge": judge},
        }
    )
    run = Run(config)
    log.append([("intent", "judged.0", {"model": "j", "run": "mine"})])
    log.append([("outcome", "judged.0", {"what": "refused", "billed": "no"})])

    def spend(run: Run) -> None:
        run.ledger.spend(
            input_tokens=1_000_000, output_tokens=2_000_000
        )  # of a local model, beside it
        for _ in range(2):  # as a stage does that asks twice
            enter_account(run, log)

    work = Stage("generate", (), (), (), spend)
    run.folder.mkdir(parents=True)
    for goes in (1, 2):
        run.remake([work])
        run.perform(work)
        entries = run.ledger.entries()
        assert len(entries) == goes
        assert sum(e.attempts for e in entries) == 6 and sum(e.unknown for e in entries) == 3
        assert sum(e.dollars or 0 for e in entries) == account(log, {"m": PRICE}, "mine").settled
        assert sum(e.unknown_dollars or 0 for e in entries) == Decimal("0.03")
        paid = account(log, {"m": PRICE}, "mine")
        assert sum(e.input_tokens for e in entries) == goes * 1_000_000 + paid.input_tokens
        assert sum(e.output_tokens for e in entries) == goes * 2_000_000 + paid.output_tokens
        assert paid.output_tokens > 0 and all(e.output_tokens >= 2_000_000 for e in entries)


@pytest.mark.parametrize("limit", [None, "5"])
def test_a_client_says_what_it_spent(tmp_path, limit):
    """Hold the last line of two goes against the bill; only a limit makes the first count on."""
    lines, bills = [], [Decimal(0)]
    with FakeTeacher() as teacher, ResponseStore(tmp_path) as log:
        asked = settings(teacher, budget_dollars=limit)
        for go in range(2):
            responder = EndpointResponder(asked, PRICE, "run")
            requests = asks(asked, 10)[5 * go : 5 * go + 5]
            assert len(list(responder.buy(requests, log))) == 5
            lines.append(responder.progress())
            bills.append(teacher.bill)
    spent = bills[2] if limit else bills[2] - bills[1]
    for line, dollars in zip(lines, (bills[1], spent), strict=True):
        assert line.startswith(f"${dollars:.4f}")
        assert ("limit $5" in line) == (limit is not None)
