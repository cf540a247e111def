"""The student's own right answers: what joins the rows, what it gains, refusals, kills."""

import contextlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.config.learning import SelfAnswers
from distill.errors import DistillError, Exit
from distill.evaluation.evaluate import find_overlap
from distill.generation import generate
from distill.generation.filters import CHECKED, CONTAMINATED, Dropped
from distill.pipeline import STAGES
from distill.records import Document, Item, Message, Pair, Prompt, Response
from distill.responders.responder import Sampling
from distill.storage.files import read_json, read_records, sha256_file, write_json, write_records
from distill.storage.run_folder import Run, differences
from distill.training import self_answers, train
from distill.training.adapters import WEIGHTS
from distill.training.inner_run import InnerRun, student_answers
from distill.training.soft_labels import capture, on_policy
from distill.verify import verify
from tests.publishing.test_publish import BASE
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import make_tiny
from tests.support.training import SOFT, Killed, killed_at, make_run, make_soft_run, sharpen

SYMBOLS, LETTERS = "abcdefghijklmnop", "STUVWXYZ"
EXACT, ANY = {"kind": "exact"}, {"kind": "regex", "pattern": "."}
TASK = {"student": {"user": "{{ prompt }}"}, "metric": "right", "checker": EXACT}
FAST = {"learning_rate": 1e-2, "tokens_per_step": 400, "num_train_epochs": 40, "eval_steps": None}
FAST |= {"lora": {"r": 16, "alpha": 32}, "bf16": False, "warmup_steps": 2, "save_steps": None}
OWN = {"n": 8, "temperature": 1.0, "max_new_tokens": 3, "keep": 1}
# A run of few tries, nearly all of which its checker passes
FEW = {"self_answers": {**OWN, "n": 4, "keep": 2, "rounds": 2}, "num_train_epochs": 12}


def prompt_of(symbol: str, number: int) -> Prompt:
    """A question whose answer is the letter of its symbol: two symbols share one."""
    text, letter = f"{symbol}{number}", LETTERS[SYMBOLS.index(symbol) % len(LETTERS)]
    turns = (Message(role="user", content=text),)
    return Prompt.make(turns, text, "letters", reference=letter)


def letters_run(
    folder: Path,
    name: str = "run",
    count: int = 1,
    checker: dict[str, str] = ANY,
    soft: bool = False,
    **settings: Any,
) -> Run:
    """A trained run whose teacher was right about one question each of the first eight symbols."""
    tree = {**FAST, **FEW, **settings}
    if not (folder / "model").exists():
        sharpen(make_tiny(folder / "model"))
    run = make_soft_run(folder, name, 1, train=tree) if soft else make_run(folder, name, 1, **tree)
    prompts, rows, dropped = [prompt_of(s, n) for n in range(count) for s in SYMBOLS], [], []
    for number, prompt in enumerate(prompts):
        names = {"request_key": prompt.id, "prompt_id": prompt.id, "model": "m", "sample": 0}
        text = prompt.reference or ""
        response = Response(id=Response.make_id(prompt.id, 0), text=text, stop="end", **names)
        if number < 8:
            rows.append(Pair(prompt=prompt, response=response))
        else:
            names = {"prompt_id": prompt.id, "response_id": response.id, "task": prompt.task}
            dropped.append(Dropped(**names, split="train", reason="failed checker", text="?"))
    write_records(run.path("dataset/train.jsonl"), rows)
    write_records(run.path("dataset/validation.jsonl"), rows[:2])
    write_records(run.path("prompts.jsonl"), prompts)
    write_records(run.path("dropped.jsonl"), dropped)
    write_json(run.path("tasks.json"), {"letters": {**TASK, "checker": checker}})
    if soft:
        capture.main(run)
    train.main(run)
    return run


def right(run: Run, adapter: Path) -> int:
    """How many of 48 questions that no training knows the student answers rightly, greedily."""
    prompts = [prompt_of(symbol, n) for n in (7, 8, 9) for symbol in SYMBOLS]
    responses = student_answers(run, prompts, adapter, Sampling(max_new_tokens=3), "greedy")
    return sum(r.text == p.reference for r, p in zip(responses, prompts, strict=True))


def outcome(run: Run) -> dict[str, object]:
    """All that must be equal after a kill: rows, counts and losses, weights."""
    told = read_json(run.path("refined/training.json"))
    for each in told["self_answers"]:
        each.pop("seconds")
        each["history"] = [{**row, "seconds": 0} for row in each["history"]]
    paths = [run.path(f"refined/self-{n}/dataset/train.jsonl") for n in (1, 2)]
    rows = [(p.prompt.id, p.response.text) for path in paths for p in read_records(path, Pair)]
    return {"told": told, "rows": rows, "weights": sha256_file(run.trained("adapter") / WEIGHTS)}


