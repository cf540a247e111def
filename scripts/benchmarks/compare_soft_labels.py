"""Compare students trained on text alone, on soft labels, and then on their own answers: one
teacher, the same tokens.

    distill signals configs/gsm8k.yaml ... 'train.loss={ce: 0.5, forward_kl: 0.5}'
    python scripts/benchmarks/compare_soft_labels.py runs/gsm8k [KEY=VALUE ...] --seeds 3 \\
        --rates 1e-4 3e-4 --json FILE

RUN is a run whose signals are captured; KEY=VALUE changes its training. Each student is a run of
its own beside it, with RUN's dataset: one that was killed goes on where it was, and what is
measured is not measured again. Each kind is trained with every learning rate on seed 0; the rate
with the least loss on the validation answers' tokens stays for the other seeds, and on-policy
rounds go on from the soft labels of seed 0. All are measured on the held-out items: the share that
the task's checker passes, and on the teacher's answers that it passes the loss and the divergence
from the teacher's distributions, forward KL from lists as training has them, both in nats a token,
item by item.
"""

import argparse
import gc
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmark_soft_labels import Signals
from rich.table import Table

from distill.config.learning import OnPolicy
from distill.config.tree import Config
from distill.errors import DistillError, Exit, exit_code
from distill.evaluation.answering import Here, requests_to, student_responder
from distill.evaluation.statistics import (
    Bounds,
    Estimate,
    Floats,
    across_seeds,
    estimate_gap_recovered,
    estimate_mean,
    smallest_visible,
)
from distill.evaluation.suites import answer_limit, by_item, held_out_items
from distill.formatting import figure
from distill.models import loading
from distill.records import Item, Pair, Response
from distill.responders.ask import Ask
from distill.storage.environment import environment
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.progress import console, say
from distill.storage.run_folder import Run, open_run
from distill.tasks.scoring import score_answer
from distill.tasks.task import tasks_of_run
from distill.training import train
from distill.training.batches import Example
from distill.training.encode import encode_pairs
from distill.training.soft_labels import on_policy
from distill.training.soft_labels.labels import CachedLabels
from distill.training.student import answer_loss, make_student

KINDS: dict[str, dict[str, float]] = {
    "text": {"ce": 1.0, "forward_kl": 0.0},
    "soft": {"ce": 0.5, "forward_kl": 0.5},
}
ON_POLICY = "soft, then on-policy"
SHARE = Bounds(0.0, 1.0)
SETTINGS = ("seed", "prompts", "teacher", "filters", "signals", "student", "train", "on_policy")
STEPS = ("steps", "best_step", "adapter_step")
COLUMNS = (("right", 3), ("nats", 4), ("kl", 4), ("gap_recovered", 2))
KL = "forward_kl"
COPIED = (
    *("dataset/validation.jsonl", "dropped.jsonl", "prompts.jsonl", "questions.jsonl"),
    "documents.jsonl",
)


class Measured(NamedTuple):
    """One student on the held-out items: whether each passes; of each verified answer of the
    teacher loss and KL."""

    right: Floats
    nats: Floats
    kl: Floats


class HeldOut(NamedTuple):
    """The held-out items, and those pairs whose answer of the teacher is right, with its
    distributions over these."""

    pairs: list[Pair]
    items: list[Item]
    verified: list[int]
    teacher_N: Floats
    examples: list[Example]
    labels: CachedLabels

    @classmethod
    def of(cls, base: Run) -> "HeldOut":
        """Read a run's, and check the teacher's answers."""
        pairs, items = held_out_items(base.folder)
        answers = [pair.response for pair in pairs]
        right_N = np.array(list(marks(base, items, answers)))
        verified = np.flatnonzero(right_N == 1).tolist()
        student, train_ = base.config.student, base.config.train
        tokenizer = loading.load_tokenizer(student.model, student.revision)
        own, date = [pairs[i] for i in verified], base.config.template_date
        examples = encode_pairs(tokenizer, own, date, train_.max_length, base.folder)
        labels = Signals(base, examples, own).labels(examples)
        return cls(pairs, items, verified, right_N, examples, labels)

    def divergences(self, network: Any) -> list[float]:
        """Return a network's forward KL from the teacher on each verified answer, in nats a
        token."""
        student, _ = make_student(network)
        student.labels, place = self.labels, 1 + list(self.labels.settings.parts).index(KL)
        with torch.no_grad():
            sums = [float(student(student.batch([one]))[place]) for one in self.examples]
        return [total / sum(one.weights) for total, one in zip(sums, self.examples, strict=True)]


