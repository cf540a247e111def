"""From answers to results: tasks, agreement, lengths and samples, each comparison paired on the same items.

Pure functions over items, responses and scores; nothing here loads a model or reads a config. Every figure is a
number, or None with the reason beside it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from distill.evaluation.claims import conclude, mcnemar, non_inferiority, smallest_visible
from distill.evaluation.scorers import agrees, passes
from distill.evaluation.statistics import (
    Bounds,
    Certainty,
    Estimate,
    Paired,
    against,
    as_interval,
    estimate_difference,
    estimate_gap_recovered,
    estimate_mean,
    pair,
    require_paired,
)
from distill.records import Item, Reading, Response, Score
from distill.tasks.checkers import GRADED

Models = Mapping[str, Mapping[str, Response]]  # model -> item id -> its answer
Values = dict[str, float | None]
Checkers = Callable[[str], Mapping[str, Any] | None]  # the checker of a task, where it has one


LOSS = "loss on the teacher's answer, nats a token"
TOP = "top-1 agreement on the teacher's answer"
SHARE, CHRF = Bounds(0.0, 1.0), Bounds(0.0, 100.0)
NO_TEACHER = "agreement is measured against the teacher's own answer"
NO_REFERENCE = "without a checker there is no reference but the teacher's answer"


@dataclass(frozen=True)
class Measured:
    """One metric of some items: each model's scores, and what the smallest and largest score mean."""

    metric: str
    items: tuple[Item, ...]
    scores: dict[str, list[Score]]
    bounds: Bounds
    no_teacher: str = NO_TEACHER
    graded: bool = False  # scores may lie between the bounds, so they are no share that passes

    def values(self, model: str) -> Values:
        """Return a model's scores by item id."""
        return {score.item_id: score.value for score in self.scores.get(model, [])}

    def ids(self) -> list[str]:
        """Return the ids of the items."""
        return [item.id for item in self.items]

    def clusters(self, ids: Sequence[str]) -> list[str]:
        """Return the clusters of some items."""
        of = {item.id: item.cluster for item in self.items}
        return [of[i] for i in ids]


def measure_task(
    task: str, items: Sequence[Item], answers: Models, metric: str, checker: Any
) -> Measured:
    """Score every model's answers to one task: by its checker, or without one as agreement with the teacher."""
    mine = tuple(item for item in items if item.task == task)
    if checker is None:
        return measure_agreement(mine, answers)
    scores = {
        m: [passes(checker, m)(i, found.get(i.id)) for i in mine] for m, found in answers.items()
    }
    return Measured(metric, mine, scores, SHARE, graded=checker["kind"] in GRADED)


def measure_agreement(items: Sequence[Item], answers: Models) -> Measured:
    """Score the likeness of base and student to the teacher's answers, in chrF, on the items that have one."""
    references = {i: a.text for i, a in answers["teacher"].items() if a.text.strip()}
    mine = tuple(item for item in items if item.id in references)
    scores = {
        m: [agrees(references, m)(item, found.get(item.id)) for item in mine]
        for m, found in answers.items()
        if m != "teacher"
    }
    return Measured("chrF", mine, scores, CHRF)


def compare(measured: Measured, a: str, b: str, certainty: Certainty) -> Estimate:
    """Estimate a - b on the items that both have a score for; stops (exit 8) where those are under 95 %."""
    paired = pair(measured.values(a), measured.values(b), measured.ids())
    require_paired(paired, len(measured.items), f"{measured.metric}, {a} against {b}")
    return _difference(measured, paired, certainty)


def tested(measured: Measured, a: str, b: str, certainty: Certainty) -> dict[str, Any]:
    """Return a - b as the scorecard shows it: its interval, and of shares that pass also what it allows to claim."""
    change = compare(measured, a, b, certainty)
    found = pair(measured.values(a), measured.values(b), measured.ids())
    sides = (found.a_N, found.b_N, measured.clusters(found.items))
    visible = smallest_visible(*sides, certainty)
    row = {**as_interval(change), "smallest_visible": visible}
    if visible is None:
        row["reasons"] = {"smallest_visible": "the items are too few, or do not vary"}
    if measured.bounds != SHARE or measured.graded:
        return row
    row["mcnemar"] = mcnemar(*sides)._asdict()
    if verdict := non_inferiority(change, certainty.margin):
        row["non_inferiority"] = {"margin": certainty.margin, "verdict": verdict}
    return row


def _difference(measured: Measured, paired: Paired, certainty: Certainty) -> Estimate:
    clusters = measured.clusters(paired.items)
    return estimate_difference(paired.a_N, paired.b_N, clusters, certainty, measured.bounds)


