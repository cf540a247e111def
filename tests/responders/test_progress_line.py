"""The line of a purchase: what is spent, perhaps spent and to come, with a limit or without, with a price or without."""

import re
from decimal import Decimal
from pathlib import Path

import pytest

from distill.records import Message, Usage
from distill.responders.endpoint.budget import Budget
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.progress_line import Tally
from distill.responders.responder import Request, Sampling
from distill.storage.log import Log
from tests.support.buying import settings
from tests.support.fake_teacher import PRICE, FakeTeacher, Reply


def bought(tally: Tally, count: int, dollars: str) -> None:
    for _ in range(count):
        tally.budget.settle(Decimal(0), Decimal(dollars))
        tally.add(Usage(output_tokens=10))


def test_what_is_left_is_foretold_from_this_go_alone() -> None:
    tally = Tally(Budget(Decimal(9), settled=Decimal(2)), True, 10)  # two dollars before it
    assert tally.line().startswith("$2.0000, in all about $2.0000, limit $9, $0.00/h, 0 tokens/s")
    bought(tally, 4, "0.5")
    assert tally.line().startswith("$4.0000, in all about $7.0000, limit $9, $")
    bought(tally, 6, "0.5")
    assert tally.line().startswith("$7.0000, in all about $7.0000, limit $9, $")


def test_doubts_stand_beside_and_grow_alike() -> None:
    tally = Tally(Budget(Decimal(9), unknown=Decimal(1)), True, 4)  # a dollar in doubt before it
    bought(tally, 1, "0.5")
    assert tally.budget.reserve(Decimal("0.25"))
    tally.budget.settle(Decimal("0.25"), Decimal(0), Decimal("0.25"))
    said = tally.line()
    assert said.startswith("$0.5000 + $1.2500 perhaps, in all about $2.0000 + $2.0000 perhaps, lim")


def test_the_rate_is_that_of_this_go() -> None:
    tally = Tally(Budget(None), True, 4)
    bought(tally, 2, "0.5")
    tally.started -= 60
    rate = re.search(r"\$([\d.]+)/h, (\d+) tokens/s", tally.line())
    assert rate and float(rate[1]) == pytest.approx(60, rel=0.01) and rate[2] == "0"


@pytest.mark.parametrize(("stated", "start"), [(None, "cost unknown, "), ("0.25", "$0.2500, in")])
def test_without_a_price_only_what_a_server_states_is_known(stated: str | None, start: str) -> None:
    tally = Tally(Budget(None), False, 1)
    bought(tally, 1, stated or "0")
    assert tally.line().startswith(start)


@pytest.mark.parametrize("limit", [None, "5"])
def test_a_purchase_says_what_it_spent(tmp_path: Path, limit: str | None) -> None:
    """Hold the last line of each of two goes against the teacher's bill; only a limit makes the first count on."""
    lines, bills = [], []
    with FakeTeacher(lambda number, payload: Reply()) as teacher, Log(tmp_path) as log:
        asked = settings(teacher, budget_dollars=limit)
        for go in range(2):
            responder = EndpointResponder(asked, PRICE, "run")
            requests = [
                Request.make(
                    responder.origin,
                    f"p{i}",
                    (Message(role="user", content=f"q{go} {i} please"),),
                    Sampling(max_new_tokens=20),
                )
                for i in range(5)
            ]
            assert len(list(responder.buy(requests, log))) == 5
            lines.append(responder.progress())
            bills.append(teacher.bill)
    told = bills[1] if limit else bills[1] - bills[0]
    for line, dollars in zip(lines, (bills[0], told), strict=True):
        assert line.startswith(f"${dollars:.4f}, in all about ${dollars:.4f}")
        assert ("limit $5" in line) == (limit is not None)
