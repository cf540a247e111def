"""Costs: from measured time and dated prices; the unknown is null with its reason, never 0."""

from datetime import date
from decimal import Decimal

import pytest

from distill.economics.costs import (
    CONTRADICTED,
    DISTILLATION,
    NO_TIME,
    NOT_APART,
    Tariff,
    distillation_cost,
    request_cost,
)
from distill.pipeline import STAGES
from distill.records import LedgerEntry, Timing, Usage
from distill.responders.prices import MachinePrice, TokenPrice

MACHINE = MachinePrice(
    name="m", dollars_per_hour=Decimal("0.36"), date=date(2026, 1, 1), source="s"
)
HOSTED = TokenPrice(
    model="*x", dollars_per_million_input=Decimal(1), dollars_per_million_output=Decimal(10),
    dollars_per_million_cached_input=Decimal("0.1"), date=date(2026, 1, 1), source="s",
)  # fmt: skip
USAGES = [Usage(input_tokens=100, output_tokens=50, seconds=s) for s in (1.0, 3.0)]
TIMING = Timing(requests=4, output_tokens=200, seconds=20, read_tokens=1000, read_seconds=5)


def entry(stage: str, seconds: float, dollars: Decimal | None = None) -> LedgerEntry:
    return LedgerEntry(stage=stage, started="t", seconds=seconds, dollars=dollars, output_tokens=5)


def test_the_cost_of_a_distillation_is_that_of_every_stage_but_the_report() -> None:
    assert [*DISTILLATION, "report"] == [stage.name for stage in STAGES]


def test_a_request_on_a_machine_costs_its_share_of_the_batch() -> None:
    cost = request_cost(USAGES, Tariff(MACHINE), TIMING)
    assert (cost.seconds_per_1k, cost.dollars_per_1k) == pytest.approx((2000, 0.2))
    assert cost.output_tokens_per_second == 25 and cost.price and "2026-01-01" in cost.price
    assert (cost.requests, cost.input_tokens, cost.output_tokens) == (2, 100, 50)
    # read: 5 s of 1,000 tokens; the 200 read here took 1 s of 4, so 100 written took 3 s
    rates = cost.per_million
    assert rates and (rates.dollars_input, rates.dollars_output) == pytest.approx((0.5, 3))
    idle = request_cost(USAGES, Tariff(MACHINE, 0.25), TIMING)  # is paid all the same
    assert (idle.seconds_per_1k, idle.dollars_per_1k) == pytest.approx((2000, 0.8))
    assert idle.price and "in use 25\u00a0% of the time" in idle.price


@pytest.mark.parametrize(
    ("timing", "reason"),
    [(None, NOT_APART), (TIMING.model_copy(update={"read_seconds": 100.0}), CONTRADICTED)],
)
def test_rates_that_were_not_timed_or_contradict_the_total_are_unknown(timing, reason) -> None:
    cost = request_cost(USAGES, Tariff(MACHINE), timing)
    assert cost.per_million is None and cost.reasons["per_million"] == reason


def test_a_hosted_model_costs_its_list_price() -> None:
    cost = request_cost(USAGES, Tariff(HOSTED), TIMING)
    assert (cost.dollars_per_1k, cost.seconds_per_1k) == pytest.approx((0.6, 2000))
    rates = cost.per_million
    assert rates and (rates.dollars_input, rates.dollars_output) == (1, 10)
    cached = Usage(input_tokens=100, cached_input_tokens=60, output_tokens=50)
    # 40 at $1, 60 at $0.10 and 50 at $10 a million, a thousand times
    assert request_cost([cached], Tariff(HOSTED)).dollars_per_1k == pytest.approx(0.546)


def test_what_is_not_priced_or_not_timed_is_unknown_with_its_reason() -> None:
    why = "evaluation.machine is not set"
    cost = request_cost(USAGES, Tariff(None, why=why), TIMING)
    assert cost.dollars_per_1k is None and cost.price is None and cost.seconds_per_1k == 2000
    assert cost.reasons["dollars_per_1k"] == cost.reasons["per_million"] == why
    for usages in ([Usage(output_tokens=9)], []):
        cost = request_cost(usages, Tariff(MACHINE), TIMING)
        assert cost.seconds_per_1k is None and cost.dollars_per_1k is None and cost.price is None
        assert cost.reasons["seconds_per_1k"] == cost.reasons["dollars_per_1k"] == NO_TIME


def test_the_distillation_costs_what_all_its_attempts_took() -> None:
    ledger = [entry("train", 100), entry("train", 3500), entry("generate", 0, Decimal("1.5"))]
    cost = distillation_cost([*ledger, entry("report", 999), entry("publish", 999)], MACHINE, "")
    assert cost.seconds == 3600 and cost.dollars == Decimal("1.86")
    assert cost.stages == {"train": 3600} and cost.output_tokens == 15 and cost.reused == 0


def test_what_the_student_wrote_is_no_answer_of_the_teacher() -> None:
    select = entry("select", 1).model_copy(update={"student_output_tokens": 3})
    found = distillation_cost([select, entry("generate", 1)], MACHINE, "", answer_tokens=10)
    assert found.reused == pytest.approx(1 - (2 + 5) / 10) and found.output_tokens == 10


def test_what_others_were_paid_is_unknown_rather_than_nothing() -> None:
    paid = LedgerEntry(stage="generate", started="t", seconds=1, attempts=3)
    assert distillation_cost([paid], MACHINE, "").dollars is None
    stated = distillation_cost([entry("generate", 1)], MACHINE, "", why_unpaid="not stated")
    assert stated.dollars is None and stated.reasons == {"dollars": "not stated"}
    doubtful = paid.model_copy(update={"dollars": Decimal(2), "unknown_dollars": Decimal("0.5")})
    found = distillation_cost([doubtful], MACHINE, "")
    assert found.dollars == Decimal("2.0001") and found.unknown_dollars == Decimal("0.5")
