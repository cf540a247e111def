"""What can only fail later is found before the first request and the first training step: H26, and
the look before anything is bought, of `plan`, `run` and stages run alone."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.cli import main
from distill.errors import Exit
from distill.planning import plan, preflight
from distill.storage.files import read_json, write_json
from tests.planning.test_pilot import write_config
from tests.support.fake_teacher import FakeTeacher
from tests.support.tiny import make_tiny

GEMMA = "teacher.model=gemma-3-27b-it"
JUDGE = "evaluation.judge={kind: endpoint, model: j, base_url: 'http://127.0.0.1:1/v1'"
SUITE = """
description: one small question
source: written for this test
license: CC0-1.0
tasks:
  - task: {name: sums, metric: correct, student: {user: "{{ prompt }}"}, checker: {kind: number}}
    data: {path: questions.jsonl}
"""


@pytest.fixture(scope="module")
def teacher() -> Iterator[FakeTeacher]:
    with FakeTeacher() as served:
        yield served


@pytest.fixture
def place(tmp_path: Path, teacher: FakeTeacher, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a config whose student and judge are small models in folders; work in its folder."""
    monkeypatch.chdir(tmp_path)
    teacher.payloads.clear()
    make_tiny(tmp_path / "student")
    make_tiny(tmp_path / "other", "qwen2")
    return write_config(tmp_path, teacher)


def edit(name: str, **facts: object) -> Callable[[], object]:
    """Change keys of a JSON file of the student; None takes one out."""

    def change() -> None:
        path = Path("student") / name
        tree = {**read_json(path), **facts}
        write_json(path, {key: value for key, value in tree.items() if value is not None})

    return change


def another_vocabulary() -> None:
    path = Path("other/tokenizer.json")
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tree))


def template(text: str) -> Callable[[], object]:
    return lambda: Path("student/chat_template.jinja").write_text(text)


def suite(questions: str | None) -> Callable[[], object]:
    def write() -> None:
        Path("mine.yaml").write_text(SUITE)
        if questions is not None:
            Path("questions.jsonl").write_text(questions)

    return write


def nothing() -> None:
    """Leave the folder as it is."""


