"""The stage `evaluate`: teacher, base (the student before training) and student answer the held-out prompts.

Answers go through the shared store, so a killed evaluation goes on where it was. Writes `scores/<model>.jsonl` and `evaluation.json`, from which the report is made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill import models
from distill.config import Config
from distill.evaluation import results
from distill.evaluation.economics import request_cost
from distill.evaluation.items import by_item, held_out, items_of
from distill.evaluation.results import Certainty, Measured
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
from distill.training.train import answer_loss

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
    certainty = Certainty(config.evaluation.confidence, config.evaluation.samples, config.seed)
    rows = {t: measure(t, items, answers) for t in dict.fromkeys(i.task for i in items)}
    for model in answers:
        scores = [s for row in rows.values() for s in row.scores.get(model, [])]
        write_records(run.path(f"scores/{model}.jsonl"), scores)
    losses = {m: found.losses for m, found in answered.items()}
    write_json(
        run.path("evaluation.json"),
        plain_numbers(
            {
                "models": {"teacher": describe_teacher(config), **described},
                **results.compared(items, answers, rows, losses, certainty),
                "cost": costs(config, answers),
                "settings": {**certainty.settings(), "max_new_tokens": limit(config)},
                "corpus": run.manifest().get("corpus", {}),
                "environment": run.manifest().get("environment", {}),
            }
        ),
    )
    for found in answered.values():
        run.spend(
            input_tokens=sum(r.usage.input_tokens for r in found.responses),
            output_tokens=sum(r.usage.output_tokens for r in found.responses),
        )


def measure(task: str, items: Sequence[Item], answers: results.Models) -> Measured:
    """Score all models on a task, by the checker of its file where it has one."""
    known = load_task(task) if task_path(task).is_file() else None
    metric = (known.metric if known else None) or "checks passed"
    return results.measure_task(task, items, answers, metric, known.checker if known else None)


def limit(config: Config) -> int:
    """Return how many tokens an answer may have: the teacher's limit, where evaluation states none."""
    return config.evaluation.max_new_tokens or config.teacher.max_new_tokens


def answer_with_student(
    config: Config, run: Run, pairs: Sequence[Pair]
) -> tuple[dict[str, Any], dict[str, Answered]]:
    """Answer with the student's weights, without and then with the adapter; return both models' descriptions too."""
    from peft import PeftModel

    student, date, adapter = config.student, config.template_date, run.path("adapter")
    models.check_base(adapter, student.model, student.revision)
    tokenizer = models.load_tokenizer(student.model, student.revision, student.trust_remote_code)
    model: Any = models.load_model(
        student.model,
        student.dtype,
        student.revision,
        student.allow_pickle,
        student.trust_remote_code,
        student.load_in_4bit,
    )
    weights = models.identity(student.model, student.revision)
    template = template_hash(tokenizer, date)
    described, answered = {}, {}
    for name in ("base", "student"):
        trained = sha256_file(run.path(ADAPTER)) if name == "student" else None
        if trained:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        described[name] = describe(student.model, student.revision, weights, template)
        described[name]["adapter_sha256"] = trained
        origin = digest({**described[name], "dtype": str(model.dtype)})
        responder = LocalResponder(
            model, tokenizer, name, origin, date, slots=config.evaluation.slots
        )
        responses = ask(config, responder, pairs, name)
        say(f"{name}: loss on the teacher's answers")
        losses = answer_loss(model, tokenizer, pairs, date, config.train.max_length)
        answered[name] = Answered(responses, list(losses))
    return described, answered


def ask(
    config: Config, responder: LocalResponder, pairs: Sequence[Pair], name: str
) -> list[Response]:
    """Ask the student's view of every prompt, greedily; what the store has is not asked again."""
    sampling = Sampling(max_new_tokens=limit(config))
    requests = [
        Request.make(responder.origin, p.prompt.id, p.prompt.messages, sampling) for p in pairs
    ]
    folder = config.store_folder() / "responses"
    return answer_all(responder, requests, folder, f"{name} answers")


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
