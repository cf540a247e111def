"""The scorecard's tables, each as a head and rows of text, for the page and for Markdown alike.

A figure stands with its interval; what is not known is a dash, and its reason is among the scorecard's `reasons`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from distill.evaluation.claims import Conclusion, conclude
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

Row = Mapping[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
MODELS = ("teacher", "base", "student")
RIVALS = ("teacher", "base")
AGREEMENT = {"chrf": "chrF", "nats_per_token": "nats a token", "top1": "likeliest token"}
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


def conclusion(difference: Row, row: Row) -> Conclusion:
    """Decide a difference that belongs to a metric's row, which knows items and documents."""
    p = (difference.get("mcnemar") or {}).get("p")
    ends = (difference.get("low"), difference.get("high"))
    return conclude(*ends, row.get("documents"), p, row.get("n"), difference.get("reason"))


def claims_too_much(low: float | None, high: float | None, decided: Conclusion) -> bool:
    """Tell whether an interval excludes 0 although the difference is undecided."""
    if low is None or high is None:
        return False
    return decided.verdict == "undecided" and not low <= 0 <= high


def change(difference: Row, row: Row) -> str:
    """Write a difference and its interval, in points, chrF or nats; no interval where it would claim too much."""
    if difference.get("mean") is None:
        return UNKNOWN
    metric = row["metric"]
    scale, digits = (
        (1, 3) if metric.startswith("loss") else (1, 1) if metric == "chrF" else (100, 1)
    )
    mean, low, high = (
        None if difference[k] is None else scale * difference[k] for k in ("mean", "low", "high")
    )
    if claims_too_much(low, high, conclusion(difference, row)):
        return f"{signed(mean, digits)} {UNDECIDED}"
    return f"{signed(mean, digits)} {between(signed(low, digits), signed(high, digits))}"


def points(difference: Row, row: Row, confidence: float) -> str:
    """Say a difference of shares and its interval in words; no interval where it would claim too much."""
    if difference.get("mean") is None:
        return f"not known ({difference.get('reason', 'no interval')})"
    mean, low, high = (signed(100 * difference[k], 1) for k in ("mean", "low", "high"))
    text = f"{mean} percentage points"
    ends = (difference["low"], difference["high"])
    if claims_too_much(*ends, conclusion(difference, row)):
        return text
    return f"{text} ({share(confidence)} interval {low} to {high})"


def within(row: Row, model: str, metric: str) -> str:
    """Write a model's score with its interval."""
    low, high = row["intervals"][model]
    if row[model] is None or low is None:
        return score(row[model], metric)
    return f"{score(row[model], metric)} {between(score(low, metric), score(high, metric))}"


def quality_rows(card: Row) -> Table:
    """Return the rows of all tasks, of all checks together, of agreement and of suites, with paired differences."""
    rows = [quality_row(f"{t}: {plain(row['metric'])}", row) for t, row in card["tasks"].items()]
    if card["overall"] and len(card["tasks"]) > 1:
        rows.append(quality_row("all checks", card["overall"]))
    rows += agreement_rows(card)
    for name, suite in card.get("suites", {}).items():
        shown = {"": suite["overall"]} if suite["overall"] else suite["tasks"]
        rows += [quality_row(f"{name} {task}".strip(), row) for task, row in shown.items()]
    return QUALITY, rows


def task_rows(rows: Row, overall: Row | None) -> Table:
    """Return the rows of some tasks, and of all their checks together where there are several."""
    found = [quality_row(f"{task}: {plain(row['metric'])}", row) for task, row in rows.items()]
    return QUALITY, found + (
        [quality_row("all checks", overall)] if overall and len(rows) > 1 else []
    )


def filled(table: Table) -> Table:
    """Return a table without the columns that hold no figure at all."""
    head, rows = table
    kept = [k for k in range(len(head)) if not rows or any(row[k] != UNKNOWN for row in rows)]
    return tuple(head[k] for k in kept), [tuple(row[k] for k in kept) for row in rows]


def agreement_rows(card: Row) -> list[tuple[str, ...]]:
    """Return the rows of likeness to the teacher's answers."""
    return [
        quality_row(f"agreement: {label}", card["agreement"][name])
        for name, label in AGREEMENT.items()
        if name in card["agreement"]
    ]


def quality_row(label: str, row: Row) -> tuple[str, ...]:
    """Return one metric: the models' scores, the paired differences, the gap recovered."""
    metric, gap = row["metric"], row.get("gap_recovered", {})
    low, high = gap.get("low"), gap.get("high")
    ends = f" {between(share(low), share(high))}"
    if claims_too_much(low, high, conclusion(row["student_minus_base"], row)):
        ends = f" {UNDECIDED}"
    return (
        label,
        str(row["n"]),
        *(score(row[model], metric) for model in MODELS),
        change(row.get("student_minus_teacher", {}), row),
        change(row["student_minus_base"], row),
        share(gap.get("value")) + (ends if gap.get("value") is not None else ""),
    )


def claim_rows(card: Row) -> Table:
    """Return what the differences allow to claim: what could be seen, McNemar's test, non-inferiority."""
    head = (
        *("the student against", "n", "documents", "difference", "could have shown"),
        *("only student / only rival passes", "McNemar p", "no worse by the margin"),
    )
    rows = dict(card["tasks"])
    if card["overall"] and len(rows) > 1:
        rows["all checks"] = card["overall"]
    found = [
        _claim(f"{rival}, {task}", row, row[f"student_minus_{rival}"])
        for rival in RIVALS
        for task, row in rows.items()
        if row.get(f"student_minus_{rival}", {}).get("mean") is not None
    ]
    return head, found


