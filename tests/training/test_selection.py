"""Prompts are bought where the student fails: which are chosen, kills, and nothing paid twice."""

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.config.tree import Config
from distill.corpus.prompts import TRANCHES
from distill.errors import Exit
from distill.generation import filters, generate
from distill.pipeline import NAMES, STAGES, perform
from distill.planning.machine import Machine
from distill.planning.plan import make_plan
from distill.records import Document, Message, Pair, Prompt, Response
from distill.storage.files import read_records, sha256_file, write_json
from distill.storage.run_folder import Run, open_run
from distill.training import selection
from distill.training.adapters import WEIGHTS
from distill.training.inner_run import InnerRun
from distill.training.student import StudentModel
from tests.support.buying import settings
from tests.support.fake_teacher import KEY, PRICE, FakeTeacher, Reply
from tests.support.tiny import make_tiny
from tests.support.training import Killed

HERE = Machine(name="here", kind="cpu", rates={"float32": ("float32", 1e9)}, source="a test")
ASKING = STAGES[: NAMES.index("filter")]


def yes(number: int, payload: dict[str, Any]) -> Reply:
    """Say yes to all: the references of the odd ones say no, so that their answers are dropped."""
    return Reply(message={"content": "yes"})


def write_config(folder: Path, teacher: FakeTeacher | str, **prompts: Any) -> Path:
    """Write a config of 24 questions; a student of the answers that pass says yes to all of them,
    which is right of every second one."""
    rows = [
        {"prompt": f"{'even' if n % 2 == 0 else 'odd'} {n}?", "reference": ("yes", "no")[n % 2]}
        for n in range(32)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ask.yaml").write_text(
        "metric: right\nstudent: {user: '{{ prompt }}'}\nchecker: {kind: exact}\n"
    )
    (folder / "prices.yaml").write_text(json.dumps({"tokens": [PRICE.model_dump(mode="json")]}))
    given = settings(teacher, api_key_env="TEACHER_KEY", max_new_tokens=6, budget_dollars="1")
    tree = {
        **{"name": "mine", "seed": 3},  # with which the first two prompts are of both kinds
        "runs": str(folder / "runs"),
        "corpus": {
            **{"path": str(folder / "rows.jsonl"), "near_duplicate_threshold": None},
            "split": {"validation": 4, "heldout": 4},
        },
        "prompts": {
            **{"tasks": [str(folder / "ask.yaml")], "train": 8, "select": "where_student_fails"},
            **prompts,
        },
        "teacher": given.model_dump(mode="json", exclude_unset=True),
        "terms": {"basis": "our own fake teacher"},
        "student": {"model": str(make_tiny(folder / "model")), "dtype": "float32"},
        "train": {
            **{"learning_rate": 0.02, "max_steps": 30, "tokens_per_step": 128, "bf16": False},
            **{"lora": {"r": 4, "alpha": 8}, "eval_steps": 10, "save_steps": 10},
        },
        "evaluation": {"prices": str(folder / "prices.yaml")},
    }
    (folder / "c.yaml").write_text(json.dumps(tree))
    return folder / "c.yaml"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, FakeTeacher]]:
    """A run, from the corpus to the answers, and its teacher, which still answers."""
    folder = tmp_path_factory.mktemp("unbroken")
    with FakeTeacher(yes) as teacher, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEACHER_KEY", KEY)
        run = open_run(write_config(folder, teacher))
        perform(run, ASKING)
        yield run, teacher


def trained_on(run: Run) -> list[list[Prompt]]:
    """Return the prompts of the train split that each tranche holds."""
    splits = {d.id: d.split for d in read_records(run.path("documents.jsonl"), Document)}
    tranches = [read_records(run.path(name), Prompt) for name in TRANCHES]
    return [[p for p in each if splits[p.document_id] == "train"] for each in tranches]


def outcome(run: Run) -> dict[str, object]:
    """Return all that must be equal, but for the times of answers."""
    names = [*TRANCHES, *(f"tranches/{n}/adapter/{WEIGHTS}" for n in (1, 2))]
    found: dict[str, object] = {name: sha256_file(run.path(name)) for name in names}
    for number in (1, 2):
        path = run.path(f"tranches/{number}/dataset/train.jsonl")
        found[path.parent.parent.name] = [p.response.id for p in read_records(path, Pair)]
        rows = read_records(path.parent.parent / "tried.jsonl", Response)
        found[f"{number} tried"] = [(r.id, r.text, r.mean_logprob) for r in rows]
    rows = read_records(run.path("responses.jsonl"), Response)
    return {**found, "answers": [(row.id, row.prompt_id, row.text) for row in rows]}


