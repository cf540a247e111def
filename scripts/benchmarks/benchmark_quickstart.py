"""Measure the quickstart against the plain script, interleaved: wall time from process start to
result, and quality.

Both sides ask the same prompts of the same models and take the same evaluations; both are scored by
the same scorers. The plain script runs in two columns: as most people write it, and with its best
flag (batches sorted by length). Run nothing else meanwhile. Command: `python
scripts/benchmarks/benchmark_quickstart.py [--repeats 2] [--best-flags]`; it prints one table and
writes eval/results/quickstart.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sacrebleu import sentence_chrf

from distill.config.yaml_file import load_config
from distill.models.registry import fetch
from distill.records import Pair, Prompt, Response, Split
from distill.storage.files import read_json, read_records, write_json
from distill.tasks.checkers import check
from distill.tasks.task import load_task

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
RESULTS = ROOT / "eval" / "results" / "quickstart.json"
Answers = dict[str, str]  # prompt id to text
HELD_OUT: Split = "heldout"


def timed(command: list[str], log: Path) -> float:
    """Run a command to its end and return its seconds; stop where it fails."""
    started = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"error: {' '.join(command)}: exit code {code} (see {log})")
    return time.monotonic() - started


def scored(prompts: dict[str, Prompt], teacher: Answers, answers: Answers) -> dict[str, float]:
    """Return passes by task and the mean chrF against the teacher's answers."""
    result: dict[str, float] = {}
    for identity, prompt in prompts.items():
        checker = load_task(prompt.task).checker or {}
        passed = check(checker, prompt, answers[identity]).passed
        result[prompt.task] = result.get(prompt.task, 0) + bool(passed)
    likeness = [sentence_chrf(answers[i], [teacher[i]]).score for i in prompts]
    return {**result, "chrf": statistics.mean(likeness)}


def distill_side(folder: Path, name: str) -> dict[str, Any]:
    """Run the quickstart in a fresh folder, with an empty store."""
    command = [sys.executable, "-m", "distill", "run", str(CONFIG)]
    seconds = timed([*command, f"runs={folder}", f"name={name}"], folder / f"{name}.log")
    run = folder / name
    pairs = read_records(run / f"dataset/{HELD_OUT}.jsonl", Pair)
    prompts = {pair.prompt.id: pair.prompt for pair in pairs}
    answers = {m: answers_of(run, m) for m in ("base", "student", "teacher")}
    card = read_json(run / "scorecard.json")
    loss = {m: card["agreement"]["nats_per_token"][m] for m in ("base", "student")}
    stages = {e["stage"]: e["seconds"] for e in ledger(run)}
    training = read_json(run / "training.json")
    return {
        "seconds": seconds,
        "stages": stages,
        "train_tokens": training["tokens"],
        **{key: training[key] for key in ("steps", "best_step", "adapter_step")},
        "loss": loss,
        "quality": {m: scored(prompts, answers["teacher"], answers[m]) for m in answers},
    }


def answers_of(run: Path, model: str) -> Answers:
    """Return what a model of the run answered to the held-out prompts."""
    found = read_records(run / f"answers/{model}.jsonl", Response)
    return {response.prompt_id: response.text for response in found}


def ledger(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ledger."""
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text("utf-8").splitlines()]


def plain_side(folder: Path, run: Path, name: str, flags: list[str]) -> dict[str, Any]:
    """Run the plain script on the prompts of a finished run."""
    config = load_config(CONFIG)
    models = [str(fetch(config.teacher.model)), str(fetch(config.student.model))]
    out = folder / f"{name}.json"
    script = str(ROOT / "scripts" / "plain_baseline.py")
    seconds = timed(
        [sys.executable, script, str(run), *models, str(out), *flags], folder / f"{name}.log"
    )
    found = read_json(out)
    pairs = read_records(run / f"dataset/{HELD_OUT}.jsonl", Pair)
    prompts = {pair.prompt.id: pair.prompt for pair in pairs}
    names = ("base", "student", "teacher")
    quality = {m: scored(prompts, found["teacher"], found[m]) for m in names}
    keys = ("train_tokens", "loss")
    return {
        "seconds": seconds,
        "stages": found["seconds"],
        "quality": quality,
        **{k: found[k] for k in keys},
    }


def table(sides: dict[str, list[dict[str, Any]]]) -> str:
    """Return the comparison as a Markdown table: median seconds with their range, ratio, and
    quality."""
    ours = statistics.median(row["seconds"] for row in sides["distill"])
    lines = [
        "| side | seconds (range) | times ours | valid JSON | example | chrF | nats a token |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, rows in sides.items():
        seconds = [row["seconds"] for row in rows]
        median, last = statistics.median(seconds), rows[-1]
        student = last["quality"]["student"]
        lines.append(
            f"| {name} | {median:.0f} ({min(seconds):.0f} to {max(seconds):.0f}) "
            f"| {median / ours:.2f} "
            f"| {student['api_json']} | {student['example']} | {student['chrf']:.1f} "
            f"| {last['loss']['student']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure both sides in turn, print the table and keep the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--best-flags", action="store_true", help="also the plain script, sorted")
    options = parser.parse_args()
    sides: dict[str, list[dict[str, Any]]] = {"distill": [], "plain": []}
    for name in (load_config(CONFIG).teacher.model, load_config(CONFIG).student.model):
        fetch(name)  # converted before the clock runs
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(options.repeats):
            sides["distill"].append(distill_side(folder, f"run-{number}"))
            run = folder / f"run-{number}"
            sides["plain"].append(plain_side(folder, run, f"plain-{number}", []))
            if options.best_flags:
                row = plain_side(folder, run, f"sorted-{number}", ["--sorted"])
                sides.setdefault("plain, sorted by length", []).append(row)
            print(table(sides), flush=True)
    write_json(RESULTS, {"machine": platform.processor() or platform.machine(), "sides": sides})


if __name__ == "__main__":
    main()
