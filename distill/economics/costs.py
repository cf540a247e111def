"""What a request and the distillation cost, from times measured in this run and dated prices.

What is paid is added up as Decimal; what is estimated from times is a float. An unknown price or an
untimed answer makes the result None with a reason, never 0. A machine is paid while it idles too:
its price is divided by the share of the time that it works (`utilisation`).
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from distill.evaluation.scorecard import DistillationCost, PerMillion, RequestCost
from distill.records import LedgerEntry, Load, Timing, Usage
from distill.responders.prices import MachinePrice, TokenPrice

THOUSAND, MILLION = 1000, 1_000_000
ASKING = ("select", "generate")  # in which the teacher answers
DISTILLATION = (  # all stages but the report
    *("corpus", "prompts", *ASKING, "filter", "signals"),
    *("recipe", "train", "refine", "evaluate"),
)
NO_TIME = "not all answers were timed in this run, on its own device"
NOT_APART = "reading the prompts was not timed apart"
CONTRADICTED = (
    "timed apart, reading the prompts took longer than reading and answering: "
    "the machine was busier then"
)


class Tariff(NamedTuple):
    """What a model's work is paid by: a list price, a machine's hour, or unknown (see `why`)."""

    price: MachinePrice | TokenPrice | None
    utilisation: float = 1.0
    why: str = ""

    @property
    def hosted(self) -> bool:
        """Tell whether tokens are paid, not time."""
        return isinstance(self.price, TokenPrice)

    def of(self, usage: Usage) -> float | None:
        """Return the dollars of one answer, or None where price or time is not known."""
        if isinstance(self.price, TokenPrice):
            return float(self.price.of(usage))
        return self.of_seconds(usage.seconds) if usage.seconds > 0 else None

    def of_seconds(self, seconds: float) -> float | None:
        """Return the dollars of a machine's seconds, what it idles beside them included."""
        if not isinstance(self.price, MachinePrice):
            return None
        return float(self.price.of(seconds)) / self.utilisation

    def described(self) -> str | None:
        """Return the price in words, with its date and source."""
        price, use = self.price, ""
        if price is None:
            return None
        if isinstance(price, TokenPrice):
            what = f"list price of {price.model.strip('*')}: {price.rates}"
        else:
            what = f"{price.what or price.name}: ${price.dollars_per_hour} an hour"
            if self.utilisation != 1:
                use = f", in use {100 * self.utilisation:g}\u00a0% of the time"
        return f"{what} ({price.date}, {price.source}){use}"


def request_cost(
    usages: Sequence[Usage], tariff: Tariff, timing: Timing | None = None
) -> RequestCost:
    """Price 1,000 requests like these: by the token where the model is hosted, else by time.

    `usages` are those of one model's answers; their seconds are those of `usage_at`, or in older
    runs shares of measured batch time.
    """
    requests, seconds = len(usages), sum(usage.seconds for usage in usages)
    inputs, outputs = sum(u.input_tokens for u in usages), sum(u.output_tokens for u in usages)
    timed = bool(usages) and all(usage.seconds > 0 for usage in usages)
    priced = [d for usage in usages if (d := tariff.of(usage)) is not None]
    dollars = sum(priced) / requests if priced and len(priced) == requests else None
    reasons = {} if timed else {"seconds_per_1k": NO_TIME}
    if dollars is None:
        reasons["dollars_per_1k"] = tariff.why if tariff.price is None else NO_TIME
    per_million, loads = None, tuple[RequestCost, ...]()
    if isinstance(tariff.price, TokenPrice):
        rates = (tariff.price.dollars_per_million_input, tariff.price.dollars_per_million_output)
        per_million = PerMillion(dollars_input=float(rates[0]), dollars_output=float(rates[1]))
    elif not (timed and timing):
        reasons["per_million"] = NOT_APART
    elif apart := reading_and_writing(usages, timing):
        each = [tariff.of_seconds(MILLION * seconds_each) for seconds_each in apart]
        per_million = PerMillion(dollars_input=each[0], dollars_output=each[1])
        reasons |= {} if tariff.price else {"per_million": tariff.why}
    else:
        reasons["per_million"] = CONTRADICTED
    if timing and usages and not tariff.hosted:
        for load in timing.loads:
            took = sum(usage_at(load, timing, usage).seconds for usage in usages)
            each = took / requests * THOUSAND
            at_load = RequestCost(
                requests=load.requests,
                concurrency=load.concurrency,
                repeats=load.repeats,
                seconds_per_1k=each,
                range_per_1k=(each * load.range[0], each * load.range[1]),
                dollars_per_1k=tariff.of_seconds(each),
                output_tokens_per_second=outputs / took,
            )
            loads += (at_load,)
    return RequestCost(
        requests=requests,
        input_tokens=inputs / requests if requests else None,
        output_tokens=outputs / requests if requests else None,
        seconds_per_1k=seconds / requests * THOUSAND if timed else None,
        dollars_per_1k=None if dollars is None else dollars * THOUSAND,
        output_tokens_per_second=outputs / seconds if timed else None,
        price=tariff.described() if dollars is not None else None,
        per_million=per_million,
        loads=loads,
        reasons=reasons,
    )


