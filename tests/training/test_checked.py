"""The checkpoint that a checker chooses: by the student's own answers, whatever the loss says."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.errors import Exit
from distill.generation.filters import CHECKED
from distill.records import Item, Message, Pair, Prompt, Response, Score
from distill.responders.local.continuous_batching import ContinuousBatch
from distill.storage.files import read_records, write_json, write_records
from distill.storage.run_folder import Run, open_run
from distill.tasks.task import TASKS_FILE
from distill.training import train
from distill.training.adapters import WEIGHTS
from distill.training.checked import check_adapter, validation_prompts
from tests.support.buying import settings
from tests.support.errors import stops
from tests.support.fake_teacher import KEY, FakeTeacher, Reply, question
from tests.support.launched import finished, launch, write_config
from tests.support.tiny import make_tiny
from tests.support.training import Killed, equal, make_run, outcome, training

TASK = {"metric": "right", "student": {"user": "{{ prompt }}"}, "checker": {"kind": "exact"}}
SETTINGS = {"num_train_epochs": 6, "learning_rate": 0.02, "tokens_per_step": 300, "eval_steps": 4}


def ask(number: int, answer: str) -> Pair:
    """Return a question of two kinds, whose right answer is its kind, and some answer."""
    kind = "ab"[number % 2]
    messages = (Message(role="user", content=f"{kind * 3} {number}"),)
    prompt = Prompt.make(messages, f"document {number}", "t", reference=kind)
    names = {"request_key": prompt.id, "prompt_id": prompt.id, "model": "m", "stop": "end"}
    fields = {"id": Response.make_id(prompt.id, 0), "sample": 0, "text": answer or kind, **names}
    return Pair(prompt=prompt, response=Response.model_validate(fields))


def make_task(folder: Path, name: str, metric: str = "checker", **settings: Any) -> Run:
    """Return a run whose teacher words the right answer in another way in validation."""
    train_settings = {**SETTINGS, "metric_for_best_model": metric, **settings}
    run = make_run(folder, name, save_steps=3, **train_settings)
    run.config = run.config.model_copy(
        update={"teacher": run.config.teacher.model_copy(update={"max_new_tokens": 4})}
    )
    write_records(run.path("dataset/train.jsonl"), [ask(n, "") for n in range(32)])
    wordy = [ask(n, f"QXZ {n} it is, as I see it") for n in range(100, 110)]
    write_records(run.path("dataset/validation.jsonl"), wordy)
    write_records(run.path(CHECKED), [ask(n, "").prompt for n in range(100, 112)])
    write_json(run.path(TASKS_FILE), {"t": TASK})
    return run


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> dict[str, Run]:
    """Two trainings of the same steps, whose checkpoint the loss and the checker choose."""
    folder = tmp_path_factory.mktemp("chosen")
    runs = {metric: make_task(folder, metric, metric) for metric in ("loss", "checker")}
    for run in runs.values():
        train.main(run)
    return runs


def test_loss_and_checker_choose_other_checkpoints_and_the_checkers_is_right_more_often(chosen):
    loss, checker = (training(run) for run in chosen.values())
    assert loss["best_step"] < checker["best_step"] == checker["adapter_step"]
    held_out = [ask(n, "").prompt for n in range(200, 212)]
    right = [
        sum(score.value or 0 for score in check_adapter(run, held_out, run.path("adapter")))
        for run in chosen.values()
    ]
    assert right[1] >= right[0] + 4, right


def test_answering_leaves_the_training_as_it_was_to_the_bit(chosen):
    loss, checker = (outcome(run) for run in chosen.values())
    assert loss["history"] == checker["history"]
    assert equal(loss["optimizer"], checker["optimizer"])


def test_an_epoch_is_validated_once_and_each_answer_of_the_best_is_on_record(chosen):
    run, made = chosen["checker"], training(chosen["checker"])
    last = [row["step"] for row in made["history"]][-1]
    ends = [
        row["step"]
        for row, after in zip(made["history"], [*made["history"][1:], {"epoch": 99}], strict=True)
        if row["epoch"] != after["epoch"]
    ]
    assert [row["step"] for row in made["validation"]] == ends and ends[-1] == last
    best = next(row for row in made["validation"] if row["step"] == made["best_step"])
    assert best["checker"] == max(row["checker"] for row in made["validation"]) and best["n"] == 12
    rows = read_records(run.path("training_checks.jsonl"), Score)
    assert [row.item_id for row in rows] == [Item.make(p).id for p in validation_prompts(run)]
    assert sum(row.value or 0 for row in rows) / 12 == best["checker"]
    again = check_adapter(run, validation_prompts(run), run.path("adapter"))
    assert [(s.value, s.answer) for s in again] == [(s.value, s.answer) for s in rows]
    assert "eval_steps is ignored" in made["notes"][0]


@contextmanager
def killed_while_answering(step: int) -> Iterator[None]:
    """Stop the block in a step of the student's answers."""
    advance, count = ContinuousBatch.advance, [0]

    def counted(batch: ContinuousBatch) -> Any:
        count[0] += 1
        if count[0] == step:
            raise Killed
        return advance(batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ContinuousBatch, "advance", counted)
        yield


