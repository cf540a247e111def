"""The tables of scorecard, report and card, each as a head and rows of text, and their cells.

A figure stands with its interval; what is not known is a dash, and its reason is among the
scorecard's `reasons`.
"""

from collections.abc import Callable, Mapping
from math import ceil

from distill.evaluation import measurements, scorecard
from distill.evaluation.measurements import MODELS, RIVALS, Difference, MetricRow, Model, Rival
from distill.evaluation.scorecard import Economics, Saving, Scorecard, Way
from distill.evaluation.statistics import Conclusion, Estimate
from distill.formatting import (
    UNKNOWN,
    Number,
    count,
    duration,
    estimate,
    figure,
    money,
    p_value,
    plain,
    score,
    share,
    signed,
)

TextTable = tuple[tuple[str, ...], list[tuple[str, ...]]]
AGREEMENT = {"chrf": "chrF", "nats_per_token": "nats a token", "top1": "top-1 token"}
PROBES = {
    "null": "an empty phrase against an answer",
    "injected": "an answer that orders the judge to choose it",
    "copy": "an answer against itself",
}
WAYS: dict[Way, str] = {
    "replace_all": "replace all",
    "try_then_escalate": "cascade",
    "perfect_router": "perfect router (upper bound)",
}
DAY = 86_400


def difference_cell(
    difference: Difference, metric: str, conclusion: Conclusion, unit: str = ""
) -> str:
    """Write a difference in points, chrF or nats, with its interval."""
    scale, digits = (1, 3) if metric.startswith("loss") else (1 if metric == "chrF" else 100, 1)
    ends = (difference.value, *difference.ends)
    undecided = conclusion.verdict == "undecided"
    return estimate(*ends, lambda x: signed(scale * x, digits), unit, undecided)


def change(row: MetricRow, rival: Rival, unit: str = "") -> str:
    """Write the student minus a rival with its interval."""
    return difference_cell(row.against(rival), row.metric, row.conclude(rival), unit)


def within(row: MetricRow, model: Model) -> str:
    """Write a model's score with its interval."""
    ends = row.intervals.get(model, (None, None))
    return estimate(row.mean(model), *ends, lambda value: score(value, row.metric))


def verdict(value: float | None, reason: str, metric: str) -> str:
    """Write the score of one answer with its reason."""
    if value is None:
        return f"not scored: {reason}"
    if metric == "chrF":
        return f"chrF {count(value)}"
    return f"{share(value) if 0 < value < 1 else '✓' if value else '✗'} {reason}"


def interval(number: Estimate, form: Callable[[float], str] = share, unit: str = "") -> str:
    """Write a number, a share if nothing else is said, with its interval."""
    return estimate(number.value, *number.ends, form, unit)


def span(amount: Estimate, documents: int | None, unit: str = "") -> str:
    """Write dollars saved with their interval; a bound has none."""
    undecided = amount.low is not None and amount.conclude(documents).verdict == "undecided"
    return estimate(amount.value, amount.low, amount.high, money, unit, undecided)


def whole_requests(requests: Number) -> str:
    """Write a number of requests, rounded up to a whole one."""
    return count(ceil(requests))


def paid_back(row: Saving) -> str:
    """Write after how many requests, and after how long, the savings have paid for the student."""
    requests, days = row.break_even.requests.value, row.break_even.days.value
    if requests is None or days is None:
        return UNKNOWN
    return f"{whole_requests(requests)} ({duration(DAY * float(days))})"


def metric_rows(rows: Mapping[str, MetricRow]) -> TextTable:
    """Return metrics: the models' scores, the paired differences, the gap recovered."""
    lines = []
    for label, row in rows.items():
        ratio, decided = row.gap_recovered, row.conclude("base").verdict != "undecided"
        sure = row.student_minus_base.value is None or decided
        gap = estimate(ratio.value, ratio.low, ratio.high, share, undecided=not sure)
        scores = (score(row.mean(model), row.metric) for model in MODELS)
        changes = (change(row, rival) for rival in RIVALS)
        lines.append((label, str(row.n), *scores, *changes, gap))
    head = ("", "n", *MODELS, "student − teacher", "student − base", "gap recovered")
    return head, lines


