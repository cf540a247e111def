"""What a request costs and what the distillation cost, from times measured in this run and dated prices.

Money is Decimal until it is written. An unknown price or an untimed answer makes the result None with a reason,
never 0.
"""

from collections.abc import Sequence
from decimal import Decimal

from distill.generation.prices import MachinePrice, TokenPrice
from distill.records import LedgerEntry, Record, Usage

THOUSAND = 1000
DISTILLATION = ("corpus", "prompts", "generate", "filter", "train", "evaluate")


class RequestCost(Record):
    """What 1,000 requests take and cost; null with a reason where it is not known."""

    seconds_per_1k: float | None
    dollars_per_1k: Decimal | None
    output_tokens_per_second: float | None
    price: str | None
    reasons: dict[str, str] = {}


class DistillationCost(Record):
    """What making the student took and cost, by stage."""

    seconds: float
    dollars: Decimal | None
    stages: dict[str, float]
    output_tokens: int
    price: str | None
    reasons: dict[str, str] = {}


def request_cost(
    usages: Sequence[Usage],
    machine: MachinePrice | None,
    why_no_machine: str,
    hosted: TokenPrice | None = None,
) -> RequestCost:
    """Price 1,000 requests like these: by the token where the model is hosted, else by the machine's time.

    `usages` are those of one model's answers; their seconds are shares of measured batch time, so they add up to it.
    """
    seconds = sum(usage.seconds for usage in usages)
    timed = bool(usages) and all(usage.seconds > 0 for usage in usages)
    reasons = {} if timed else {"seconds_per_1k": "the answers were not timed in this run"}
    per_request = seconds / len(usages) if timed else None
    dollars, price = None, None
    if hosted is not None and usages:
        dollars = sum((hosted.of(usage) for usage in usages), Decimal(0)) / len(usages) * THOUSAND
        price = describe(hosted)
    elif machine is None or per_request is None:
        reasons["dollars_per_1k"] = why_no_machine if machine is None else reasons["seconds_per_1k"]
    else:
        dollars, price = machine.of(per_request) * THOUSAND, describe(machine)
    return RequestCost(
        seconds_per_1k=None if per_request is None else per_request * THOUSAND,
        dollars_per_1k=dollars,
        output_tokens_per_second=sum(u.output_tokens for u in usages) / seconds if timed else None,
        price=price,
        reasons=reasons,
    )


def distillation_cost(
    ledger: Sequence[LedgerEntry], machine: MachinePrice | None, why_no_machine: str
) -> DistillationCost:
    """Add up the stages that made and measured the student: what was paid to others, and the machine's time.

    Attempts that failed or were cut short count as well: they cost the same.
    """
    entries = [entry for entry in ledger if entry.stage in DISTILLATION]
    stages = {s: sum(e.seconds for e in entries if e.stage == s) for s in DISTILLATION}
    stages = {stage: seconds for stage, seconds in stages.items() if seconds}
    seconds = sum(stages.values())
    paid = sum((entry.dollars or Decimal(0) for entry in entries), Decimal(0))
    return DistillationCost(
        seconds=seconds,
        dollars=None if machine is None else paid + machine.of(seconds),
        stages=stages,
        output_tokens=sum(entry.output_tokens for entry in entries),
        price=None if machine is None else describe(machine),
        reasons={"dollars": why_no_machine} if machine is None else {},
    )


def describe(price: MachinePrice | TokenPrice) -> str:
    """Return a price in words, with its date and source."""
    if isinstance(price, MachinePrice):
        what = f"{price.what or price.name}: ${price.dollars_per_hour} an hour"
    else:
        rates = f"${price.dollars_per_million_input} in, ${price.dollars_per_million_output} out"
        what = f"list price of {price.model.strip('*')}: {rates} a million tokens"
    return f"{what} ({price.date}, {price.source})"
