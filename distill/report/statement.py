"""The surplus statement: what the student would save, in plain sentences and tables, from the scorecard's `economics`.

A sentence says what is assumed, against whose price, and how sure the figure is; where it is not known, why.
"""

from decimal import Decimal
from math import ceil

from distill.evaluation.scorecard import Amount, Case, Economics, Saving, Way
from distill.formatting import UNKNOWN, between, count, duration, money, plain, share
from distill.report.tables import UNDECIDED, Table, claims_too_much, points

WAYS: dict[Way, str] = {
    "replace_all": "replace all",
    "try_then_escalate": "cascade",
    "perfect_router": "perfect router (upper bound)",
}
MEANING: dict[Way, str] = {
    "replace_all": "Replacing the teacher (the student answers everything, good or not)",
    "try_then_escalate": "Cascade (student first, teacher when the check fails)",
    "perfect_router": "A perfect router",
}
DAY = 86_400


def span(amount: Amount, documents: int | None) -> str:
    """Write an amount saved with its interval, or a dash; without it where it would claim too much."""
    if amount.value is None or amount.low is None:
        return money(amount.value)
    if claims_too_much(amount.low, amount.high, amount.conclude(documents)):
        return f"{money(amount.value)} {UNDECIDED}"
    return f"{money(amount.value)} {between(money(amount.low), money(amount.high))}"


def in_short(economics: Economics, confidence: float) -> str:
    """Return the headline's saving and when it has paid for the distillation."""
    row = economics.saving()
    if row.dollars_per_1k.value is None:
        return f"What using the student saves is not known: {row.dollars_per_1k.reason}."
    hypothetical = ""
    if economics.teacher.hypothetical:
        hypothetical = (
            " This is hypothetical: another model's list price is put on this run's tokens."
        )
    return f"{_saving(economics, row, confidence)}{hypothetical} {_break_even(economics, row)}"


def statement(economics: Economics, confidence: float) -> list[str]:
    """Return what the student saves, in sentences: the share, the saving, the break-even, the assumptions."""
    row = economics.saving()
    lines = [_share(economics, confidence)]
    if row.dollars_per_1k.value is None:
        lines.append(
            f"{MEANING[row.way]}: what it saves is not known: {row.dollars_per_1k.reason}."
        )
    else:
        line = _saving(economics, row, confidence)
        if row.dollars_per_1k.conclude(economics.documents).verdict != "undecided":
            month = span(row.dollars_per_month, economics.documents)
            line += f" {count(economics.requests_per_month)} requests a month save {month}."
        if row.way == "replace_all":
            difference = economics.quality
            quality = points(difference, difference.conclude(), confidence)
            line += f" Quality changes by {quality} against the teacher of this run."
        if row.way == "try_then_escalate":
            line += " The cost of the check and the wait for a second answer are not counted."
        lines.append(line)
    cascade = economics.saving("try_then_escalate").dollars_per_1k.reason
    if economics.tests and not economics.when_served and cascade:
        lines.append(f"What a cascade would save is not stated: {cascade}.")
    lines += [
        _break_even(economics, row, at_length=True),
        _hypothetical(economics),
        _machine(economics),
    ]
    return [line for line in lines if line]


def _share(economics: Economics, confidence: float) -> str:
    taken_over = economics.share
    if taken_over.value is None:
        return f"Which requests the student can take is not known: {taken_over.reason}."
    interval = f"{share(confidence)} interval {share(taken_over.low)} to {share(taken_over.high)}"
    if taken_over.low is None:
        interval = f"no interval: {taken_over.reason}" if taken_over.reason else "no interval"
    unscored, untested = economics.unscored, economics.of - economics.requests
    return (
        f"The student can take {share(taken_over.value)} of {economics.requests} held-out requests ({interval}): its "
        f"answers pass their check ({plain(', '.join(economics.tests))}). These requests are "
        f"{share(economics.share_of_price.value)} of what all of them cost at the teacher's price."
        + (f" {unscored} answers could not be tested and are left out." if unscored else "")
        + (f" All figures leave out {untested} requests that no test covers." if untested else "")
    )


