"""The refine stage: on-policy distillation by the seams that are there (GKD, arXiv 2306.13649).

Round after round the student answers some training prompts, the teacher reads the answers once, and
the student trains towards its distributions there. A round is a run inside the run, in
refined/round-N. One that was killed goes on where it was, to the same bits.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config.learning import SOFT
from distill.generation.filters import CONTAMINATED, Dropped
from distill.models.devices import release_memory
from distill.reasoning import join_thought
from distill.records import Pair, Prompt
from distill.responders.ask import Ask
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training import train
from distill.training.adapters import write_merged
from distill.training.batches import order
from distill.training.soft_labels import capture

SUMMARY = ("steps", "best_step", "adapter_step", "tokens", "seconds", "history", "validation")
SALT = 1_000_003  # apart from the epochs of training, whose order is drawn from (seed, epoch)


class Round(Run):
    """Round `number` (from 1) of a run; what it spends is entered there.

    Its config is that of one epoch towards the teacher's distributions alone, in the shared store.
    """

    def __init__(self, outer: Run, number: int) -> None:
        config, settings = outer.config, outer.config.on_policy
        none = dict.fromkeys(("ce", *SOFT), 0.0)
        mix = {**none, settings.divergence: 1.0, "teacher": "cached"}
        train_changes = {
            "loss": config.train.loss.model_copy(update=mix),
            "seed": config.train_seed + number,
            "learning_rate": settings.learning_rate,
            **{"num_train_epochs": 1, "max_steps": None, "num_processes": None},
            "report_to": "none",
        }
        changes = {"name": f"round-{number}", "runs": outer.path("refined")}
        changes |= {"train": config.train.model_copy(update=train_changes)}
        super().__init__(config.model_copy(update={**changes, "store": config.store_folder()}))
        self.outer, self.number, self.ledger = outer, number, outer.ledger


def main(run: Run) -> None:
    """Do the rounds that are left, and write adapter, training.json and merged in refined/.

    Raises DistillError: exit 2 where the tokenizers differ, 10 where the teacher's terms forbid it,
    and what the capture and the training raise.
    """
    config = run.config
    prompts, adapter = training_prompts(run), run.path("adapter")
    summaries: list[dict[str, Any]] = []
    for number in range(1, config.on_policy.rounds + 1):
        current = Round(run, number)
        if not current.path("training.json").exists():
            refine(current, prompts, adapter)
        adapter = current.path("adapter")
        training = read_json(current.path("training.json"))
        pairs = read_records(current.path("dataset/train.jsonl"), Pair)
        answers = {"answers": len(pairs), "ended": sum(p.response.stop == "end" for p in pairs)}
        names = (*SUMMARY, "adapter_sha256")
        summaries.append({**answers, **{name: training[name] for name in names}})
    final = run.path("refined/adapter")
    shutil.rmtree(final, ignore_errors=True)
    shutil.copytree(adapter, final)
    summary = {"rounds": summaries, "adapter_sha256": summaries[-1]["adapter_sha256"]}
    write_json(run.path("refined/training.json"), summary)
    write_merged(config.student, final, run.path("refined/merged"), config.reasoning)


def refine(current: Round, prompts: Sequence[Prompt], adapter: Path) -> None:
    """Do one round, from the student with `adapter`."""
    config = current.config
    say(f"refine: round {current.number} of {config.on_policy.rounds}")
    samples = order(len(prompts), config.train_seed, SALT)[: config.on_policy.prompts]
    pairs = student_answers(current, [prompts[i] for i in samples], adapter)
    write_records(current.path("dataset/train.jsonl"), pairs)
    validation = current.outer.path("dataset/validation.jsonl")
    if validation.exists():
        write_records(current.path("dataset/validation.jsonl"), read_records(validation, Pair))
    capture.main(current)
    release_memory()
    train.main(current, start=adapter)


def training_prompts(run: Run) -> list[Prompt]:
    """Return the prompts of the train split, but for those contaminated by held-out text.

    Those whose answer the filters dropped are included.
    """
    trained = [pair.prompt for pair in read_records(run.path("dataset/train.jsonl"), Pair)]
    rows = read_records(run.path("dropped.jsonl"), Dropped)
    gone = {r.prompt_id for r in rows if r.split == "train" and r.reason != CONTAMINATED}
    paths = [path for path in map(run.path, ("prompts.jsonl", "questions.jsonl")) if path.exists()]
    more = [p for path in paths for p in read_records(path, Prompt) if p.id in gone]
    by_id = {prompt.id: prompt for prompt in [*trained, *more]}
    return [by_id[name] for name in sorted(by_id)]


def student_answers(current: Round, prompts: Sequence[Prompt], adapter: Path) -> list[Pair]:
    """Let the student answer, at most as long as the config says, without the empty answers."""
    config, settings, student = current.config, current.config.on_policy, current.config.student
    model = (student.model, student.dtype, student.revision, config.template_date)
    template = {"template": student.chat_template_kwargs, "reasoning": config.reasoning}
    responder = LocalResponder.load(*model, adapter=adapter, trust=student.trust, **template)
    shape = settings.model_dump(include={"temperature", "top_p", "max_new_tokens"})
    sampling, pairs = Sampling(**shape), list[Pair]()
    requests = [Request.make(responder.origin, p.id, p.messages, sampling) for p in prompts]
    with Ask(responder, config.store_folder() / "responses", current) as ask:
        responses = ask.responses(requests, f"student, round {current.number}")
    del responder, ask
    release_memory()
    for prompt, response in zip(prompts, responses, strict=True):
        text = response.text
        if config.reasoning == "keep" and response.reasoning:
            text = join_thought(text, response.reasoning)
        if text.strip() and response.stop != "error":
            response = response.model_copy(update={"text": text})
            pairs.append(Pair(prompt=prompt, response=response))
    return pairs
