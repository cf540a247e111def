"""From scores to results: rows of the scorecard, each comparison paired on the same items.

Pure functions; nothing here loads a model or reads a config. Every figure is a number, or None with
the reason beside it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean

import numpy as np

from distill.evaluation import measurements, statistics
from distill.evaluation.measurements import MODELS, RIVALS, Difference, MetricRow, Results
from distill.evaluation.scorecard import Failures, WorstAnswer
from distill.evaluation.scorers import NO_TEACHER, SHARE, AnswersByModel, Measured
from distill.evaluation.statistics import Certainty, Estimate, estimate_difference, estimate_mean
from distill.formatting import clip
from distill.records import AnswerLoss, Item, Response

LOSS = "loss on the teacher's answer, nats a token"
TOP = "top-1 agreement on the teacher's answer"
NO_REFERENCE = "without a checker there is no reference but the teacher's answer"
MOST_FAILURES = 3
LONGEST = 400  # characters of a text on the card
NO_FAILURE = "every worst sample passes its check"


def compare(measured: Measured, a: str, b: str, certainty: Certainty) -> Difference:
    """Return a - b with its interval and, of shares that pass, what it allows to claim.

    Paired on the items that both have a score for; stops (exit 8) where those are under 95 %.
    """
    a_N, b_N = measured.array(a), measured.array(b)
    both_N = statistics.paired(a_N, b_N, f"{measured.metric}, {a} against {b}")
    sides = (a_N[both_N], b_N[both_N], measured.clusters[both_N])
    change = estimate_difference(*sides, certainty, measured.bounds)
    facts: dict[str, object] = {"smallest_visible": statistics.smallest_visible(*sides, certainty)}
    if facts["smallest_visible"] is None:
        facts["reasons"] = {"smallest_visible": "the items are too few, or do not vary"}
    if measured.yes_or_no:
        facts["mcnemar"] = statistics.mcnemar(*sides)
        if verdict := statistics.non_inferiority(change, certainty.margin):
            facts["non_inferiority"] = measurements.Claim(margin=certainty.margin, verdict=verdict)
    return Difference.of(change).model_copy(update=facts)


def mean_of(measured: Measured, model: str, certainty: Certainty) -> Estimate:
    """Estimate a model's mean score over the items that it has a score for."""
    if model not in measured.scores:
        return Estimate(value=None, reason=measured.no_teacher)
    scores_N = measured.array(model)
    scored_N = np.isfinite(scores_N)
    sides = (scores_N[scored_N], measured.clusters[scored_N])
    estimate = estimate_mean(*sides, certainty, measured.bounds)
    if estimate.value is None and scored_N.any():  # a mean of few is one, without an interval
        return estimate.model_copy(update={"value": fmean(sides[0])})
    return estimate


def row_of(measured: Measured, certainty: Certainty) -> MetricRow:
    """Return a metric's row: the models' means, the paired differences, the gap recovered."""
    means = {model: mean_of(measured, model, certainty) for model in MODELS}
    unscored = {m: int(np.isnan(measured.array(m)).sum()) for m in measured.scores}
    to_teacher = Difference(mean=None, low=None, high=None, reason=measured.no_teacher)
    if "teacher" in measured.scores:
        to_teacher = compare(measured, "student", "teacher", certainty)
    why_zero = {  # the commonest reasons first
        model: Counter(s.reason for s in measured.of(model) if s.value == 0).most_common(5)
        for model in measured.scores
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
        student_minus_base=compare(measured, "student", "base", certainty),
        gap_recovered=gap_recovered(measured, certainty),
        reasons={model: mean.reason for model, mean in means.items() if mean.reason},
        failures={model: dict(reasons) for model, reasons in why_zero.items()},
    )
    if not row.unscored:
        return row
    worst_N, differences = np.nan_to_num(measured.array("student"), nan=measured.bounds.low), {}
    for rival in RIVALS:
        if rival in measured.scores:
            best_N = np.nan_to_num(measured.array(rival), nan=measured.bounds.high)
            sides = (worst_N, best_N, measured.clusters)
            change = estimate_difference(*sides, certainty, measured.bounds)
            differences[f"student_minus_{rival}"] = Difference.of(change)
    counted = measurements.CountedAgainst(student=fmean(worst_N), **differences)
    return row.model_copy(update={"if_missing_counts_against_student": counted})


def gap_recovered(measured: Measured, certainty: Certainty) -> Estimate:
    """Estimate the share of the gap recovered, where there is a reference beside the teacher."""
    if "teacher" not in measured.scores:
        alike = measured.no_teacher == NO_TEACHER
        return Estimate(value=None, reason=NO_REFERENCE if alike else measured.no_teacher)
    scores_3N = np.stack([measured.array(m) for m in ("student", "teacher", "base")])
    all_N = np.isfinite(scores_3N).all(axis=0)
    clusters = measured.clusters[all_N]
    gap = compare(measured, "teacher", "base", certainty)
    decided = gap.conclude(len(set(clusters)), len(clusters))
    if decided.verdict == "undecided":  # the gap itself must stand, by the rule of every claim
        reason = f"whether teacher and base differ is undecided: {decided.reason}"
        return Estimate(value=None, reason=reason)
    student, teacher, base = scores_3N[:, all_N]
    return statistics.estimate_gap_recovered(
        student, teacher, base, clusters, certainty, measured.bounds
    )


