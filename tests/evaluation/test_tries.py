"""Several tries: chosen as in service, never by the reference, and scored as any other answer."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.callables import PROVIDED
from distill.config.tree import Tries
from distill.errors import DistillError, Exit
from distill.evaluation import evaluate
from distill.evaluation.scorers import HeldOutRequest, measure_items
from distill.evaluation.statistics import Certainty
from distill.evaluation.suites import held_out_items
from distill.evaluation.tries import TEST, VOTE, choose, tries_result, vote, way_to_choose
from distill.records import Item, Message, Prompt, Response, Score, Usage
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request
from distill.storage.files import read_json, read_records, write_records
from distill.storage.run_folder import Run
from distill.tasks.task import Task
from tests.evaluation.test_evaluate import heldout_pairs, make_run
from tests.evaluation.test_evaluate import student as student  # a fixture

HUMAN_EVAL = json.dumps({"prompt": "def f():", "test": "assert f() == 1", "entry_point": "f"})
WRONG = ("#### 1", "#### 2", "it is 3", "#### 4", "no idea")


def prompt(text: str = "3 + 4?", reference: str | None = "7", task: str = "sums") -> Prompt:
    turn = Message(role="user", content=text)
    return Prompt.make((turn,), f"document of {text}", task, reference=reference)


def answers(asked: Prompt, texts: Sequence[str], cut: Sequence[int] = ()) -> list[Response]:
    usage = Usage(input_tokens=10, output_tokens=4, seconds=0.5)
    return [
        Response(
            id=f"{asked.id} {k}", request_key="k", sample=k, prompt_id=asked.id, model="student",
            text=text, stop="length" if k in cut else "end", usage=usage,
        )
        for k, text in enumerate(texts)
    ]  # fmt: skip


def task(kind: str, **settings: Any) -> Task:
    tree = {"student": {"user": "{{ prompt }}"}, "metric": "m"}
    return Task.model_validate({"name": "t", **tree, "checker": {"kind": kind, **settings}})


@pytest.mark.parametrize(
    ("kind", "settings", "texts", "place"),
    [
        ("number", {}, ["#### 3", "so 5", "#### 7.0", "2", "it is 7", "1", "$7", "9"], 2),
        ("number", {}, ["8", "7", "7.00", "8"], 0),  # of a tie the first seen
        ("number", {}, ["none", "", "so 5", "#### 5"], 2),  # what says nothing has no vote
        ("number", {}, ["0.0000001", "2", ".0000001"], 0),
        ("math", {}, [r"\boxed{3}", r"\boxed{\frac{1}{2}}", r"\boxed{5}", "so $0.5$"], 1),
        ("math", {}, [r"\boxed{\sqrt{3}}", r"\boxed{4\sqrt{3}}", r"so $\sqrt{48}$"], 1),
        ("choice", {}, ["C. Not B", "The answer is B.", "answer: (B)"], 1),
        ("exact", {}, ["Yes", "yes", " yes "], 1),
        ("normalised", {}, ["No.", "The  answer!", "the answer"], 1),
        ("field_f1", {}, ["{", '{"a": "x"}', '{"a": 1, "b": "Y."}', '{"b": "y", "a": 1}'], 2),
        ("regex", {"pattern": "= (.+)"}, ["= 8", "7", "= 7", "is = 7 "], 2),
        ("number", {}, ["no", "nothing"], 0),
    ],
)
def test_the_vote_compares_answers_as_the_check_does(kind, settings, texts, place) -> None:
    check = {"kind": kind, **settings}
    for reference in ("the reference is not looked at", None):
        asked = prompt(reference=reference)
        assert vote(check, asked, answers(asked, texts)) == place
    assert way_to_choose(task(kind, **settings), prompt()) == VOTE


def test_what_was_cut_off_has_no_vote() -> None:
    assert vote({"kind": "number"}, prompt(), answers(prompt(), ["5", "5", "7"], cut=(0, 1))) == 2


@pytest.mark.parametrize(
    ("kind", "settings", "asked", "way"),
    [
        ("json_object", {"keys": {"a": "string"}}, prompt(reference=None), TEST),
        ("max_sentences", {}, prompt(reference=None), TEST),
        ("regex", {"pattern": "= .+"}, prompt(reference=None), TEST),
        ("python_code", {}, prompt(reference="os.path"), TEST),
        ("python_tests", {}, prompt("Write f.\nassert f() == 1", "assert f() == 1\n"), TEST),
        ("python_tests", {}, prompt("f, so that assert f() == 1", HUMAN_EVAL), TEST),
        ("python_tests", {}, prompt("Write f.", "assert f() == 1"), "do not stand in the prompt"),
        ("python_tests", {}, prompt("Write f.", HUMAN_EVAL), "do not stand in the prompt"),
        ("python_tests", {}, prompt("Write f.", " \n"), "nothing says which"),
        ("includes", {}, prompt(), "reads no answer to vote on"),
        ("number", {}, prompt(reference=None), "nothing says which"),
        ("mine", {}, prompt(), "mine reads no answer to vote on"),
        ("blind", {}, prompt(), TEST),
    ],
)
def test_each_check_has_its_way_or_a_reason(kind, settings, asked, way, monkeypatch) -> None:
    def blind(prompt: Prompt, text: str) -> bool:
        return True

    monkeypatch.setattr(blind, "needs_reference", False, raising=False)
    monkeypatch.setitem(PROVIDED["checker"], "mine", lambda prompt, text: True)
    monkeypatch.setitem(PROVIDED["checker"], "blind", blind)
    assert way in way_to_choose(task(kind, **settings), asked)


def compared(check: dict[str, Any] | None, texts: Sequence[Sequence[str]], greedy: str) -> Any:
    """Compare tries (a list an item) with a greedy answer, over items of a document each."""
    items = [Item.make(prompt(f"{k}: 3 + 4?", "7")) for k in range(len(texts))]
    by_item = {i.id: answers(i.prompt, mine) for i, mine in zip(items, texts, strict=True)}
    one = {i.id: answers(i.prompt, [greedy])[0] for i in items}
    row = measure_items(items, {"teacher": one, "student": one}, check, "right")
    tried = [answer for mine in by_item.values() for answer in mine] if check else []
    rows, choices = choose({"sums": row}, tried)
    settings = Tries(n=len(texts[0]), temperature=0.7)
    return tries_result(settings, rows, Certainty(samples=300)), choices, items


def test_a_student_that_is_right_in_three_of_eight_tries_wins_by_the_vote() -> None:
    right = [["#### 7", "so 7", "7.0"], list(WRONG)]
    texts = [[*right[1][: k % 5], *right[0], *right[1][k % 5 :]] for k in range(24)]
    result, choices, items = compared({"kind": "number"}, texts, "#### 8")
    row = result.tasks["sums"]
    assert (row.way, row.n, row.student.value, row.choice.value) == (VOTE, 24, 0.0, 1.0)
    assert row.any_right.value == 1.0 and row.choice_minus_student.low > 0.7
    assert row.choice_minus_student.conclude().verdict == "better"
    assert result.overall.choice == row.choice and result.overall.way == ""
    usage = choices[items[0].id].usage
    assert (usage.input_tokens, usage.output_tokens, usage.seconds) == (80, 32, 4.0)


def test_a_vote_that_is_wrong_loses_though_a_try_is_right() -> None:
    result, *_ = compared({"kind": "number"}, [["7", "8", "8"]] * 8, "#### 7")
    row = result.overall
    assert (row.student.value, row.choice.value, row.any_right.value) == (1.0, 0.0, 1.0)
    assert row.choice_minus_student.conclude().verdict == "worse"


def test_the_first_that_passes_is_chosen_and_a_grade_is_compared_as_a_grade() -> None:
    check = {"kind": "json_object", "keys": {"a": "string"}}
    texts = [["{", "[]", '{"a": "x"}', '{"a": "y"}']] * 6
    result, choices, items = compared(check, texts, "{")
    assert result.tasks["sums"].way == TEST and result.tasks["sums"].choice.value == 1.0
    assert choices[items[0].id].text == '{"a": "x"}'
    result, *_ = compared(None, texts, "{")
    row = result.tasks["sums"]
    assert row.reason == "nothing says which answer is right" and row.choice.value is None
    assert result.overall is None


def test_programs_choose_only_where_they_may_run() -> None:
    items = [Item.make(prompt("assert f() == 1", "assert f() == 1"))]
    mine = answers(items[0].prompt, ["def f(): return 2", "def f(): return 1"])
    row = measure_items(items, {"teacher": {}, "student": {}}, {"kind": "python_tests"}, "m")
    with pytest.raises(DistillError, match="not run unless asked") as caught:
        choose({"sums": row}, mine)
    assert caught.value.code == Exit.CONFIG


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, student: Path) -> Run:
    """Return an evaluated run with three tries, of a task with a check and one without."""
    folder = tmp_path_factory.mktemp("tries")
    run = make_run(folder, student, heldout_pairs(), tries={"n": 3, "temperature": 1.5})
    evaluate.main(run)
    return run


def test_only_what_can_be_chosen_is_tried_and_all_of_it_is_counted(evaluated: Run) -> None:
    by_try = read_records(evaluated.path("answers/tries.jsonl"), Response)
    checked = [i for i in held_out_items(evaluated.folder)[1] if i.task == "math_word_problem"]
    assert [r.prompt_id for r in by_try] == [i.prompt.id for i in checked for _ in range(3)]
    assert [r.sample for r in by_try] == [0, 1, 2] * len(checked)
    assert len({r.text for r in by_try}) == len(by_try), "all are sampled, each by its own seed"
    result = read_json(evaluated.path("evaluation.json"))["tries"]
    assert (result["n"], result["temperature"]) == (3, 1.5)
    assert result["tasks"]["chat"]["reason"] and "choice" not in result["tasks"]["chat"]
    assert result["tasks"]["math_word_problem"]["n"] == result["overall"]["n"] == len(checked)
    scores = read_records(evaluated.path("scores/tries.jsonl"), Score)
    assert [s.item_id for s in scores] == [i.id for i in checked] and scores[0].model == "tries"
    prompts = {item.id: item.prompt.id for item in checked}
    for request in read_records(evaluated.path("requests.jsonl"), HeldOutRequest):
        mine = [r.usage for r in by_try if r.prompt_id == prompts.get(request.item)]
        total = request.usage.get("tries", Usage())
        assert total.output_tokens == sum(usage.output_tokens for usage in mine)


def test_without_tries_nothing_is_written_of_them(evaluated: Run, tmp_path: Path) -> None:
    copied = shutil.copytree(evaluated.folder.parent, tmp_path / "runs")
    settings = evaluated.config.evaluation.model_copy(update={"tries": None})
    run = Run(evaluated.config.model_copy(update={"runs": copied, "evaluation": settings}))
    evaluate.measure(run, [], evaluate.find_overlap(run, held_out_items(run.folder)[1]))
    assert "tries" not in run.path("evaluation.json").read_text()
    assert "tries" not in run.path("requests.jsonl").read_text()


def test_the_vote_is_taken_from_files_alone(evaluated: Run, tmp_path: Path) -> None:
    copied = shutil.copytree(evaluated.folder.parent, tmp_path / "runs")
    run = Run(evaluated.config.model_copy(update={"runs": copied}))
    items = held_out_items(run.folder)[1]
    overlap = evaluate.find_overlap(run, items)
    evaluate.measure(run, [], overlap)
    for name in ("evaluation.json", "requests.jsonl", "scores/tries.jsonl"):
        assert run.path(name).read_bytes() == evaluated.path(name).read_bytes()
    by_try = read_records(run.path("answers/tries.jsonl"), Response)
    right = {item.prompt.id: item.reference for item in items}
    texts = [f"so {right[r.prompt_id]}" if r.sample else "so 99" for r in by_try]
    changes = [{"text": text, "stop": "end"} for text in texts]
    rows = [r.model_copy(update=change) for r, change in zip(by_try, changes, strict=True)]
    write_records(run.path("answers/tries.jsonl"), rows)
    evaluate.measure(run, [], overlap)
    row = read_json(run.path("evaluation.json"))["tries"]["overall"]
    assert (row["student"]["value"], row["choice"]["value"]) == (0.0, 1.0)


def test_a_kill_among_the_tries_asks_nothing_twice(evaluated: Run, tmp_path, monkeypatch) -> None:
    copied = shutil.copytree(evaluated.folder.parent, tmp_path / "runs")
    run = Run(evaluated.config.model_copy(update={"runs": copied}))
    shutil.rmtree(copied / ".store")
    shutil.rmtree(run.path("answers"))
    sampled, finish = list[Request](), LocalResponder._raw

    def mortal(responder: LocalResponder, request: Request, row: Any) -> Any:
        sampled.extend([request] if request.sampling.temperature else [])
        if len(sampled) > 4:
            raise KeyboardInterrupt
        return finish(responder, request, row)

    with monkeypatch.context() as patch:
        patch.setattr(LocalResponder, "_raw", mortal)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(run)
    assert not run.path("answers/tries.jsonl").exists()
    evaluate.main(run)
    (log,) = (copied / ".store/responses").glob("*.jsonl")
    assert log.read_bytes().count(b" response ") == 2 * 8 + 3 * 4
    for name in ("answers/tries.jsonl", "scores/tries.jsonl"):
        texts = [
            [{k: v for k, v in json.loads(line).items() if k != "usage"} for line in lines]
            for lines in (one.path(name).read_text().splitlines() for one in (run, evaluated))
        ]
        assert texts[0] == texts[1]