def test_the_teacher_is_asked_what_the_student_fails(unbroken):
    run, teacher = unbroken
    tranches = trained_on(run)
    assert [len(each) for each in tranches] == [2, 4, 8]
    for before, after in pairwise(tranches):
        new = [prompt for prompt in after if prompt not in before]
        assert len(new) == len(after) - len(before), "a tranche holds the one before"
        assert {prompt.reference for prompt in new} == {"no"}, "the others it can already"
    tried = read_records(run.path("tranches/1/tried.jsonl"), Response)
    assert {response.text for response in tried} == {"yes"} and len(tried) == 22
    assert all(-6 < (response.mean_logprob or 1) < 0 for response in tried)
    answers = read_records(run.path("responses.jsonl"), Response)
    assert len(answers) == 8 + 4 + 4 == len(teacher.payloads), "each prompt is bought once"
    assert "mean_logprob" not in run.path("responses.jsonl").read_text()
    assert not run.path("tranches/1/merged").exists()


def test_a_second_run_asks_nothing_and_the_budget_holds_for_all_tranches(unbroken):
    run, teacher = unbroken
    before = len(teacher.payloads)
    again = open_run(run.folder, ["name=again"])
    perform(again, ASKING)
    assert len(teacher.payloads) == before and outcome(again) == outcome(run)
    entries = run.ledger.entries()
    paid = {e.stage: e.dollars for e in entries if e.dollars}
    assert set(paid) == {"select", "generate"} and sum(paid.values()) == teacher.bill
    assert [(e.stage, e.attempts) for e in entries if e.attempts] == [
        ("select", 4 + 4 + 2 + 2),
        ("generate", 4),
    ]
    tried = [read_records(run.path(f"tranches/{n}/tried.jsonl"), Response) for n in (1, 2)]
    # the second student is the first again, as what it was to learn was dropped
    own = sum({r.id: r.usage.output_tokens for rows in tried for r in rows}.values())
    assert [e.student_output_tokens for e in entries if e.attempts] == [own, 0] and own > 0
    # a limit within the second tranche's prices ends the run there, and a higher one goes on
    limit = teacher.bill * Decimal("0.8")
    place = run.folder.parent.parent / "c.yaml"
    named = ["name=poor", f"store={run.folder.parent / 'poor'}", f"teacher.budget_dollars={limit}"]
    assert main(["run", str(place), *named]) == Exit.BUDGET
    poor = open_run(place, named)
    assert sum(e.dollars or 0 for e in poor.ledger.entries()) <= limit
    perform(open_run(place, [*named[:2], "teacher.budget_dollars=1"]), ASKING)
    assert outcome(poor) == outcome(run) and len(teacher.payloads) == 2 * before


KILLS: tuple[tuple[object, str, int], ...] = (  # in what, and in which call after the kill before
    (generate, "write_records", 1),
    (filters, "write_json", 1),
    (StudentModel, "forward", 12),
    (selection, "solves", 1),
    (selection, "write_records", 2),  # before the second tranche's prompts
    (generate, "write_records", 1),
    (StudentModel, "forward", 12),
    (selection, "solves", 3),
    (selection, "write_records", 3),  # before selected.jsonl
)


def test_a_selection_that_is_killed_again_and_again_ends_with_the_same_bytes(unbroken):
    run, teacher = unbroken
    place, before, bill = run.folder.parent.parent / "c.yaml", len(teacher.payloads), teacher.bill
    named = ["name=killed", f"store={run.folder.parent / 'killed-store'}"]
    for where, attribute, last in KILLS:
        real, calls = getattr(where, attribute), [0]

        def dying(*values: Any, real: Any = real, calls: Any = calls, last: int = last) -> Any:
            calls[0] += 1
            if calls[0] == last:
                raise Killed
            return real(*values)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(where, attribute, dying)
            perform(open_run(place, named), ASKING)
    killed = open_run(place, named)
    assert not killed.path("selected.jsonl").exists() and killed.path(TRANCHES[1]).exists()
    perform(killed, ASKING)
    assert outcome(killed) == outcome(run)
    assert len(teacher.payloads) - before == 16, "nothing is bought twice"
    paid = sum(entry.dollars or 0 for entry in killed.ledger.entries())
    assert paid == teacher.bill - bill


def prompt_of(text: str, reference: str | None = "yes", task: str = "ask") -> Prompt:
    return Prompt.make((Message(role="user", content=text),), "d", task, reference=reference)


