"""Suites in a run: asked beside the held-out items, apart from the headline, resumed, and paired or refused."""

from pathlib import Path

import pytest

from distill.config import EndpointTeacher, LocalTeacher, Teacher
from distill.errors import DistillError, Exit
from distill.evaluation import answering, evaluate, results
from distill.evaluation.scorers import score_suite
from distill.evaluation.statistics import Certainty
from distill.evaluation.suites import Suite, load_suite, why_no_teacher
from distill.records import Item, Response, Score
from distill.storage.files import read_json, read_records
from distill.storage.run_folder import Run
from tests.evaluation.test_evaluate import heldout_pairs, make_run
from tests.evaluation.test_suites import SUM, make_suite
from tests.support.tiny import make_tiny

FEW = Certainty(samples=200)
PERSON = [
    {"question": f"Person {k}", "answer": f'{{"name": "A{k}", "age": {k}}}'} for k in range(4)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "student")


def with_suite(run: Run, suite: Path, teacher: Teacher | None = None) -> Run:
    """Return the run with a suite, and another teacher."""
    evaluation = run.config.evaluation.model_copy(update={"suites": (str(suite),)})
    changes = {"evaluation": evaluation, "teacher": teacher or run.config.teacher}
    return Run(run.config.model_copy(update=changes))


def asked_of_teacher(path: Path) -> Path:
    path.write_text(path.read_text() + "ask_teacher: true\n")
    return path


def answers(suite: Suite, right: int, text: str = "", lost: int = 0) -> dict[str, Response]:
    """Return answers of which the first `right` are the reference and the last `lost` are missing."""
    items = suite.items[: len(suite.items) - lost]
    return {
        i.id: answer(i, (i.reference or "") if k < right else text) for k, i in enumerate(items)
    }


def answer(item: Item, text: str) -> Response:
    return Response(
        id=f"r{item.id}", request_key="k", sample=0, prompt_id=item.prompt.id, model="m",
        text=text or "none", stop="end",
    )  # fmt: skip


def test_a_run_asks_its_suites_beside_the_held_out_items(tmp_path: Path, model: Path) -> None:
    plain = make_run(tmp_path / "runs", model, heldout_pairs())
    evaluate.main(plain.config, plain)
    alone = read_json(plain.path("evaluation.json"))
    run = with_suite(plain, make_suite(tmp_path / "suite"))
    evaluate.main(run.config, run)
    found = read_json(run.path("evaluation.json"))
    assert found["overall"] == alone["overall"] and found["tasks"] == alone["tasks"]
    suite = found["suites"]["sums"]
    assert suite["license"] == "none" and suite["tasks"]["sums"]["n"] == 6
    row = suite["overall"]
    assert row["teacher"] is None and row["reasons"]["teacher"] == row["gap_recovered"]["reason"]
    assert "does not ask the teacher" in row["reasons"]["teacher"]
    assert row["student_minus_base"]["mean"] is not None
    scores = read_records(run.path("scores/sums/student.jsonl"), Score)
    assert len(scores) == 6 and run.path("scores/sums/items.jsonl").exists()
    top = found["agreement"]["top1"]
    assert 0 <= top["base"] <= 1 and top["tokens"] == found["agreement"]["nats_per_token"]["tokens"]


def test_a_kill_while_a_suite_is_asked_costs_nothing_twice(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = make_suite(tmp_path / "suite")
    run = with_suite(make_run(tmp_path / "runs", model, heldout_pairs()), suite)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "ask_suite", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(run.config, run)  # base has answered the held-out prompts
    monkeypatch.undo()
    evaluate.main(run.config, run)
    evaluate.main(run.config, run)
    (log,) = (tmp_path / "runs/.store/responses").glob("*.jsonl")
    assert log.read_bytes().count(b" response ") == 2 * (8 + 6)


def test_a_local_teacher_is_asked_where_the_suite_says_so(tmp_path: Path, model: Path) -> None:
    plain = make_run(tmp_path / "runs", model, heldout_pairs())
    suite = asked_of_teacher(make_suite(tmp_path / "suite"))
    run = with_suite(plain, suite)
    evaluate.main(run.config, run)
    row = read_json(run.path("evaluation.json"))["suites"]["sums"]["overall"]
    assert "recorded" in row["reasons"]["teacher"]
    most = plain.config.teacher.max_new_tokens
    local = LocalTeacher(model=str(model), dtype="float32", max_new_tokens=most, license="mit")
    run = with_suite(plain, suite, local)
    terms = run.config.terms.model_copy(update={"basis": "it is ours"})
    run = Run(run.config.model_copy(update={"terms": terms}))
    evaluate.main(run.config, run)
    row = read_json(run.path("evaluation.json"))["suites"]["sums"]["overall"]
    assert row["teacher"] == row["base"], "the same weights"
    assert row["student_minus_teacher"]["mean"] is not None
    assert len(read_records(run.path("scores/sums/teacher.jsonl"), Score)) == 6


def test_a_paid_teacher_is_asked_only_within_a_budget(tmp_path: Path) -> None:
    suite = load_suite(str(asked_of_teacher(make_suite(tmp_path / "suite"))))
    paid = EndpointTeacher(model="m", base_url="https://example.org/v1")
    for budget, reason in ((None, "budget_dollars"), (1, None)):
        teacher = paid.model_copy(update={"budget_dollars": budget})
        found = why_no_teacher(teacher, suite)
        assert found is None if reason is None else found is not None and reason in found


def test_too_few_pairs_are_refused_and_few_items_give_no_interval(tmp_path: Path) -> None:
    suite = load_suite(str(make_suite(tmp_path)))
    given = {"base": answers(suite, 2), "student": answers(suite, 5, lost=1)}
    with pytest.raises(DistillError) as caught:
        results.results_of(score_suite(suite, given, "x"), FEW)
    assert caught.value.code == Exit.EVALUATION
    one = load_suite(str(make_suite(tmp_path, n=1)))
    given = {"base": answers(one, 0), "student": answers(one, 1)}
    row = results.results_of(score_suite(one, given, "x"), FEW).tree()["overall"]
    assert row["student_minus_base"]["mean"] is None
    assert "not enough data" in row["student_minus_base"]["reason"]


def test_grades_are_measured_and_are_no_checks_passed(tmp_path: Path) -> None:
    task = SUM | {"name": "people", "metric": "field_f1", "checker": {"kind": "field_f1"}}
    suite = load_suite(str(make_suite(tmp_path, PERSON, task)))
    given = {"base": answers(suite, 0, '{"name": "A1"}'), "student": answers(suite, 4)}
    rows = score_suite(suite, given, "x")
    found = results.results_of(rows, FEW).tree()
    row = found["tasks"]["people"]
    assert (
        row["student"] == 1.0
        and 0 < row["base"] < 0.5
        and "mcnemar" not in row["student_minus_base"]
    )
    assert found["overall"] is None and results.pool(list(rows.values())) is None
