"""Measure the levers of a recipe by the criteria of eval/recipe.yaml, each arm a resumable run.

    python scripts/benchmarks/measure_recipe.py MEASURE --json FILE [--seeds 1 2] [--runs FOLDER]
    python scripts/benchmarks/measure_recipe.py pack RUN FILE.jsonl.gz

An arm's student is trained by the stages of `distill run`, in a run of its own that continues where
it was killed; what it answers is kept in the store of all runs. After each arm and seed the raw
figures are written: which problems were right, as a string of 0 and 1 in the order of their ids.
What FILE holds already is not measured again, and FILE has figures of one kind of CPU alone.
`pack` writes a run's problems with the teacher's answers, as they lie in data/gsm8k.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.table import Table

from distill.corpus.prompts import ask
from distill.errors import DistillError, Exit, exit_code
from distill.evaluation.statistics import Estimate, across_seeds, estimate_mean
from distill.evaluation.suites import answer_limit
from distill.evaluation.tries import vote
from distill.pipeline import STAGES, perform
from distill.records import Document, Prompt, Response, digest
from distill.responders.responder import Sampling
from distill.storage.environment import environment, processor
from distill.storage.files import read_json, read_records, sha256_file, write_json
from distill.storage.progress import console, say
from distill.storage.run_folder import Run, open_run
from distill.tasks.checkers import CheckResult, check
from distill.tasks.task import tasks_of_run
from distill.training.inner_run import student_answers

ROOT = Path(__file__).resolve().parent.parent.parent
CRITERIA, CONFIG = ROOT / "eval/recipe.yaml", ROOT / "configs/gsm8k.yaml"
SIZE = 1300  # problems of A, and of B
TEACHER = "qwen2.5-coder-1.5b-instruct"
RECORDED = (
    f"teacher={{kind: recorded, model: {TEACHER}, license: apache-2.0, max_new_tokens: 320}}",
    f"signals.model={TEACHER}",
    "corpus.columns={prompt: question, answer: answer, reference: reference}",
    "corpus.reference_pattern=null",
)
TEACHERS = {"greedy": "answers.jsonl.gz", "sampled": "sampled.jsonl.gz"}


class Arm(NamedTuple):
    """What one arm does otherwise than configs/gsm8k.yaml."""

    settings: Sequence[str] = ()
    teacher: str = "greedy"  # answers of data/gsm8k that are trained on; `asked` asks the teacher
    tries: int = 1
    temperature: float = 0.0
    steps_of: str | None = None  # trains as many steps as that arm with the same seed


def student(folder: Path, corpus: Path, arm: Arm, seed: int, steps: int | None) -> Run:
    """Return the run of an arm and seed, trained, or what is left of that done now.

    Arms that are trained alike share it, whatever measure they are of.
    """
    path, words = corpus, list[str]()
    if arm.teacher in TEACHERS:
        path, words = ROOT / "data/gsm8k" / TEACHERS[arm.teacher], [*RECORDED]
    words += [f"corpus.path={path}", "prompts.heldout=0", *arm.settings]
    words += [f"train.max_steps={steps}"] if steps else []
    name = f"{digest([arm.teacher, arm.settings, steps])[:8]}-{seed}"
    run = open_run(CONFIG, [*words, f"runs={folder}", f"name={name}", f"train.seed={seed}"])
    names = [stage.name for stage in STAGES]
    perform(run, STAGES[: names.index("evaluate")])
    return run


def problems(run: Run, name: str) -> list[Prompt]:
    """Return the problems of validation, A or B."""
    split = "validation" if name == "validation" else "heldout"
    documents = sorted(read_records(run.path("documents.jsonl"), Document), key=lambda d: d.id)
    mine = [document for document in documents if document.split == split]
    mine = {"A": mine[:SIZE], "B": mine[SIZE : 2 * SIZE]}.get(name, mine[:400])
    task = tasks_of_run(run.folder)(run.config.prompts.tasks[0])
    assert task is not None
    return [ask(task, document) for document in mine]


def results(
    run: Run, prompts: Sequence[Prompt], responses: Sequence[Response]
) -> list[CheckResult]:
    """Check answers, as many to each prompt; one that was cut off is wrong and says nothing."""
    task = tasks_of_run(run.folder)(prompts[0].task)
    assert task is not None and task.checker is not None
    tries = len(responses) // len(prompts)
    each = [prompt for prompt in prompts for _ in range(tries)]
    return [
        check(task.checker, prompt, response.text)
        if response.stop == "end"
        else CheckResult(False, None, "cut off")
        for prompt, response in zip(each, responses, strict=True)
    ]


def measured(run: Run, arm: Arm, prompts: Sequence[Prompt], trained: bool = True) -> dict[str, Any]:
    """Let an arm's student answer the problems and return the raw figures."""
    sampling = Sampling(temperature=arm.temperature, max_new_tokens=answer_limit(run.config))
    adapter = run.trained("adapter") if trained else None
    title = f"{run.folder.name}, {len(prompts)} problems"
    responses = student_answers(run, prompts, adapter, sampling, title, arm.tries)
    checked, task = results(run, prompts, responses), tasks_of_run(run.folder)(prompts[0].task)
    assert task is not None and task.checker is not None
    right, tries = "", list[int]()
    for number, prompt in enumerate(prompts):
        mine = slice(number * arm.tries, (number + 1) * arm.tries)
        passed = [bool(one.passed) for one in checked[mine]]
        right += str(int(passed[vote(task.checker, prompt, responses[mine])]))
        tries.append(sum(passed))
    figures: dict[str, Any] = {
        "right": right,
        "answer_tokens": sum(response.usage.output_tokens for response in responses),
        "cut_off": sum(response.stop == "length" for response in responses),
    }
    if arm.tries > 1:
        figures["tries_right"] = tries
    if trained:
        figures["training"] = read_json(run.trained("training.json"))
        figures["funnel"] = read_json(run.path("funnel.json"))
        for key in ("history", "notes"):  # long, and of no use here
            figures["training"].pop(key, None)
    return figures


