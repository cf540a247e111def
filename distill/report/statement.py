"""The surplus statement: what the student would save, in plain sentences and tables, from the scorecard's `economics`.

A sentence says what is assumed, against whose price, and how sure the figure is; where it is not known, why.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any

from distill.evaluation.claims import Conclusion, conclude
from distill.formatting import UNKNOWN, between, count, duration, figure, money, share
from distill.report.tables import UNDECIDED, claims_too_much, points

Row = Mapping[str, Any]
WAYS = {
    "replace_all": "replace all",
    "try_then_escalate": "try, then escalate",
    "perfect_router": "perfect router (upper bound)",
}
BRIEF = {
    "replace_all": "Where the student answers everything, good or not",
    "try_then_escalate": "Where the student is tried first, and the teacher asked if its answer fails the test",
}
MEANING = {
    "replace_all": "The student answers everything, good or not",
    "try_then_escalate": "The student answers first, and the teacher too where the test rejects its answer (what the "
    "test costs, and the wait for a second answer, not counted)",
}


def decided(amount: Row, documents: int | None) -> Conclusion:
    """Decide whether an amount saved is above 0, by the rule of all claims."""
    return conclude(amount["low"], amount["high"], documents, why_no_interval=amount.get("reason"))


def span(amount: Row, documents: int | None) -> str:
    """Write an amount saved with its interval, or a dash; no interval where it would claim too much."""
    value, low, high = (amount[key] for key in ("value", "low", "high"))
    if value is None or low is None:
        return money(value)
    if claims_too_much(low, high, decided(amount, documents)):
        return f"{money(value)} {UNDECIDED}"
    return f"{money(value)} {between(money(low), money(high))}"


def row_of(economics: Row, way: str) -> Row:
    """Return the row of one way to use the student."""
    return next(row for row in economics["rows"] if row["way"] == way)


def statement(economics: Row, confidence: float) -> list[str]:
    """Return what the student saves, in sentences: the share, the surplus, the break-even, the assumptions."""
    headline = row_of(economics, economics["headline"])
    return [
        line
        for line in (
            _share(economics, confidence),
            _surplus(economics, headline, confidence),
            _no_trying(economics),
            _break_even(economics, headline),
            _hypothetical(economics),
            _machine(economics),
        )
        if line
    ]


def in_short(economics: Row, confidence: float) -> str:
    """Return the headline's surplus and when it has paid for the distillation, in two sentences."""
    headline = row_of(economics, economics["headline"])
    saved, paid = headline["dollars_per_1k"], headline["break_even"]["requests"]
    if saved["value"] is None:
        return f"What using the student saves is not known: {saved['reason']}."
    said = f"{BRIEF[headline['way']]}: {_of_price(economics, saved, confidence)}."
    if economics["teacher"]["hypothetical"]:
        said += " This is hypothetical: another model's list price is put on this run's tokens."
    if paid["value"] is None:
        return f"{said} No break-even is stated: {paid['reason']}."
    cost = money(economics["distillation_dollars"])
    return f"{said} Making it cost {cost}, paid back after {whole_requests(paid['value'])} requests{_between(paid)}."


def _share(economics: Row, confidence: float) -> str:
    found, weighted = economics["share"], economics["share_of_price"]
    if found["value"] is None:
        return f"Which requests the student can take is not known: {found['reason']}."
    tests = ", ".join(test.replace("_", " ") for test in economics["tests"])
    unscored, untested = economics["unscored"], economics["of"] - economics["requests"]
    return (
        f"The student can take {share(found['value'])} of {economics['requests']} held-out requests "
        f"({_interval(found, confidence)}): its answers pass their test ({tests}; it says what its name says, and no "
        f"more). These requests are {share(weighted['value'])} of what all of them cost at the teacher's price."
        + (f" {unscored} answers could not be tested and are left out." if unscored else "")
        + (f" All figures leave out {untested} requests that no test covers." if untested else "")
    )


def _interval(found: Row, confidence: float) -> str:
    if found["low"] is None:
        return f"no interval: {found['reason']}" if found["reason"] else "no interval"
    return f"{share(confidence)} interval {share(found['low'])} to {share(found['high'])}"


def _surplus(economics: Row, headline: Row, confidence: float) -> str:
    """Say what the headline saves, or costs; where its interval holds 0, that these items cannot tell."""
    saved = headline["dollars_per_1k"]
    if saved["value"] is None:
        return f"{MEANING[headline['way']]}: what that saves is not known: {saved['reason']}."
    said = f"{MEANING[headline['way']]}: {_of_price(economics, saved, confidence)}."
    if decided(saved, economics.get("documents")).verdict != "undecided":
        volume, month = economics["requests_per_month"], headline["dollars_per_month"]
        said += (
            f" With {count(volume)} requests a month: {span(month, economics.get('documents'))}."
        )
    return said + (_quality(economics, confidence) if headline["way"] == "replace_all" else "")


def _of_price(economics: Row, saved: Row, confidence: float) -> str:
    teacher = economics["teacher"]
    whose = f"{teacher['name']}'s {'list price' if teacher['hosted'] else 'cost'}"
    before = f"1,000 requests, {money(teacher['dollars_per_1k'])} at {whose}"
    return f"{before}, {_saved(saved, economics.get('documents'), confidence)}"


