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
from distill.config.learning import Recipe, tried
from distill.config.tree import Config
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.evaluation import answering, chooser, evaluate
from distill.evaluation.scorecard import Scorecard
from distill.pipeline import STAGES, from_stage, perform
from distill.planning import plan as planning
from distill.planning.cost import teacher_cost
from distill.planning.machine import Machine
from distill.planning.search import plan_search, require_search
from distill.planning.work import count_work
from distill.records import Pair, Record, Score
from distill.storage.files import read_json, read_records, sha256_file, write_json, write_records
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
    for page in ("scorecard.md", "report.html"):
        text = run.path(page).read_text()
        assert "chosen among 7 trainings: text-0.02-4" in text and "optimism" in text
    assert run.path("recipe.md").read_text().count("\n| text") == 1
    assert "aria-label" in run.path("recipe.html").read_text()
    assert main(["recipe", str(run.folder)]) == 0
    assert "| text-0.02-4 | 1 | 4 | 20 of 20 | +100.0 [" in capsys.readouterr().out
    assert "points, with a one-sided 80 % lower bound of +" in run.path("recipe.md").read_text()
    spent = [entry for entry in run.ledger.entries() if entry.stage == "recipe"]
    assert found["seconds"] == pytest.approx(sum(entry.seconds for entry in spent), rel=1e-4)
    assert found["tokens"] > facts["tokens"], "answers take tokens beside those trained on"
    off = open_run(run.folder, ["recipe.mode=off"]).config
    assert off.train.metric_for_best_model == "loss", "what follows from a search ends with it"
    checks = verify.verify(run.folder)
    assert not verify.failures(checks) and "answers/default.jsonl" in str(checks)
    chosen, config = load_config(run.path("chosen.yaml")), tried(run.config, **facts["choice"])
    assert chosen.resolved() == config.model_copy(update={"name": "run-chosen"}).resolved()


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


def test_held_out_items_are_known_again_whatever_the_teacher_says_and_who_opened_them(
    searched, tmp_path, monkeypatch
):
    run, _ = searched
    folder = shutil.copytree(run.folder, tmp_path / "run")
    auto, off = (
        Run(run.config.model_copy(update={"recipe": recipe}), folder)
        for recipe in (run.config.recipe, Recipe())
    )
    monkeypatch.setattr(answering, "answer", lambda *_: None)  # all have answered
    first, *others = read_records(auto.path("dataset/heldout.jsonl"), Pair)
    openings = list[int | None]()

    def evaluated(run: Run, training: str, **changes: Record) -> None:
        write_records(
            auto.path("dataset/heldout.jsonl"), [first.model_copy(update=changes), *others]
        )
        run.note("stages", {**run.manifest()["stages"], "train": {"marker": training}})
        evaluate.main(run)
        openings.append(read_json(run.path("evaluation.json")).get("recipe", {}).get("openings"))

    reworded = first.response.model_copy(update={"text": "as another teacher says it"})
    evaluated(off, "one", response=reworded)
    evaluated(auto, "two", response=reworded)
    evaluated(auto, "two")
    evaluated(auto, "two", prompt=first.prompt.model_copy(update={"reference": "another"}))
    before = read_json(run.path("evaluation.json"))["recipe"]["openings"]
    assert openings == [None, before + 2, before + 2, 1]


def stubbed(trial: Run, passed: float) -> None:
    """Stand for a training whose student passes a share of the prompts."""
    prompts = validation_prompts(trial)
    names = [prompt.id for prompt in prompts]
    values = [float(n < passed * len(names)) for n in range(len(names) - 1)]
    scores = [
        Score(item_id=name, model="student", value=value, reason="r")
        for name, value in zip(names, [*values, None], strict=True)  # the last was not checked
    ]
    write_records(trial.path("training_checks.jsonl"), scores)
    write_json(trial.path("training.json"), {"tokens": 7, "seconds": 1.5})


def twin_of(run: Run, name: str, **sections: Any) -> Run:
    """Return a run whose search is left to do."""
    config = run.config.model_copy(update={"runs": run.folder.parent / name, **sections})
    twin = Run(config)
    for file in ("documents.jsonl", "tasks.json", "validation_prompts.jsonl", "prompts.jsonl"):
        twin.path(file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.path(file), twin.path(file))
    shutil.copytree(run.path("dataset"), twin.path("dataset"))
    return twin


