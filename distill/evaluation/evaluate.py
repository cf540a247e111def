"""The stage `evaluate`: teacher, base (the student before training) and student answer the held-out prompts.

Answers go through the shared store, so a killed evaluation goes on where it was. Writes
`answers/<model>.jsonl`, `scores/<model>.jsonl` and `evaluation.json`, from which the report is made.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel

from distill import models
from distill.checkers import NEEDS_REFERENCE
from distill.config import Config, Student
from distill.evaluation import results
from distill.evaluation.economics import request_cost
from distill.evaluation.items import by_item, held_out, items_of
from distill.evaluation.results import Measured
from distill.evaluation.statistics import Certainty
from distill.evaluation.words import plain_numbers
from distill.generation.generate import answer_all
from distill.generation.local import LocalResponder
from distill.generation.prices import load_prices
from distill.generation.responder import Request, Sampling
from distill.progress import say
from distill.records import Item, Pair, Response, digest
from distill.run import Run
from distill.store import sha256_file, write_json, write_records
from distill.tasks import load_task, task_path
from distill.template import template_hash
from distill.training.student import answer_loss

ADAPTER = "adapter/adapter_model.safetensors"


class Answered(NamedTuple):
    """What one model said to the held-out prompts, and its loss on the teacher's answers: (sum, tokens) each."""

    responses: list[Response]
    losses: list[tuple[float, int]]


def main(config: Config, run: Run) -> None:
    """Answer, score and compare; raises DistillError (exit 8) where too few items can be compared."""
    pairs = held_out(run.path("dataset/heldout.jsonl"))
    items = items_of(pairs, run.path("documents.jsonl"))
    described, answered = answer_with_student(config, run, pairs)
    answers = {
        "teacher": {i.id: p.response for i, p in zip(items, pairs, strict=True)},
        **{m: by_item(items, found.responses) for m, found in answered.items()},
    }
    settings = config.evaluation
    certainty = Certainty(settings.confidence, settings.samples, config.seed, settings.margin)
    rows = {t: measure(t, items, answers) for t in dict.fromkeys(i.task for i in items)}
    for model, given in answers.items():
        scores = [s for row in rows.values() for s in row.scores.get(model, [])]
        write_records(run.path(f"scores/{model}.jsonl"), scores)
        write_records(run.path(f"answers/{model}.jsonl"), given.values())
    losses = {m: found.losses for m, found in answered.items()}
    write_json(
        run.path("evaluation.json"),
        plain_numbers(
            {
                "models": {"teacher": describe_teacher(config), **described},
                **results.compared(items, answers, rows, losses, certainty),
                "cost": costs(config, answers),
                "settings": {**certainty._asdict(), **asked(config, items)},
                "corpus": run.manifest().get("corpus", {}),
                "environment": run.manifest().get("environment", {}),
            }
        ),
    )


def measure(task: str, items: Sequence[Item], answers: results.Models) -> Measured:
    """Score all models on a task: by its checker where it has one and what that needs, else by agreement."""
    known = load_task(task) if task_path(task).is_file() else None
    checker = known.checker if known else None
    if checker and checker["kind"] in NEEDS_REFERENCE:
        there = any(item.reference for item in items if item.task == task)
        checker = checker if there else None
    return results.measure_task(task, items, answers, (known and known.metric) or "", checker)


def asked(config: Config, items: Sequence[Item]) -> dict[str, Any]:
    """Return how the models were asked, and how much."""
    return {
        "items": len(items),
        "documents": len({item.cluster for item in items}),
        "max_new_tokens": limit(config),
        "teacher_temperature": config.teacher.temperature,
        "teacher_sees_more": any(item.prompt.teacher_messages for item in items),
    }


def limit(config: Config) -> int:
    """Return how many tokens an answer may have: the teacher's limit, where evaluation states none."""
    return config.evaluation.max_new_tokens or config.teacher.max_new_tokens


