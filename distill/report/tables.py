"""The scorecard's tables, each as a head and rows of text, for the page and for Markdown alike.

A figure stands with its interval; what is not known is a dash, and its reason is among the scorecard's `reasons`.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from distill.evaluation.claims import Conclusion
from distill.evaluation.measurements import (
    MODELS,
    RIVALS,
    AnswerLengths,
    Contamination,
    Difference,
    DuelRow,
    JudgeResult,
    MetricRow,
    Model,
    ProbeResult,
    Results,
    Rival,
)
from distill.evaluation.scorecard import Costs, PerMillion, RequestCost, Scorecard
from distill.formatting import (
    UNKNOWN,
    between,
    count,
    duration,
    figure,
    money,
    p_value,
    plain,
    score,
    share,
    signed,
)

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
Number = float | Decimal | None
AGREEMENT = {"chrf": "chrF", "nats_per_token": "nats a token", "top1": "top-1 token"}
PROBES = {
    "null": "an empty phrase against an answer",
    "injected": "an answer that orders the judge to choose it",
    "copy": "an answer against itself",
}
UNDECIDED = (
    "(undecided)"  # in place of an interval that says more than the rule of `conclude` allows
)
QUALITY = (
    *("", "n", "teacher", "base", "student"),
    *("student − teacher", "student − base", "gap recovered"),
)


def claims_too_much(low: Number, high: Number, conclusion: Conclusion) -> bool:
    """Tell whether an interval excludes 0 although the difference is undecided."""
    if low is None or high is None:
        return False
    return conclusion.verdict == "undecided" and not low <= 0 <= high


def change(row: MetricRow, rival: Rival) -> str:
    """Write the student minus a rival with its interval, in points, chrF or nats."""
    return written(row.against(rival), row.metric, row.conclude(rival))


def written(difference: Difference, metric: str, conclusion: Conclusion) -> str:
    """Write a difference with its interval; without it where it would claim too much."""
    if difference.mean is None:
        return UNKNOWN
    scale, digits = (
        (1, 3) if metric.startswith("loss") else (1, 1) if metric == "chrF" else (100, 1)
    )
    mean, low, high = (
        signed(None if x is None else scale * x, digits)
        for x in (difference.mean, difference.low, difference.high)
    )
    if claims_too_much(difference.low, difference.high, conclusion):
        return f"{mean} {UNDECIDED}"
    return f"{mean} {between(low, high)}"


def points(difference: Difference, conclusion: Conclusion, confidence: float) -> str:
    """Say a difference of shares and its interval in words; without it where it would claim too much."""
    if difference.mean is None:
        return f"not known ({difference.reason or 'no interval'})"
    mean, low, high = (
        signed(None if x is None else 100 * x, 1)
        for x in (difference.mean, difference.low, difference.high)
    )
    text = f"{mean} percentage points"
    if claims_too_much(difference.low, difference.high, conclusion):
        return text
    return f"{text} ({share(confidence)} interval {low} to {high})"


def within(row: MetricRow, model: Model) -> str:
    """Write a model's score with its interval."""
    low, high = row.intervals.get(model, (None, None))
    text = score(row.mean(model), row.metric)
    if row.mean(model) is None or low is None:
        return text
    return f"{text} {between(score(low, row.metric), score(high, row.metric))}"


def quality_rows(card: Scorecard) -> Table:
    """Return the rows of all tasks, of all checks together, of agreement and of suites, with paired differences."""
    rows = [*task_rows(card)[1], *agreement_rows(card)]
    for name, suite in card.suites.items():
        of_suite = {"": suite.overall} if suite.overall else suite.tasks
        rows += [quality_row(f"{name} {task}".strip(), row) for task, row in of_suite.items()]
    return QUALITY, rows


def task_rows(results: Scorecard | Results) -> Table:
    """Return the rows of some tasks, and of all their checks together where there are several."""
    rows = [quality_row(f"{task}: {plain(row.metric)}", row) for task, row in results.tasks.items()]
    if results.overall and len(rows) > 1:
        rows.append(quality_row("all checks", results.overall))
    return QUALITY, rows