def chosen_by(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, tuple[str, float | None]]
) -> tuple[str, int]:
    """Return which of some prompts are the three hardest, and how many were tried: `answers` says
    what the student answers, and how sure it is of that; None where there was no room."""
    outer = Run(
        Config.model_validate(
            {
                **{"name": "x", "runs": folder, "corpus": {"path": "x"}},
                **{"teacher": {"model": "t"}, "student": {"model": "s"}},
            }
        )
    )
    tasks: dict[str, dict[str, Any]] = {"ask": {"student": {"user": "x"}, "metric": "right"}}
    tasks["ask"]["checker"] = {"kind": "exact"}
    tasks["free"] = {"student": {"user": "x"}}
    tranche = InnerRun(outer, "tranches/1")
    write_json(tranche.path("tasks.json"), tasks)
    tried = list[str]()

    def answered(run: Run, prompts: list[Prompt], *values: Any, logprobs: bool) -> list[Response]:
        tried.extend(prompt.messages[0].content for prompt in prompts)
        rows = [answers[prompt.messages[0].content] for prompt in prompts]
        assert logprobs
        names = {"sample": 0, "prompt_id": "p", "model": "s", "id": "i", "request_key": "k"}
        return [
            Response.model_validate(
                {
                    **names,
                    "text": text,
                    "stop": "error" if sure is None else "length" if text == "cut" else "end",
                    "mean_logprob": sure,
                }
            )
            for text, sure in rows
        ]

    monkeypatch.setattr(selection, "student_answers", answered)
    monkeypatch.setattr(selection, "FEWEST", 3)
    prompts = [
        prompt_of(name, None if name == "d" else "yes", "free" if name == "e" else "ask")
        for name in answers
    ]
    hardest = selection.hardest(tranche, prompts, 3)
    return "".join(prompt.messages[0].content for prompt in hardest), len(tried)


def test_those_that_fail_come_first_then_the_least_sure(tmp_path, monkeypatch):
    right, wrong = ("yes", -0.5), ("no", -0.1)
    every = dict.fromkeys("abcdefgh", wrong)
    choose = partial(chosen_by, tmp_path, monkeypatch)
    # d has no reference and e no checker, so that nothing says whether they fail
    assert choose(every | {"d": right, "e": right}) == ("abc", 6), "enough fail of the first six"
    assert choose({"a": right, **dict.fromkeys("bc", wrong), "f": ("cut", -0.1)}) == ("bcf", 4)
    sure = {name: ("yes", -place / 10) for place, name in enumerate("afgbcdeh", 1)}
    assert choose(sure) == ("hed", 8), "none fails"
    assert choose({"d": wrong, "a": ("", None), "e": ("x", -2.0), "b": wrong}) == ("bed", 4)
    assert choose({"a": ("", None), "b": right, "c": right}) == ("bca", 3), "what has no room: last"


def test_a_corpus_within_the_budget_is_asked_in_full(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with FakeTeacher(yes) as teacher:
        run = open_run(write_config(tmp_path, teacher, train=24))
        perform(run, ASKING[:-1])
    assert read_records(run.path("selected.jsonl"), Prompt) == read_records(
        run.path("prompts.jsonl"), Prompt
    )
    assert not teacher.payloads and not run.path("tranches").exists()


@pytest.mark.parametrize(
    ("prompts", "what"),
    [
        ({"train": None}, "select needs train"),
        ({"train": 3}, "4 or more"),
        ({"questions": {}}, "select chooses among prompts that are there"),
    ],
)
def test_what_cannot_be_selected_is_refused(tmp_path, capsys, prompts, what):
    place = write_config(tmp_path, "http://127.0.0.1:9/v1", **prompts)
    assert main(["run", str(place)]) == Exit.CONFIG
    assert what in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_the_plan_counts_tranches_trainings_and_answers(tmp_path):
    run = open_run(write_config(tmp_path, "http://127.0.0.1:9/v1"))
    plan = make_plan(run, machine=HERE)
    rows = {row.stage: row for row in plan.stages}
    assert plan.prompts["train"] == 8 and rows["generate"].work.startswith("16 answers")
    # of 2 and then 4 more that it fails, where half of what it tries fails
    assert rows["select"].work == "asked in 3 tranches, 2 trainings, 12 answers of the student"
    assert (rows["select"].seconds or 0) > 0.75 * (rows["train"].seconds or 0)
    free = open_run(tmp_path / "c.yaml", ["prompts.tasks=[]"])
    rows = {row.stage: row for row in make_plan(free, machine=HERE).stages}
    assert "42 answers of the student" in rows["select"].work
