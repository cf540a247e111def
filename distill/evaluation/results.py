"""From answers to results: tasks, agreement, lengths and samples, each comparison paired on the same items.

Pure functions over items, responses and scores; nothing here loads a model or reads a config. Every figure is a
number, or None with the reason beside it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from distill.evaluation.claims import mcnemar, non_inferiority, smallest_visible
from distill.evaluation.measurements import (
    MODELS,
    RIVALS,
    AnswerLengths,
    Claim,
    CountedAgainst,
    Difference,
    MetricRow,
    Rank,
    Results,
    Sample,
)
from distill.evaluation.scorers import agrees, passes
from distill.evaluation.statistics import (
    Bounds,
    Certainty,
    Estimate,
    Paired,
    against,
    estimate_difference,
    estimate_gap_recovered,
    estimate_mean,
    pair,
    require_paired,
)
from distill.records import AnswerLoss, Item, Response, Score
from distill.tasks.checkers import GRADED

AnswersByModel = Mapping[str, Mapping[str, Response]]  # model -> item id -> its answer
Values = dict[str, float | None]


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
    task: str, items: Sequence[Item], answers: AnswersByModel, metric: str, checker: Any
) -> Measured:
    """Score every model's answers to one task: by its checker, or without one as agreement with the teacher."""
    mine = tuple(item for item in items if item.task == task)
    if checker is None:
        return measure_agreement(mine, answers)
    scores = {
        m: [passes(checker, m)(i, by_id.get(i.id)) for i in mine] for m, by_id in answers.items()
    }
    # A checker of the user's may grade without saying so beforehand.
    between = any(s.value not in (None, 0, 1) for rows in scores.values() for s in rows)
    return Measured(metric, mine, scores, SHARE, graded=checker["kind"] in GRADED or between)


def measure_agreement(items: Sequence[Item], answers: AnswersByModel) -> Measured:
    """Score the likeness of base and student to the teacher's answers, in chrF, on the items that have one."""
    references = {i: a.text for i, a in answers["teacher"].items() if a.text.strip()}
    mine = tuple(item for item in items if item.id in references)
    scores = {
        m: [agrees(references, m)(item, by_id.get(item.id)) for item in mine]
        for m, by_id in answers.items()
        if m != "teacher"
    }
    return Measured("chrF", mine, scores, CHRF)


def compare(measured: Measured, a: str, b: str, certainty: Certainty) -> Estimate:
    """Estimate a - b on the items that both have a score for; stops (exit 8) where those are under 95 %."""
    paired = pair(measured.values(a), measured.values(b), measured.ids())
    require_paired(paired, len(measured.items), f"{measured.metric}, {a} against {b}")
    return _difference(measured, paired, certainty)


def tested(measured: Measured, a: str, b: str, certainty: Certainty) -> Difference:
    """Return a - b: its interval, and of shares that pass also what it allows to claim."""
    change = compare(measured, a, b, certainty)
    paired = pair(measured.values(a), measured.values(b), measured.ids())
    sides = (paired.a_N, paired.b_N, measured.clusters(paired.items))
    visible = smallest_visible(*sides, certainty)
    update: dict[str, Any] = {"smallest_visible": visible}
    if visible is None:
        update["reasons"] = {"smallest_visible": "the items are too few, or do not vary"}
    if measured.bounds == SHARE and not measured.graded:
        update["mcnemar"] = mcnemar(*sides)
        if verdict := non_inferiority(change, certainty.margin):
            update["non_inferiority"] = Claim(margin=certainty.margin, verdict=verdict)
    return difference_of(change).model_copy(update=update)


def difference_of(estimate: Estimate) -> Difference:
    """Return an estimate as the scorecard holds it."""
    low, high = estimate.ends
    return Difference(mean=estimate.value, low=low, high=high, reason=estimate.reason)


def _difference(measured: Measured, paired: Paired, certainty: Certainty) -> Estimate:
    clusters = measured.clusters(paired.items)
    return estimate_difference(paired.a_N, paired.b_N, clusters, certainty, measured.bounds)


