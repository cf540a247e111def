"""The stage on a tiny real model with a real adapter: three models, held-out items and a suite."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.config.teachers import LocalTeacher
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.evaluation import answering, evaluate
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.suites import held_out_items
from distill.records import Document, Message, Pair, Prompt, Response, Score, Timing, Usage
from distill.storage.files import read_json, read_records, write_records
from distill.storage.run_folder import Run
from tests.evaluation.test_suites import make_suite
from tests.support.tiny import make_adapter, make_tiny

ITEMS, QUESTIONS = 8, 6  # held out, and of the suite


def heldout_pairs() -> list[Pair]:
    """Return pairs of a task with a checker (number) and one without (chat), two a document."""
    pairs = []
    for k in range(ITEMS):
        task = ("math_word_problem", "chat")[k % 2]
        turn = Message(role="user", content=f"What is {k} + 1?")
        prompt = Prompt.make((turn,), f"chunk{k}", task, reference=str(k + 1))
        usage = Usage(input_tokens=9, output_tokens=4, seconds=0.5)
        answer = Response(
            id=f"r{k}", request_key=f"k{k}", sample=0, prompt_id=prompt.id, model="teacher",
            text=f"It is {k + 1}.", stop="end", usage=usage,
        )  # fmt: skip
        pairs.append(Pair(prompt=prompt, response=answer))
    return pairs


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "student")


def make_run(folder: Path, student: Path, pairs: list[Pair], **settings: Any) -> Run:
    """Make a run that has been trained: held-out pairs, documents, an adapter with an effect."""
    evaluation = {"machine": "cpu-2-core", "bootstrap_samples": 500, **settings}
    tree = {
        "name": "tiny",
        "runs": str(folder),
        "corpus": {"source": "python-docs"},
        "teacher": {"kind": "recorded", "model": "somebody/teacher", "max_new_tokens": 12},
        "student": {"model": str(student), "dtype": "float32"},
        "evaluation": evaluation,
    }
    run = Run(Config.model_validate(tree))
    write_records(run.path("dataset/heldout.jsonl"), pairs)
    documents = [
        Document(id=f"chunk{k}", text="x", source="s", meta={"parent": f"doc{k // 2}"})
        for k in range(ITEMS)
    ]
    write_records(run.path("documents.jsonl"), documents)
    make_adapter(run.path("adapter"), str(student), 0.3)
    run.note("corpus", {"corpus_sha256": "ab" * 32, "python": "3.11.9", "documents": ITEMS})
    return run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, student: Path) -> Run:
    """Return an evaluated run with a suite, which no teacher can be asked anew."""
    folder = tmp_path_factory.mktemp("evaluated")
    suite = make_suite(folder / "suite")
    suite.write_text(suite.read_text() + "ask_teacher: true\n")
    run = make_run(folder / "runs", student, heldout_pairs(), suites=[str(suite)])
    evaluate.main(run)
    return run


@pytest.fixture
def again(evaluated: Run, tmp_path: Path) -> Run:
    """Return a copy of the evaluated run, with its store."""
    folder = shutil.copytree(evaluated.folder.parent, tmp_path / "runs")
    return Run(evaluated.config.model_copy(update={"runs": folder}))


def test_evaluation_measures_three_models_on_the_same_items(evaluated: Run) -> None:
    evaluation = read_json(evaluated.path("evaluation.json"))
    checked, likeness = (evaluation["tasks"][name] for name in ("math_word_problem", "chat"))
    assert checked["teacher"] == 1.0 and checked["metric"] == "correct" and checked["n"] == 4
    assert likeness["teacher"] is None and likeness["gap_recovered"]["value"] is None
    assert likeness["gap_recovered"]["reason"]
    nats, top = (evaluation["agreement"][name] for name in ("nats_per_token", "top1"))
    assert nats["base"] > 0 and nats["student"] != nats["base"], "the adapter was not applied"
    assert 0 <= top["base"] <= 1 and top["tokens"] == nats["tokens"]
    models = evaluation["models"]
    assert models["student"]["adapter_sha256"] and not models["base"]["adapter_sha256"]
    assert models["teacher"]["sha256"] is None and models["teacher"]["reasons"]
    requests = read_records(evaluated.path("requests.jsonl"), HeldOutRequest)
    assert sum(r.usage["teacher"].seconds for r in requests) == ITEMS * 0.5
    assert {(r.test, r.when_served) for r in requests} == {("correct", False), (None, False)}
    for model in ("base", "student"):
        (timing,) = read_records(evaluated.path(f"timings/{model}.jsonl"), Timing)
        (load,) = timing.loads
        assert (load.requests, load.concurrency) == (ITEMS, min(8, ITEMS))
        assert load.usage.seconds > 0 and timing.read_seconds > 0
    assert evaluation["corpus"]["python"] == "3.11.9"
    scores = read_records(evaluated.path("scores/student.jsonl"), Score)
    assert len(scores) == ITEMS and all(score.reason for score in scores)
    scores = read_records(evaluated.path("scores/teacher.jsonl"), Score)
    assert len(scores) == 4, "agreement has no teacher"


def test_a_suite_stands_beside_the_held_out_items(evaluated: Run) -> None:
    evaluation = read_json(evaluated.path("evaluation.json"))
    suite = evaluation["suites"]["sums"]
    assert suite["license"] == "none" and suite["tasks"]["sums"]["n"] == QUESTIONS
    assert evaluation["overall"]["n"] == 4, "its items are not in the headline"
    row = suite["overall"]
    assert row["teacher"] is None and row["reasons"]["teacher"] == row["gap_recovered"]["reason"]
    assert "recorded" in row["reasons"]["teacher"]
    assert row["student_minus_base"]["mean"] is not None
    assert len(read_records(evaluated.path("scores/sums/student.jsonl"), Score)) == QUESTIONS
    assert evaluated.path("scores/sums/items.jsonl").exists()


@pytest.mark.parametrize("killed", ["ask_suite", "answer_loss"])
def test_a_killed_evaluation_asks_nothing_twice_and_ends_the_same(
    again: Run, evaluated: Run, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    store = again.folder.parent / ".store/responses"
    shutil.rmtree(store)
    shutil.rmtree(again.path("answers"))

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answering, killed, kill)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(again)  # base has answered the held-out prompts
    evaluate.main(again)
    (log,) = store.glob("*.jsonl")
    assert log.read_bytes().count(b" response ") == 2 * (ITEMS + QUESTIONS)
    first, second = (
        {k: v for k, v in read_json(run.path("evaluation.json")).items() if k != "environment"}
        for run in (evaluated, again)
    )
    assert json.dumps(first) == json.dumps(second)


def test_a_local_teacher_is_asked_where_the_suite_says_so(again: Run, student: Path) -> None:
    limit = again.config.teacher.max_new_tokens
    local = LocalTeacher(model=str(student), dtype="float32", max_new_tokens=limit, license="mit")
    terms = again.config.terms.model_copy(update={"basis": "it is ours"})
    run = Run(again.config.model_copy(update={"teacher": local, "terms": terms}))
    evaluate.main(run)
    row = read_json(run.path("evaluation.json"))["suites"]["sums"]["overall"]
    assert row["teacher"] == row["base"], "the same weights"
    assert row["student_minus_teacher"]["mean"] is not None
    assert len(read_records(run.path("scores/sums/teacher.jsonl"), Score)) == QUESTIONS
    assert run.path("timings/teacher.jsonl").exists()


def test_items_in_the_training_data_are_not_in_the_headline(again: Run) -> None:
    stolen = again.folder / "dataset/heldout.jsonl"
    pair = read_records(stolen, Pair)[0]
    text = f"as asked:\n{pair.prompt.messages[-1].content.upper()}"
    thief = Pair(
        prompt=Prompt.make((Message(role="user", content="hm"),), "d", "chat"),
        response=pair.response.model_copy(update={"text": text}),
    )
    write_records(again.path("dataset/train.jsonl"), [thief])
    evaluate.main(again)
    evaluation = read_json(again.path("evaluation.json"))
    overlap = evaluation["contamination"]
    assert (overlap["n"], overlap["flagged"], overlap["unsearchable"]) == (ITEMS, 1, 0)
    assert overlap["kinds"] == {"corpus": 0, "prompt": 0, "answer": 1}
    assert overlap["examples"][0]["item"] == overlap["items"][0]
    assert "paraphrase" in overlap["method"]
    tasks, all_tasks = evaluation["tasks"], overlap["all_items"]["tasks"]
    assert sum(row["n"] for row in tasks.values()) == ITEMS - 1
    assert sum(row["n"] for row in all_tasks.values()) == ITEMS
    assert len(read_records(again.path("scores/student.jsonl"), Score)) == ITEMS
    assert len(read_records(again.path("requests.jsonl"), HeldOutRequest)) == ITEMS - 1


def test_items_that_all_stand_in_the_training_data_stop_before_anything_is_asked(again):
    shutil.rmtree(again.path("answers"))
    shutil.copy(again.path("dataset/heldout.jsonl"), again.path("dataset/train.jsonl"))
    with pytest.raises(DistillError, match="stand in the training data") as caught:
        evaluate.main(again)
    assert caught.value.code == Exit.EVALUATION and not again.path("answers").exists()


def test_chunks_of_one_document_are_one_cluster(tmp_path: Path) -> None:
    rows = [
        Document(id=f"chunk{k}", text="x", source="s", meta={"parent": "doc"}) for k in range(2)
    ]
    write_records(tmp_path / "documents.jsonl", rows)
    pairs = heldout_pairs()
    write_records(tmp_path / "dataset/heldout.jsonl", [*pairs[:2], pairs[0], pairs[2]])
    kept, items = held_out_items(tmp_path)
    write_records(tmp_path / "empty/dataset/heldout.jsonl", [])
    with pytest.raises(DistillError) as caught:
        held_out_items(tmp_path / "empty")
    assert caught.value.code == Exit.EVALUATION
    assert kept == pairs[:3] and [item.cluster for item in items] == ["doc", "doc", "chunk2"]
