"""The search for a recipe on tiny models: what must win, kills, no request, bad input."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill import recipe, verify
from distill.cli import main
from distill.config.recipe import tried
from distill.config.tree import Config
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.evaluation import chooser
from distill.evaluation.scorecard import Scorecard
from distill.pipeline import STAGES, from_stage, perform
from distill.planning.search import plan_search, require_search
from distill.records import Score
from distill.storage.files import read_json, sha256_file, write_json, write_records
from distill.storage.run_folder import Run, open_run
from distill.training import train
from distill.training.checked import validation_prompts
from tests.support.buying import always, settings
from tests.support.errors import stops
from tests.support.fake_teacher import FakeTeacher
from tests.support.tiny import make_tiny
from tests.support.training import killed_at

RATE = 2e-2  # at which a tiny student learns in four epochs what the default never does
SAME = ("recipe.json", "chosen.yaml", "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def small_ladder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chooser, "RATES", (RATE,))
        patch.setattr(chooser, "EPOCHS", (4,))
        patch.setenv("TEACHER_KEY", "key-of-the-tests")
        yield


def tree_of(folder: Path, teacher: FakeTeacher | str) -> dict[str, Any]:
    """Return a config whose answers are all "ok", which is what the checker wants."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        make_tiny(folder / "student")
        rows = (json.dumps({"prompt": f"q{n} please"}) for n in range(80))
        corpus.write_text("\n".join(rows))
        checker = {"kind": "regex", "pattern": "^ok"}
        task = {"metric": "right", "student": {"user": "{{ prompt }}"}, "checker": checker}
        (folder / "say.yaml").write_text(json.dumps(task))
    answers = settings(teacher, api_key_env="TEACHER_KEY", max_new_tokens=6)
    split = {"validation": 40, "heldout": 8}
    return {
        "name": "run",
        "runs": str(folder / "runs"),
        "corpus": {"path": str(corpus), "split": split, "near_duplicate_threshold": None},
        "prompts": {"tasks": [str(folder / "say.yaml")]},
        "teacher": answers.model_dump(mode="json", exclude_unset=True),
        "terms": {"basis": "our own fake teacher"},
        "student": {"model": str(folder / "student"), "dtype": "float32"},
        "train": {
            **{"learning_rate": 1e-6, "num_train_epochs": 1, "tokens_per_step": 120},
            **{"lora": {"r": 4, "alpha": 8}, "bf16": False},
        },
        "recipe": {"mode": "auto", "seeds": 2},
        "evaluation": {"bootstrap_samples": 200},
    }


def config_of(folder: Path, **sections: Any) -> Config:
    tree = tree_of(folder, "http://localhost:1/v1") | sections
    return Config.model_validate_json(json.dumps(tree))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, FakeTeacher]]:
    folder = tmp_path_factory.mktemp("recipe")
    with FakeTeacher(always(message={"content": "ok"})) as teacher:
        (folder / "c.yaml").write_text(json.dumps(tree_of(folder, teacher)))
        run = open_run(folder / "c.yaml")
        perform(run, STAGES)
        yield run, teacher


def test_a_setting_that_must_win_is_trained_with_and_compared_on_held_out(searched, capsys):
    run, teacher = searched
    assert len(teacher.payloads) == 40, "of validation nothing is bought"
    facts = read_json(run.path("recipe.json"))
    assert facts["chosen"] == "text-0.02-4"
    assert [row["trial"] for row in facts["ladder"]] == ["default", "text-0.02-4"]
    assert all(row["n"] == 20 for row in facts["ladder"]) and facts["trials"] == 7
    assert facts["test"]["difference"]["low"] > 0 and facts["test"]["n"] == 20
    rates = [row["learning_rate"] for row in read_json(run.path("training.json"))["history"]]
    assert max(rates) > RATE / 2
    assert run.config.train.learning_rate == 1e-6, "the config stays what the user gave"
    found = read_json(run.path("evaluation.json"))["recipe"]
    assert found["heldout"]["mean"] == 1 and found["openings"] == 1 and found["optimism"] == 0
    sealed = run.manifest()["recipe"]
    assert sealed["search"]["rungs"] == [[4, 1]] and sealed["optimism"] == 0
    card = (run.path("scorecard.md")).read_text()
    assert "chosen among 7 trainings: text-0.02-4" in card and "optimism" in card
    assert run.path("recipe.md").read_text().count("\n| text") == 1
    assert "aria-label" in run.path("recipe.html").read_text()
    assert main(["recipe", str(run.folder)]) == 0
    assert "| text-0.02-4 | 1 | 4 | 20 of 20 | +100.0 [" in capsys.readouterr().out
    checks = verify.verify(run.folder)
    assert not verify.failures(checks) and "answers/default.jsonl" in str(checks)
    chosen, config = load_config(run.path("chosen.yaml")), tried(run.config, **facts["choice"])
    assert chosen == config.model_copy(update={"name": "run-chosen"})


def test_a_second_search_that_is_killed_sends_nothing_and_ends_with_the_same_bytes(
    searched, monkeypatch
):
    run, teacher = searched
    before = [sha256_file(run.path(name)) for name in SAME]
    with killed_at(3):
        perform(run, STAGES, from_stage("recipe"))
    for call in (20, 9):
        with killed_at(call):
            perform(run, STAGES)
    real, count = recipe.write_json, [0]

    def dying(path: Path, facts: object) -> None:
        count[0] += 1
        if count[0] in (1, 2, 4):
            raise KeyboardInterrupt
        real(path, facts)

    monkeypatch.setattr(recipe, "write_json", dying)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            perform(run, STAGES)
    perform(run, STAGES)
    assert [sha256_file(run.path(name)) for name in SAME] == before
    assert len(teacher.payloads) == 40
    found = Scorecard.model_validate_json(run.path("scorecard.json").read_text()).recipe
    assert found and found.openings == 2
    assert "opened the same held-out items 2 times" in run.path("scorecard.md").read_text()