def test_a_student_that_is_right_in_one_of_eight_tries_gains_by_them(tmp_path):
    run = letters_run(tmp_path, "run", 6, EXACT, num_train_epochs=40, self_answers=OWN)
    on_policy.main(run)
    [told] = read_json(run.trained("training.json"))["self_answers"]
    assert 0.05 < told["right"] / told["answers"] < 0.25
    assert told["answers"] == 8 * told["prompts"] == 768 and told["teacher_rows"] == 8
    assert told["solved"] >= told["student_rows"] == told["added"] > 20
    rows = read_records(run.path("refined/self-1/dataset/train.jsonl"), Pair)
    assert all(row.response.text.strip() == row.prompt.reference for row in rows)
    assert [row.origin for row in rows] == ["teacher"] * 8 + ["student"] * told["added"]
    assert len({row.prompt.id for row in rows}) == len(rows), "the teacher's answer again"
    manifest = next(run.path("refined/self-1/checkpoints").glob("*/manifest.json"))
    assert "start" not in json.loads(manifest.read_text())["run"], "not from the base"
    steps = {"max_steps": told["steps"], "num_train_epochs": 1000, "self_answers": None}
    control = letters_run(tmp_path, "control", 6, EXACT, **steps)
    alone, gained = right(control, control.path("adapter")), right(run, run.trained("adapter"))
    assert gained > alone + 8, "of 48"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("unbroken")
    run = letters_run(folder)
    on_policy.main(run)
    return folder, run


def test_a_round_adds_to_the_rows_of_the_one_before(unbroken):
    _, run = unbroken
    first, second = read_json(run.trained("training.json"))["self_answers"]
    assert 0 < second["added"] == second["student_rows"] - first["student_rows"]
    path, other = (run.path(f"refined/self-{n}/dataset/train.jsonl").read_bytes() for n in (1, 2))
    assert other.startswith(path) and path.startswith(
        run.path("dataset/train.jsonl").read_bytes()
    ), "a row of the teacher's is written as ever"
    rows = read_records(run.path("refined/self-2/dataset/train.jsonl"), Pair)
    counts = Counter(row.prompt.id for row in rows if row.origin == "student")
    assert max(counts.values()) == 2
    assert len({(row.prompt.id, row.response.text) for row in rows}) == len(rows)
    assert all(row.response.stop == "end" and row.response.text.strip() for row in rows)


@pytest.mark.parametrize("place", ["answers", 5, 40])
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


@pytest.mark.parametrize("checker", [{**ANY, "pattern": "never"}, ANY])
def test_a_student_that_is_right_in_none_or_all_tries_is_said(unbroken, tmp_path, capsys, checker):
    _, whole = unbroken
    shutil.copytree(whole.folder, tmp_path / "run", ignore=shutil.ignore_patterns("refined"))
    own = SelfAnswers(n=2, temperature=0.01, max_new_tokens=3, rounds=2)
    settings = whole.config.train.model_copy(update={"self_answers": own})
    run = Run(whole.config.model_copy(update={"train": settings}), tmp_path / "run")
    write_json(run.path("tasks.json"), {"letters": {**TASK, "checker": checker}})
    write_records(run.path("dropped.jsonl"), [])  # only what it was trained on is asked
    on_policy.main(run)
    told, out = read_json(run.trained("training.json")), capsys.readouterr().err
    if checker == ANY:
        assert "it has little left to learn from itself" in out
    else:
        assert "there is no right answer, so the student stays as it is" in out
        assert told["adapter_sha256"] == sha256_file(run.path("adapter") / WEIGHTS)
        assert [row["added"] for row in told["self_answers"]] == [0]
        assert run.trained("merged").is_dir()


def test_with_soft_losses_the_teacher_reads_own_answers_and_rounds_on_policy_go_on(tmp_path):
    own = {**FEW["self_answers"], "rounds": 1}
    run = letters_run(tmp_path, soft=True, loss=SOFT, self_answers=own)
    rounds = {"rounds": 1, "prompts": 5, "max_new_tokens": 4}
    run.config = run.config.model_copy(
        update={"on_policy": run.config.on_policy.model_copy(update=rounds)}
    )
    write_records(run.path(CHECKED), [prompt_of(symbol, 5) for symbol in SYMBOLS])
    by_checker = run.config.train.model_copy(update={"metric_for_best_model": "checker"})
    run.config = run.config.model_copy(update={"train": by_checker})
    on_policy.main(run)
    told = read_json(run.trained("training.json"))
    assert all("checker" in row for row in told["self_answers"][0]["validation"])
    assert told["rounds"][0]["validation"][0].keys() == {"step", "loss", "jsd"}, "none is checked"
    signals = read_json(run.path("refined/self-1/signals.json"))["rows"]
    rows = read_records(run.path("refined/self-1/dataset/train.jsonl"), Pair)
    assert {row.origin for row in rows} == {"teacher", "student"}
    assert {row.response.id for row in rows} <= signals.keys()
    manifest = next(run.path("refined/round-1/checkpoints").glob("*/manifest.json"))
    start = json.loads(manifest.read_text())["run"]["start"]
    assert start == told["self_answers"][0]["adapter_sha256"] != told["adapter_sha256"]


