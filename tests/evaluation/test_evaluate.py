"""The evaluate stage on a tiny real model with a real adapter: three models, one set of items, resumable."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.evaluation import answering, evaluate
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.suites import held_out, items_of
from distill.models import registry
from distill.records import Document, Message, Pair, Prompt, Response, Score, Timing, Usage
from distill.storage.files import read_json, read_records, write_records
from distill.storage.run_folder import Run
from distill.tasks.task import shipped
from tests.support.tiny import make_tiny

ITEMS = 8


def heldout_pairs() -> list[Pair]:
    """Return pairs of a task with a checker (number) and one without (chat), two chunks a document."""
    pairs = []
    for k in range(ITEMS):
        task = ("math_word_problem", "chat")[k % 2]
        prompt = Prompt.make(
            (Message(role="user", content=f"What is {k} + 1?"),),
            f"chunk{k}",
            task,
            reference=str(k + 1),
        )
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


def make_run(folder: Path, student: Path, pairs: list[Pair]) -> Run:
    """Make a run that has been trained: held-out pairs, documents, and an adapter that changes the student."""
    config = Config.model_validate(
        {
            "name": "tiny",
            "runs": str(folder),
            "corpus": {"source": "python-docs"},
            "teacher": {"kind": "recorded", "model": "somebody/teacher", "max_new_tokens": 12},
            "student": {"model": str(student), "dtype": "float32"},
            "evaluation": {"machine": "cpu-2-core", "bootstrap_samples": 500},
        }
    )
    run = Run(config)
    write_records(run.path("dataset/heldout.jsonl"), pairs)
    documents = [
        Document(id=f"chunk{k}", text="x", source="s", meta={"parent": f"doc{k // 2}"})
        for k in range(ITEMS)
    ]
    write_records(run.path("documents.jsonl"), documents)
    model: Any = AutoModelForCausalLM.from_pretrained(student)
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(run.path("adapter"))
    registry.record_base(run.path("adapter"), str(student))
    run.note("corpus", {"corpus_sha256": "ab" * 32, "python": "3.11.9", "documents": ITEMS})
    return run


def test_evaluation_measures_three_models_on_the_same_items(tmp_path: Path, student: Path) -> None:
    run = make_run(tmp_path, student, heldout_pairs())
    evaluate.main(run.config, run)
    found = read_json(run.path("evaluation.json"))
    checked, likeness = found["tasks"]["math_word_problem"], found["tasks"]["chat"]
    assert checked["teacher"] == 1.0 and checked["metric"] == "correct" and checked["n"] == 4
    assert likeness["teacher"] is None and likeness["gap_recovered"]["value"] is None
    assert likeness["gap_recovered"]["reason"]
    nats = found["agreement"]["nats_per_token"]
    assert nats["base"] > 0 and nats["student"] != nats["base"], "the adapter was not applied"
    assert (
        found["models"]["student"]["adapter_sha256"]
        and not found["models"]["base"]["adapter_sha256"]
    )
    assert found["models"]["teacher"]["sha256"] is None and found["models"]["teacher"]["reasons"]
    asked = read_records(run.path("requests.jsonl"), HeldOutRequest)
    assert sum(r.usage["teacher"].seconds for r in asked) == ITEMS * 0.5
    assert {r.test for r in asked} == {"correct", None} and not any(r.when_served for r in asked)
    for model in ("base", "student"):
        (timing,) = read_records(run.path(f"timings/{model}.jsonl"), Timing)
        assert timing.requests == ITEMS and timing.seconds > 0 and timing.read_seconds > 0
    assert found["corpus"]["python"] == "3.11.9"
    scores = read_records(run.path("scores/student.jsonl"), Score)
    assert len(scores) == ITEMS and all(score.reason for score in scores)
    assert len(read_records(run.path("scores/teacher.jsonl"), Score)) == 4, (
        "agreement has no teacher"
    )


def test_a_killed_evaluation_asks_nothing_twice_and_ends_the_same(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, student, heldout_pairs())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "answer_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(run.config, run)  # base has answered, nothing else is done
    monkeypatch.undo()
    evaluate.main(run.config, run)
    stored = sorted((tmp_path / ".store/responses").glob("*.jsonl"))
    before, first = stored[0].read_bytes(), read_json(run.path("evaluation.json"))
    assert before.count(b" response ") == 2 * ITEMS
    evaluate.main(run.config, run)
    assert stored[0].read_bytes() == before, "asked again what was stored"
    assert json.dumps(read_json(run.path("evaluation.json"))) == json.dumps(first)


def test_no_held_out_items_stop_with_exit_8(tmp_path: Path) -> None:
    write_records(tmp_path / "heldout.jsonl", [])
    with pytest.raises(DistillError) as caught:
        held_out(tmp_path / "heldout.jsonl")
    assert caught.value.code == Exit.EVALUATION


def test_chunks_of_one_document_are_one_cluster(tmp_path: Path) -> None:
    rows = [
        Document(id=f"chunk{k}", text="x", source="s", meta={"parent": "doc"}) for k in range(2)
    ]
    write_records(tmp_path / "documents.jsonl", rows)
    items = items_of(heldout_pairs()[:3], tmp_path / "documents.jsonl")
    assert [item.cluster for item in items] == ["doc", "doc", "chunk2"]


def test_a_task_whose_references_are_missing_is_measured_as_agreement() -> None:
    pairs = [
        p.model_copy(update={"prompt": p.prompt.model_copy(update={"reference": None})})
        for p in heldout_pairs()
    ]
    items = items_of(pairs, Path("none"))
    answers = {
        m: {i.id: p.response for i, p in zip(items, pairs, strict=True)}
        for m in ("teacher", "base", "student")
    }
    assert evaluate.measure_held_out(items, answers, shipped)["math_word_problem"].metric == "chrF"


def test_items_in_the_training_data_are_not_in_the_headline(tmp_path: Path, student: Path) -> None:
    pairs = heldout_pairs()
    run = make_run(tmp_path, student, pairs)
    stolen = pairs[0].prompt.messages[-1].content
    thief = Pair(
        prompt=Prompt.make((Message(role="user", content="hm"),), "d", "chat"),
        response=pairs[0].response.model_copy(update={"text": f"as asked:\n{stolen.upper()}"}),
    )
    write_records(run.path("dataset/train.jsonl"), [thief])
    evaluate.main(run.config, run)
    found = read_json(run.path("evaluation.json"))
    told = found["contamination"]
    assert (told["n"], told["flagged"], told["unsearchable"]) == (ITEMS, 1, 0)
    assert told["kinds"] == {"corpus": 0, "prompt": 0, "answer": 1}
    assert told["examples"][0]["item"] == told["items"][0] and "paraphrase" in told["method"]
    tasks = found["tasks"]
    assert sum(row["n"] for row in tasks.values()) == ITEMS - 1
    assert sum(row["n"] for row in told["all_items"]["tasks"].values()) == ITEMS
    assert len(read_records(run.path("scores/student.jsonl"), Score)) == ITEMS
    assert len(read_records(run.path("requests.jsonl"), HeldOutRequest)) == ITEMS - 1


def test_items_that_all_stand_in_the_training_data_stop_before_anything_is_asked(
    tmp_path: Path, student: Path
) -> None:
    pairs = heldout_pairs()
    run = make_run(tmp_path, student, pairs)
    write_records(run.path("dataset/train.jsonl"), pairs)
    with pytest.raises(DistillError, match="stand in the training data") as caught:
        evaluate.main(run.config, run)
    assert caught.value.code == Exit.EVALUATION and not run.path("answers").exists()