def with_figures(table: Table) -> Table:
    """Return a table without the columns that hold no figure at all."""
    head, rows = table
    columns = [k for k in range(len(head)) if not rows or any(row[k] != UNKNOWN for row in rows)]
    return tuple(head[k] for k in columns), [tuple(row[k] for k in columns) for row in rows]


def agreement_rows(card: Scorecard) -> list[tuple[str, ...]]:
    """Return the rows of likeness to the teacher's answers."""
    return [
        quality_row(f"agreement: {label}", card.agreement[name])
        for name, label in AGREEMENT.items()
        if name in card.agreement
    ]


def quality_row(label: str, row: MetricRow) -> tuple[str, ...]:
    """Return one metric: the models' scores, the paired differences, the gap recovered."""
    return (
        label,
        str(row.n),
        *(score(row.mean(model), row.metric) for model in MODELS),
        change(row, "teacher"),
        change(row, "base"),
        gap(row),
    )


def gap_claims_too_much(row: MetricRow) -> bool:
    """Tell whether the gap's interval excludes 0 although it is undecided that training helped."""
    ratio, change = row.gap_recovered, row.student_minus_base
    return change.mean is not None and claims_too_much(ratio.low, ratio.high, row.conclude("base"))


def gap(row: MetricRow) -> str:
    """Write the share of the gap recovered with its interval; without it where it would claim too much."""
    ratio = row.gap_recovered
    if ratio.value is None:
        return UNKNOWN
    if gap_claims_too_much(row):
        return f"{share(ratio.value)} {UNDECIDED}"
    return f"{share(ratio.value)} {between(share(ratio.low), share(ratio.high))}"