def mean_of(measured: Measured, model: str, certainty: Certainty) -> Estimate:
    """Estimate a model's mean score over the items that it has a score for."""
    found = {i: v for i, v in measured.values(model).items() if v is not None}
    if not found and model not in measured.scores:
        return Estimate(value=None, reason=measured.no_teacher)
    clusters = measured.clusters(list(found))
    estimate = estimate_mean(list(found.values()), clusters, certainty, measured.bounds)
    if (
        estimate.value is None and found
    ):  # a mean of few is still a mean; only its interval is unknown
        return estimate.model_copy(update={"value": fmean(found.values())})
    return estimate


def row_of(measured: Measured, certainty: Certainty) -> dict[str, Any]:
    """Return a metric's row of the scorecard: the models' means, the paired differences, the gap recovered."""
    means = {m: mean_of(measured, m, certainty) for m in ("teacher", "base", "student")}
    unscored = {m: _missing(measured, m) for m in measured.scores}
    return {
        "metric": measured.metric,
        "n": len(measured.items),
        "documents": len({item.cluster for item in measured.items}),
        "unscored": sum(unscored.values()),
        **{model: mean.value for model, mean in means.items()},
        "intervals": {m: [mean.low, mean.high] for m, mean in means.items()},
        "student_minus_teacher": _against_teacher(measured, certainty),
        "student_minus_base": tested(measured, "student", "base", certainty),
        "gap_recovered": _gap(measured, certainty),
        "reasons": {model: mean.reason for model, mean in means.items() if mean.reason},
        "failures": {m: _failures(found) for m, found in measured.scores.items()},
        **_counted_against(measured, certainty, unscored),
    }


def _failures(scores: Sequence[Score]) -> dict[str, int]:
    """Count why a model's answers scored 0, the commonest reasons first."""
    return dict(Counter(score.reason for score in scores if score.value == 0).most_common(5))


def _missing(measured: Measured, model: str) -> int:
    values = measured.values(model)
    return sum(values.get(i) is None for i in measured.ids())


def _against_teacher(measured: Measured, certainty: Certainty) -> dict[str, Any]:
    if "teacher" not in measured.scores:
        return as_interval(Estimate(value=None, reason=measured.no_teacher))
    return tested(measured, "student", "teacher", certainty)


def _gap(measured: Measured, certainty: Certainty) -> dict[str, Any]:
    """Return the share of the gap recovered, where there is a reference other than the teacher's answer."""
    if "teacher" not in measured.scores:
        alike = measured.no_teacher == NO_TEACHER
        gap = Estimate(value=None, reason=NO_REFERENCE if alike else measured.no_teacher)
    else:
        three = [measured.values(m) for m in ("student", "teacher", "base")]
        ids = [i for i in measured.ids() if all(values.get(i) is not None for values in three)]
        student, teacher, base = ([values[i] or 0.0 for i in ids] for values in three)
        clusters = measured.clusters(ids)
        change = tested(measured, "teacher", "base", certainty)
        p = change.get("mcnemar", {}).get("p")
        ends, documents = (change["low"], change["high"]), len(set(clusters))
        decided = conclude(*ends, documents, p, len(ids), change.get("reason"))
        if decided.verdict == "undecided":  # the gap itself must stand, by the rule of every claim
            reason = f"that teacher and base do not differ is possible: {decided.reason}"
            gap = Estimate(value=None, reason=reason)
        else:
            gap = estimate_gap_recovered(
                student, teacher, base, clusters, certainty, measured.bounds
            )
    shown = {"value": gap.value, "low": gap.low, "high": gap.high}
    return shown if gap.reason is None else {**shown, "reason": gap.reason}


def _counted_against(
    measured: Measured, certainty: Certainty, unscored: Mapping[str, int]
) -> dict[str, Any]:
    """Return, where a score is missing, the result in which everything missing counts against the student."""
    if not any(unscored.values()):
        return {}
    ids, bounds = measured.ids(), measured.bounds
    student = against(measured.values("student"), ids, bounds.low)
    row: dict[str, Any] = {"unscored_by_model": dict(unscored)}
    row["student"] = fmean(v or 0.0 for v in student.values())
    for other in ("teacher", "base"):
        if other in measured.scores:
            rival = against(measured.values(other), ids, bounds.high)
            paired = pair(student, rival, ids)
            row[f"student_minus_{other}"] = as_interval(_difference(measured, paired, certainty))
    return {"if_missing_counts_against_student": row}


def pool(rows: Sequence[Measured]) -> Measured | None:
    """Join the tasks that have a checker: one share of answers that pass, over all of them."""
    checked = [m for m in rows if m.bounds == SHARE and not m.graded]
    if not checked:
        return None
    items = tuple(item for m in checked for item in m.items)
    scores = {
        model: [score for m in checked for score in m.scores[model]] for model in checked[0].scores
    }
    return Measured("checks passed", items, scores, SHARE, checked[0].no_teacher)