@pytest.mark.parametrize("step", [2, 17])
def test_a_run_killed_in_a_validation_ends_with_the_same_bits(chosen, step):
    whole = chosen["checker"]
    run = make_task(whole.folder.parent.parent, f"killed{step}")
    with killed_while_answering(step):
        train.main(run)
    train.main(run)
    assert outcome(run)["validation"] == outcome(whole)["validation"]
    for name in ("training_checks.jsonl", f"adapter/{WEIGHTS}"):
        assert run.path(name).read_bytes() == whole.path(name).read_bytes()


def test_training_in_all_its_ways_is_left_as_it_was(tmp_path):
    """With dropout, checkpointed activations and rows that are padded, in bfloat16."""
    ways = {
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        **{"gradient_checkpointing": True, "packing": False, "bf16": True, "num_train_epochs": 2},
    }
    runs = [make_task(tmp_path, metric, metric, **ways) for metric in ("loss", "checker")]
    for run in runs:
        train.main(run)
    one, other = map(outcome, runs)
    assert one["history"] == other["history"] and equal(one["optimizer"], other["optimizer"])


def test_a_validation_without_a_checker_is_by_loss_and_says_so(tmp_path):
    run = make_task(tmp_path, "none", num_train_epochs=1)
    write_records(run.path(CHECKED), [])
    train.main(run)
    made = training(run)
    assert "by loss, if at all: no prompt has a checker and what that needs" in made["notes"][0]
    assert [row["step"] for row in made["validation"]] == [made["steps"]]
    assert not run.path("training_checks.jsonl").exists()


def test_what_could_not_be_checked_is_no_wrong_answer_and_where_all_are_it_ends(
    tmp_path, monkeypatch, capsys
):
    run = make_task(tmp_path, "unchecked", num_train_epochs=1)
    values: list[float | None] = [None] * 12

    def scores(run: Run, prompts: list[Prompt], *_: object) -> list[Score]:
        names = [Item.make(prompt).id for prompt in prompts]
        facts = {"model": "student", "reason": "no sandbox"}
        rows = zip(names, values, strict=True)
        return [Score.model_validate({"item_id": n, "value": v, **facts}) for n, v in rows]

    monkeypatch.setattr(train, "check_student", scores)
    with stops(Exit.TRAINING, "12 of 12 answers were not checked: no sandbox"):
        train.main(run)
    values[:3] = [1.0, 0.0, 1.0]
    train.main(run)
    [row] = training(run)["validation"]
    assert row["checker"] == pytest.approx(2 / 3) and row["n"] == 3
    assert "9 of 12 answers were not checked" in capsys.readouterr().err


def test_patience_counts_epochs_and_a_tie_is_won_by_the_earlier_one(tmp_path):
    run = make_task(tmp_path, "still", learning_rate=1e-9, early_stopping_patience=2)
    train.main(run)
    made = training(run)
    assert len(made["validation"]) == 3 and made["stopped_early"]
    assert made["best_step"] == made["adapter_step"] == made["validation"][0]["step"]


