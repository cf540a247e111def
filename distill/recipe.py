"""The stage `recipe`: trials choose the settings of training by what the student's answers score.

A trial is a run inside the run, in recipe/TRIAL; it shares dataset, signals and store, and buys
nothing. Rungs and test are those of `distill.evaluation.chooser`. A search that was killed goes on
to the same bytes: what a trial scored is read, and no clock counts.
"""

import shutil
from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
import yaml

from distill.config.learning import tried
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.evaluation.chooser import Trial, against_default, climb, halves, ranked
from distill.evaluation.statistics import Bounds, Estimate, estimate_difference
from distill.formatting import plain_numbers
from distill.models.devices import free_frames, release_memory
from distill.planning.estimate import RunEstimate
from distill.planning.machine import measure
from distill.planning.plan import types_of
from distill.planning.search import Search, plan_search, sealed_search
from distill.planning.work import count_work, origins_of
from distill.records import Document, Prompt, Score
from distill.report import plots
from distill.report.render import environment
from distill.storage.files import read_json, read_records, write_atomic, write_json, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training import train
from distill.training.checked import CHECKED, check_adapter, checked_values, validation_prompts
from distill.training.inner_run import InnerRun


def main(run: Run) -> None:
    """Search, and write recipe.json, chosen.yaml, recipe.md and recipe.html.

    Raises DistillError: exit 7 where every trial diverges, and what `plan_search` raises.
    """
    config, prompts = run.config, validation_prompts(run)
    origins = origins_of(prompts, read_records(run.path("documents.jsonl"), Document))
    search, first_N, origins_N = seal_search(run, origins), halves(origins), np.array(origins)
    read, rest = ([*compress(prompts, mine_N)] for mine_N in (first_N, ~first_N))
    default = Trial(None, None, config.train.num_train_epochs)
    results, rungs, more = dict[Trial, dict[str, Any]](), dict[Trial, int](), list[dict[str, Any]]()

    def passes(trial: Trial, rung: int) -> float | None:
        results[trial], rungs[trial] = perform(run, trial, read), rung
        return None if "diverged" in results[trial] else sum(results[trial]["values"])

    if not (sound := climb(default, search.losses, search.rungs, passes)):
        what = f"all {len(results)} trials diverged, the default so: {results[default]['diverged']}"
        fix = f"lower train.learning_rate; the last good: {run.path('recipe/default/checkpoints')}"
        raise DistillError(Exit.TRAINING, "recipe", what, fix)
    best = choice = ranked(sound)[0]
    test = Estimate.unknown("the default is the best of the rungs")
    if best != default:
        seeds = range(1, config.recipe.seeds + 1)
        more = [perform(run, t, read, seed, rest) for t in (best, default) for seed in seeds]
        best_SN, default_SN = np.split(np.array([row["values"] for row in more]), 2)
        test = against_default(best_SN, default_SN, origins_N[~first_N])
        choice = best if test.low is not None and test.low > 0 else default
    if choice != default:  # whose held-out answers are compared with the default's
        more.append(perform(run, default, prompts, last=True))
    base, shares = results[default]["values"], Bounds(0.0, 1.0)
    ladder = [
        {
            **{"trial": trial.name, "rung": rungs[trial], **trial._asdict(), "n": len(read)},
            **{key: row[key] for key in ("tokens", "diverged") if key in row},
            "passes": sum(row["values"]),
            "difference": estimate_difference(
                row["values"], base, origins_N[first_N], bounds=shares
            ),
        }
        for trial, row in results.items()
    ]
    rows = [*results.values(), *more]
    facts = {
        **{"choice": choice._asdict(), "chosen": choice.name, "best": best.name, "ladder": ladder},
        "test": {"n": len(rest), "seeds": config.recipe.seeds, "difference": test},
        "smallest_difference": search.smallest_difference,
        **{"trials": len(rows), "tokens": sum(row["tokens"] for row in rows)},
    }
    final = tried(config, *choice).model_copy(update={"name": f"{config.name[:80]}-chosen"})
    tree = final.model_dump(mode="json", exclude_defaults=True)
    tree["teacher"]["kind"] = config.teacher.kind
    if config.evaluation.judge:
        tree["evaluation"]["judge"]["kind"] = config.evaluation.judge.kind
    if config.signals.endpoint:
        tree["signals"]["endpoint"]["kind"] = "endpoint"
    if config.filters.failed_checker == "signals_only" and not final.train.loss.soft:
        tree["filters"]["failed_checker"] = "drop"  # what has no signal to learn from
    text = yaml.safe_dump(tree, sort_keys=False)
    load_config(run.path("chosen.yaml"), text=text)  # what could not be read is not written
    write_atomic(run.path("chosen.yaml"), text)
    write_json(run.path("recipe.json"), plain_numbers(facts))
    write_pages(run, [row.get("seconds") for row in results.values()])
    totals = {"chosen": choice.name, "trials": len(rows)}
    run.note("recipe", {**run.manifest()["recipe"], **totals})


