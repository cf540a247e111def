"""Costs: from measured time and dated prices; what is not known is null with its reason, never 0."""

from datetime import date
from decimal import Decimal

from distill.evaluation.economics import distillation_cost, request_cost
from distill.generation.prices import MachinePrice, TokenPrice
from distill.records import LedgerEntry, Usage

MACHINE = MachinePrice(
    name="m", dollars_per_hour=Decimal("0.36"), date=date(2026, 1, 1), source="s"
)
HOSTED = TokenPrice(
    model="*x", dollars_per_million_input=Decimal(1), dollars_per_million_output=Decimal(10),
    date=date(2026, 1, 1), source="s",
)  # fmt: skip
USAGES = [Usage(input_tokens=100, output_tokens=50, seconds=s) for s in (1.0, 3.0)]


def entry(stage: str, seconds: float, dollars: Decimal | None = None) -> LedgerEntry:
    return LedgerEntry(stage=stage, started="t", seconds=seconds, dollars=dollars, output_tokens=5)


def test_a_request_on_a_machine_costs_its_share_of_the_batch() -> None:
    cost = request_cost(USAGES, MACHINE, "")
    assert cost.seconds_per_1k == 2000 and cost.dollars_per_1k == Decimal("0.2")
    assert (
        cost.output_tokens_per_second == 25
        and cost.price is not None
        and "2026-01-01" in cost.price
    )


def test_a_hosted_model_costs_its_list_price() -> None:
    cost = request_cost(USAGES, MACHINE, "", HOSTED)
    assert cost.dollars_per_1k == Decimal("0.6") and cost.seconds_per_1k == 2000


def test_no_machine_no_dollars_but_a_reason() -> None:
    cost = request_cost(USAGES, None, "evaluation.machine is not set")
    assert (
        cost.dollars_per_1k is None
        and cost.reasons["dollars_per_1k"] == "evaluation.machine is not set"
    )
    assert cost.seconds_per_1k == 2000


def test_untimed_answers_have_no_time_and_no_dollars() -> None:
    for usages in ([Usage(output_tokens=9)], []):
        cost = request_cost(usages, MACHINE, "")
        assert cost.seconds_per_1k is None and cost.dollars_per_1k is None
        assert set(cost.reasons) == {"seconds_per_1k", "dollars_per_1k"}


def test_the_distillation_costs_what_all_its_attempts_took() -> None:
    ledger = [entry("train", 100), entry("train", 3500), entry("generate", 0, Decimal("1.5"))]
    cost = distillation_cost([*ledger, entry("report", 999), entry("publish", 999)], MACHINE, "")
    assert (
        cost.seconds == 3600 and cost.dollars == Decimal("1.86") and cost.stages == {"train": 3600}
    )
    assert cost.output_tokens == 15


def test_without_a_machine_the_distillations_cost_is_unknown() -> None:
    cost = distillation_cost([entry("train", 1)], None, "why")
    assert cost.dollars is None and cost.reasons == {"dollars": "why"}