def write_paid_task(folder: Path, teacher: FakeTeacher) -> Path:
    """Write a run of a paid teacher; two prompts, both of validation, have no reference."""
    os.environ["TEACHER_KEY"] = KEY
    rows = [
        {"prompt": f"{'ab'[n % 2] * 3} {n}", "reference": None if n in (2, 3) else "ab"[n % 2]}
        for n in range(48)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "letter.yaml").write_text(json.dumps(TASK))
    given = {"api_key_env": "TEACHER_KEY", "max_new_tokens": 4}
    lora = {"r": 4, "alpha": 8}
    tree = {
        **{"name": "paid", "runs": str(folder / "runs"), "terms": {"basis": "our own"}},
        "corpus": {
            **{"path": str(folder / "rows.jsonl"), "near_duplicate_threshold": None},
            "split": {"validation": 12, "heldout": 8},
        },
        "prompts": {"tasks": [str(folder / "letter.yaml")]},
        "teacher": settings(teacher, **given).model_dump(mode="json", exclude_unset=True),
        "student": {"model": str(make_tiny(folder / "model"))},
        "train": {**SETTINGS, "metric_for_best_model": "checker", "lora": lora, "bf16": False},
        "evaluation": {"max_new_tokens": 4},
    }
    (folder / "paid.yaml").write_text(json.dumps(tree))
    return folder / "paid.yaml"


def test_answers_that_the_checker_alone_would_read_are_not_bought(tmp_path, capsys):
    def right(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(message={"content": question(payload)[0]})

    with FakeTeacher(right) as teacher:
        config = write_paid_task(tmp_path, teacher)
        assert main(["plan", str(config)]) == 0
        plan = capsys.readouterr().out
        assert main(["run", str(config)]) == 0
        questions = {question(payload) for payload in teacher.payloads}
    run = open_run(config)
    prompts = validation_prompts(run)
    assert len(prompts) == 10 and all(prompt.reference for prompt in prompts)
    assert f"{len(prompts)} validation prompts are not asked" in " ".join(plan.split())
    assert f"{48 - len(prompts)} requests" in plan
    assert questions.isdisjoint(prompt.messages[0].content for prompt in prompts)
    assert len(teacher.payloads) == len(questions) == 48 - len(prompts)
    bought = read_records(run.path("dataset/validation.jsonl"), Pair)
    assert len(bought) == 12 - len(prompts) and not any(p.prompt.reference for p in bought)
    rows = training(run)["validation"]
    assert all(row["n"] == len(prompts) and row["loss"] > 0 for row in rows) and len(rows) == 6
    card = json.loads(run.path("scorecard.json").read_text())["training"]
    best = max(row["checker"] for row in rows)
    assert card["validation_prompts"] == len(prompts)
    assert card["validation_right"] == pytest.approx(best, rel=1e-5)
    page = run.path("report.html").read_text()
    assert "validation prompts answered right, %" in page and "Right in validation" in page
    assert f"which answered most of {len(prompts)} validation prompts right" in page
    assert main(["verify", str(run.folder)]) == 0


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_choose_the_same(tmp_path):
    run = make_task(tmp_path, "two", num_processes=2, num_train_epochs=2)
    alone = make_task(tmp_path, "alone", num_train_epochs=2)
    train.main(alone)
    config = str(write_config(run, tmp_path))
    process = launch("--multi_gpu", "--num_processes", "2", "scripts/train.py", config)
    shown = finished(process)
    assert process.returncode == 0, shown
    one, two = training(alone), training(run)
    assert [row["checker"] for row in one["validation"]] == [
        row["checker"] for row in two["validation"]
    ]
    assert one["best_step"] == two["best_step"] and two["world_size"] == 2
    rows, others = (r.path("training_checks.jsonl").read_bytes() for r in (alone, run))
    assert rows == others
