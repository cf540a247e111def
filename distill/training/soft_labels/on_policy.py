"""The refine stage: on-policy distillation, by the seams that are there already (GKD, arXiv 2306.13649).

Round after round the student answers some training prompts, each answer is cut off where the config says, the teacher
reads them once, and the student trains towards its distributions there. A round is a run inside the run, in
refined/round-N: its dataset is what the student said, its signals and answers are in the shared store, its training
begins with the adapter before it. A round that was killed goes on where it was, to the same bits.
"""

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distill.config import SOFT, Config
from distill.generation.filters import CONTAMINATED, Dropped
from distill.records import Pair, Prompt
from distill.responders.ask import Ask
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training import train
from distill.training.batches import order
from distill.training.merge import write_merged
from distill.training.soft_labels import capture

TOLD = (
    *("steps", "best_step", "adapter_step", "tokens", "seconds", "history", "validation"),
    "adapter_sha256",
)
SALT = 1_000_003  # apart from the epochs of training, whose order is drawn from (seed, epoch)


class Round(Run):
    """Round `number` (from 1) of a run; what it spends is entered there."""

    def __init__(self, outer: Run, number: int) -> None:
        super().__init__(round_config(outer, number))
        self.outer, self.number, self.ledger = outer, number, outer.ledger


def round_config(outer: Run, number: int) -> Config:
    """Return the config of a round: one epoch towards the teacher's distributions alone, in the shared store."""
    config, settings = outer.config, outer.config.on_policy
    none = dict.fromkeys(("ce", *SOFT), 0.0)
    loss = config.train.loss.model_copy(
        update={**none, settings.divergence: 1.0, "teacher": "cached"}
    )
    changes = {
        "loss": loss,
        "seed": config.train_seed + number,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": 1,
        **{"max_steps": None, "num_processes": None, "report_to": "none"},
    }
    return config.model_copy(
        update={
            "name": f"round-{number}",
            "runs": outer.path("refined"),
            "store": config.store_folder(),
            "train": config.train.model_copy(update=changes),
        }
    )


def main(config: Config, run: Run) -> None:
    """Do the rounds that are left, and write refined/adapter, refined/training.json and refined/merged.

    Raises DistillError: exit 2 where the tokenizers differ, 10 where the teacher's terms forbid it, and what the
    capture and the training raise.
    """
    prompts, adapter = training_prompts(run), run.path("adapter")
    rounds = [Round(run, number) for number in range(1, config.on_policy.rounds + 1)]
    for each in rounds:
        if not each.path("training.json").exists():
            refine(each, prompts, adapter)
        adapter = each.path("adapter")
    copied = run.path("refined/adapter")
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(adapter, copied)
    summaries = [told_of(each) for each in rounds]
    summary = {"rounds": summaries, "adapter_sha256": summaries[-1]["adapter_sha256"]}
    write_json(run.path("refined/training.json"), summary)
    write_merged(config.student, copied, run.path("refined/merged"))


def refine(each: Round, prompts: Sequence[Prompt], adapter: Path) -> None:
    """Do one round, from the student with `adapter`."""
    config, number = each.config, each.number
    say(f"refine: round {number} of {config.on_policy.rounds}")
    samples = order(len(prompts), config.train_seed, SALT)[: config.on_policy.prompts]
    pairs = student_answers(each, [prompts[i] for i in samples], adapter)
    write_records(each.path("dataset/train.jsonl"), pairs)
    validation = each.outer.path("dataset/validation.jsonl")
    if validation.exists():
        write_records(each.path("dataset/validation.jsonl"), read_records(validation, Pair))
    capture.main(config, each)
    gc.collect()
    train.main(config, each, start=adapter)
    gc.collect()


def training_prompts(run: Run) -> list[Prompt]:
    """Return the prompts of the train split, those whose answer was dropped included, but none that leaks held-out text."""
    trained = [pair.prompt for pair in read_records(run.path("dataset/train.jsonl"), Pair)]
    rows = read_records(run.path("dropped.jsonl"), Dropped)
    gone = {r.prompt_id for r in rows if r.split == "train" and r.reason != CONTAMINATED}
    paths = [path for path in map(run.path, ("prompts.jsonl", "questions.jsonl")) if path.exists()]
    more = [p for path in paths for p in read_records(path, Prompt) if p.id in gone]
    by_id = {prompt.id: prompt for prompt in [*trained, *more]}
    return [by_id[name] for name in sorted(by_id)]


def student_answers(each: Round, prompts: Sequence[Prompt], adapter: Path) -> list[Pair]:
    """Let the student answer, at most as long as the config says; an empty answer teaches nothing and is left out."""
    config, settings = each.config, each.config.on_policy
    student = config.student
    responder = LocalResponder.load(
        student.model,
        student.dtype,
        student.revision,
        config.template_date,
        adapter=adapter,
        allow_pickle=student.allow_pickle,
        trust_remote_code=student.trust_remote_code,
    )
    sampling = Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
    )
    requests = [Request.make(responder.origin, p.id, p.messages, sampling) for p in prompts]
    store = config.store_folder() / "responses"
    title = f"student, round {each.number}"
    with Ask(responder, store, each) as ask:
        responses = ask.responses(requests, title)
    del responder, ask
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    both = zip(prompts, responses, strict=True)
    return [Pair(prompt=p, response=r) for p, r in both if r.text.strip() and r.stop != "error"]


def told_of(each: Round) -> dict[str, Any]:
    """Return what the summary says of a round that is done."""
    training = read_json(each.path("training.json"))
    pairs = read_records(each.path("dataset/train.jsonl"), Pair)
    return {
        "answers": len(pairs),
        "ended": sum(pair.response.stop == "end" for pair in pairs),
        **{name: training[name] for name in TOLD},
    }