SOFT = ("train.loss.forward_kl=1", "signals.model=./other")
FOUND: dict[str, tuple[tuple[str, ...], Callable[[], object], Exit, str]] = {
    "H26 report_to that is not installed": (
        ("train.report_to=wandb",),
        *(nothing, Exit.TRAINING, "train.report_to: wandb is not installed"),
    ),
    "H26 load_in_4bit without a GPU": (
        ("student.load_in_4bit=true",),
        *(nothing, Exit.TRAINING, "student.load_in_4bit: needs an NVIDIA GPU and bitsandbytes"),
    ),
    "H26 target_modules that match nothing": (
        ("train.lora.target_modules=[nothing_proj]",),
        *(nothing, Exit.TRAINING, "train.lora.target_modules: Target modules"),
    ),
    "H26 target_modules of a model that is not here": (
        ("train.lora.target_modules=[nothing_proj]", "student.model=qwen2.5-coder-1.5b-instruct"),
        *(nothing, Exit.TRAINING, "train.lora.target_modules: Target modules"),
    ),
    "H26 max_length that no prompt fits into": (
        ("train.max_length=4",),
        *(nothing, Exit.TRAINING, "train.max_length: none of 90 prompts fits into 4 tokens"),
    ),
    "H26 a filter that this process was not given": (
        ("filters.python=[mine]",),
        *(nothing, Exit.CONFIG, "filter mine: is not known to this process"),
    ),
    "H26 a corpus that is not there": (
        ("corpus.path=gone.jsonl",),
        *(nothing, Exit.INPUT, "gone.jsonl: does not exist"),
    ),
    "H4 target_modules that are no expression": (
        ("train.lora.target_modules=(",),
        *(nothing, Exit.TRAINING, "train.lora.target_modules: "),
    ),
    "target_modules that cannot be merged": (
        ("train.lora.target_modules=[embed_tokens]",),
        *(nothing, Exit.TRAINING, "includes the embedding"),
    ),
    "H26 terms.agreement missing": (
        (GEMMA,),
        *(nothing, Exit.TERMS, "terms.agreement: a copy of the agreement goes with the model"),
    ),
    "terms.agreement that is not there": (
        (GEMMA, "terms.agreement=gone.txt"),
        *(nothing, Exit.TERMS, "terms.agreement: a copy of the agreement goes with the model"),
    ),
    "terms that forbid it": (
        ("teacher.model=gpt-5.6-terra", "terms.basis=null"),
        *(nothing, Exit.TERMS, "teacher gpt-5.6-terra: "),
    ),
    "H26 unknown name in teacher_price": (
        ("evaluation.teacher_price=nobody",),
        *(nothing, Exit.CONFIG, "evaluation.teacher_price: the price table has no model nobody"),
    ),
    "unknown machine": (
        ("evaluation.machine=abacus",),
        *(nothing, Exit.CONFIG, "evaluation.machine: the price table has no machine abacus"),
    ),
    "budget without a price": (
        ("evaluation.prices=null", "teacher.budget_dollars=3"),
        *(nothing, Exit.BUDGET, "teacher.budget_dollars: the price of fake-1 is unknown"),
    ),
    "teacher without its key": (
        ("teacher.api_key_env=NOBODY_SET_THIS",),
        *(nothing, Exit.CONFIG, "NOBODY_SET_THIS is not set"),
    ),
    "judge without its key": (
        (JUDGE + ", api_key_env: NOBODY_SET_THIS}",),
        *(nothing, Exit.CONFIG, "NOBODY_SET_THIS is not set"),
    ),
    "judge that is not there": (
        ("evaluation.judge={model: ./nobody}",),
        *(nothing, Exit.CONFIG, "./nobody: is no model folder"),
    ),
    "suite that is not there": (
        ("evaluation.suites=[gone.yaml]",),
        *(nothing, Exit.CONFIG, "gone.yaml: there is no such suite"),
    ),
    "suite whose questions are not there": (
        ("evaluation.suites=[mine.yaml]",),
        *(suite(None), Exit.INPUT, "questions.jsonl"),
    ),
    "suite with a row that is no question": (
        ("evaluation.suites=[mine.yaml]",),
        *(suite('{"nothing": 1}\n'), Exit.INPUT, "questions.jsonl:1 is no question"),
    ),
    "two suites of one name": (
        ("evaluation.suites=[mine.yaml, ./mine.yaml]",),
        *(suite('{"prompt": "1 + 1", "reference": "2"}\n'), Exit.CONFIG, "two suites are called"),
    ),
    "processes that do not come": (
        ("train.num_processes=2",),
        *(nothing, Exit.TRAINING, "train.num_processes: 2 processes were asked for, 1 came"),
    ),
    "student that is not there": (
        ("student.model=./nobody",),
        *(nothing, Exit.CONFIG, "./nobody: is no model folder"),
    ),
    "student of an unknown architecture": (
        (),
        edit("config.json", model_type="abacus", architectures=["Abacus"]),
        *(Exit.TRAINING, "model ./student: "),
    ),
    "student of quantised weights": (
        (),
        edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        *(Exit.TRAINING, "model ./student: has quantised weights"),
    ),
    "student without a template": (
        (),
        lambda: Path("student/chat_template.jinja").unlink(),
        *(Exit.TRAINING, "has no chat template"),
    ),
    "template that refuses": (
        (),
        template("{{ raise_exception('no') }}"),
        *(Exit.TRAINING, "refuses the conversation: no"),
    ),
    "template that loses the answer": (
        (),
        template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        *(Exit.TRAINING, "chat template of ./student"),
    ),
    "soft labels over another vocabulary": (
        SOFT,
        *(another_vocabulary, Exit.CONFIG, "have different tokenizers"),
    ),
    "runs that is a file": (
        ("runs=rows.jsonl",),
        *(nothing, Exit.STATE, "rows.jsonl: is no folder"),
    ),
    "store that is a file": (
        ("store=rows.jsonl",),
        *(nothing, Exit.STATE, "rows.jsonl: is no folder"),
    ),
}