def marks(base: Run, items: Sequence[Item], answers: Sequence[Response]) -> Iterator[float]:
    """Yield 1 for an answer that its task's checker passes, else 0."""
    find, given = tasks_of_run(base.folder), by_item(items, answers)
    for item in items:
        task = find(item.task)
        if task is None or task.checker is None:
            what = "has no checker, and without one nobody can say what is right"
            raise DistillError(Exit.EVALUATION, f"task {item.task}", what, "use a task with one")
        yield score_answer(item, given[item.id], "student", task.checker).value or 0.0


def student_run(base: Run, name: str, changes: Mapping[str, Any], count: int | None) -> Run:
    """Return the run of one student, with the first `count` rows of the training data of `base`."""
    config = base.config
    settings = config.train.model_copy(update=dict(changes))
    named = {"name": f"{config.name}-{name}", "store": config.store_folder(), "train": settings}
    run = Run(config.model_copy(update={**named, "on_policy": OnPolicy()}))
    if run.path("signals.json").exists():
        return run
    pairs = read_records(base.path("dataset/train.jsonl"), Pair)[:count]
    write_records(run.path("dataset/train.jsonl"), pairs)
    for file in COPIED:
        if base.path(file).exists():
            shutil.copy(base.path(file), run.path(file))
    made = read_json(base.path("signals.json"))
    kept = {p.response.id for p in [*pairs, *read_records(run.path(COPIED[0]), Pair)]}
    rows = {answer: row for answer, row in made["rows"].items() if answer in kept}
    write_json(run.path("signals.json"), {**made, "rows": rows})
    return run


def trained(run: Run) -> Run:
    """Train a student, or what is left of it."""
    with run.lock():
        if not run.path("training.json").exists():
            say(f"training {run.folder.name}")
            train.main(run)
    gc.collect()
    return run


def refined(base: Run, soft: Run, count: int | None, settings: Config) -> Run:
    """Let the student of `soft` go on from its own answers."""
    run = student_run(base, "on-policy-0", {}, count)
    rounds = {"train": soft.config.train, "on_policy": settings.on_policy}
    run = Run(run.config.model_copy(update=rounds))
    with run.lock():
        if not run.path("adapter").exists():
            shutil.copytree(soft.path("adapter"), run.path("adapter"))
        if not run.path("refined/training.json").exists():
            on_policy.main(run)
    gc.collect()
    return run


class Candidate(NamedTuple):
    """A student of seed 0, and the loss on the validation answers' tokens at the step whose weights
    it has."""

    run: Run
    loss: float


def tried(
    base: Run, kind: str, rates: Sequence[float], count: int | None
) -> dict[float, Candidate]:
    """Return the students of seed 0 by learning rate, the best rate first."""
    candidates = {}
    for rate in rates:
        run = student(base, kind, rate, 0, count)
        training = read_json(run.path("training.json"))
        by_step = {row["step"]: row.get("ce", row["loss"]) for row in training["validation"]}
        candidates[rate] = Candidate(run, by_step[training["adapter_step"]])
    losses = {rate: candidate.loss for rate, candidate in candidates.items()}
    say(f"{kind}: loss on the validation answers by learning rate {losses}")
    return dict(sorted(candidates.items(), key=lambda row: row[1].loss))


def trainings(run: Run) -> list[dict[str, int]]:
    """Return how many steps a student's training, or each of its rounds, took, the best one, and
    the one it left."""
    rounds = range(1, run.config.on_policy.rounds + 1)
    folders = [run.path(f"refined/round-{number}") for number in rounds] or [run.folder]
    rows = [read_json(folder / "training.json") for folder in folders]
    return [{key: row[key] for key in STEPS} for row in rows]