def usage_at(load: Load, timing: Timing, usage: Usage) -> Usage:
    """Return a usage with the seconds that so many tokens take at a load."""
    reading, writing = reading_and_writing([load.usage], timing) or (0.0, load.pace)
    seconds = usage.input_tokens * reading + usage.output_tokens * writing
    return usage.model_copy(update={"seconds": seconds})


def reading_and_writing(usages: Sequence[Usage], timing: Timing) -> tuple[float, float] | None:
    """Return the seconds of an input and of an output token; None where the timings contradict.

    Reading is measured by answers of one token; writing is the remaining time of the answers over
    the output tokens, so that both times their tokens add up to the time measured.
    """
    inputs, outputs = sum(u.input_tokens for u in usages), sum(u.output_tokens for u in usages)
    if not timing.read_tokens or not outputs:
        return None
    reading = timing.read_seconds / timing.read_tokens
    writing = sum(u.seconds for u in usages) - inputs * reading
    return (reading, writing / outputs) if writing > 0 else None


def distillation_cost(
    ledger: Sequence[LedgerEntry],
    machine: MachinePrice | None,
    why_no_machine: str,
    answer_tokens: int = 0,
    why_unpaid: str = "",
) -> DistillationCost:
    """Add up payments and the machine's time of all that made and measured the student.

    `answer_tokens` are those of all the teacher's answers: what the ledger lacks of them, an
    earlier run paid for. `why_unpaid` is set where the ledger cannot know what others were paid.
    """
    entries = [entry for entry in ledger if entry.stage in DISTILLATION]
    stages = {s: sum(e.seconds for e in entries if e.stage == s) for s in DISTILLATION}
    stages = {stage: seconds for stage, seconds in stages.items() if seconds}
    seconds, price = sum(stages.values()), Tariff(machine).described()
    paid = sum((entry.dollars or Decimal(0) for entry in entries), Decimal(0))
    if any(entry.attempts and entry.dollars is None for entry in entries):
        why_unpaid = "what the teacher's endpoint was paid is not known"
    why = why_unpaid or ("" if machine else why_no_machine)
    asking = (entry for entry in entries if entry.stage in ASKING)
    bought = sum(entry.output_tokens - entry.student_output_tokens for entry in asking)
    return DistillationCost(
        seconds=seconds,
        dollars=None if why or machine is None else paid + machine.of(seconds),
        unknown_dollars=sum((e.unknown_dollars or Decimal(0) for e in entries), Decimal(0)),
        stages=stages,
        output_tokens=sum(entry.output_tokens for entry in entries),
        reused=max(0.0, 1 - bought / answer_tokens) if answer_tokens else 0.0,
        price=price and f"{price}, busy while the student was made",
        reasons={"dollars": why} if why else {},
    )