def _saving(economics: Economics, row: Saving, confidence: float) -> str:
    """Say what one way saves or costs; where it is undecided, why."""
    amount, teacher = row.dollars_per_1k, economics.teacher
    value = amount.value or Decimal(0)
    per = (
        f"per 1,000 requests, of {money(teacher.dollars_per_1k)} at {teacher.name}'s "
        f"{'list price' if teacher.hosted else 'cost'}"
    )
    interval = f"{share(confidence)} interval {money(amount.low)} to {money(amount.high)}"
    conclusion = amount.conclude(economics.documents)
    if amount.low is None:
        text = f"saves {money(value)} {per}; how sure that is, is not known: {amount.reason}"
    elif conclusion.verdict == "better":
        text = f"saves {money(value)} {per} ({interval})"
    elif conclusion.verdict == "worse":
        text = f"saves nothing: it costs {money(-value)} more {per} (saved: {interval})"
    else:
        ends = "" if claims_too_much(amount.low, amount.high, conclusion) else f", {interval}"
        text = (
            f"may save or cost, undecided: {conclusion.reason} (saved: {money(value)} {per}{ends})"
        )
    return f"{MEANING[row.way]}: {text}."


def _break_even(economics: Economics, row: Saving, at_length: bool = False) -> str:
    """Say when the saving has paid for the distillation; `at_length` also what that cost counts."""
    after, days = row.break_even.requests, row.break_even.days
    if after.value is None:
        return f"No break-even is stated: {after.reason}."
    ends = ""
    if after.low is not None and after.high is not None:
        ends = f" ({whole_requests(after.low)} to {whole_requests(after.high)})"
    cost, when = (
        money(economics.distillation_dollars),
        f"{whole_requests(after.value)} requests{ends}",
    )
    if not at_length:
        return f"Making it cost {cost}, paid back after {when}."
    bought = economics.teacher.answers_dollars
    hypothetical = ""
    if bought is not None:  # the answers, at the price that is compared with
        hypothetical = f", {money(bought)} of it what the teacher's answers would have cost at the list price below"
    return (
        f"The distillation cost {cost} of machine time and tokens, nobody's work counted{hypothetical}; it "
        f"is paid back after {when}, {duration(DAY * float(days.value or 0))} at this volume."
    )


def whole_requests(requests: float | Decimal) -> str:
    """Write a number of requests, rounded up to a whole one."""
    return count(ceil(requests))


def _hypothetical(economics: Economics) -> str:
    if not economics.teacher.hypothetical:
        return ""
    return (
        f"This is hypothetical: the answers that the student learned from and is compared with are not "
        f"{economics.teacher.name}'s. Its list price ({economics.teacher.price}) is put on the tokens of the "
        "teacher of this run; what it would have answered, at what length, and how much better, was not measured."
    )


def _machine(economics: Economics) -> str:
    student, month = economics.student, economics.student.month_of_machines
    if student.dollars_per_1k is None or month is None:
        return ""
    below = ": the last row below" if economics.teacher.hosted else ""
    return (
        f"The student costs {money(student.dollars_per_1k)} for 1,000 requests on a machine that works "
        f"{share(float(student.utilisation))} of its paid time, in batches. Rented for these requests alone, "
        f"{month.machines} machine{'s' * (month.machines > 1)} would cost {money(month.dollars_per_month)} "
        f"a month and work {share(float(month.in_use), 1)} of the time{below}."
    )


def saving_rows(economics: Economics) -> Table:
    """Return the head and the rows of the table of savings."""
    head = ("saved", "1,000 requests", "a month", "paid back after")
    rows = [
        (
            WAYS[row.way],
            span(row.dollars_per_1k, economics.documents),
            span(row.dollars_per_month, economics.documents),
            _paid(row),
        )
        for row in economics.rows
    ]
    return head, rows


def sensitivity_rows(economics: Economics) -> Table:
    """Return the head and the rows of the table of what could change."""
    head = (WAYS[economics.headline], "teacher", "student", "saved", "a month", "paid back after")
    rows = [
        (
            case.case,
            money(case.teacher_dollars_per_1k),
            money(case.student_dollars_per_1k),
            span(case.dollars_per_1k, economics.documents),
            money(case.dollars_per_month.value),
            _paid(case),
        )
        for case in economics.sensitivity
    ]
    return head, rows


def _paid(row: Saving | Case) -> str:
    after, days = row.break_even.requests.value, row.break_even.days.value
    if after is None or days is None:
        return UNKNOWN
    return f"{whole_requests(after)} ({duration(DAY * float(days))})"
