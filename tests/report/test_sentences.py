"""The sentences: each claims what its interval supports, names the price, says what is unknown.

One case of 16 scored items of four documents holds them to the one rule: eleven more answers pass
after training than before, the interval excludes 0 (+48.8 to +88.7 points), and an exact test of
four documents cannot go below p = 0.125.
"""

from collections.abc import Sequence
from typing import Any

import pytest

from distill.economics.costs import Tariff
from distill.economics.savings import NEEDS_ANSWER, Assumptions, economics
from distill.evaluation import results, scorers
from distill.evaluation.measurements import MODELS, Difference, MetricRow, Model, ModelFacts
from distill.evaluation.scorecard import Costs, Economics, RequestCost, Scorecard, TeacherPrice
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.statistics import Certainty
from distill.publishing.publish import evidence
from distill.records import Item, Message, Prompt, Response, Usage
from distill.report import tables
from distill.report.render import environment, parts
from tests.economics.test_savings import ASSUMED, CERTAINTY, MACHINE, SIXTEEN, asked, reckon

SAY = environment(markdown=True).globals["say"]
CORRECT = {"teacher": (4, 4, 4, 4), "base": (0, 0, 0, 0), "student": (3, 3, 3, 2)}  # by document


def worded(found: Economics) -> str:
    return "\n".join(environment(markdown=True).globals["savings"](found)).replace("\u00a0", " ")


def said(requests: Sequence[HeldOutRequest], assumed: Assumptions = ASSUMED) -> str:
    return worded(reckon(requests, assumed))


def row(documents: int) -> MetricRow:
    """Return the row of all checks; the four documents may stand for more that are like them."""
    items, answers = [], {model: dict[str, Response]() for model in CORRECT}
    for document in range(documents):
        for k in range(4):
            turn = Message(role="user", content=f"{document}, {k}?")
            prompt = Prompt.make((turn,), f"doc{document}", "sums", reference="7")
            items.append(Item.make(prompt))
            for model, correct in CORRECT.items():
                answers[model][items[-1].id] = Response(
                    id=f"{model}-{document}-{k}", request_key="k", sample=0, prompt_id=prompt.id,
                    model=model, text="7" if k < correct[document % 4] else "8", stop="end",
                )  # fmt: skip
    measured = scorers.measure_items(items, answers, {"kind": "number"}, "correct")
    return results.row_of(measured, Certainty(samples=500))


def test_the_cost_names_load_machine_and_engines() -> None:
    load: dict[str, Any] = {
        "requests": 16,
        "concurrency": 8,
        "repeats": 3,
        "range_per_1k": (590.0, 612.0),
    }
    timed: dict[str, Any] = {"seconds_per_1k": 600.0, "output_tokens_per_second": 80.0}
    loads = (RequestCost(**load, **timed),)
    here: dict[str, Any] = {"concurrency": 8, "machine": "a laptop", "loads": loads, **timed}
    costs = Costs(
        teacher=RequestCost(engine="llama.cpp", **here),
        student=RequestCost(engine="distill", **here),
    )
    text = str(SAY["cost"](costs)).replace("\u00a0", " ")
    assert "100 % of the teacher's time. They were timed with 8 at once on a laptop, in" in text
    assert text.endswith("in the engine distill (the teacher in llama.cpp).")
    head, rows = tables.load_rows(costs)
    cells = [cell.replace("\u00a0", " ") for cell in rows[0]]
    assert [row[0] for row in rows] == ["teacher", "student"] and len(head) == len(cells)
    assert cells[1:4] == ["llama.cpp", "8", "10 min [9.8 min, 10 min]"]
    assert cells[-1] == "3 of 16 requests"
    assert "timed" not in SAY["cost"](Costs(student=RequestCost(**timed)))


def savings(documents: int) -> Economics:
    usage = {
        "teacher": Usage(input_tokens=400, output_tokens=60),
        "student": Usage(input_tokens=400, output_tokens=60, seconds=0.5),
    }
    requests = [
        HeldOutRequest(
            item=f"{d}-{k}", cluster=f"d{d}", usage=usage, test="correct", when_served=True,
            accepted=k < CORRECT["student"][d % 4],
        )
        for d in range(documents)
        for k in range(4)
    ]  # fmt: skip
    return reckon(requests, ASSUMED)