def seal_search(run: Run, origins: Sequence[str]) -> Search:
    """Return the search's list of trials: once it has begun, what the manifest holds."""
    if search := sealed_search(run):
        return search
    config = run.config
    estimate = RunEstimate(config, count_work(run), None, measure(types_of(config)))
    search = plan_search(config, estimate, origins)
    assert search
    before = len(run.ledger.entries())  # what follows of this stage is spent on this search
    run.note("recipe", {"search": search.model_dump(mode="json"), "ledger_before": before})
    say(search.line())
    return search


def perform(
    run: Run,
    trial: Trial,
    prompts: Sequence[Prompt],
    seed: int = 0,
    tested: Sequence[Prompt] = (),
    last: bool = False,
) -> dict[str, Any]:
    """Train, unless that is done, with the checkpoint chosen on `prompts`; return what the answers
    to them score, or those to `tested`. The `last` training is that of a run without a search.

    A training that diverged scores 0, and its checkpoints stay.
    """
    name = f"{trial.name}{'-last' * last}{f'-seed-{seed}' * bool(seed)}"
    config = tried(run.config, *trial)
    seeds = {"seed": (run.config.train_seed + seed) % 2**32}
    settings = config.train.model_copy(update=seeds)
    inner = InnerRun(run, f"recipe/{name}", train=settings, recipe=config.recipe)
    path = inner.path("result.json")
    if not path.exists():
        say(f"recipe: {name}")
        write_records(inner.path(CHECKED), prompts)
        files = ["dataset/train.jsonl", "signals.json", *["dataset/validation.jsonl"] * last]
        for file in (file for file in files if run.path(file).exists()):
            inner.path(file).parent.mkdir(exist_ok=True)
            shutil.copyfile(run.path(file), inner.path(file))
        facts: dict[str, Any] = {"values": [0.0] * len(tested or prompts), "tokens": 0}
        try:
            if not inner.path("training.json").exists():
                train.main(inner)
            training = read_json(inner.path("training.json"))
            scores = read_records(inner.path("training_checks.jsonl"), Score)
            if tested:
                scores = check_adapter(inner, tested, inner.path("adapter"))
            values = checked_values(scores)
            mean = sum(values) / len(values)  # in the place of what was not checked
            facts["values"] = [mean if s.value is None else s.value for s in scores]
            facts |= {key: training[key] for key in ("tokens", "seconds")}
        except DistillError as error:
            if error.code != Exit.TRAINING or not error.where.startswith("step "):
                raise
            free_frames(error)
            facts["diverged"] = str(error)
            say(f"recipe: {name} diverged: {error}")
        write_json(path, facts)
        release_memory()
    facts = read_json(path)
    if "diverged" not in facts:
        for folder in ("checkpoints", *["merged"] * (not last)):
            shutil.rmtree(inner.path(folder), ignore_errors=True)
    return facts


def write_pages(run: Run, seconds: Sequence[float | None]) -> None:
    """Write the ladder as a table, recipe.md, and as a plot, recipe.html."""
    recipe, marks = read_json(run.path("recipe.json")), list[plots.Mark]()
    for row in recipe["ladder"]:
        kind = "teacher" if row["rung"] else "base"
        kind = "student" if row["trial"] == recipe["chosen"] else kind
        marks.append(plots.Mark(kind, 100 * row["passes"] / row["n"], None, None, row["epochs"]))
    values = [mark.value for mark in marks]
    edge = (max(values) - min(values) or 1.0) / 10
    ends = (1.1 * max(mark.cost for mark in marks), min(values) - edge, max(values) + edge)
    words = "; ".join(f"{r['trial']}: {r['passes']:g} of {r['n']}" for r in recipe["ladder"])
    plot = plots.Plot(*ends, "epochs", "{:g}", "passed, %", "{:.3g}", words, marks)
    values = {"name": run.config.name, "recipe": recipe, "seconds": seconds, "plot": plot}
    for name in ("recipe.md", "recipe.html"):
        template = environment(markdown=name == "recipe.md").get_template(f"{name}.j2")
        write_atomic(run.path(name), template.render(**values, ticks=plots.ticks))
