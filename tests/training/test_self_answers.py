"""The student's own right answers: what joins the rows, what it gains, refusals, kills."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from distill.cli import main
from distill.config.learning import SelfAnswers
from distill.errors import DistillError, Exit
from distill.generation import generate
from distill.generation.filters import Dropped
from distill.records import Document, Message, Pair, Prompt, Response
from distill.responders.responder import Sampling
from distill.storage.files import read_json, read_records, sha256_file, write_json, write_records
from distill.storage.run_folder import Run
from distill.training import train
from distill.training.adapters import WEIGHTS
from distill.training.inner_run import InnerRun, student_answers
from distill.training.soft_labels import capture, on_policy
from distill.verify import verify
from tests.publishing.test_publish import BASE
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import make_tiny
from tests.support.training import SOFT, Killed, killed_at, make_run, make_soft_run

SYMBOLS, LETTERS = "abcdefghijklmnop", "STUVWXYZ"
TASK = {"student": {"user": "{{ prompt }}"}, "metric": "right", "checker": {"kind": "exact"}}
FAST = {"learning_rate": 2e-2, "tokens_per_step": 400, "num_train_epochs": 40, "eval_steps": None}
FAST |= {"lora": {"r": 16, "alpha": 32}, "bf16": False, "warmup_steps": 2, "save_steps": None}
OWN = {"n": 8, "temperature": 1.0, "max_new_tokens": 3, "keep": 2}


def prompt_of(symbol: str, number: int) -> Prompt:
    """A question whose answer is the letter of its symbol: two symbols share one."""
    text, letter = f"{symbol}{number}", LETTERS[SYMBOLS.index(symbol) % len(LETTERS)]
    turns = (Message(role="user", content=text),)
    return Prompt.make(turns, text, "letters", reference=letter)


def letters_run(folder: Path, name: str = "run", soft: bool = False, **settings) -> Run:
    """A trained run whose teacher was right about one question each of the first eight symbols."""
    tree = {**FAST, "self_answers": OWN, **settings}
    run = make_soft_run(folder, name, 1, train=tree) if soft else make_run(folder, name, 1, **tree)
    prompts, rows, dropped = [prompt_of(s, n) for n in range(4) for s in SYMBOLS], [], []
    for prompt in prompts:
        names = {"request_key": prompt.id, "prompt_id": prompt.id, "model": "m", "sample": 0}
        text = prompt.reference or ""
        response = Response(id=Response.make_id(prompt.id, 0), text=text, stop="end", **names)
        if prompt.document_id in ("a0", "b0", "c0", "d0", "e0", "f0", "g0", "h0"):
            rows.append(Pair(prompt=prompt, response=response))
        else:
            names = {"prompt_id": prompt.id, "response_id": response.id, "task": prompt.task}
            dropped.append(Dropped(**names, split="train", reason="failed checker", text="?"))
    write_records(run.path("dataset/train.jsonl"), rows)
    write_records(run.path("dataset/validation.jsonl"), rows[:2])
    write_records(run.path("prompts.jsonl"), prompts)
    write_records(run.path("dropped.jsonl"), dropped)
    write_json(run.path("tasks.json"), {"letters": TASK})
    if soft:
        capture.main(run)
    train.main(run)
    return run


def right(run: Run, adapter: Path) -> int:
    """How many of 48 questions that no training knows the student answers rightly, greedily."""
    prompts = [prompt_of(symbol, n) for n in range(5, 8) for symbol in SYMBOLS]
    responses = student_answers(run, prompts, adapter, Sampling(max_new_tokens=3), "greedy")
    return sum(r.text == p.reference for r, p in zip(responses, prompts, strict=True))


def outcome(run: Run) -> dict[str, object]:
    """All that must be equal after a kill: rows, counts and losses, weights."""
    told = read_json(run.path("refined/training.json"))
    for rounds in (told["rounds"], told["self_answers"]):
        for each in rounds:
            each.pop("seconds")
            each["history"] = [{**row, "seconds": 0} for row in each["history"]]
    files = ("adapter/" + WEIGHTS, "self-1/dataset/train.jsonl", "self-2/dataset/train.jsonl")
    return {"told": told, **{name: sha256_file(run.path(f"refined/{name}")) for name in files}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("unbroken")
    run = letters_run(folder, self_answers={**OWN, "rounds": 2})
    on_policy.main(run)
    return folder, run


def test_a_student_that_is_right_in_one_of_eight_tries_gains_by_them(unbroken):
    folder, run = unbroken
    first, second = read_json(run.trained("training.json"))["self_answers"]
    share = first["right"] / first["answers"]
    assert 0.06 < share < 0.25 and first["prompts"] == 64 and first["answers"] == 512
    assert first["teacher_rows"] == 8 and first["student_rows"] == first["added"] > 16
    assert second["student_rows"] == first["added"] + second["added"]
    assert second["right"] > 2 * first["right"]
    rows = read_records(run.path("refined/self-2/dataset/train.jsonl"), Pair)
    own = [row for row in rows if row.origin == "student"]
    assert len(own) == second["student_rows"] and all(r.response.stop == "end" for r in own)
    assert all(row.response.text == row.prompt.reference for row in rows)
    assert len({(row.prompt.id, row.response.text) for row in rows}) == len(rows)
    lines = run.path("refined/self-2/dataset/train.jsonl").read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:8]) == run.path("dataset/train.jsonl").read_bytes()
    manifest = next(run.path("refined/self-1/checkpoints").glob("*/manifest.json"))
    assert "start" not in json.loads(manifest.read_text())["run"], "not from the base"
    steps = {"max_steps": first["steps"], "num_train_epochs": 1000}
    control = letters_run(folder, "control", self_answers=None, **steps)
    gained = right(run, run.path("refined/self-1/adapter"))
    alone = right(control, control.path("adapter"))
    print("RIGHT", share, alone, gained, right(run, run.trained("adapter")), first["steps"])
    assert gained > alone + 8, "of 48"


@pytest.mark.parametrize("place", ["answers", 3, 30, 100])
def test_a_killed_round_goes_on_to_the_same_bits(unbroken, monkeypatch, place):
    folder, whole = unbroken
    name = f"kill{place}"
    shutil.copytree(whole.folder, folder / "runs" / name, ignore=shutil.ignore_patterns("refined"))
    run = Run(whole.config.model_copy(update={"name": name, "store": folder / f"store{place}"}))
    if place == "answers":

        def killed(*values: object) -> None:
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(InnerRun, "write_dataset", killed)
            on_policy.main(run)
    else:
        with killed_at(place):
            on_policy.main(run)
    on_policy.main(run)
    assert outcome(run) == outcome(whole)


@pytest.mark.parametrize("pattern", ["[^A-Z]", "."])
def test_a_student_that_is_right_in_none_or_all_tries_is_said(unbroken, tmp_path, capsys, pattern):
    _, whole = unbroken
    shutil.copytree(whole.folder, tmp_path / "run", ignore=shutil.ignore_patterns("refined"))
    own = SelfAnswers(n=4, temperature=0.01, max_new_tokens=3, rounds=2)
    settings = whole.config.train.model_copy(update={"self_answers": own})
    run = Run(whole.config.model_copy(update={"train": settings}), tmp_path / "run")
    task = {**TASK, "checker": {"kind": "regex", "pattern": pattern}}
    write_json(run.path("tasks.json"), {"letters": task})
    on_policy.main(run)
    told, out = read_json(run.trained("training.json")), capsys.readouterr().err
    if pattern == ".":
        assert "it has little left to learn from itself" in out
    else:
        assert "there is no right answer, so the student stays as it is" in out
        assert told["adapter_sha256"] == sha256_file(run.path("adapter") / WEIGHTS)
        assert [row["added"] for row in told["self_answers"]] == [0]
        assert run.trained("merged").is_dir()


def test_with_soft_losses_the_teacher_reads_own_answers_and_rounds_on_policy_go_on(tmp_path):
    run = letters_run(tmp_path, soft=True, loss=SOFT, num_train_epochs=10)
    rounds = {"rounds": 1, "prompts": 5, "max_new_tokens": 4}
    run.config = run.config.model_copy(
        update={"on_policy": run.config.on_policy.model_copy(update=rounds)}
    )
    on_policy.main(run)
    told = read_json(run.trained("training.json"))
    signals = read_json(run.path("refined/self-1/signals.json"))["rows"]
    rows = read_records(run.path("refined/self-1/dataset/train.jsonl"), Pair)
    assert {row.origin for row in rows} == {"teacher", "student"}
    assert {row.response.id for row in rows} <= signals.keys()
    manifest = next(run.path("refined/round-1/checkpoints").glob("*/manifest.json"))
    start = json.loads(manifest.read_text())["run"]["start"]
    assert start == told["self_answers"][0]["adapter_sha256"] != told["adapter_sha256"]


def test_without_any_reference_it_is_refused_before_the_teacher_is_asked(tmp_path, monkeypatch):
    run = make_run(tmp_path, self_answers={})
    run.config = run.config.model_copy(
        update={"terms": run.config.terms.model_copy(update={"basis": "our own"})}
    )
    document = Document.make("q", "here", split="train")
    turns = (Message(role="user", content="q"),)
    write_records(run.path("documents.jsonl"), [document])
    write_records(run.path("prompts.jsonl"), [Prompt.make(turns, document.id, "letters")])
    write_json(run.path("tasks.json"), {"letters": TASK})
    monkeypatch.setattr(generate, "make_responder", None)
    with pytest.raises(DistillError, match="letters has no prompt with the reference") as error:
        generate.main(run)
    assert error.value.code == Exit.CONFIG


def test_a_whole_run_says_whose_each_row_is(tmp_path):
    rows = [
        {"prompt": f"{s}{n}", "reference": prompt_of(s, n).reference, "answer": "?"}
        for s in SYMBOLS
        for n in range(6)
    ]
    for row in rows:
        row["answer"] = row["reference"] if row["prompt"] < "i" else "none"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.yaml").write_text(json.dumps(TASK))
    tree = {
        "name": "tiny",
        "corpus": {
            **{"path": "rows.jsonl", "format": "prompts", "near_duplicate_threshold": None},
            "split": {"validation": 4, "heldout": 24},
        },
        "prompts": {"tasks": ["./letters.yaml"]},
        "teacher": {"kind": "recorded", "model": "somebody/one", "license": "CC0-1.0"},
        "terms": {"basis": "a test of our own"},
        "student": {"model": BASE, "dtype": "float32"},
        "train": {**FAST, "num_train_epochs": 10, "self_answers": {**OWN, "n": 4}},
        "evaluation": {"max_new_tokens": 3},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    files = {p.name: p.read_bytes() for p in make_tiny(tmp_path / "base").iterdir()}
    with fake_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add(BASE, files)
        use_hub(patch, hub, tmp_path / "hub")
        with contextlib.chdir(tmp_path):
            assert main(["run", "c.yaml"]) == 0
            assert main(["publish", "runs/tiny", "--override", "a test"]) == 0
            assert main(["publish", "runs/tiny", "--dataset"]) == 0
            checks = verify(Path("runs/tiny"))
            before = (tmp_path / "runs/tiny/stages/train.json").read_bytes()
            assert main(["run", "c.yaml", "train.self_answers.keep=1"]) == Exit.STATE
            assert main(["run", "c.yaml", "train.self_answers=null"]) == 0, "train is not stale"
    run = tmp_path / "runs/tiny"
    assert not [check for check in checks if check.state in ("differs", "missing")], checks
    assert (run / "stages/train.json").read_bytes() == before
    assert "then on its own answers: " in (run / "release/README.md").read_text()
    published = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (
            run / "release-dataset/kept/train.jsonl",
            run / "release-dataset/raw/train.jsonl",
        )
    ]
    kept, raw = ([row["origin"] for row in rows] for rows in published)
    own = [row for row in published[0] if row["origin"] == "student"]
    [told] = read_json(run / "refined/training.json")["self_answers"]
    assert kept.count("student") == told["student_rows"] > 0 == raw.count("student")
    assert kept.count("teacher") == told["teacher_rows"]
    assert all(row["completion"][0]["content"] == row["reference"] for row in own)
    card = (run / "release-dataset/README.md").read_text()
    assert f"{len(own)} rows of the split `train` are answers of the student" in card
