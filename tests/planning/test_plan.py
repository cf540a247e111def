"""The plan: the recorded runs within a factor of 1.5, and no figure where nothing is known."""

import json
import re

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from distill.cli import main
from distill.config.tree import Config
from distill.config.yaml_file import load_config
from distill.errors import Exit
from distill.models.registry import shape_of
from distill.planning import plan as planning
from distill.planning.cost import teacher_cost
from distill.planning.estimate import RunEstimate
from distill.planning.machine import Machine, find_machine
from distill.planning.plan import announce, make_plan, show
from distill.planning.work import count_work
from distill.storage.run_folder import Run
from tests.planning.test_work import ROOT, of_folder, shipped
from tests.planning.test_work import texts as texts  # a fixture
from tests.support.tiny import make_tiny

HERE = Machine(name="here", kind="cpu", rates={"auto": ("bfloat16", 858e9)}, source="recorded")
RECORDED = ROOT / "eval/results/python-docs-scorecard.json"
# Seconds of the stages of three runs on two cores: with bfloat16 (A), with AVX2 at 150 GFLOP/s (B),
# and the one that README shows (C). docs/measured.md describes the machines.
RUNS = {
    "A": ("bfloat16", 858e9, {"generate": 88, "train": 137, "evaluate": 96}),
    "B": ("float32", 150e9, {"generate": 452, "train": 459, "evaluate": 215}),
    "C": ("bfloat16", 412e9, json.loads(RECORDED.read_text())["cost"]["distillation"]["stages"]),
}


SAMPLE = (  # of GSM8K, which holds back more than it has
    f"corpus.path={ROOT / 'data/gsm8k/sample.jsonl'}",
    "corpus.split={validation: 20, heldout: 40}",
)
SIZE = (  # of the quickstart when it was recorded
    *("prompts.train=240", "prompts.validation=24", "prompts.heldout=66", "corpus.limit=360"),
    *("corpus.split={validation: 26, heldout: 66}", "evaluation.suites=[forgetting]"),
)


def quickstart(*overrides: str) -> Run:
    return shipped("quickstart", *SIZE, *overrides)


def shown(config: Config, machine: Machine = HERE) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(show(make_plan(Run(config), machine=machine)))
    return capture.get()


@pytest.mark.parametrize("where", RUNS)
def test_recorded_runs_are_predicted_within_a_factor_of_one_and_a_half(where):
    dtype, rate, recorded = RUNS[where]
    machine = Machine(name="x", kind="cpu", rates={"auto": (dtype, rate)}, source="")
    run = shipped("python-docs") if where == "C" else quickstart()
    config, work = run.config, count_work(run)
    estimate = RunEstimate(config, work, teacher_cost(config, work), machine)
    rows = {row.stage: row for row in estimate.stages()}
    assert list(rows) == [
        *("corpus", "prompts", "generate", "filter", "train", "evaluate", "report")
    ]
    for stage in ("generate", "train", "evaluate"):
        assert recorded[stage] / 1.5 < (rows[stage].seconds or 0) < 1.5 * recorded[stage]
    total = sum(recorded.values())
    assert total / 1.25 < sum(row.seconds or 0 for row in rows.values()) < 1.25 * total


@pytest.mark.parametrize("name", ["folder", "one-gpu"])
def test_shipped_configs_are_planned_from_real_texts(texts, name):
    told = shown(load_config(ROOT / f"configs/{name}.yaml", [f"corpus.path={texts}"]))
    assert "40 documents" in told and "models to fetch" in told and "858" not in told


def test_one_gpu_fits_its_gpu_and_what_does_not_fit_is_said(texts):
    config = load_config(ROOT / "configs/one-gpu.yaml", [f"corpus.path={texts}"])
    machine = find_machine(config.evaluation.machine, "bfloat16")
    peaks = {row.stage: row for row in make_plan(Run(config), machine=machine).memory}
    assert list(peaks) == ["generate", "train", "merge", "evaluate"]
    assert all(row.fits for row in peaks.values())
    told = shown(config, machine)
    assert "DOES NOT FIT" not in told and "memory: peak of generate" in told
    told = shown(config, machine.model_copy(update={"memory": 4e9, "main_memory": 3e9}))
    for stage in ("memory: DOES NOT FIT: train", "main memory: DOES NOT FIT: merge"):
        assert stage in told and "weights 3.1 GB" in told


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_the_merged_student_takes_the_disk_of_the_type_of_its_base(tmp_path, texts, dtype, width):
    model = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path / "m"), dtype=dtype)
    model.save_pretrained(tmp_path / "m")
    disk = make_plan(of_folder(texts, f"student.model={tmp_path / 'm'}"), machine=HERE).disk
    assert disk["merged"] == width * model.num_parameters()
    assert disk["merged"] == pytest.approx(
        (tmp_path / "m/model.safetensors").stat().st_size, rel=0.1
    )


def test_soft_labels_have_a_line_and_a_size():
    loss = "train.loss={ce: 0.5, forward_kl: 0.5}"
    text = shown(load_config(ROOT / "configs/gsm8k.yaml", SAMPLE))
    assert "signals" not in text and "soft labels" not in text
    text = shown(load_config(ROOT / "configs/gsm8k.yaml", [*SAMPLE, loss]))
    assert "read once" in text and "soft labels" in text