def test_few_documents_leave_sentence_table_gap_and_gate_undecided() -> None:
    few, many = row(4), row(24)
    change = few.student_minus_base
    ends = [round(100 * (end or 0), 1) for end in (change.value, change.low, change.high)]
    assert ends == [68.8, 48.9, 88.6] and change.mcnemar
    assert change.mcnemar.p == pytest.approx(0.125)
    sentence, cells = SAY["quality"](Scorecard(overall=few)), tables.metric_rows({"": few})[1][0]
    assert "whether training helped is undecided: 16 items of 4 documents are too few" in sentence
    assert "[+" not in sentence, "no interval that claims more than the sentence"
    assert cells[-2] == "+68.8 (undecided)" and cells[-3].endswith("(undecided)")
    assert change.non_inferiority and change.non_inferiority.verdict == "undecided"
    assert few.gap_recovered.value is None and "4 documents" in (few.gap_recovered.reason or "")
    sentence, cells = SAY["quality"](Scorecard(overall=many)), tables.metric_rows({"": many})[1][0]
    assert "; training helped." in sentence and "points [+" in sentence and "[+" in cells[-2]
    assert many.gap_recovered.value == pytest.approx(11 / 16)

    turned = Difference(mean=-11 / 16, low=-(change.high or 0), high=-(change.low or 0))
    for measured, what in ((few, "undecided: 16 items of 4"), (many, "is worse than its base")):
        worse = measured.model_copy(update={"student_minus_base": turned})
        (finding,) = evidence(Scorecard(overall=worse))
        assert what in finding.what
    assert not evidence(Scorecard(overall=few))
    models: dict[Model, ModelFacts] = {model: ModelFacts(name=model) for model in MODELS}
    for measured, count in ((few, 1), (many, 0)):
        card = Scorecard(models=models, overall=measured, agreement={"chrf": measured})
        text = " ".join(parts(card).values())
        assert text.count("It takes 6 documents to decide a difference") == count, "said once"


def test_few_documents_save_nothing_for_sure_and_are_never_paid_back() -> None:
    few, many = savings(4), savings(24)
    assert "saves $" in SAY["in_short"](many) and "pay it back" in SAY["in_short"](many)
    text = SAY["in_short"](few) + SAY["saving_at_length"](few)
    assert "saves $" not in text and "4 documents are too few" in text
    assert "No break-even is stated" in text and "a month" not in text
    rows = tables.saving_rows(few)[1]
    assert all(row[3] == "–" and ("[" not in row[1] or "[−" in row[1]) for row in rows)


def test_the_savings_say_share_surplus_break_even_and_assumptions() -> None:
    text = said(SIXTEEN)
    for words in (
        "can take 80 % [60 %, 95 %] of 20 held-out requests: its answers pass their check (valid",
        "Cascade (student first, teacher when the check fails): saves $0.70 per 1,000 requests [",
        "], of $1.00 at x's list price.",
        "10,000 requests a month save $7.00 [",
        "Making the student cost $3.20 of machine time and tokens",
        " 4,572 requests [",
        "a machine that works 50 % of its paid time",
        "1 machine would cost $259.20 a month and work 0.2 % of the time",
    ):
        assert words in text, words
    assert "hypothetical" not in text and "13.7" not in text, "days are said in hours"


def test_a_price_of_another_model_is_called_hypothetical() -> None:
    teacher = TeacherPrice(name="giant", hypothetical=True, answers_dollars=2.0)
    found = economics(SIXTEEN, ASSUMED, CERTAINTY, teacher, Difference())
    text = worded(found)
    assert "This is hypothetical" in text and "a model that is not giant" in text
    assert "$2.00 of it is what the teacher's answers would have cost" in text
    assert "another model's list price" in SAY["in_short"](found)


DEAR, EVEN = ({"student": Tariff(MACHINE, cost)} for cost in (0.01, 0.0714285714))
UNPRICED = {"teacher": Tariff(None, why="no row of x")}
COMPARING = asked([True] * 20, test="correct", when_served=False)  # the test needs the reference
UNTESTED = asked([None] * 20, test=None, when_served=False)


@pytest.mark.parametrize(
    ("requests", "changes", "words"),
    [
        (SIXTEEN, DEAR, "saves nothing: it costs $4.20 more per 1,000 requests [$4."),
        (SIXTEEN, DEAR, "No break-even is stated: nothing is saved"),
        (SIXTEEN, EVEN, "; whether it saves is undecided: the interval includes 0."),
        (SIXTEEN, EVEN, "No break-even is stated: it may never be paid back: the interval"),
        (SIXTEEN, UNPRICED, "what it saves is not known: no row of x."),
        (UNTESTED, {}, "Which requests the student can take is not known"),
        (SIXTEEN[:1], {}, "not enough data"),
        ([*SIXTEEN, *UNTESTED[:3]], {}, "leave out 3 requests that no test covers"),
        (asked([None, *[True] * 30]), {}, "1 answers could not be tested"),
        (COMPARING, {}, f"What a cascade would save is not stated: {NEEDS_ANSWER}."),
        (COMPARING, {}, "(the student answers everything, good or not)"),
        (COMPARING, {}, "Quality changes by −10.0 points [−20.0, 0.0] against the teacher"),
    ],
)
def test_what_is_lost_undecided_or_not_known_is_said(
    requests: Sequence[HeldOutRequest], changes: dict[str, Tariff], words: str
) -> None:
    text = said(requests, ASSUMED._replace(**changes))
    assert words in text
    assert not changes or " saves $" not in text