def student(base: Run, kind: str, rate: float, seed: int, count: int | None) -> Run:
    """Return the run of one student, trained."""
    loss = base.config.train.loss.model_copy(update=KINDS[kind])
    changes = {"loss": loss, "learning_rate": rate, "seed": seed}
    return trained(student_run(base, f"{kind}-{rate:g}-{seed}", changes, count))


def measure(base: Run, run: Run | None, held: HeldOut) -> Measured:
    """Measure a student, or with None the base, on the held-out items; what was measured is
    read."""
    path = (run or base).path("measured.json" if run else "measured-base.json")
    kept = read_json(path) if path.exists() else {}
    if "kl" not in kept:
        responder, _ = student_responder(run or base, run.folder.name if run else "base", bool(run))
        kept = kept or answered(base, responder, held)
        kept["kl"] = held.divergences(responder.network)
        write_json(path, kept)
        del responder
        gc.collect()
    return Measured(*(np.array(kept[name], float) for name in Measured._fields))


def answered(base: Run, responder: Here, held: HeldOut) -> dict[str, list[float]]:
    """Let a student answer the held-out items and read the teacher's verified answers; returns
    marks and nats a token."""
    store = base.config.store_folder() / "responses"
    prompts = [pair.prompt for pair in held.pairs]
    requests = requests_to(responder, prompts, [answer_limit(base.config)] * len(prompts))
    with Ask(responder, store) as ask:
        answers = ask.responses(requests, "answers")
    pairs, length = [held.pairs[i] for i in held.verified], base.config.train.max_length
    network, tokenizer = responder.network, responder.tokenizer
    readings = answer_loss(network, tokenizer, pairs, responder.date, length)
    nats = [reading.loss / max(1, reading.tokens) for reading in readings]
    return {"right": list(marks(base, held.items, answers)), "nats": nats}


