"""The refine stage: rounds on the student's own right answers, then on-policy distillation.

That is done by the seams that are there (GKD, arXiv 2306.13649): round after round the student
answers some training prompts, the teacher reads the answers once, and
the student trains towards its distributions there. A round is a run inside the run, in
refined/round-N. One that was killed goes on where it was, to the same bits.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config.learning import SOFT
from distill.models.devices import release_memory
from distill.records import Pair, Prompt
from distill.responders.responder import Sampling
from distill.storage.files import read_json, read_records, sha256_file, write_json
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training import self_answers, train
from distill.training.adapters import WEIGHTS, write_merged
from distill.training.batches import order
from distill.training.inner_run import SUMMARY, InnerRun, student_answers, training_prompts
from distill.training.soft_labels import capture

SALT = 1_000_003  # apart from the epochs of training, whose order is drawn from (seed, epoch)


class Round(InnerRun):
    """Round `number` (from 1): one epoch towards the teacher's distributions alone."""

    def __init__(self, outer: Run, number: int) -> None:
        config, settings = outer.config, outer.config.on_policy
        none = dict.fromkeys(("ce", *SOFT), 0.0)
        mix = {**none, settings.divergence: 1.0, "teacher": "cached"}
        changes = {
            "loss": config.train.loss.model_copy(update=mix),
            "seed": config.train_seed + number,
            "learning_rate": settings.learning_rate,
            **{"num_train_epochs": 1, "max_steps": None, "metric_for_best_model": "loss"},
        }
        train_changes = config.train.model_copy(update=changes)
        super().__init__(outer, f"refined/round-{number}", train=train_changes)
        self.number = number


def main(run: Run) -> None:
    """Do the rounds that are left, and write adapter, training.json and merged in refined/.

    Raises DistillError: exit 2 where the tokenizers differ, 10 where the teacher's terms forbid it,
    and what the capture and the training raise.
    """
    config, prompts = run.config, training_prompts(run)
    adapter, taught = self_answers.teach(run, prompts)
    summaries: list[dict[str, Any]] = []
    for number in range(1, config.on_policy.rounds + 1):
        current = Round(run, number)
        if not current.path("training.json").exists():
            refine(current, prompts, adapter)
        adapter = current.path("adapter")
        training = read_json(current.path("training.json"))
        pairs = read_records(current.path("dataset/train.jsonl"), Pair)
        answers = {"answers": len(pairs), "ended": sum(p.response.stop == "end" for p in pairs)}
        summaries.append({**answers, **{name: training[name] for name in SUMMARY}})
    final = run.path("refined/adapter")
    shutil.rmtree(final, ignore_errors=True)
    shutil.copytree(adapter, final)
    summary = {"rounds": summaries, "adapter_sha256": sha256_file(final / WEIGHTS)}
    summary |= {"self_answers": taught} if taught else {}
    write_json(run.path("refined/training.json"), summary)
    write_merged(config.student, final, run.path("refined/merged"), config.reasoning)


def refine(current: Round, prompts: Sequence[Prompt], adapter: Path) -> None:
    """Do one round, from the student with `adapter`."""
    config = current.config
    say(f"refine: round {current.number} of {config.on_policy.rounds}")
    samples = order(len(prompts), config.train_seed, SALT)[: config.on_policy.prompts]
    asked = [prompts[i] for i in samples]
    shape = config.on_policy.model_dump(include={"temperature", "top_p", "max_new_tokens"})
    title = f"student, round {current.number}"
    responses = student_answers(current, asked, adapter, Sampling(**shape), title)
    pairs = [
        Pair(prompt=prompt, response=response)
        for prompt, response in zip(asked, responses, strict=True)
        if response.text.strip() and response.stop != "error"
    ]
    current.write_dataset(pairs)
    capture.main(current)
    release_memory()
    train.main(current, start=adapter)