def answer_with_student(
    config: Config, run: Run, pairs: Sequence[Pair]
) -> tuple[dict[str, Any], dict[str, Answered]]:
    """Answer with the student's weights without and with the adapter; return both models' descriptions too."""
    student, adapter = config.student, run.path("adapter")
    models.check_base(adapter, student.model, student.revision)
    tokenizer = models.load_tokenizer(student.model, student.revision, student.trust_remote_code)
    described, answered = {}, {}
    for name, folder in (("base", None), ("student", adapter)):
        told = describe(
            student.model,
            student.revision,
            models.identity(student.model, student.revision),
            template_hash(tokenizer, config.template_date),
        )
        told["adapter_sha256"] = sha256_file(run.path(ADAPTER)) if folder else None
        model = load_student(student, folder)
        origin = digest({**told, "dtype": str(model.dtype)})
        slots, date = config.evaluation.slots, config.template_date
        responder = LocalResponder(model, tokenizer, name, origin, date, slots)
        responses = ask(config, run, responder, pairs)
        say(f"{name}: loss on the teacher's answers")
        losses = answer_loss(model, tokenizer, pairs, date, config.train.max_length)
        described[name], answered[name] = told, Answered(responses, losses)
        del model, responder
        gc.collect()
    return described, answered


def load_student(student: Student, adapter: Path | None) -> Any:
    """Load the student's base, or with `adapter` the student as it is released: added in float32, cast once."""
    flags = (student.revision, student.allow_pickle, student.trust_remote_code)
    if adapter is None:
        return models.load_model(student.model, student.dtype, *flags)
    base = models.load_model(student.model, "float32", *flags)
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    return merged.to(models.pick_dtype(student.dtype)).eval()


def ask(
    config: Config, run: Run, responder: LocalResponder, pairs: Sequence[Pair]
) -> list[Response]:
    """Ask the student's view of every prompt, greedily; what the store has is not asked again."""
    sampling = Sampling(max_new_tokens=limit(config))
    requests = [
        Request.make(responder.origin, p.prompt.id, p.prompt.messages, sampling) for p in pairs
    ]

    def spend(input_tokens: int, output_tokens: int) -> None:
        run.spend(input_tokens=input_tokens, output_tokens=output_tokens)

    folder = config.store_folder() / "responses"
    return answer_all(responder, requests, folder, f"{responder.model} answers", spend)


def describe(
    reference: str, revision: str | None, identity: str | None, template: str | None
) -> dict[str, Any]:
    """Describe a model for the scorecard: its name, what pins its weights, and its chat template."""
    local = models.is_folder(reference)
    commit = identity if identity and len(identity) == 40 else None
    return {
        "name": Path(reference).name if local else reference,
        "hub_id": models.hub_id(reference),
        "revision": revision or commit,
        "sha256": None if commit else identity,
        "template_hash": template,
    }


def describe_teacher(config: Config) -> dict[str, Any]:
    """Describe the teacher; of recorded answers only what the user stated is known."""
    teacher = config.teacher
    if teacher.kind != "local":
        told = describe(teacher.model or teacher.kind, teacher.revision, None, None)
        return {**told, "reasons": {"sha256": "the answers were recorded elsewhere"}}
    tokenizer = models.load_tokenizer(teacher.model, teacher.revision)
    identity = models.identity(teacher.model, teacher.revision)
    template = template_hash(tokenizer, config.template_date)
    return describe(teacher.model, teacher.revision, identity, template)


def costs(config: Config, answers: results.Models) -> dict[str, Any]:
    """Price 1,000 requests of each model: hosted models by the token, all else by the machine's time."""
    book = load_prices(config.evaluation.prices)
    machine, name = book.machine(config.evaluation.machine), config.evaluation.machine
    rows = {}
    for model, found in answers.items():
        hosted = book.teacher(config.teacher.model) if model == "teacher" else None
        given = [r.usage for r in found.values() if r.stop != "error"]
        cost = request_cost(given, machine, book.why_no_machine(name), hosted)
        rows[model] = cost.model_dump(mode="python")
    return rows