def _claim(label: str, row: Row, found: Row) -> tuple[str, ...]:
    scale, digits = (1, 1) if row["metric"] == "chrF" else (100, 1)
    visible, test = found.get("smallest_visible"), found.get("mcnemar")
    claimed = found.get("non_inferiority")
    return (
        label,
        str(row["n"]),
        str(row.get("documents", UNKNOWN)),
        change(found, row),
        figure(None if visible is None else scale * visible, digits),
        f"{test['only_a']} / {test['only_b']}" if test else UNKNOWN,
        p_value(test["p"]) if test else UNKNOWN,
        f"{claimed['verdict']} ({share(claimed['margin'])})" if claimed else UNKNOWN,
    )


def cost_rows(card: Row) -> Table:
    """Return what 1,000 requests take and cost each model, and how long its answers are."""
    head = ("1,000 requests", "time", "dollars", "tokens/s", "tokens an answer", "cut off")
    rows = []
    for model in MODELS:
        cost, long = card["cost"][model], card["lengths"][model]
        rows.append(
            (
                model,
                duration(cost["seconds_per_1k"]),
                money(cost["dollars_per_1k"]),
                figure(cost["output_tokens_per_second"], 0),
                figure(long["tokens"], 0),
                share(long["truncated"]),
            )
        )
    return head, rows


def plane_rows(card: Row) -> Table:
    """Return the points of the plot of quality against cost."""
    row = card["overall"] or card["agreement"]["chrf"]
    head = ("", "checks passed" if card["overall"] else "chrF", "1,000 requests")
    known = card["cost"]["student"]["dollars_per_1k"] is not None
    key, form = ("dollars_per_1k", money) if known else ("seconds_per_1k", duration)
    rows = [
        (
            model,
            within(row, model, row["metric"]),
            form(card["cost"][model][key]),
        )
        for model in MODELS
    ]
    return head, rows


def judge_rows(judge: Row) -> Table:
    """Return the judge's win rates of the student; a dash where the judge did not pass its probes."""
    head = (
        *("the student against", "n", "win rate", "wins", "ties", "losses", "not parsed"),
        *("flipped by order", "win rate, like length", "n of like length"),
    )
    return head, [_judged(rival, judge[rival]) for rival in RIVALS]


def _judged(rival: str, row: Row) -> tuple[str, ...]:
    alike = row["length_matched"]
    counts = (count(row.get(key)) for key in ("wins", "ties", "losses", "unparsed"))
    return (
        rival,
        count(row.get("n")),
        rate(row["win_rate"]),
        *counts,
        share(row.get("flip_rate")),
        rate(alike["win_rate"]),
        count(alike.get("n")),
    )


def probe_rows(probe: Row) -> Table:
    """Return what a judge was tried with, and what it made of it."""
    head = ("probe", "n", "wins", "loses", "not parsed")
    rows = [
        (
            what,
            count(probe[kind]["n"]),
            *(share(probe[kind][key]) for key in ("wins", "losses", "unparsed")),
        )
        for kind, what in PROBES.items()
    ]
    return head, rows


def contamination_rows(card: Row) -> Table:
    """Return the checks passed on the items that were not found, and on all of them, side by side."""
    both = {
        "not found in the training data": card["overall"],
        "all items": (card["contamination"].get("all_items") or {}).get("overall"),
    }
    return QUALITY, [quality_row(label, row) for label, row in both.items() if row]


def rate(row: Row) -> str:
    """Return a share with its interval."""
    if row.get("mean") is None:
        return UNKNOWN
    return f"{share(row['mean'])} {between(share(row['low']), share(row['high']))}"


def made_rows(card: Row) -> Table:
    """Return the time of each stage of making and measuring the student."""
    spent = card["cost"]["distillation"]
    return ("stage", "time"), [(s, duration(seconds)) for s, seconds in spent["stages"].items()]


def loss_rows(training: Row) -> Table:
    """Return the validation losses, and the training loss at the same steps."""
    train = {row["step"]: row["loss"] for row in training.get("history", [])}
    rows = [
        (figure(row["step"], 0), figure(train.get(row["step"]), 3), figure(row["loss"], 3))
        for row in training.get("validation", [])
    ]
    return ("step", "training loss", "validation loss"), rows


def leaked(found: Row, clean: Row | None) -> Iterator[str]:
    """Say how many items stand in the training data, and the shares of checks passed without and with them."""
    if not found:
        return
    low, high = (share(found.get("rate", {}).get(end), 1) for end in ("low", "high"))
    method = found.get("method", "")
    blank = found.get("unsearchable")
    but = f" ({blank} of them have no words of their own to look for)" if blank else ""
    if not found["flagged"]:
        yield (
            f"None of the {found['n']} items was found in the training data{but}; of items like these, "
            f"{low} to {high} would be. {method}"
        )
        return
    whole = (found.get("all_items") or {}).get("overall")
    beside = ""
    if clean and whole:
        pairs = (f"{m} {share(clean[m])} and {share(whole[m])}" for m in ("teacher", "student"))
        beside = f" Checks passed without and with them: {', '.join(pairs)}."
    yield (
        f"{found['flagged']} of {found['n']} items{but} stand in the training data (of items like these, {low} to "
        f"{high} would); the figures are without them.{beside} {method}"
    )