def test_several_tries_are_in_the_plan():
    more = [*SAMPLE, "evaluation.tries={n: 8}"]
    plans = [
        make_plan(Run(load_config(ROOT / "configs/gsm8k.yaml", c)), machine=HERE)
        for c in (SAMPLE, more)
    ]
    before, after = ({row.stage: row for row in plan.stages}["evaluate"] for plan in plans)
    assert "tries" not in before.work and after.work.startswith(before.work)
    assert after.work.endswith("tries")
    assert 4 * (before.tokens or 0) < (after.tokens or 0) < 5.1 * (before.tokens or 0)
    assert (after.seconds or 0) > 2 * (before.seconds or 0)


def test_rounds_on_policy_and_a_live_teacher_are_in_the_plan():
    live = ["train.loss={ce: 0.5, forward_kl: 0.5, teacher: live}", "on_policy.rounds=3"]
    configs = [
        load_config(ROOT / "configs/gsm8k.yaml", more) for more in (SAMPLE, [*SAMPLE, *live])
    ]
    plans = [make_plan(Run(config), machine=HERE) for config in configs]
    before, after = ({row.stage: row for row in plan.stages} for plan in plans)
    assert "refine" not in before and "signals" not in after
    assert after["refine"].work.startswith("3 rounds")
    assert (after["train"].seconds or 0) > 1.3 * (before["train"].seconds or 0)
    taught = plans[1].memory[1].parts["live teacher"]
    assert taught == 2 * shape_of("qwen2.5-coder-1.5b-instruct").parameters
    assert [row.stage for row in plans[1].memory][-2:] == ["refine", "evaluate"]


def test_own_answers_and_the_second_training_are_in_the_plan():
    settings = [*SAMPLE, "train.self_answers={n: 8, keep: 2, max_new_tokens: 100}"]
    configs = [load_config(ROOT / "configs/gsm8k.yaml", more) for more in (SAMPLE, settings)]
    plans = [make_plan(Run(config), machine=HERE) for config in configs]
    before, after = ({row.stage: row for row in plan.stages} for plan in plans)
    prompts = plans[1].prompts["train"]
    assert after["refine"].work.startswith(f"{8 * prompts:,} own answers, then up to ")
    assert before["train"] == after["train"]
    assert (after["refine"].seconds or 0) > 2 * (after["train"].seconds or 0)
    assert [row.stage for row in plans[1].memory][-2:] == ["refine", "evaluate"]


def test_without_a_rate_there_are_no_seconds_and_no_price():
    plan = make_plan(quickstart(), machine=HERE.model_copy(update={"rates": {}}))
    unknown = [row.stage for row in plan.stages if row.seconds is None]
    assert unknown == ["generate", "train", "evaluate"]
    assert "time: generate, train, evaluate not counted: not known yet" in plan.notes


def test_answers_that_exist_take_no_teacher():
    plan = make_plan(quickstart("teacher={kind: recorded, model: somebody}"), machine=HERE)
    line = plan.stages[2]
    assert plan.teacher is None and "none made" in line.work and not line.seconds


def test_the_plan_is_json_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["plan", str(ROOT / "configs/quickstart.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["prompts"] == {"train": 60, "validation": 6, "heldout": 30}
    assert plan["machine"]["rates"]["auto"] and plan["seconds"] > 60
    assert {row["stage"]: row["fits"] for row in plan["memory"]}["train"] in (True, False)
    assert plan["teacher"]["requests"] == 96 and plan["teacher"]["output_tokens_most"] == 96 * 128


def test_what_cannot_be_planned_says_so(capsys):
    assert main(["plan", str(ROOT / "configs/quickstart.yaml"), "student.model=a/b"]) == Exit.CONFIG
    assert "configs/models.yaml" in capsys.readouterr().err


def test_a_run_says_how_long_it_takes_here(capsys, monkeypatch, tmp_path):
    """The machine is a given one, so that the figures are."""
    machine = HERE.model_copy(update={"rates": {"auto": ("float32", 400e9)}})
    monkeypatch.setattr(planning, "measure", lambda *_: machine)
    announce(quickstart(f"runs={tmp_path}"))
    # of a model that is not here yet, the tokens of the prompts are counted less exactly
    said = r"run: about (7.9|8) min on this machine \(recorded\): generate 3(.1)? min"
    assert re.search(said, capsys.readouterr().err)


def test_a_run_is_never_stopped_by_what_cannot_be_predicted(capsys, tmp_path, texts):
    announce(quickstart(f"runs={tmp_path}", "student.model=some/model"))
    announce(of_folder(tmp_path / "none"))
    assert not capsys.readouterr().err
    tiny = str(make_tiny(tmp_path / "m"))
    short = (f"runs={tmp_path}", f"teacher.model={tiny}", f"student.model={tiny}")
    capsys.readouterr()
    announce(of_folder(texts, *short))
    assert not capsys.readouterr().err