def mean_of(measured: Measured, model: str, certainty: Certainty) -> Estimate:
    """Estimate a model's mean score over the items that it has a score for."""
    scores = {i: v for i, v in measured.values(model).items() if v is not None}
    if not scores and model not in measured.scores:
        return Estimate(value=None, reason=measured.no_teacher)
    clusters = measured.clusters(list(scores))
    estimate = estimate_mean(list(scores.values()), clusters, certainty, measured.bounds)
    if estimate.value is None and scores:  # a mean of few is still a mean, without an interval
        return estimate.model_copy(update={"value": fmean(scores.values())})
    return estimate


def row_of(measured: Measured, certainty: Certainty) -> MetricRow:
    """Return a metric's row of the scorecard: the models' means, the paired differences, the gap recovered."""
    means = {model: mean_of(measured, model, certainty) for model in MODELS}
    unscored = {
        model: sum(measured.values(model).get(i) is None for i in measured.ids())
        for model in measured.scores
    }
    if "teacher" in measured.scores:
        to_teacher = tested(measured, "student", "teacher", certainty)
    else:
        to_teacher = difference_of(Estimate(value=None, reason=measured.no_teacher))
    why_zero = {  # the commonest reasons first
        model: Counter(score.reason for score in scores if score.value == 0).most_common(5)
        for model, scores in measured.scores.items()
    }
    row = MetricRow(
        metric=measured.metric,
        n=len(measured.items),
        documents=len({item.cluster for item in measured.items}),
        unscored=sum(unscored.values()),
        teacher=means["teacher"].value,
        base=means["base"].value,
        student=means["student"].value,
        intervals={model: means[model].ends for model in MODELS},
        student_minus_teacher=to_teacher,
        student_minus_base=tested(measured, "student", "base", certainty),
        gap_recovered=_gap(measured, certainty),
        reasons={model: mean.reason for model, mean in means.items() if mean.reason},
        failures={model: dict(reasons) for model, reasons in why_zero.items()},
    )
    if not any(unscored.values()):
        return row
    against_student = _counted_against(measured, certainty, unscored)
    return row.model_copy(update={"if_missing_counts_against_student": against_student})


def _gap(measured: Measured, certainty: Certainty) -> Estimate:
    """Return the share of the gap recovered, where there is a reference other than the teacher's answer."""
    if "teacher" not in measured.scores:
        alike = measured.no_teacher == NO_TEACHER
        reason = NO_REFERENCE if alike else measured.no_teacher
        return Estimate(value=None, reason=reason)
    three = [measured.values(m) for m in ("student", "teacher", "base")]
    ids = [i for i in measured.ids() if all(values.get(i) is not None for values in three)]
    clusters = measured.clusters(ids)
    decided = tested(measured, "teacher", "base", certainty).conclude(len(ids), len(set(clusters)))
    if decided.verdict == "undecided":  # the gap itself must stand, by the rule of every claim
        reason = f"whether teacher and base differ is undecided: {decided.reason}"
        return Estimate(value=None, reason=reason)
    student, teacher, base = ([values[i] or 0.0 for i in ids] for values in three)
    return estimate_gap_recovered(student, teacher, base, clusters, certainty, measured.bounds)


def _counted_against(
    measured: Measured, certainty: Certainty, unscored: dict[str, int]
) -> CountedAgainst:
    """Return the result in which everything missing counts against the student."""
    ids, bounds = measured.ids(), measured.bounds
    student = against(measured.values("student"), ids, bounds.low)
    differences = {}
    for rival in RIVALS:
        if rival in measured.scores:
            paired = pair(student, against(measured.values(rival), ids, bounds.high), ids)
            change = difference_of(_difference(measured, paired, certainty))
            differences[f"student_minus_{rival}"] = change
    mean = fmean(v or 0.0 for v in student.values())
    return CountedAgainst(unscored_by_model=unscored, student=mean, **differences)


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


def results_of(rows: Mapping[str, Measured], certainty: Certainty) -> Results:
    """Return the rows of some tasks, and of all their checks together."""
    pooled = pool(list(rows.values()))
    return Results(
        tasks={task: row_of(row, certainty) for task, row in rows.items()},
        overall=row_of(pooled, certainty) if pooled else None,
    )