@pytest.mark.parametrize("sound", [False, True])
def test_trials_that_diverge_lose_and_all_of_them_end_it(searched, monkeypatch, sound):
    twin = twin_of(searched[0], f"diverged{sound}")

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
    passes = [row["passes"] for row in facts["ladder"]]
    assert passes == pytest.approx([20 * 10 / 19, 20 * 8 / 19, 0, 20 * 8 / 19], rel=1e-4)
    assert facts["test"]["difference"]["reason"] == "the default is the best of the rungs"


def test_what_has_begun_is_searched_to_its_end_with_other_memory_and_on_a_busy_machine(
    searched, monkeypatch
):
    twin = twin_of(searched[0], "sealed")
    trials = list[str]()

    def dying(trial: Run) -> None:
        trials.append(trial.folder.name)
        if len(trials) == 2:
            raise KeyboardInterrupt
        stubbed(trial, 0.5 if trial.folder.name == "default" else 0.4)

    monkeypatch.setattr(train, "main", dying)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(twin)
    train_settings = twin.config.train.model_copy(update={"gradient_checkpointing": True})
    bounds = twin.config.recipe.model_copy(update={"teacher_tokens": 10**6})
    changes = {"train": train_settings, "recipe": bounds}
    again = Run(twin.config.model_copy(update=changes))
    monkeypatch.setattr(chooser, "EPOCHS", (9,))  # what another plan would say
    slow = ESTIMATE.machine
    monkeypatch.setattr("distill.planning.search.measure", lambda *_: slow)
    hours = Run(twin.config.model_copy(update={"recipe": bounds.model_copy(update={"hours": 1})}))
    require_search(hours, False)
    recipe.main(again)
    assert trials == ["default", "text-0.02-4", "text-0.02-4"]
    shutil.rmtree(twin.path("recipe"))  # as --redo leaves it
    with stops(Exit.CONFIG, "recipe.hours"):
        require_search(hours, False)
    recipe.main(again)
    assert trials[3:] == ["default", "text-0.02-9"]
    stage = next(stage for stage in STAGES if stage.name == "recipe")
    local = {"model": str(twin.config.student.model), "kind": "local"}
    tree = {**twin.config.user_tree(), "teacher": local}
    other = Config.model_validate_json(json.dumps(tree))
    prints = [Run(config, twin.folder).fingerprint(stage) for config in (twin.config, other)]
    losses = [facts["losses of the trials"] for facts in prints]
    assert losses == ["text", "text reverse_kl forward_kl"], "other teachers bring other trials"


def test_the_chosen_config_can_be_loaded_where_wrong_answers_gave_signals_only(
    searched, monkeypatch
):
    tree = searched[0].config.user_tree()
    tree["teacher"] = {"model": tree["student"]["model"]}
    tree["filters"]["failed_checker"] = "signals_only"
    tree["train"]["loss"] |= {"forward_kl": 1.0}
    tree["recipe"]["losses"] = ["text"]
    config = Config.model_validate_json(json.dumps(tree))
    sections = {name: getattr(config, name) for name in ("teacher", "filters", "train", "recipe")}
    twin = twin_of(searched[0], "signals", **sections)
    monkeypatch.setattr(
        train, "main", lambda trial: stubbed(trial, float("text" in trial.folder.name))
    )

    def scores(trial: Run, prompts: Any, adapter: Path) -> list[Score]:
        value = float("text" in trial.folder.name)
        return [Score(item_id=p.id, model="student", value=value, reason="r") for p in prompts]

    monkeypatch.setattr(recipe, "check_adapter", scores)
    recipe.main(twin)
    chosen = load_config(twin.path("chosen.yaml"))
    assert not chosen.train.loss.soft and chosen.filters.failed_checker == "drop"