def named(results: measurements.Results) -> dict[str, MetricRow]:
    """Return the rows of tasks by what their checks are called, and of several checks together."""
    rows = {f"{task}: {plain(row.metric)}": row for task, row in results.tasks.items()}
    overall = {"all checks": results.overall} if results.overall and len(rows) > 1 else {}
    return rows | overall


def likeness(card: Scorecard) -> dict[str, MetricRow]:
    """Return the rows of likeness to the teacher's answers."""
    rows = {f"agreement: {label}": card.agreement.get(name) for name, label in AGREEMENT.items()}
    return {label: row for label, row in rows.items() if row}


def quality_rows(card: Scorecard) -> TextTable:
    """Return all tasks, all checks together, agreement and suites, with paired differences."""
    rows = named(card) | likeness(card)
    for name, suite in card.suites.items():
        of_suite = {"": suite.overall} if suite.overall else suite.tasks
        rows |= {f"{name} {task}".strip(): row for task, row in of_suite.items()}
    return metric_rows(rows)


def with_figures(table: TextTable) -> TextTable:
    """Return a table without the columns that hold no figure at all."""
    head, rows = table
    columns = [k for k in range(len(head)) if not rows or any(row[k] != UNKNOWN for row in rows)]
    return tuple(head[k] for k in columns), [tuple(row[k] for k in columns) for row in rows]


def claim_rows(card: Scorecard) -> TextTable:
    """Return what the differences allow to claim: what could be seen, McNemar, non-inferiority."""
    head = (
        *("the student against", "n", "documents", "difference", "could have shown"),
        *("only student / only rival passes", "McNemar p", "no worse by the margin"),
        "the student is",
    )
    lines = []
    for rival in RIVALS:
        for task, row in named(card).items():
            difference = row.against(rival)
            visible, test = difference.smallest_visible, difference.mcnemar
            scale, claim = (1 if row.metric == "chrF" else 100), difference.non_inferiority
            cells = (
                f"{rival}, {task}",
                str(row.n),
                count(row.documents),
                change(row, rival),
                figure(None if visible is None else scale * visible, 1),
                f"{test.only_a} / {test.only_b}" if test else UNKNOWN,
                p_value(test.p) if test else UNKNOWN,
                f"{claim.verdict} ({share(claim.margin)})" if claim else UNKNOWN,
                row.conclude(rival).verdict,
            )
            if difference.value is not None:
                lines.append(cells)
    return head, lines


def tries_rows(tries: measurements.TriesResult) -> TextTable:
    """Return what several tries at a request make of the student, and how one is chosen."""
    head = ("tries", "n", "one greedy answer", f"chosen of {tries.n}", "chosen − greedy")
    head += ("one is right (upper bound)", "chosen by")
    rows = {f"{task}: {plain(row.metric)}": row for task, row in tries.tasks.items()}
    several = tries.overall and tries.overall.n > max(row.n for row in rows.values() if row.way)
    overall = {"all with a choice": tries.overall} if tries.overall and several else {}
    lines = []
    for label, row in (rows | overall).items():
        estimates = map(interval, (row.student, row.choice))
        change = difference_cell(row.choice_minus_student, "", row.choice_minus_student.conclude())
        bound = share(row.any_right.value)
        lines.append((label, str(row.n), *estimates, change, bound, row.way or row.reason or ""))
    return head, lines


def cost_rows(card: Scorecard) -> TextTable:
    """Return what 1,000 requests take and cost each model, and how long its answers are."""
    head = ("1,000 requests", "time", "dollars", "tokens/s", "tokens an answer", "cut off")
    rows = []
    costs = {model: card.cost.of(model) for model in MODELS}
    if card.tries and card.cost.tries:
        costs[f"student, {card.tries.n} tries"] = card.cost.tries
    for model, cost in costs.items():
        lengths = card.lengths.get(model, measurements.AnswerLengths())
        per_second, tokens = count(cost.output_tokens_per_second), count(lengths.tokens)
        spent = (duration(cost.seconds_per_1k), money(cost.dollars_per_1k), per_second)
        rows.append((model, *spent, tokens, share(lengths.truncated)))
    return head, rows


