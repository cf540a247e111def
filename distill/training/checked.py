"""Validation by the checker: the student answers the validation prompts, and each is checked.

In training it answers as it would be merged now, which is what will be evaluated, from a copy of
the adapted weights: what is trained is not touched. Nothing is stored: greedy answers in batches of
a fixed size are the same bits after a kill.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import DistillError, Exit
from distill.generation.filters import CHECKED, checked_prompts
from distill.reasoning import split_thought
from distill.records import Item, Prompt, Response, Score
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling
from distill.storage.files import read_records
from distill.storage.progress import say, tracking
from distill.storage.run_folder import Run
from distill.tasks.scoring import answer_limit, score_answer
from distill.tasks.task import checker_of, tasks_of_run
from distill.training.adapters import factors
from distill.training.inner_run import InnerRun, student_answers
from distill.training.student import StudentModel

ROWS = 32  # at once on a CPU; as many as its free memory holds would be others after a kill
TITLE = "validation"


def validation_prompts(run: Run) -> list[Prompt]:
    """Return the prompts whose answers are checked in validation, always in the same order.

    A run inside a run has those of its own file, where it has one, else those of the outer run.
    """
    if (path := run.path(CHECKED)).exists():
        return read_records(path, Prompt)
    return validation_prompts(run.outer) if isinstance(run, InnerRun) else checked_prompts(run)


def check_answers(
    run: Run, prompts: Sequence[Prompt], responses: Iterable[Response]
) -> list[Score]:
    """Score the answers to validation prompts by their tasks' checkers, as evaluation does."""
    while isinstance(run, InnerRun):
        run = run.outer
    find, scores = tasks_of_run(run.folder), list[Score]()
    for prompt, response in zip(prompts, responses, strict=True):
        answer = split_thought(response.text, response.reasoning)[1]
        response = response.model_copy(update={"text": answer})
        checker = checker_of(find(prompt.task), prompt)
        scores.append(score_answer(Item.make(prompt), response, "student", checker))
    return scores


def checked_values(scores: Sequence[Score]) -> list[float]:
    """Return the values of the scores that have one, and say how many have none.

    Raises DistillError (exit 7) where none has, with the first reason.
    """
    values = [score.value for score in scores if score.value is not None]
    if len(values) < len(scores):
        reason = next(score.reason for score in scores if score.value is None)
        what = f"{len(scores) - len(values)} of {len(scores)} answers were not checked: {reason}"
        if not values:
            fix = "see to what the checker needs, or set train.metric_for_best_model: loss"
            raise DistillError(Exit.TRAINING, "validation", what, fix)
        say(f"warning: validation: {what}; they count neither as right nor as wrong")
    return values


def check_adapter(run: Run, prompts: Sequence[Prompt], adapter: Path | None) -> list[Score]:
    """Let the student with a trained adapter, or the base, answer greedily; score each prompt.

    The answers go through the store that runs share.
    """
    sampling = Sampling(max_new_tokens=answer_limit(run.config))
    return check_answers(run, prompts, student_answers(run, prompts, adapter, sampling, TITLE))


def check_student(
    run: Run, prompts: Sequence[Prompt], student: StudentModel, tokenizer: PreTrainedTokenizerBase
) -> list[Score]:
    """Let a student in training answer greedily, and score each prompt."""
    config, responses = run.config, dict[str, Response]()
    sampling = Sampling(max_new_tokens=answer_limit(config))
    requests = [Request.make("", prompt.id, prompt.messages, sampling) for prompt in prompts]
    with as_merged(student) as model, tracking(TITLE, len(prompts), "answers") as tracker:
        rows = config.evaluation.concurrency or (ROWS if model.device.type == "cpu" else None)
        responder = LocalResponder(model, tokenizer, "student", "", config.template_date, rows)
        for raw in responder.ask(requests):
            responses[raw.id], usage = raw.response(""), raw.usage
            run.ledger.spend(usage.input_tokens, usage.output_tokens, student=True)
            tracker.advance()
    return check_answers(run, prompts, [responses[request.id] for request in requests])


@contextmanager
def as_merged(student: StudentModel) -> Iterator[PreTrainedModel]:
    """Yield the model with its adapter merged into copies of the adapted weights, as it was loaded.

    Weights in 4 bits, and those whose copy a GPU has no room for, keep the adapter beside them. On
    leaving the student is as it was: in training, packed or fused, its weights untouched.
    """
    model: PreTrainedModel = student.model.get_base_model()
    adapted = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, LoraLayer) and type(child.base_layer) is nn.Linear
    ]
    layers = getattr(student.decoder(), "layers", ())
    layers = [layer for layer in layers if "forward" in vars(layer)]
    fused = [vars(layer).pop("forward") for layer in layers]
    attention: Any = model.config._attn_implementation

    def restore() -> None:
        for owner, name, layer in adapted:
            setattr(owner, name, layer)

    student.eval()
    try:
        model.set_attn_implementation(student.attention)
        try:
            for owner, name, layer in adapted:
                setattr(owner, name, merged(layer))
        except torch.OutOfMemoryError:
            restore()
        yield model
    finally:
        restore()
        model.set_attn_implementation(attention)
        for layer, forward in zip(layers, fused, strict=True):
            layer.forward = forward
        student.train()


@torch.no_grad()
def merged(layer: LoraLayer) -> nn.Linear:
    """Return an adapted linear module with the product added in float32, as `load_merged` does."""
    (a, b, scale), base = factors(layer), cast(nn.Linear, layer.base_layer)
    plain = nn.Linear(base.in_features, base.out_features, False, device="meta")
    weight = (base.weight.float() + (b @ a) * scale).to(base.weight.dtype)
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return plain