ESTIMATE: Any = SimpleNamespace(  # of a machine that does an operation a second
    work=SimpleNamespace(pool=None),
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
        ({"teacher_tokens": 1350}, "may take 1420"),  # 1,300 are expected
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
    assert paid.user_tree()["teacher"]["budget_dollars"] is None
    for dollars, least in ((5, 5), (200, 100)):
        teacher = paid.user_tree()["teacher"] | {"budget_dollars": 100}
        both = config_of(tmp_path, recipe={"mode": "auto", "dollars": dollars}, teacher=teacher)
        assert getattr(both.teacher, "budget_dollars", None) == least
    local = config_of(tmp_path, teacher={"model": "t"})
    assert local.arms == ("text", "reverse_kl", "forward_kl") and local.captures
    assert local.signals.temperatures == (2.0,)
    assert local.train.metric_for_best_model == "checker"
    assert Config.model_validate_json(json.dumps(local.user_tree())) == local
    off = Config.model_validate_json(json.dumps({**local.user_tree(), "recipe": {}}))
    assert (off.signals.temperatures, off.train.metric_for_best_model) == ((), "loss")
    trial = tried(local, "forward_kl", 4e-4, 3)
    assert trial.train.loss.parts == {"forward_kl": 1} and trial.train.loss.temperature == 2
    assert (trial.train.lora.alpha, trial.recipe.mode) == (8, "off")
    assert not config_of(tmp_path, recipe={}).arms


def test_a_corpus_that_no_plan_reads_is_looked_at_before_the_first_request(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(count_work, "__defaults__", (1,))  # bytes above which it is not read
    with FakeTeacher(always(message={"content": "ok"})) as teacher:
        tree = tree_of(tmp_path, teacher)
        tree["corpus"]["split"]["validation"] = 10
        run = Run(Config.model_validate_json(json.dumps(tree)))
        rows = {row.stage: row for row in planning.make_plan(run).stages}
        assert rows["recipe"].work == "not known until the corpus is read"
        with stops(Exit.INPUT, "corpus.split.validation"):
            perform(run, STAGES[:5])
        assert not teacher.payloads


def test_the_search_is_announced_and_its_trials_have_room(tmp_path, monkeypatch, capsys):
    run = Run(config_of(tmp_path))
    rates = {"float32": ("float32", 1e7)}
    machine = Machine(name="here", kind="cpu", rates=rates, source="recorded")
    monkeypatch.setattr(planning, "measure", lambda *_: machine)
    planning.announce(run)
    assert ", recipe " in capsys.readouterr().err
    disk = planning.make_plan(run, machine=machine).disk
    free = int(disk["checkpoints"] + disk["merged"] + disk["trials"] / 2)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with stops(Exit.STATE, "trials"):
        planning.announce(run)


def test_what_the_store_holds_of_the_answers_counts(searched):
    tree = searched[0].config.user_tree()
    tree["corpus"]["split"]["validation"] = 38  # two prompts more are asked
    config = Config.model_validate_json(json.dumps({**tree, "name": "more"}))
    cost = teacher_cost(config, count_work(Run(config)))
    assert cost and cost.requests and cost.stored_tokens > 0
    most = cost.stored_tokens + cost.input_tokens + cost.output_tokens_most
    for bound, error in ((most, None), (most - 1, Exit.BUDGET)):
        tree["recipe"]["teacher_tokens"] = bound
        run = Run(Config.model_validate_json(json.dumps({**tree, "name": "more"})))
        if error:
            with stops(error, "recipe.teacher_tokens"):
                require_search(run, True)
        else:
            require_search(run, True)
    run = Run(searched[0].config.model_copy(update={"recipe": run.config.recipe}), run.folder)
    require_search(run, True)  # all is bought


def test_where_the_default_alone_diverges_the_run_is_evaluated_and_that_is_said(
    searched, monkeypatch
):
    run, real = searched[0], train.main

    def diverging(trial: Run) -> None:
        if trial.config.train.learning_rate == 1e-6:
            raise DistillError(Exit.TRAINING, "step 7", "loss nan", "lower it")
        real(trial)

    monkeypatch.setattr(train, "main", diverging)
    perform(run, STAGES, from_stage("recipe"))
    assert read_json(run.path("recipe.json"))["chosen"] == "text-0.02-4"
    card = run.path("scorecard.md").read_text()
    assert "The default diverged, so held-out items have no difference" in card
