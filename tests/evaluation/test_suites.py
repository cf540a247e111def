"""Suites: read from YAML with their questions; refused in one line where something is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import DistillError, Exit
from distill.evaluation.suites import (
    known_suites,
    load_suite,
    load_suites,
    read_suite,
    suite_hashes,
)

SUM = {
    "name": "sums",
    "metric": "correct",
    "student": {"user": "{{ prompt }}"},
    "checker": {"kind": "number"},
}
QUESTIONS = [{"question": f"{k} + 1?", "answer": str(k + 1)} for k in range(6)]


def make_suite(folder: Path, rows: Any = QUESTIONS, task: Any = SUM, **changes: Any) -> Path:
    """Write a suite of one task with its questions beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"task": task, "data": {"path": "q.jsonl"}, "max_new_tokens": 8, **changes}
    told = {"description": "sums", "source": "made here", "license": "none", "tasks": [entry]}
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


def refused(path: Path, code: Exit, *words: str) -> None:
    with pytest.raises(DistillError) as caught:
        load_suite(str(path))
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_suite_is_its_tasks_with_their_items(tmp_path: Path) -> None:
    suite = load_suite(str(make_suite(tmp_path)))
    assert suite.name == "sums" and not suite.ask_teacher and suite.facts["license"] == "none"
    assert {item.reference for item in suite.items} == {str(k + 1) for k in range(6)}
    assert set(suite.limits().values()) == {8} and len({i.cluster for i in suite.items}) == 6


def test_n_chooses_by_content_and_not_by_place(tmp_path: Path) -> None:
    first = load_suite(str(make_suite(tmp_path / "a", n=3))).items
    turned = load_suite(str(make_suite(tmp_path / "b", QUESTIONS[::-1], n=3))).items
    assert first == turned and len(first) == 3


def test_rows_of_one_passage_are_one_cluster_and_columns_have_any_name(tmp_path: Path) -> None:
    rows = [{"q": f"{k}?", "gold": k, "passage": k // 2} for k in range(4)]
    data = {"path": "q.jsonl", "columns": {"prompt": "q", "reference": "gold"}}
    suite = load_suite(str(make_suite(tmp_path, rows, data={**data, "cluster": "passage"})))
    assert sorted(item.cluster for item in suite.items) == ["0", "0", "1", "1"]
    assert {item.reference for item in suite.items} == {"0", "1", "2", "3"}


def test_the_shapes_of_gsm8k_and_humaneval_are_read_from_a_file(tmp_path: Path) -> None:
    gsm8k = load_suite("gsm8k", Path("data/gsm8k/sample.jsonl"))
    assert len(gsm8k.items) == 160 and all(item.reference for item in gsm8k.items)
    assert "a short solution" in gsm8k.items[0].prompt.messages[0].content
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def one() -> int:\n    ...\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() < 2 and candidate() == 1\n",
        "entry_point": "one",
    }
    (tmp_path / "h.jsonl").write_text(json.dumps(row))
    (item,) = load_suite("humaneval", tmp_path / "h.jsonl").items
    assert json.loads(item.reference or "")["test"] == row["test"]
    assert "canonical" not in str(item.prompt.messages)


def test_what_is_wrong_with_a_suite_is_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "none.yaml", Exit.CONFIG, "no such suite", "forgetting")
    refused(make_suite(tmp_path, rows=[]), Exit.INPUT, "task sums", "no items")
    refused(make_suite(tmp_path, n=0), Exit.CONFIG, "tasks.0.n")
    refused(make_suite(tmp_path, rows=[{"x": 1}]), Exit.INPUT, "q.jsonl:1", "no question")
    refused(make_suite(tmp_path, task="chat"), Exit.CONFIG, "chat has no checker")
    refused(make_suite(tmp_path, task=SUM | {"checker": {"kind": "vibes"}}), Exit.CONFIG, "vibes")
    refused(make_suite(tmp_path, data={}), Exit.CONFIG, "needs path or dataset")
    refused(make_suite(tmp_path, data={"path": "gone.jsonl"}), Exit.INPUT, "gone.jsonl")
    refused(make_suite(tmp_path, colour="red"), Exit.CONFIG, "colour")
    path = make_suite(tmp_path)
    with pytest.raises(DistillError, match="two suites are called sums"):
        load_suites([str(path), str(make_suite(tmp_path / "other"))])
    path.write_text(path.read_text().replace("license: none", ""))
    refused(path, Exit.CONFIG, "license")


def test_a_changed_question_changes_the_stage_s_identity(tmp_path: Path) -> None:
    path = make_suite(tmp_path)
    names = [str(path)]
    before = suite_hashes(names)
    assert list(before) == [f"suite {path}"] and suite_hashes(names) == before
    make_suite(tmp_path, rows=QUESTIONS[:-1])
    assert suite_hashes(names) != before


@pytest.mark.parametrize("name", known_suites())
def test_shipped_suites_are_whole(name: str) -> None:
    suite, _ = read_suite(name)
    assert suite.license and suite.source
    for entry in suite.tasks:
        assert entry.load_task().checker
        assert entry.data.path is None or entry.data.path.is_file()


def test_the_forgetting_set_is_small_checkable_and_passed_by_its_own_answers() -> None:
    from distill.tasks.checkers import check

    suite = load_suite("forgetting")
    assert len(suite.items) == 56 and str(len(suite.items)) in suite.facts["description"]
    assert sum(suite.limits().values()) < 56 * 50, "it must cost little"
    for part in suite.parts:
        for item in part.items:
            assert check(part.task.checker or {}, item.prompt, item.reference or "").passed