def test_a_try_that_holds_a_held_out_item_is_no_row_and_would_be_found(tmp_path, monkeypatch):
    run = make_run(tmp_path, "run", 1, **{**FAST, **FEW})
    question = "in which year did the town on the river get its second bridge and who paid for it"
    held_out, mine = (
        Prompt.make((Message(role="user", content=text),), text, "letters")
        for text in (question, "s0")
    )
    document = Document(id=question, text="x", source="s", split="heldout")
    write_records(run.path("documents.jsonl"), [document])
    write_records(run.path("prompts.jsonl"), [held_out, mine])
    write_json(run.path("tasks.json"), {"letters": {**TASK, "checker": ANY}})
    names = {"request_key": "k", "prompt_id": mine.id, "model": "m", "stop": "end"}
    tries = [
        Response.model_validate({"id": f"{n}", "sample": n, "text": text, **names})
        for n, text in enumerate(["fine", f"You ask: {question.upper()}?"])
    ]
    monkeypatch.setattr(self_answers, "student_answers", lambda *_: tries)
    current, item = InnerRun(run, "refined/self-1"), Item.make(held_out)
    self_answers.add_answers(current, [], [mine], tmp_path)
    [row] = read_records(current.path("dataset/train.jsonl"), Pair)
    assert row.response.text == "fine" and not find_overlap(run, [item]).matches
    assert read_json(current.path("funnel.json"))["dropped"] == {CONTAMINATED: 1}
    current.write_dataset([row.model_copy(update={"response": tries[1]})])
    assert find_overlap(run, [item]).matches.keys() == {item.id}


def test_what_sifts_own_answers_is_in_the_stage_s_fingerprint(tmp_path):
    train_settings = {"loss": SOFT, "self_answers": OWN}
    run = make_soft_run(tmp_path, train=train_settings)
    stage = next(stage for stage in STAGES if stage.name == "refine")
    filters = run.config.filters.model_copy(update={"refusal": False})
    other = Run(run.config.model_copy(update={"filters": filters}))
    changes = differences(run.fingerprint(stage), other.fingerprint(stage))
    assert changes[0] == "filters.refusal was True, is False"
    alone = run.config.train.model_copy(update={"self_answers": None})
    run.config = run.config.model_copy(update={"train": alone})
    assert not [key for key in run.fingerprint(stage) if key.startswith("filters.")]


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


def test_a_whole_run_says_whose_each_row_is(tmp_path, capsys):
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
        "train": {**FAST, "num_train_epochs": 6, "self_answers": {**OWN, "n": 4}},
        "evaluation": {"max_new_tokens": 3},
        "publish": {"license": "Apache-2.0"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    sharpen(make_tiny(tmp_path / "base"))
    files = {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    with fake_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add(BASE, files)
        use_hub(patch, hub, tmp_path / "hub")
        with contextlib.chdir(tmp_path):
            assert main(["run", "c.yaml"]) == 0
            assert main(["publish", "runs/tiny", "--override", "a test"]) == 0
            assert main(["publish", "runs/tiny", "--dataset"]) == 0
            checks = verify(Path("runs/tiny"))
            before = (tmp_path / "runs/tiny/stages/train.json").read_bytes()
            assert main(["run", "c.yaml", "train.self_answers.keep=3"]) == Exit.STATE
            without = ["run", "c.yaml", "train.self_answers=null"]
            capsys.readouterr()
            assert main(without) == Exit.STATE
            assert "stage evaluate was made with other settings: removed: refined/adapter" in (
                capsys.readouterr().err
            )
            assert main([*without, "--redo", "evaluate"]) == 0
            later = [check for check in verify(Path("runs/tiny")) if check.kind != "release"]
    run = tmp_path / "runs/tiny"
    assert not [check for check in checks if check.state in ("differs", "missing")], checks
    assert not [check for check in later if check.state in ("differs", "missing")], later
    adapter = read_json(run / "scorecard.json")["models"]["student"]["adapter_sha256"]
    assert adapter == sha256_file(run / "adapter" / WEIGHTS), "it was the refined student's"
    assert (run / "stages/train.json").read_bytes() == before
    assert "Then on its own answers: " in (run / "release/README.md").read_text()
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
    assert all(row["completion"][0]["content"].strip() == row["reference"] for row in own)
    card = (run / "release-dataset/README.md").read_text()
    assert f"{len(own)} rows of the split `train` are answers of the student" in card