def token_row(
    metric: str,
    items: Sequence[Item],
    sums: Mapping[str, Sequence[tuple[float, int]]],
    certainty: Certainty,
    bounds: Bounds | None = None,
) -> dict[str, Any]:
    """Return an agreement row of what is measured token by token on the teacher's answers, before and after.

    `sums` holds, for base and student, each item's (sum, tokens); tokens are the weights of the mean.
    """
    kept = [k for k in range(len(items)) if sums["base"][k][1] > 0]
    tokens = [float(sums["base"][k][1]) for k in kept]
    clusters = [items[k].cluster for k in kept]
    value = {m: [sums[m][k][0] / sums[m][k][1] for k in kept] for m in ("base", "student")}
    means = {m: estimate_mean(value[m], clusters, certainty, bounds, tokens) for m in value}
    change = estimate_difference(
        value["student"], value["base"], clusters, certainty, bounds, tokens
    )
    return {
        "metric": metric,
        "n": len(kept),
        "documents": len(set(clusters)),
        "tokens": int(sum(tokens)),
        "teacher": None,
        **{m: mean.value for m, mean in means.items()},
        "intervals": {m: [mean.low, mean.high] for m, mean in means.items()},
        "student_minus_base": as_interval(change),
        "reasons": {"teacher": NO_TEACHER},
    }


def reading_rows(
    items: Sequence[Item], readings: Mapping[str, Sequence[Reading]], certainty: Certainty
) -> dict[str, Any]:
    """Return the agreement rows of the loss on the teacher's answers, and of how often the likeliest token is theirs."""
    losses = {m: [(r.loss, r.tokens) for r in found] for m, found in readings.items()}
    first = {m: [(float(r.hits), r.tokens) for r in found] for m, found in readings.items()}
    return {
        "nats_per_token": token_row(LOSS, items, losses, certainty),
        "top1": token_row(TOP, items, first, certainty, SHARE),
    }


def lengths(answers: Sequence[Response]) -> dict[str, Any]:
    """Return how long a model's answers are, and the shares that were cut off or empty."""
    given = [a for a in answers if a.stop != "error"]
    if not given:
        return {"n": 0, "tokens": None, "characters": None, "truncated": None, "empty": None}
    return {
        "n": len(given),
        "tokens": fmean(a.usage.output_tokens for a in given),
        "characters": fmean(len(a.text) for a in given),
        "truncated": fmean(a.stop == "length" for a in given),
        "empty": fmean(not a.text.strip() for a in given),
    }


def samples(rows: Sequence[Measured], agreement: Measured, answers: Models) -> list[dict[str, Any]]:
    """Choose the student's best, typical and worst answer to each task, and show all models' answers to it.

    Ranked by the task's own score, then by likeness to the teacher; typical is the median.
    """
    alike = agreement.values("student")
    chosen = []
    for measured in rows:
        own = measured.values("student")
        ranked = sorted(
            measured.items, key=lambda i: (own.get(i.id) or 0.0, alike.get(i.id) or 0.0, i.id)
        )
        places = {"best": len(ranked) - 1, "typical": len(ranked) // 2, "worst": 0}
        for rank, place in list(places.items())[: len(ranked)]:
            chosen.append(_sample(measured, ranked[place], rank, answers))
    return chosen


def _sample(measured: Measured, item: Item, rank: str, answers: Models) -> dict[str, Any]:
    scores = {
        m: next((s for s in found if s.item_id == item.id), None)
        for m, found in measured.scores.items()
    }
    shown = {m: found[item.id].text for m, found in answers.items() if item.id in found}
    return {
        "task": item.task,
        "rank": rank,
        "item": item.id,
        "metric": measured.metric,
        "messages": [m.model_dump() for m in item.prompt.messages],
        "reference": item.reference,
        "answers": shown,
        "scores": {m: s.value for m, s in scores.items() if s},
        "reasons": {m: s.reason for m, s in scores.items() if s},
    }


def compared(
    items: Sequence[Item],
    answers: Models,
    rows: Mapping[str, Measured],
    readings: Mapping[str, Sequence[Reading]],
    certainty: Certainty,
) -> dict[str, Any]:
    """Return everything that compares the models: tasks, all checks together, agreement, lengths, samples."""
    alike = measure_agreement(items, answers)
    pooled = pool(list(rows.values()))
    return {
        "tasks": {task: row_of(row, certainty) for task, row in rows.items()},
        "overall": row_of(pooled, certainty) if pooled else None,
        "agreement": {
            "chrf": row_of(alike, certainty),
            **reading_rows(items, readings, certainty),
        },
        "lengths": {m: lengths(list(found.values())) for m, found in answers.items()},
        "samples": samples(list(rows.values()), alike, answers),
    }