def compare(held: HeldOut, students: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Return the table's figures: each kind over its seeds, and soft labels against text, item by
    item."""
    items = [item.cluster for item in held.items]
    verified = [items[i] for i in held.verified]
    [base] = students["base"]
    found: dict[str, Any] = {
        "teacher": {"right": told(estimate_mean(held.teacher_N, items, bounds=SHARE))}
    }
    for kind, measured in students.items():
        right_SN, nats_SM, kl_SM = stacked(measured)
        scores = (right_SN.mean(0), held.teacher_N, base.right)
        found[kind] = {
            "seeds": len(measured),
            "right": told(estimate_mean(right_SN.mean(0), items, bounds=SHARE)),
            "right_by_seed": right_SN.mean(1).tolist(),
            "nats": told(estimate_mean(nats_SM.mean(0), verified)),
            "nats_by_seed": nats_SM.mean(1).tolist(),
            "kl": told(estimate_mean(kl_SM.mean(0), verified)),
            "kl_by_seed": kl_SM.mean(1).tolist(),
            "gap_recovered": told(estimate_gap_recovered(*scores, items, bounds=SHARE)),
        }
    text, soft = (stacked(students[kind]) for kind in KINDS)
    found["soft - text"] = _difference(text, soft, items, verified)
    if ON_POLICY in students:
        one = stacked(students["soft"][:1])
        found["on-policy - soft"] = _difference(one, stacked(students[ON_POLICY]), items, verified)
    return found


def stacked(measured: Sequence[Measured]) -> tuple[Floats, Floats, Floats]:
    """Lay seeds over each other: (S, N) whether right, (S, M) nats, (S, M) divergences."""
    right_SN, nats_SM, kl_SM = (np.stack(column) for column in zip(*measured, strict=True))
    return right_SN, nats_SM, kl_SM


def _difference(
    one: tuple[Floats, Floats, Floats],
    two: tuple[Floats, Floats, Floats],
    items: Sequence[str],
    verified: Sequence[str],
) -> dict[str, Any]:
    """Return `two` - `one`, with the seeds' spread where there are several, and the smallest
    difference to be seen."""
    found = {}
    clustered = zip(Measured._fields, (items, verified, verified), one, two, strict=True)
    for name, clusters, b_SN, a_SN in clustered:
        if max(len(a_SN), len(b_SN)) > 1:
            estimate = across_seeds(a_SN, b_SN, clusters)
        else:
            estimate = estimate_mean(a_SN[0] - b_SN[0], clusters)
        least = smallest_visible(a_SN.mean(0), b_SN.mean(0), clusters)
        found[name] = {**told(estimate), "smallest_visible": least}
    return found


def told(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON."""
    shown = {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
    reason = {"reason": estimate.reason} if estimate.reason else {}
    return {**shown, **reason, "n": estimate.n, "method": estimate.method}


def teacher_tokens(base: Run, count: int | None) -> dict[str, int]:
    """Return the tokens that the teacher wrote for the training prompts, and for those answers that
    are trained on."""
    kept = read_records(base.path("dataset/train.jsonl"), Pair)
    rows = [pair.response.usage.output_tokens for pair in kept]
    responses = read_records(base.path("responses.jsonl"), Response)
    spare = {p.response.id for p in kept[count:]} if count else set()
    others = {p.prompt.id for p in held_out_items(base.folder)[0]}
    others |= {p.prompt.id for p in read_records(base.path(COPIED[0]), Pair)}
    asked = [r for r in responses if r.prompt_id not in others and r.id not in spare]
    return {
        "answers": len(rows[:count]),
        "tokens": sum(rows[:count]),
        "tokens_with_dropped": sum(r.usage.output_tokens for r in asked),
    }


def show(found: Mapping[str, Any]) -> None:
    """Print the figures: a row a kind, and a line a difference."""
    shown = Table("", "seeds", "right", "nats a token", "KL, nats a token", "gap recovered")
    for name, row in found.items():
        if "seeds" in row or name == "teacher":
            cells = (_within(row.get(key, {}), digits) for key, digits in COLUMNS)
            shown.add_row(name, str(row.get("seeds", "")), *cells)
    console.print(shown)
    for name in (name for name in found if " - " in name):
        right, nats, kl = (found[name][key] for key in Measured._fields)
        told_ = f"nats a token {_within(nats, 4)}, KL {_within(kl, 4)}"
        say(f"{name}: right {_within(right, 3)}, {told_}")


def _within(estimate: Mapping[str, Any], digits: int) -> str:
    """Return a number with its interval and, of a difference, the smallest that could be seen."""
    if estimate.get("mean") is None:
        return estimate.get("reason", "")
    mean, low, high = (figure(estimate[key], digits) for key in ("mean", "low", "high"))
    least = estimate.get("smallest_visible")
    seen = f" (smallest to be seen {figure(least, digits)})" if least else ""
    return f"{mean} [{low}, {high}]{seen}"


def main() -> None:
    """Train and measure what is left, and print and write what there is after each student."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4])
    parser.add_argument("--examples", type=int, help="of the training data; all by default")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    base = open_run(asked.run, asked.overrides)
    held, students = HeldOut.of(base), dict[str, list[Measured]]()
    students["base"] = [measure(base, None, held)]
    candidates = {kind: tried(base, kind, asked.rates, asked.examples) for kind in KINDS}
    rates = {
        kind: {r: one.loss for r, one in by_rate.items()} for kind, by_rate in candidates.items()
    }
    runs = [one.run for by_rate in candidates.values() for one in by_rate.values()]

    def report() -> None:
        found = compare(held, students) if KINDS.keys() <= students.keys() else {}
        if not found:
            return
        show(found)
        settings = {key: base.config.resolved()[key] for key in SETTINGS}
        facts = {"environment": environment(), "settings": settings, "rates": rates}
        facts["trainings"] = {run.folder.name: trainings(run) for run in runs}
        facts["teacher_tokens"] = teacher_tokens(base, asked.examples)
        if asked.json:
            write_json(asked.json, {**facts, "found": found})

    for seed in range(asked.seeds):
        for kind in KINDS:
            runs.append(student(base, kind, next(iter(rates[kind])), seed, asked.examples))
            students.setdefault(kind, []).append(measure(base, runs[-1], held))
        report()
        if seed == 0 and base.config.on_policy.rounds:
            runs.append(run := refined(base, runs[-1], asked.examples, base.config))
            students[ON_POLICY] = [measure(base, run, held)]
            report()


if __name__ == "__main__":
    sys.exit(exit_code(main, False))