def _saved(saved: Row, documents: int | None, confidence: float) -> str:
    value, low, high = (saved[key] for key in ("value", "low", "high"))
    if low is None:
        return f"save {money(value)}, and how sure that is, is not known: {saved['reason']}"
    interval = f"{share(confidence)} interval {money(low)} to {money(high)}"
    conclusion = decided(saved, documents)
    if conclusion.verdict == "better":
        return f"save {money(value)} ({interval})"
    if conclusion.verdict == "worse":
        return f"save nothing: they cost {money(-value)} more (saved: {interval})"
    shown = "" if claims_too_much(low, high, conclusion) else f", {interval}"
    return f"may save or cost, undecided: {conclusion.reason} (saved: {money(value)}{shown})"


def _no_trying(economics: Row) -> str:
    """Say why nobody can try the student first, where there is a test and it cannot be run on a new request."""
    reason = row_of(economics, "try_then_escalate")["dollars_per_1k"]["reason"]
    if not economics["tests"] or economics["when_served"] or not reason:
        return ""
    return f"What trying the student first would save is not stated: {reason}."


def _quality(economics: Row, confidence: float) -> str:
    """Say what replacing every answer does to quality, against the teacher that was measured."""
    return f" In quality that is {points(economics['quality'], economics['quality'], confidence)} against the teacher of this run."


def _break_even(economics: Row, headline: Row) -> str:
    cost, paid = economics["distillation_dollars"], headline["break_even"]
    after, days = paid["requests"], paid["days"]
    if after["value"] is None:
        return f"No break-even is stated: {after['reason']}."
    return (
        f"The distillation cost {money(cost)} of machine time and tokens, nobody's work counted{_bought(economics)}; it "
        f"is paid back after {whole_requests(after['value'])} requests{_between(after)}, {duration(86_400 * days['value'])} at this "
        "volume."
    )


def _between(after: Row) -> str:
    return (
        f" ({whole_requests(after['low'])} to {whole_requests(after['high'])})"
        if after["low"] is not None
        else ""
    )


def _bought(economics: Row) -> str:
    """Say what of the cost is hypothetical too: the answers, at the price that is compared with."""
    bought = economics["teacher"]["answers_dollars"]
    if bought is None:
        return ""
    return f", {money(bought)} of it what the teacher's answers would have cost at the list price below"


def whole_requests(requests: float) -> str:
    """Write a number of requests, rounded up to a whole one."""
    return count(ceil(requests))


def _hypothetical(economics: Row) -> str:
    if not economics["teacher"]["hypothetical"]:
        return ""
    return (
        f"This is hypothetical: the answers that the student learned from and is compared with are not "
        f"{economics['teacher']['name']}'s. Its list price ({economics['teacher']['price']}) is put on the tokens of the "
        "teacher of this run; what it would have answered, at what length, and how much better, was not measured."
    )


def _machine(economics: Row) -> str:
    student = economics["student"]
    month = student["month_of_machines"]
    if student["dollars_per_1k"] is None or month is None:
        return ""
    below = ": the last row below" if economics["teacher"]["hosted"] else ""
    return (
        f"The student costs {money(student['dollars_per_1k'])} for 1,000 requests on a machine that works "
        f"{share(student['utilisation'])} of its paid time, in batches. Rented for these requests alone, "
        f"{month['machines']} machine{'s' * (month['machines'] > 1)} would cost {money(month['dollars_per_month'])} "
        f"a month and work {share(month['in_use'], 1)} of the time{below}."
    )


def surplus_rows(economics: Row) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of the table of surplus."""
    head = ("saved", "1,000 requests", "a month", "paid back after")
    rows = [
        (
            WAYS[row["way"]],
            span(row["dollars_per_1k"], economics.get("documents")),
            span(row["dollars_per_month"], economics.get("documents")),
            _paid(row),
        )
        for row in economics["rows"]
    ]
    return head, rows


def sensitivity_rows(economics: Row) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of the table of what could change."""
    head = (
        WAYS[economics["headline"]],
        "teacher",
        "student",
        "saved",
        "a month",
        "paid back after",
    )
    rows = [
        (
            case["case"],
            money(case["teacher_dollars_per_1k"]),
            money(case["student_dollars_per_1k"]),
            span(case["dollars_per_1k"], economics.get("documents")),
            money(case["dollars_per_month"]["value"]),
            _paid(case),
        )
        for case in economics["sensitivity"]
    ]
    return head, rows


def _paid(row: Row) -> str:
    after, days = row["break_even"]["requests"]["value"], row["break_even"]["days"]["value"]
    return UNKNOWN if after is None else f"{whole_requests(after)} ({duration(86_400 * days)})"


def token_rows(cost: Row) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of the table of requests asked one at a time, and of tokens read and written."""
    head = (
        "one request at a time",
        "1,000 take",
        "and cost",
        "tokens/s",
        "tokens of a prompt",
        "a million read",
        "a million written",
    )
    rows = []
    for model in ("teacher", "base", "student"):
        row = cost[model]
        alone, million = row["one_at_a_time"] or {}, row["per_million"] or {}
        rows.append(
            (
                model,
                duration(alone.get("seconds_per_1k")),
                money(alone.get("dollars_per_1k")),
                figure(alone.get("output_tokens_per_second"), 0),
                figure(row["input_tokens"], 0),
                money(million.get("dollars_input")),
                money(million.get("dollars_output")),
            )
        )
    return head, rows