def bits(arms: Mapping[str, Any], name: str, seeds: Sequence[str]) -> np.ndarray:
    """Return (S, N) whether each problem was right, for those seeds."""
    return np.array([[float(c) for c in arms[name][seed]["right"]] for seed in seeds])


def in_points(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON."""
    return {
        "points": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "how": estimate.method,
        "reason": estimate.reason,
    }


def outcome(
    measure: Mapping[str, Any], arms: Mapping[str, Any], ids: Sequence[str]
) -> dict[str, Any]:
    """Compare each arm with what the criterion names, on the seeds that both have."""
    against = measure["against"]
    rivals = [against] if isinstance(against, str) else against
    comparisons: dict[str, Any] = {}
    for name in (name for name in arms if name not in rivals):
        for rival in rivals:
            seeds = sorted(arms[name].keys() & arms.get(rival, {}).keys(), key=int)
            if not seeds:
                continue
            a_SN, b_SN = 100 * bits(arms, name, seeds), 100 * bits(arms, rival, seeds)
            one = len(seeds) == 1
            change = estimate_mean(a_SN[0] - b_SN[0], ids) if one else across_seeds(a_SN, b_SN, ids)
            row = {
                "seeds": len(seeds),
                "mean": float(a_SN.mean()),
                "rival": float(b_SN.mean()),
                **in_points(change),
            }
            least = measure.get("least", 0)
            if "success" in measure and change.low is not None and change.high is not None:
                met = change.low > least and row["points"] >= measure["success"]
                short = "not met" if change.high < measure["success"] else "cannot tell"
                row["verdict"] = "success" if met else short
            comparisons[f"{name} - {rival}"] = row
    return comparisons


def pack(run: Run, path: Path) -> None:
    """Write a row for each problem but those of the train split that the teacher was not asked.

    A row has the teacher's answer, where it was asked; one that was cut off is kept beside, as no
    answer. The same run gives the same bytes.
    """
    prompts = {p.id: p.document_id for p in read_records(run.path("prompts.jsonl"), Prompt)}
    responses = read_records(run.path("responses.jsonl"), Response)
    answers, rows = {prompts[one.prompt_id]: one for one in responses}, list[dict[str, object]]()
    for document in read_records(run.path("documents.jsonl"), Document):
        answer = answers.get(document.id)
        if answer is None and document.split == "train":
            continue
        row: dict[str, object] = {
            "question": document.text,
            "reference": document.meta["reference"],
        }
        if answer:
            row["answer" if answer.stop == "end" else "cut_off"] = answer.text
            row["tokens"] = answer.usage.output_tokens
        rows.append(row)
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    say(f"{path}: {len(rows)} problems, {len(answers)} answers, sha256 {sha256_file(path)}")


def show(measure: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    """Print the share right of each arm, and the differences."""
    table = Table("arm", "seeds", "right, %", title=measure["title"])
    for name, seeds in file["arms"].items():
        shares = [100 * row["right"].count("1") / len(row["right"]) for row in seeds.values()]
        table.add_row(name, str(len(shares)), " ".join(f"{share:.1f}" for share in shares))
    console.print(table)
    for name, row in file["outcome"].items():
        ends = (
            f"[{row['low']:+.1f}, {row['high']:+.1f}]" if row["low"] is not None else row["reason"]
        )
        say(f"{name}: {row['points']:+.1f} points {ends}, {row.get('verdict', '')}")


def main() -> None:
    """Do what is left of a measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    if sys.argv[1:2] == ["pack"]:
        return pack(open_run(Path(sys.argv[2])), Path(sys.argv[3]))
    criteria = yaml.safe_load(CRITERIA.read_text())
    parser.add_argument("measure", choices=criteria["measures"])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="of the measure's; all by default")
    parser.add_argument("--arms", nargs="+", help="of the measure's; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe"))
    parser.add_argument(
        "--corpus", type=Path, default=Path("train.jsonl"), help="GSM8K's, for teachers asked anew"
    )
    asked = parser.parse_args()
    measure = criteria["measures"][asked.measure]
    file: dict[str, Any] = read_json(asked.json) if asked.json.exists() else {"arms": {}}
    here = processor()
    if file.setdefault("processor", here) != here:
        what, fix = f"holds figures of {file['processor']}, this is {here}", "name another file"
        raise DistillError(Exit.CONFIG, asked.json, what, fix)
    for seed in asked.seeds or measure["seeds"]:
        for name, settings in measure["arms"].items():
            arm, done = Arm(**settings), file["arms"].setdefault(name, {})
            if str(seed) in done or (asked.arms and name not in asked.arms):
                continue
            steps = None
            if arm.steps_of:
                other = file["arms"].get(arm.steps_of, {}).get(str(seed))
                if other is None:  # it comes later in the list: measured with the next call
                    say(f"{name}: waits for {arm.steps_of}, seed {seed}")
                    continue
                steps = other["training"]["self_answers"][-1]["steps"]
            run = student(asked.runs, asked.corpus, arm, seed, steps)
            prompts = problems(run, measure["items"])
            ids = digest([prompt.id for prompt in prompts])
            if ids != criteria["sets"].get(measure["items"]):
                what = f"{measure['items']} has the hash {ids}, which eval/recipe.yaml does not say"
                raise DistillError(Exit.CONFIG, CRITERIA, what, "restore data/gsm8k and the config")
            done[str(seed)] = measured(run, arm, prompts)
            file |= {"items": ids, "environment": environment()}
            file["outcome"] = outcome(measure, file["arms"], [prompt.id for prompt in prompts])
            write_json(asked.json, file)
            show(measure, file)


if __name__ == "__main__":
    sys.exit(exit_code(main, False))