@pytest.mark.parametrize(("overrides", "change", "code", "line"), FOUND.values(), ids=FOUND.keys())
def test_a_run_finds_it_before_the_first_request(
    place: Path,
    teacher: FakeTeacher,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    change: Callable[[], object],
    code: Exit,
    line: str,
) -> None:
    change()
    words = [str(place), "student.model=./student", *overrides]
    assert main(["run", *words]) == code
    errors = [row for row in capsys.readouterr().err.splitlines() if row.startswith("error: ")]
    assert any(line in row for row in errors), errors
    assert not teacher.payloads and not Path("runs/mine").exists()


def test_all_problems_are_listed_at_once_by_run_plan_and_a_stage_that_buys(
    place: Path, teacher: FakeTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ("student.model=./student", "train.lora.target_modules=[x]", GEMMA)
    wrong += ("evaluation.teacher_price=nobody", "evaluation.judge={model: ./nobody}")
    for verb, more in (("run", ()), ("plan", ()), ("generate", ()), ("train", ())):
        assert main([verb, str(place), *wrong, *more]) == Exit.TERMS
        errors = capsys.readouterr().err.splitlines()
        wheres = [row.split(": ")[1] for row in errors]
        later = () if verb == "train" else ("./nobody",)  # which may be on another machine
        first = ("terms.agreement", "evaluation.teacher_price", "train.lora.target_modules")
        assert tuple(wheres) == (*first, *later)
    assert main(["plan", str(place), *wrong, "corpus.path=gone", "--json"]) == Exit.INPUT
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len(problems) == 5 and problems[2].endswith("(exit 2)"), "planned or not, all are said"
    assert not teacher.payloads and not Path("runs").exists()


def test_what_suits_this_machine_alone_is_asked_of_the_stage_that_needs_it(
    place: Path, teacher: FakeTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers may be bought where there is no GPU, and trained on where there is one."""
    words = [str(place), "student.model=./student", "student.load_in_4bit=true"]
    assert main(["corpus", *words]) == main(["prompts", *words]) == 0
    assert main(["generate", *words]) == 0 and teacher.payloads
    teacher.payloads.clear()
    assert main(["filter", *words]) == 0
    capsys.readouterr()
    assert main(["train", *words]) == Exit.TRAINING
    assert "student.load_in_4bit: needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_disk_that_cannot_hold_what_is_trained_stops_a_run(
    place: Path,
    teacher: FakeTeacher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(place), "student.model=./student"]
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    assert main(["run", *words]) == Exit.STATE
    (line,) = capsys.readouterr().err.splitlines()
    assert "and 100 kB are free (" in line and "checkpoints" in line and "merged" in line
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=750_000))
    assert main(["run", *words, *SOFT]) == Exit.STATE
    assert "soft labels" in capsys.readouterr().err.splitlines()[-1]
    assert not teacher.payloads
    shutil.rmtree("runs", ignore_errors=True)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    assert main(["run", *words, "train.num_processes=2"]) == Exit.TRAINING


def test_h24_limits_and_certificates_of_this_session_are_named(
    place: Path,
    teacher: FakeTeacher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(place), "student.model=./student", "teacher.concurrency=300"]
    monkeypatch.setenv("SSL_CERT_FILE", "/gone.pem")
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda kind: (64, 64))
    for verb in ("run", "plan", "generate"):
        assert main([verb, *words]) == Exit.CONFIG
        errors = capsys.readouterr().err
        assert "SSL_CERT_FILE: /gone.pem is not there" in errors
        assert "teacher.concurrency: 300 connections need 348 open files, and 64 are" in errors
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda kind: (64, 4096))
    limits = list[object]()
    monkeypatch.setattr(preflight.resource, "setrlimit", lambda kind, pair: limits.append(pair))
    assert main(["generate", *words]) == Exit.CONFIG and limits == [(348, 4096)]
    assert not teacher.payloads
