"""Sixteen scored items of four documents: every sentence, table, gap, saving and the gate follow the one rule.

Eleven more answers pass after training than before. The interval excludes 0 (+48.8 to +88.7 points), and an exact test of
four documents cannot go below p = 0.125.
"""

import pytest

from distill.evaluation import results, scorers
from distill.evaluation.measurements import Difference, MetricRow
from distill.evaluation.scorecard import Economics, Scorecard
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.statistics import Certainty
from distill.publishing.gate import evidence
from distill.records import Item, Message, Prompt, Response, Usage
from distill.report import tables
from distill.report.render import environment
from tests.economics.test_savings import ASSUMED, reckon

SAY = environment(markdown=False).globals["say"]
RIGHT = {"teacher": (4, 4, 4, 4), "base": (0, 0, 0, 0), "student": (3, 3, 3, 2)}  # of each document


def row(documents: int) -> MetricRow:
    """Return the row of all checks; the four documents may stand for more that are like them."""
    items, answers = [], {model: dict[str, Response]() for model in RIGHT}
    for document in range(documents):
        for k in range(4):
            turn = Message(role="user", content=f"{document}, {k}?")
            prompt = Prompt.make((turn,), f"doc{document}", "sums", reference="7")
            items.append(Item.make(prompt))
            for model, right in RIGHT.items():
                answers[model][items[-1].id] = Response(
                    id=f"{model}-{document}-{k}", request_key="k", sample=0, prompt_id=prompt.id, model=model,
                    text="7" if k < right[document % 4] else "8", stop="end",
                )  # fmt: skip
    measured = scorers.measure_task("sums", items, answers, "correct", {"kind": "number"})
    return results.row_of(measured, Certainty(samples=500))


def savings(documents: int) -> Economics:
    usage = {
        "teacher": Usage(input_tokens=400, output_tokens=60),
        "student": Usage(input_tokens=400, output_tokens=60, seconds=0.5),
    }
    requests = [
        HeldOutRequest(
            item=f"{d}-{k}", cluster=f"d{d}", usage=usage, test="correct", when_served=True,
            accepted=k < RIGHT["student"][d % 4],
        )
        for d in range(documents)
        for k in range(4)
    ]  # fmt: skip
    return reckon(requests, ASSUMED)


def test_the_case_is_the_one_that_misled() -> None:
    change = row(4).student_minus_base
    ends = [round(100 * (end or 0), 1) for end in (change.mean, change.low, change.high)]
    assert ends == [68.8, 48.9, 88.6]
    assert change.mcnemar and change.mcnemar.p == pytest.approx(0.125)


@pytest.mark.parametrize("documents", [4, 24])
def test_the_sentence_and_the_table_say_the_same(documents: int) -> None:
    overall = row(documents)
    sentence = SAY["quality"](Scorecard(overall=overall))
    cells = tables.quality_row("sums", overall)
    if documents == 4:
        assert "training helped" not in sentence.replace("whether training helped is undecided", "")
        assert "16 items of 4 documents are too few" in sentence
        assert "[+" not in sentence, "no interval that claims more than the sentence"
        assert cells[-2] == "+68.8 (undecided)" and cells[-3].endswith("(undecided)")
        claim = overall.student_minus_base.non_inferiority
        assert claim and claim.verdict == "undecided"
    else:
        assert "; training helped." in sentence and "points [+" in sentence
        assert "[+" in cells[-2]


def test_no_gap_is_given_where_it_is_undecided_that_there_is_one() -> None:
    assert row(24).gap_recovered.value == pytest.approx(11 / 16)
    gap = row(4).gap_recovered
    assert gap.value is None and "4 documents are too few" in (gap.reason or "")


def test_few_documents_save_nothing_for_sure_and_are_never_paid_back() -> None:
    few, many = savings(4), savings(24)
    assert "saves $" in SAY["in_short"](many) and "pay it back" in SAY["in_short"](many)
    text = SAY["in_short"](few) + SAY["saving_at_length"](few)
    assert "saves $" not in text and "4 documents are too few" in text
    assert "No break-even is stated" in text and "a month" not in text
    rows = tables.saving_rows(few)[1]
    assert all(row[3] == "–" and ("[" not in row[1] or "[−" in row[1]) for row in rows)


def test_the_gate_says_that_a_student_measured_worse_but_undecided() -> None:
    low, high = row(4).student_minus_base.low, row(4).student_minus_base.high
    turned = Difference(mean=-11 / 16, low=-(high or 0), high=-(low or 0))

    def card(documents: int) -> Scorecard:
        overall = row(documents).model_copy(update={"student_minus_base": turned})
        return Scorecard(overall=overall)

    (finding,) = evidence(card(4))
    assert "undecided: 16 items of 4 documents" in finding.what
    (finding,) = evidence(card(24))
    assert finding.what.startswith("is worse than its base")
    assert not evidence(Scorecard(overall=row(4)))