def claim_rows(card: Scorecard) -> Table:
    """Return what the differences allow to claim: what could be seen, McNemar's test, non-inferiority."""
    head = (
        *("the student against", "n", "documents", "difference", "could have shown"),
        *(
            "only student / only rival passes",
            "McNemar p",
            "no worse by the margin",
            "the student is",
        ),
    )
    rows = dict(card.tasks)
    if card.overall and len(rows) > 1:
        rows["all checks"] = card.overall
    lines = []
    for rival in RIVALS:
        for task, row in rows.items():
            difference = row.against(rival)
            if difference.mean is None:
                continue
            scale, visible = (1 if row.metric == "chrF" else 100), difference.smallest_visible
            test, claim = difference.mcnemar, difference.non_inferiority
            lines.append(
                (
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
            )
    return head, lines


def cost_rows(card: Scorecard) -> Table:
    """Return what 1,000 requests take and cost each model, and how long its answers are."""
    head = ("1,000 requests", "time", "dollars", "tokens/s", "tokens an answer", "cut off")
    rows = []
    for model in MODELS:
        cost, lengths = card.cost.of(model), card.lengths.get(model, AnswerLengths())
        rows.append(
            (
                model,
                duration(cost.seconds_per_1k),
                money(cost.dollars_per_1k),
                figure(cost.output_tokens_per_second, 0),
                figure(lengths.tokens, 0),
                share(lengths.truncated),
            )
        )
    return head, rows


def token_rows(cost: Costs) -> Table:
    """Return the head and the rows of the table of requests asked one at a time, and of tokens read and written."""
    head = (
        *("one request at a time", "1,000 take", "and cost", "tokens/s"),
        *("tokens of a prompt", "a million read", "a million written"),
    )
    rows = []
    for model in MODELS:
        row = cost.of(model)
        alone, million = row.one_at_a_time or RequestCost(), row.per_million or PerMillion()
        rows.append(
            (
                model,
                duration(alone.seconds_per_1k),
                money(alone.dollars_per_1k),
                figure(alone.output_tokens_per_second, 0),
                figure(row.input_tokens, 0),
                money(million.dollars_input),
                money(million.dollars_output),
            )
        )
    return head, rows


def plane_rows(card: Scorecard) -> Table:
    """Return the points of the plot of quality against cost."""
    row = card.overall or card.agreement["chrf"]
    head = ("", "checks passed" if card.overall else "chrF", "1,000 requests")
    if card.cost.student.dollars_per_1k is not None:
        costs = {model: money(card.cost.of(model).dollars_per_1k) for model in MODELS}
    else:
        costs = {model: duration(card.cost.of(model).seconds_per_1k) for model in MODELS}
    return head, [(model, within(row, model), costs[model]) for model in MODELS]


def judge_rows(judge: JudgeResult) -> Table:
    """Return the judge's win rates of the student; a dash where the judge did not pass its probes."""
    head = (
        *("the student against", "n", "win rate", "wins", "ties", "losses", "not parsed"),
        *("flipped by order", "win rate, like length", "n of like length"),
    )
    rows = []
    for rival in RIVALS:
        row = judge.against(rival)
        near = row.length_matched or DuelRow()
        rows.append(
            (
                rival,
                count(row.n),
                rate(row.win_rate),
                *(count(number) for number in (row.wins, row.ties, row.losses, row.unparsed)),
                share(row.flip_rate),
                rate(near.win_rate),
                count(near.n),
            )
        )
    return head, rows


def probe_rows(probe: ProbeResult) -> Table:
    """Return what a judge was tried with, and what it made of it."""
    head = ("probe", "n", "wins", "loses", "not parsed")
    rows = [
        (PROBES[kind], count(row.n), share(row.wins), share(row.losses), share(row.unparsed))
        for kind, row in probe.kinds().items()
    ]
    return head, rows


def contamination_rows(card: Scorecard) -> Table:
    """Return the checks passed on the items that were not found, and on all of them, side by side."""
    all_items = card.contamination.all_items if card.contamination else None
    both = {
        "not found in the training data": card.overall,
        "all items": all_items.overall if all_items else None,
    }
    return QUALITY, [quality_row(label, row) for label, row in both.items() if row]


def rate(difference: Difference) -> str:
    """Write a share with its interval."""
    if difference.mean is None:
        return UNKNOWN
    return f"{share(difference.mean)} {between(share(difference.low), share(difference.high))}"


def made_rows(card: Scorecard) -> Table:
    """Return the time of each stage of making and measuring the student."""
    stages = card.cost.distillation.stages
    return ("stage", "time"), [(stage, duration(seconds)) for stage, seconds in stages.items()]


def loss_rows(training: Mapping[str, Any]) -> Table:
    """Return the validation losses, and the training loss at the same steps."""
    train = {row["step"]: row["loss"] for row in training.get("history", [])}
    rows = [
        (figure(row["step"], 0), figure(train.get(row["step"]), 3), figure(row["loss"], 3))
        for row in training.get("validation", [])
    ]
    return ("step", "training loss", "validation loss"), rows


def contamination_sentence(found: Contamination | None, clean: MetricRow | None) -> str:
    """Say how many items stand in the training data, and the shares of checks passed without and with them."""
    if found is None:
        return ""
    low, high = share(found.rate.low, 1), share(found.rate.high, 1)
    blank = found.unsearchable
    but = f" ({blank} of them have no words of their own to look for)" if blank else ""
    if not found.flagged:
        return (
            f"None of the {found.n} items was found in the training data{but}; of items like these, "
            f"{low} to {high} would be. {found.method}"
        )
    full = found.all_items.overall if found.all_items else None
    beside = ""
    if clean and full:
        pairs = (
            f"{m} {share(clean.mean(m))} and {share(full.mean(m))}" for m in ("teacher", "student")
        )
        beside = f" Checks passed without and with them: {', '.join(pairs)}."
    return (
        f"{found.flagged} of {found.n} items{but} stand in the training data (of items like these, {low} to "
        f"{high} would); the figures are without them.{beside} {found.method}"
    )
