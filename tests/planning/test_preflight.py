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
NO_PROJ = "train.lora.target_modules=[nothing_proj]"
NO_KEY = "NOBODY_SET_THIS"
SOFT = ("train.loss.forward_kl=1", "signals.model=./other")
QUESTIONS = Path("questions.jsonl")
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
    Path("mine.yaml").write_text(SUITE)
    return write_config(tmp_path, teacher)


Change = Callable[[], object]


def edit(**facts: object) -> Change:
    """Change keys of the student's config.json."""
    path = Path("student/config.json")
    return lambda: write_json(path, {**read_json(path), **facts})


def template(text: str) -> Change:
    return lambda: Path("student/chat_template.jinja").write_text(text)


def another_vocabulary() -> None:
    path = Path("other/tokenizer.json")
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tree))


FOUND: tuple[tuple[tuple[str, ...], Exit, str], ...] = (  # H26: settings, and what is said of them
    (("train.report_to=wandb",), Exit.TRAINING, "train.report_to: wandb is not installed"),
    (("student.load_in_4bit=true",), Exit.TRAINING, "load_in_4bit: needs an NVIDIA GPU and bits"),
    ((NO_PROJ,), Exit.TRAINING, "train.lora.target_modules: Target modules"),
    ((NO_PROJ, "student.model=qwen2.5-coder-1.5b-instruct"), Exit.TRAINING, "Target modules"),
    (("train.lora.target_modules=(",), Exit.TRAINING, "train.lora.target_modules: "),
    (
        ("train.lora.target_modules=[embed_tokens]",),
        Exit.TRAINING,
        "embedding is trained by no adapter",
    ),
    (("train.max_length=4",), Exit.TRAINING, "max_length: none of 90 prompts fits into 4 tokens"),
    (("train.self_answers={}",), Exit.CONFIG, "train.self_answers: task chat has no checker"),
    (("train.num_processes=2",), Exit.TRAINING, "2 processes were asked for, 1 came"),
    (("filters.python=[mine]",), Exit.CONFIG, "filter mine: is not known to this process"),
    (("corpus.path=gone.jsonl",), Exit.INPUT, "gone.jsonl: does not exist"),
    ((GEMMA,), Exit.TERMS, "terms.agreement: a copy of the agreement goes with the model"),
    ((GEMMA, "terms.agreement=gone.txt"), Exit.TERMS, "terms.agreement: a copy of the agreement"),
    (("teacher.model=gpt-5.6-terra", "terms.basis=null"), Exit.TERMS, "teacher gpt-5.6-terra: "),
    (("evaluation.teacher_price=nobody",), Exit.CONFIG, "the price table has no model nobody"),
    (("evaluation.machine=abacus",), Exit.CONFIG, "the price table has no machine abacus"),
    (("evaluation.prices=null", "teacher.budget_dollars=3"), Exit.BUDGET, "price of fake-1 is unk"),
    ((f"teacher.api_key_env={NO_KEY}",), Exit.CONFIG, f"{NO_KEY} is not set"),
    ((f"{JUDGE}, api_key_env: {NO_KEY}}}",), Exit.CONFIG, f"{NO_KEY} is not set"),
    (("evaluation.judge={model: ./nobody}",), Exit.CONFIG, "./nobody: is no model folder"),
    (("student.model=./nobody",), Exit.CONFIG, "./nobody: is no model folder"),
    (("evaluation.suites=[gone.yaml]",), Exit.CONFIG, "gone.yaml: there is no such suite"),
    (("evaluation.suites=[mine.yaml]",), Exit.INPUT, "questions.jsonl"),
    (("runs=rows.jsonl",), Exit.STATE, "rows.jsonl: is no folder"),
    (("store=rows.jsonl",), Exit.STATE, "rows.jsonl: is no folder"),
)
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
LOSING = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
MINE, TWICE = "evaluation.suites=[mine.yaml]", "evaluation.suites=[mine.yaml, ./mine.yaml]"
FILES: dict[Change, tuple[tuple[str, ...], Exit, str]] = {
    edit(model_type="abacus", architectures=["Abacus"]): ((), Exit.TRAINING, "model ./student: "),
    edit(**GPTQ): ((), Exit.TRAINING, "model ./student: has quantised weights"),
    Path("student/chat_template.jinja").unlink: ((), Exit.TRAINING, "has no chat template"),
    template("{{ raise_exception('no') }}"): ((), Exit.TRAINING, "refuses the conversation: no"),
    template(LOSING): ((), Exit.TRAINING, "chat template of ./student"),
    another_vocabulary: (SOFT, Exit.CONFIG, "have different tokenizers"),
    lambda: QUESTIONS.write_text('{"nothing": 1}\n'): ((MINE,), Exit.INPUT, ":1 is no question"),
    lambda: QUESTIONS.write_text('{"prompt": "1 + 1", "reference": "2"}\n'): (
        *((TWICE,), Exit.CONFIG, "two suites are called"),
    ),
}
CASES = [*((lambda: None, *case) for case in FOUND), *((change, *c) for change, c in FILES.items())]


@pytest.mark.parametrize(
    ("change", "overrides", "code", "line"), CASES, ids=lambda x: "" if callable(x) else str(x)[:60]
)
def test_a_run_finds_it_before_the_first_request(
    place: Path,
    teacher: FakeTeacher,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    overrides: tuple[str, ...],
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
    def run(free: int, *more: str) -> tuple[int, str]:
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        code = main(["run", str(place), "student.model=./student", *more])
        shutil.rmtree("runs", ignore_errors=True)
        return code, capsys.readouterr().err.splitlines()[-1]

    code, line = run(100_000)
    assert code == Exit.STATE and "and 100 kB are free (" in line
    assert "checkpoints" in line and "merged" in line
    code, line = run(750_000, *SOFT)
    assert code == Exit.STATE and "soft labels" in line and not teacher.payloads
    assert run(10**12, "train.num_processes=2")[0] == Exit.TRAINING


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
        assert "SSL_CERT_FILE: /gone.pem " in errors
        assert "teacher.concurrency: 300 connections need 348 open files, and 64 are" in errors
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda kind: (64, 4096))
    limits = list[object]()
    monkeypatch.setattr(preflight.resource, "setrlimit", lambda kind, pair: limits.append(pair))
    assert main(["generate", *words]) == Exit.CONFIG and limits == [(348, 4096)]
    assert not teacher.payloads
