"""Any responder on a suite: a model, a run's student, a file of answers; compared, and refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from distill.callables import provided
from distill.errors import DistillError, Exit
from distill.evaluation import lm_eval
from distill.evaluation.compare import compare_paths
from distill.evaluation.score import score
from distill.evaluation.scorecard import HarnessResult
from distill.evaluation.suites import Suite, load_suite
from distill.records import Item, Message, Score
from distill.report.tables import harness_rows
from distill.storage.files import read_records, write_json, write_records
from tests.evaluation.test_evaluate import heldout_pairs, make_run
from tests.evaluation.test_suites import QUESTIONS, make_suite
from tests.support.tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "student")


def scored(suite: Suite, who: Path | str, folder: Path, name: str | None = None) -> str:
    return score(suite, str(who), name, folder / "store", folder / "out")


def write_answers(path: Path, right: int, given: int = len(QUESTIONS)) -> Path:
    rows = [
        {"prompt": row["question"], "answer": row["answer"] if k < right else "none"}
        for k, row in enumerate(QUESTIONS[:given])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_of_answers_are_scored_and_compared(tmp_path: Path) -> None:
    suite = load_suite(str(make_suite(tmp_path)))
    for name, right in (("good", 6), ("bad", 2)):
        shown = scored(suite, write_answers(tmp_path / f"{name}.jsonl", right), tmp_path)
        assert name in shown and "sums: correct" in shown
    scores = tmp_path / "out/scores/sums"
    assert [s.value for s in read_records(scores / "good.jsonl", Score)] == [1.0] * 6
    told = compare_paths([scores / "good.jsonl"], [scores / "bad.jsonl"])
    assert "6 items in both" in told and "+0.667" in told and "| sums" in told
    answered = tmp_path / "out/answers/sums/good.jsonl"  # what was written is a file of answers too
    assert "100.0" in scored(suite, answered, tmp_path, "again")


def test_seeds_of_runs_are_averaged_item_by_item(tmp_path: Path) -> None:
    pairs = heldout_pairs()
    for name, right in (("a", 6), ("b", 2)):
        write_records(tmp_path / name / "dataset/heldout.jsonl", pairs)
        scores = [
            Score(item_id=Item.make(p.prompt).id, model="m", value=float(k < right), reason="r")
            for k, p in enumerate(pairs)
        ]
        write_records(tmp_path / name / "scores/student.jsonl", scores)
    a, b = tmp_path / "a", tmp_path / "b"
    assert compare_paths([a], [b]).count("+0.500") == 2, "of both tasks"
    assert compare_paths([a, a, b], [b, b]).count("+0.333") == 2
    for wrong in (tmp_path / "nowhere", a / "dataset/heldout.jsonl"):
        with pytest.raises(DistillError) as caught:
            compare_paths([wrong], [b])
        assert caught.value.code == Exit.INPUT


def test_a_missing_answer_is_counted_and_too_many_are_not_compared(tmp_path: Path) -> None:
    suite = load_suite(str(make_suite(tmp_path)))
    whole = write_answers(tmp_path / "whole.jsonl", 3)
    part = write_answers(tmp_path / "part.jsonl", 3, given=4)
    scored(suite, whole, tmp_path)
    assert "|   6 |       2 |" in scored(suite, part, tmp_path)
    scores = tmp_path / "out/scores/sums"
    with pytest.raises(DistillError) as caught:
        compare_paths([scores / "whole.jsonl"], [scores / "part.jsonl"])
    assert caught.value.code == Exit.EVALUATION and "4 of 6" in str(caught.value)


def test_a_model_and_a_run_are_asked_once(tmp_path: Path, model: Path) -> None:
    suite = load_suite(str(make_suite(tmp_path)))
    run = make_run(tmp_path / "runs", model, heldout_pairs())
    write_json(run.path("config.json"), run.config.resolved())
    shown = [scored(suite, who, tmp_path) for who in (model, run.folder)]
    assert "student" in shown[0] and "tiny" in shown[1]
    stored = {path: path.read_bytes() for path in (tmp_path / "store").glob("*.jsonl")}
    assert b"".join(stored.values()).count(b" response ") == 12
    assert scored(suite, run.folder, tmp_path) == shown[1]
    assert {path: path.read_bytes() for path in stored} == stored


def test_a_run_is_a_suite_of_its_held_out_prompts(tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path / "runs", model, heldout_pairs())
    write_json(run.path("config.json"), run.config.resolved())
    suite = load_suite(str(run.folder))
    assert [part.task.name for part in suite.parts] == ["math_word_problem"]
    assert suite.name == "tiny-heldout" and set(suite.limits().values()) == {12}
    assert "tiny-heldout" in scored(suite, model, tmp_path)


def test_a_student_that_a_server_has_is_asked_in_its_own_view(tmp_path: Path, model: Path) -> None:
    passage, pairs, asked = (Message(role="user", content="a passage"),), [], list[str]()
    for pair in heldout_pairs():
        prompt = pair.prompt.model_copy(update={"teacher_messages": passage})
        pairs.append(pair.model_copy(update={"prompt": prompt}))
    run = make_run(tmp_path / "runs", model, pairs)
    write_json(run.path("config.json"), run.config.resolved())

    def served(messages: list[dict[str, str]]) -> str:
        asked.append(messages[-1]["content"])
        return "4"

    tree = {**run.config.resolved(), "teacher": {"kind": "python", "responder": "served"}}
    (tmp_path / "served.yaml").write_text(json.dumps(tree))
    suite, who = load_suite(str(run.folder)), (str(tmp_path / "served.yaml"), "served")
    with provided({}, (), {"served": served}):
        score(suite, *who, tmp_path / "store", tmp_path / "out", student_view=True)
        assert all(text.startswith("What is ") for text in asked) and asked
        asked.clear()
        score(suite, *who, tmp_path / "store", tmp_path / "out")
        assert set(asked) == {"a passage"}


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ("configs/endpoint.yaml", Exit.BUDGET),
        ("gone/model", Exit.INPUT),
        ("gone.jsonl", Exit.INPUT),
        ("data/gsm8k/sample.jsonl", Exit.INPUT),
        ("data/forgetting/facts.jsonl", Exit.INPUT),
    ],
)
def test_who_cannot_be_asked_is_refused(tmp_path: Path, config: str, code: Exit) -> None:
    suite = load_suite(str(make_suite(tmp_path)))
    with pytest.raises(DistillError) as caught:
        scored(suite, config, tmp_path)
    assert caught.value.code == code, caught.value


FOUND = {
    "results": {
        "arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.1, "em,strict": 0.0,
                "em_stderr,strict": 0.0, "note,none": "text"},
    },
    "versions": {"arc": 1.0},
    "n-samples": {"arc": {"original": 100, "effective": 16}},
}  # fmt: skip


def test_results_of_lm_eval_are_read_back() -> None:
    found = lm_eval.read_results(FOUND)
    metrics = found["arc"].tree()["metrics"]
    assert metrics["acc"] == {"value": 0.25, "stderr": 0.1} and found["arc"].n == 16
    assert metrics["em (strict)"] == {"value": 0.0, "stderr": None}, "no error of width zero"
    assert set(metrics) == {"acc", "em (strict)"}
    _, rows = harness_rows(HarnessResult(harness="lm-eval 0", tasks=found))
    assert ("arc", "16", "acc", "0.2500", "0.1000") in rows


def test_without_lm_eval_tasks_or_a_student_there_is_one_line(tmp_path, model, monkeypatch):
    run = make_run(tmp_path / "runs", model, heldout_pairs())
    shutil.rmtree(run.path("adapter"))
    for module, tasks, words in (
        (None, "arc", "is not installed"),
        (lm_eval, "", "names no task"),
        (lm_eval, "arc", "is missing"),
    ):
        monkeypatch.setitem(sys.modules, "lm_eval", module)
        with pytest.raises(DistillError, match=words):
            lm_eval.main(run, tasks, None, None)