def stubbed(trial: Run, passed: float) -> None:
    """Stand for a training whose student passes a share of the prompts."""
    prompts = validation_prompts(trial)
    names = [prompt.id for prompt in prompts]
    scores = [
        Score(item_id=name, model="student", value=float(n < passed * len(names)), reason="r")
        for n, name in enumerate(names)
    ]
    write_records(trial.path("training_checks.jsonl"), scores)
    write_json(trial.path("training.json"), {"tokens": 7, "seconds": 1.5})


@pytest.mark.parametrize("sound", [False, True])
def test_trials_that_diverge_lose_and_all_of_them_end_it(searched, monkeypatch, sound):
    run, _ = searched
    twin = Run(run.config.model_copy(update={"runs": run.folder.parent / f"diverged{sound}"}))
    for name in ("documents.jsonl", "tasks.json", "validation_prompts.jsonl", "prompts.jsonl"):
        twin.path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.path(name), twin.path(name))
    shutil.copytree(run.path("dataset"), twin.path("dataset"))

    def diverging(trial: Run) -> None:
        if trial.config.train.learning_rate == RATE or not sound:
            raise DistillError(Exit.TRAINING, "step 7", "loss nan", "lower it")
        stubbed(trial, 0.5 if trial.folder.name == "default" else 0.4)

    monkeypatch.setattr(train, "main", diverging)
    monkeypatch.setattr(chooser, "RATES", (1e-6, RATE))
    monkeypatch.setattr(chooser, "EPOCHS", (4, 5))
    if not sound:
        with stops(Exit.TRAINING, "all 3 trials diverged.*step 7.*the last good"):
            recipe.main(twin)
        return
    recipe.main(twin)
    facts = read_json(twin.path("recipe.json"))
    assert (facts["chosen"], facts["trials"]) == ("default", 4)
    assert "step 7" in facts["ladder"][2]["diverged"]
    assert [row["passes"] for row in facts["ladder"]] == [10, 8, 0, 8]
    assert facts["test"]["difference"]["reason"] == "the default is the best of the rungs"


ESTIMATE: Any = SimpleNamespace(  # of a machine that does an operation a second
    work=SimpleNamespace(texts=None),
    machine=SimpleNamespace(seconds=lambda flops, dtype, stage: 3600.0),
    **{"student": None, "prompt": 1, "answer": 1, "trained": 1, "step": 1},
)


def test_the_hours_fix_the_trials_before_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(chooser, "RATES", (1e-4, 2e-4))
    monkeypatch.setattr(chooser, "EPOCHS", (4, 5))
    monkeypatch.setattr("distill.planning.search.answer_flops", lambda *_: 1.0)
    origins = [f"{n}" for n in range(40)]
    rungs = {}
    for hours in (None, 55, 50):
        config = config_of(tmp_path, recipe={"mode": "auto", "hours": hours, "seeds": 2})
        search = plan_search(config, ESTIMATE, origins)
        assert search and search.tested == 20
        rungs[hours] = search.rungs
    assert rungs == {None: ((4, 2), (5, 1)), 55: ((4, 2), (5, 1)), 50: ((4, 2),)}
    config = config_of(tmp_path, recipe={"mode": "auto", "hours": 1})
    with stops(Exit.CONFIG, "recipe.hours"):
        plan_search(config, ESTIMATE, origins)


def test_what_a_search_cannot_do_is_said_before_it(tmp_path):
    config = config_of(tmp_path)
    with stops(Exit.CONFIG, "no validation prompt has a checker"):
        plan_search(config, ESTIMATE, [])
    with stops(Exit.INPUT, "n = 24 validation prompts.*of 12 documents.*take 38 documents or more"):
        plan_search(config, ESTIMATE, [f"{n // 2}" for n in range(24)])
    for bound, match in (
        ({"teacher_tokens": 300}, "below a first tranche"),
        ({"teacher_tokens": 900}, "prompts.train="),
    ):
        run = Run(config_of(tmp_path, recipe={"mode": "auto", **bound}))
        with stops(Exit.BUDGET, match):
            require_search(run, True)
        require_search(run, False)
    rounds = {"on_policy": {"rounds": 1}, "signals": {"model": "x"}}
    for sections, match in (
        ({"recipe": {"mode": "auto", "losses": ["forward_kl"]}}, "name a local model in signals"),
        (
            {"teacher": {"model": "t"}, "recipe": {"mode": "auto", "dollars": 1}},
            "for a paid teacher",
        ),
        (rounds, "come after it, with chosen.yaml"),
    ):
        with pytest.raises(ValueError, match=match):
            config_of(tmp_path, **sections)


def test_a_search_takes_what_it_needs_for_granted(tmp_path):
    paid = config_of(tmp_path, recipe={"mode": "auto", "dollars": 2})
    assert paid.arms == ("text",) and not paid.captures
    assert paid.resolved()["teacher"]["budget_dollars"] == "2"
    local = config_of(tmp_path, teacher={"model": "t"})
    assert local.arms == ("text", "reverse_kl", "forward_kl") and local.captures
    assert local.signals.temperatures == (2.0,)
    assert local.train.metric_for_best_model == "checker"
    again = Config.model_validate_json(json.dumps(local.resolved()))
    assert again == local
    trial = tried(local, "forward_kl", 4e-4, 3)
    assert trial.train.loss.parts == {"forward_kl": 1} and trial.train.loss.temperature == 2
    assert (trial.train.lora.alpha, trial.recipe.mode) == (8, "off")
    assert not config_of(tmp_path, recipe={}).arms