def pool(rows: Sequence[Measured]) -> Measured | None:
    """Join the tasks that have a checker: one share of answers that pass, over all of them."""
    checked = [m for m in rows if m.yes_or_no]
    if not checked:
        return None
    items = [item for m in checked for item in m.items]
    scores = {
        model: {item: score for m in checked for item, score in m.scores[model].items()}
        for model in checked[0].scores
    }
    return Measured("checks passed", items, scores, SHARE, checked[0].no_teacher)


def results_of(rows: Mapping[str, Measured], certainty: Certainty) -> Results:
    """Return the rows of some tasks, and of all their checks together."""
    pooled = pool(list(rows.values()))
    return Results(
        tasks={task: row_of(row, certainty) for task, row in rows.items()},
        overall=row_of(pooled, certainty) if pooled else None,
    )


def agreement_of(
    alike: Measured,
    items: Sequence[Item],
    losses: Mapping[str, Mapping[str, AnswerLoss]],
    certainty: Certainty,
) -> dict[str, MetricRow]:
    """Return the rows of likeness to the teacher's answers: of text, loss and top-1 tokens.

    `losses` are those of base and student by item id; tokens are the weights of their means.
    """
    items = [item for item in items if losses["base"][item.id].tokens > 0]
    ids, clusters = [item.id for item in items], [item.cluster for item in items]
    tokens = [float(losses["base"][i].tokens) for i in ids]
    rows = {"chrf": row_of(alike, certainty)}
    for name, metric, field, bounds in (
        ("nats_per_token", LOSS, "loss", None),
        ("top1", TOP, "hits", SHARE),
    ):
        base, student = (
            [getattr(row, field) / row.tokens for row in map(losses[model].__getitem__, ids)]
            for model in ("base", "student")
        )
        how = (clusters, certainty, bounds, tokens)
        means = {"base": estimate_mean(base, *how), "student": estimate_mean(student, *how)}
        rows[name] = MetricRow(
            metric=metric,
            n=len(items),
            documents=len(set(clusters)),
            tokens=int(sum(tokens)),
            teacher=None,
            base=means["base"].value,
            student=means["student"].value,
            intervals={"base": means["base"].ends, "student": means["student"].ends},
            student_minus_base=Difference.of(estimate_difference(student, base, *how)),
            reasons={"teacher": NO_TEACHER},
        )
    return rows


def answer_lengths(answers: Iterable[Response]) -> measurements.AnswerLengths:
    """Return how long a model's answers are, and the shares that were cut off or empty."""
    complete = [a for a in answers if a.stop != "error"]
    return measurements.AnswerLengths(
        n=len(complete),
        tokens=statistics.mean_or_none(a.usage.output_tokens for a in complete),
        truncated=statistics.mean_or_none(a.stop == "length" for a in complete),
        empty=statistics.mean_or_none(not a.text.strip() for a in complete),
    )


def samples(
    rows: Iterable[Measured], alike: Measured, answers: AnswersByModel
) -> Iterator[measurements.Sample]:
    """Yield the student's best, typical and worst answer to each task, with all models' answers.

    Ranked by the task's own score, then by likeness to the teacher; typical is the median.
    """
    likeness = alike.values("student")
    for measured in rows:
        value = measured.values("student")
        ranked = sorted(
            measured.items, key=lambda i: (value.get(i.id) or 0.0, likeness.get(i.id) or 0.0, i.id)
        )
        places: dict[measurements.Rank, int] = {
            "best": len(ranked) - 1,
            "typical": len(ranked) // 2,
            "worst": 0,
        }
        for rank, place in list(places.items())[: len(ranked)]:
            item = ranked[place]
            scores = {model: by_id[item.id] for model, by_id in measured.scores.items()}
            yield measurements.Sample(
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


def failures(samples: Iterable[measurements.Sample]) -> Failures:
    """Return at most three of the student's worst answers, failed checks first, one a task."""
    worst: dict[bool, list[WorstAnswer]] = {False: [], True: []}
    for sample in samples:
        value, alike = sample.scores.get("student"), sample.metric == "chrF"
        if sample.rank != "worst" or value is None or (value >= 1 and not alike):
            continue
        reason = f"chrF {value:.0f} against the teacher" if alike else sample.reasons["student"]
        texts = (sample.messages[-1]["content"], *map(sample.answers.get, ("student", "teacher")))
        question, student, teacher = (clip(text or "", LONGEST) for text in texts)
        worst[alike].append(
            WorstAnswer(
                task=sample.task, asked=question, student=student, teacher=teacher, reason=reason
            )
        )
    rows = (*worst[False], *worst[True])[:MOST_FAILURES]
    return Failures(worst=rows) if rows else Failures(worst=(), reason=NO_FAILURE)


def bare(evaluation: measurements.EvaluationResult) -> measurements.EvaluationResult:
    """Return an evaluation without what may quote documents: samples, examples, reasons of 0."""

    def without(tree: object) -> object:
        if isinstance(tree, dict):
            return {k: without(v) for k, v in tree.items() if k not in ("examples", "failures")}
        return tree

    return measurements.EvaluationResult.model_validate(
        without({**evaluation.tree(), "samples": ()})
    )
