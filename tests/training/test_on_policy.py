"""On-policy rounds: the student's own answers, read by the teacher, trained on, and resumed."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from distill.cli import main
from distill.errors import Exit
from distill.evaluation.answering import student_responder
from distill.generation.filters import CONTAMINATED, Dropped
from distill.records import Document, Pair
from distill.storage.files import read_json, read_records, sha256_file, write_records
from distill.storage.run_folder import Run
from distill.training import inner_run, train
from distill.training.adapters import WEIGHTS
from distill.training.soft_labels import on_policy
from distill.training.soft_labels.cache import SignalCache
from distill.verify import verify
from tests.evaluation.test_suites import make_suite
from tests.publishing.test_publish import BASE
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import make_tiny
from tests.support.training import TRAIN, killed_at, make_pair, make_soft_run
from tests.test_verify import write_config

OWN = {"rounds": 2, "prompts": 5, "max_new_tokens": 12, "learning_rate": 1e-2}


def make_run(folder: Path, name: str = "run", **changes) -> Run:
    """A trained run in float32 with rounds before it, and all its prompts in prompts.jsonl."""
    small = {"tokens_per_step": 150, "micro_batch_tokens": 100}
    made = {"train": {**TRAIN, **small, "loss": {}, "num_train_epochs": 1}, "on_policy": OWN}
    run = make_soft_run(folder, name, **{**made, **changes})
    pairs = read_records(run.path("dataset/train.jsonl"), Pair)
    write_records(run.path("prompts.jsonl"), [pair.prompt for pair in pairs])
    write_records(run.path("dropped.jsonl"), [])
    train.main(run)
    return run


def outcome(run: Run) -> dict[str, object]:
    """All that must be equal after a kill: weights, losses and answers of each round."""
    found: dict[str, object] = {}
    for number in (1, 2):
        folder = run.path(f"refined/round-{number}")
        told = read_json(folder / "training.json")
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in told["history"]]
        found[f"{number} history"] = rows
        found[f"{number} validation"] = told["validation"]
        pairs = read_records(folder / "dataset/train.jsonl", Pair)
        found[f"{number} answers"] = [(p.prompt.id, p.response.text) for p in pairs]
        found[f"{number} weights"] = sha256_file(folder / "adapter" / WEIGHTS)
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = make_run(folder)
    on_policy.main(run)
    return folder, run


def test_each_round_answers_with_the_student_before_it_and_trains_it_on(unbroken):
    _, run = unbroken
    asked, weights = [], [sha256_file(run.path("adapter") / WEIGHTS)]
    for number in (1, 2):
        each = on_policy.Round(run, number)
        pairs = read_records(each.path("dataset/train.jsonl"), Pair)
        assert 0 < len(pairs) <= 5
        assert all(p.response.usage.output_tokens <= 12 for p in pairs)
        asked.append({p.prompt.id for p in pairs})
        weights.append(sha256_file(each.path("adapter") / WEIGHTS))
        facts = json.loads(next(each.path("checkpoints").glob("*/manifest.json")).read_text())
        assert facts["run"]["start"] == weights[number - 1]
        history = read_json(each.path("training.json"))["history"]
        assert all(row["loss"] == row["jsd"] and "ce" not in row for row in history)
        row = read_json(run.path("refined/training.json"))["rounds"][number - 1]
        assert 0 < row["best_step"] == row["adapter_step"] <= row["steps"]
    assert len(set(weights)) == 3 and asked[0] != asked[1]
    told = read_json(run.trained("training.json"))
    assert told["adapter_sha256"] == weights[2] == sha256_file(run.trained("adapter") / WEIGHTS)


def test_a_student_with_code_of_its_own_is_trained_refined_and_loaded(tmp_path):
    """C5: whoever loads it passes on that its code is trusted."""
    (tmp_path / "student").mkdir()
    code = "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    folder = make_tiny(tmp_path / "student")
    (folder / "modeling_own.py").write_text(code)
    facts = json.loads((folder / "config.json").read_text())
    facts["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(facts))
    student = {"model": str(folder), "dtype": "float32", "trust_remote_code": True}
    run = make_run(tmp_path, student=student, on_policy={**OWN, "rounds": 1})
    assert not run.path("merged").exists(), "the rounds that follow are trained on"
    on_policy.main(run)
    assert (run.trained("merged") / "modeling_own.py").read_text() == code
    responder, _ = student_responder(run, "student")
    assert type(responder.network).__name__ == "Own"


@pytest.mark.parametrize("call", [1, 6, 17])
def test_a_killed_round_goes_on_to_the_same_bits(unbroken, call):
    folder, whole = unbroken
    name = f"kill{call}"
    shutil.copytree(whole.folder, folder / "runs" / name, ignore=shutil.ignore_patterns("refined"))
    run = Run(whole.config.model_copy(update={"name": name, "store": folder / f"store{call}"}))
    with killed_at(call):
        on_policy.main(run)
    on_policy.main(run)
    assert outcome(run) == outcome(whole)


def test_a_round_that_is_done_asks_and_reads_nothing_again(unbroken, monkeypatch):
    _, run = unbroken
    monkeypatch.setattr(inner_run, "Ask", None)
    monkeypatch.setattr(SignalCache, "append", None)
    before = outcome(run)
    on_policy.main(run)
    assert outcome(run) == before


def test_the_teacher_s_rounds_bring_the_student_nearer_to_it(tmp_path):
    run = make_run(tmp_path, on_policy={**OWN, "rounds": 1, "prompts": 9, "max_new_tokens": 40})
    on_policy.main(run)
    [told] = read_json(run.trained("training.json"))["rounds"]
    first, *_, last = told["validation"]
    assert last["jsd"] < first["jsd"]


def test_prompts_whose_answer_was_dropped_are_asked_but_none_that_leaks(tmp_path):
    run = make_soft_run(tmp_path, on_policy=OWN)
    pairs = read_records(run.path("dataset/train.jsonl"), Pair)
    kept, wrong, other = pairs[:6], pairs[6], pairs[8]
    question = "In which year did the town on the river get its second bridge, and who paid for it?"
    held_out = Document(id=question, text="x", source="s", split="heldout")
    write_records(run.path("documents.jsonl"), [held_out])
    leaking = [make_pair(f"Answer me: {question}", "no"), make_pair("And what?", f"No. {question}")]
    pairs += [make_pair(question, "In 1907."), *leaking]
    write_records(run.path("dataset/train.jsonl"), kept)
    write_records(run.path("prompts.jsonl"), [pair.prompt for pair in pairs])
    rows = [
        dropped(wrong, "train", "not the reference's number"),
        dropped(leaking[0], "train", "failed checker"),  # the first reason, and not the only one
        dropped(leaking[1], "train", CONTAMINATED),
        dropped(other, "validation", "empty"),
    ]
    write_records(run.path("dropped.jsonl"), rows)
    found = {prompt.id for prompt in inner_run.training_prompts(run)}
    assert found == {pair.prompt.id for pair in [*kept, wrong]}


def dropped(pair: Pair, split: str, reason: str) -> Dropped:
    prompt, response = pair.prompt, pair.response
    return Dropped.model_validate(
        {
            **{"prompt_id": prompt.id, "response_id": response.id, "task": prompt.task},
            **{"split": split, "reason": reason, "text": response.text},
        }
    )


def test_a_whole_run_evaluates_verifies_and_publishes_the_refined_student(tmp_path):
    files = {p.name: p.read_bytes() for p in make_tiny(tmp_path / "base").iterdir()}
    with fake_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add(BASE, files)
        use_hub(patch, hub, tmp_path / "hub")
        config = write_config(tmp_path, make_suite(tmp_path / "suite"))
        text = config.read_text() + (
            f"signals: {{model: {BASE}, dtype: float32}}\nterms: {{basis: a test of our own}}\n"
            "on_policy: {rounds: 1, prompts: 4, max_new_tokens: 8}\n"
        )
        config.write_text(text)
        with contextlib.chdir(tmp_path):
            assert main(["run", str(config)]) == 0
            assert main(["publish", "runs/tiny", "--override", "a test"]) == 0
            checks = verify(Path("runs/tiny"))
            assert main(["run", str(config), "on_policy.prompts=3"]) == Exit.STATE
            assert main(["run", str(config), "on_policy.prompts=3", "--redo", "refine"]) == 0
    run = tmp_path / "runs/tiny"
    assert not [check for check in checks if check.state in ("differs", "missing")], checks
    for page in ("release/README.md", "report.html"):
        assert "Then on policy: 1 rounds" in (run / page).read_text()
    card = read_json(run / "scorecard.json")
    assert card["training"]["on_policy"][0]["answers"] <= 3
    assert card["models"]["student"]["adapter_sha256"] == sha256_file(
        run / "refined/adapter" / WEIGHTS
    )
    redone = read_json(run / "stages/train.json")["at"]
    assert redone < read_json(run / "stages/refine.json")["at"]
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert sum(row["input_tokens"] for row in ledger if row["stage"] == "refine") > 0