def token_row(
    metric: str,
    items: Sequence[Item],
    sums: Mapping[str, Sequence[tuple[float, int]]],
    certainty: Certainty,
    bounds: Bounds | None = None,
) -> MetricRow:
    """Return an agreement row of what is measured token by token on the teacher's answers, before and after.

    `sums` holds, for base and student, each item's (sum, tokens); tokens are the weights of the mean.
    """
    positions = [k for k in range(len(items)) if sums["base"][k][1] > 0]
    tokens = [float(sums["base"][k][1]) for k in positions]
    clusters = [items[k].cluster for k in positions]
    value = {m: [sums[m][k][0] / sums[m][k][1] for k in positions] for m in ("base", "student")}
    means = {m: estimate_mean(value[m], clusters, certainty, bounds, tokens) for m in value}
    change = estimate_difference(
        value["student"], value["base"], clusters, certainty, bounds, tokens
    )
    return MetricRow(
        metric=metric,
        n=len(positions),
        documents=len(set(clusters)),
        tokens=int(sum(tokens)),
        teacher=None,
        base=means["base"].value,
        student=means["student"].value,
        intervals={"base": means["base"].ends, "student": means["student"].ends},
        student_minus_base=difference_of(change),
        reasons={"teacher": NO_TEACHER},
    )


def answer_lengths(answers: Sequence[Response]) -> AnswerLengths:
    """Return how long a model's answers are, and the shares that were cut off or empty."""
    came = [a for a in answers if a.stop != "error"]
    if not came:
        return AnswerLengths(n=0, tokens=None, characters=None, truncated=None, empty=None)
    return AnswerLengths(
        n=len(came),
        tokens=fmean(a.usage.output_tokens for a in came),
        characters=fmean(len(a.text) for a in came),
        truncated=fmean(a.stop == "length" for a in came),
        empty=fmean(not a.text.strip() for a in came),
    )


def samples(
    items: Sequence[Item], rows: Sequence[Measured], answers: AnswersByModel
) -> Iterator[Sample]:
    """Yield the student's best, typical and worst answer to each task, with all models' answers to it.

    Ranked by the task's own score, then by likeness to the teacher; typical is the median.
    """
    alike = measure_agreement(items, answers).values("student")
    for measured in rows:
        value = measured.values("student")
        ranked = sorted(
            measured.items, key=lambda i: (value.get(i.id) or 0.0, alike.get(i.id) or 0.0, i.id)
        )
        best, typical = len(ranked) - 1, len(ranked) // 2
        positions: list[tuple[Rank, int]] = [("best", best), ("typical", typical), ("worst", 0)]
        for rank, position in positions[: len(ranked)]:
            item = ranked[position]
            scores = {
                model: score
                for model, scores in measured.scores.items()
                for score in scores
                if score.item_id == item.id
            }
            yield Sample(
                task=item.task,
                rank=rank,
                item=item.id,
                metric=measured.metric,
                messages=tuple(m.model_dump() for m in item.prompt.messages),
                reference=item.reference,
                answers={
                    m: by_id[item.id].text for m, by_id in answers.items() if item.id in by_id
                },
                scores={m: s.value for m, s in scores.items()},
                reasons={m: s.reason for m, s in scores.items()},
            )


def agreement_rows(
    items: Sequence[Item],
    answers: AnswersByModel,
    losses: Mapping[str, Sequence[AnswerLoss]],
    certainty: Certainty,
) -> dict[str, MetricRow]:
    """Return the rows of likeness to the teacher's answers: their text, their loss, their top-1 tokens."""
    nats = {m: [(row.loss, row.tokens) for row in rows] for m, rows in losses.items()}
    hits = {m: [(float(row.hits), row.tokens) for row in rows] for m, rows in losses.items()}
    return {
        "chrf": row_of(measure_agreement(items, answers), certainty),
        "nats_per_token": token_row(LOSS, items, nats, certainty),
        "top1": token_row(TOP, items, hits, certainty, SHARE),
    }