def load_rows(costs: scorecard.Costs) -> TextTable:
    """Return what models that run here take by how many requests run at once."""
    head = ("timed", "engine", "at once", "1,000 requests take", "dollars", "tokens/s", "runs")
    rows = []
    timed = [(model, costs.of(model)) for model in MODELS]
    for model, cost, load in ((*both, load) for both in timed for load in both[1].loads):
        ends = load.range_per_1k if load.repeats > 1 and load.range_per_1k else (None, None)
        took = estimate(load.seconds_per_1k, *ends, duration)
        spent = (money(load.dollars_per_1k), count(load.output_tokens_per_second))
        runs = f"{load.repeats} of {load.requests} requests"
        rows.append((model, cost.engine or UNKNOWN, count(load.concurrency), took, *spent, runs))
    return head, rows


def token_rows(cost: scorecard.Costs) -> TextTable:
    """Return how long prompts are, and the cost of a million tokens read and written."""
    rows = []
    for model in MODELS:
        row = cost.of(model)
        million = row.per_million or scorecard.PerMillion()
        apart = (money(million.dollars_input), money(million.dollars_output))
        rows.append((model, count(row.input_tokens), *apart))
    return ("dollars of tokens", "tokens of a prompt", "a million read", "a million written"), rows


def judge_rows(result: measurements.JudgeResult) -> TextTable:
    """Return the judge's win rates of the student."""
    head = (
        *("the student against", "n", "win rate", "wins", "ties", "losses", "not parsed"),
        *("flipped by order", "win rate, like length", "n of like length"),
    )
    rows = []
    for rival in RIVALS:
        row = result.against(rival)
        counts = (count(number) for number in (row.wins, row.ties, row.losses, row.unparsed))
        near = row.length_matched or measurements.DuelRow()
        matched = (share(row.flip_rate), interval(near.win_rate), count(near.n))
        rows.append((rival, count(row.n), interval(row.win_rate), *counts, *matched))
    return head, rows


def probe_rows(probe: measurements.ProbeResult) -> TextTable:
    """Return what a judge was tried with, and what it made of it."""
    rows = [
        (PROBES[kind], count(row.n), share(row.wins), share(row.losses), share(row.unparsed))
        for kind, row in probe.kinds().items()
    ]
    return ("probe", "n", "wins", "loses", "not parsed"), rows


def saving_rows(economics: Economics) -> TextTable:
    """Return what each way to use the student saves."""
    rows = []
    for row in economics.rows:
        amounts = (row.dollars_per_1k, row.dollars_per_month)
        cells = (span(amount, economics.documents) for amount in amounts)
        rows.append((WAYS[row.way or economics.headline], *cells, paid_back(row)))
    return ("saved", "1,000 requests", "a month", "paid back after"), rows


def sensitivity_rows(economics: Economics) -> TextTable:
    """Return what could change the headline, one thing at a time."""
    head = (WAYS[economics.headline], "teacher", "student", "saved", "a month", "paid back after")
    rows = []
    for case in economics.sensitivity:
        prices = (money(case.teacher_dollars_per_1k), money(case.student_dollars_per_1k))
        saved = (
            span(case.dollars_per_1k, economics.documents),
            money(case.dollars_per_month.value),
        )
        rows.append((case.case or "", *prices, *saved, paid_back(case)))
    return head, rows


def harness_rows(result: scorecard.HarnessResult) -> TextTable:
    """Return what another harness measured."""
    head = (result.harness, "n", "metric", "student", "standard error")
    rows = [
        (name, count(task.n), metric, figure(row.value, 4), figure(row.stderr, 4))
        for name, task in result.tasks.items()
        for metric, row in task.metrics.items()
    ]
    return head, rows


def stage_rows(card: Scorecard) -> TextTable:
    """Return the time of each stage of making and measuring the student."""
    rows = card.cost.distillation.stages.items()
    return ("stage", "time"), [(stage, duration(seconds)) for stage, seconds in rows]


def funnel_steps(
    funnel: scorecard.Funnel, documents: int | None = None
) -> list[tuple[str, int, str]]:
    """Return name, count and kind of what came in, what was dropped by reason, what was kept."""
    return [
        *([("documents", documents, "in")] if documents is not None else []),
        *(("prompts", funnel.prompts, "in"), ("answers", funnel.answers, "in")),
        *((f"dropped: {reason}", n, "dropped") for reason, n in funnel.dropped.items()),
        ("kept: train", funnel.kept_train, "kept"),
        *([("of them soft labels alone", soft, "kept")] if (soft := funnel.only_signals) else []),
        ("kept: validation", funnel.kept_validation, "kept"),
        ("kept: heldout", funnel.kept_heldout, "kept"),
    ]
