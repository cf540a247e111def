"""Who answers in an evaluation: the student as it is released, its base, and on suites the teacher.

All are responders, and answers go through the shared store: an evaluation that was killed goes on where it was, and
what was asked once is never asked or paid for again.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import Config
from distill.evaluation.items import by_item
from distill.evaluation.measure import limit, why_no_teacher
from distill.evaluation.suites import Suite
from distill.evaluation.throughput import timed
from distill.models import loading, registry
from distill.models.chat_template import template_hash
from distill.records import AnswerLoss, Pair, Prompt, Response, digest
from distill.responders.ask import Ask
from distill.responders.kinds import make_responder
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Responder, Sampling
from distill.responders.terms import require_terms
from distill.storage.files import sha256_file
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training.adapters import WEIGHTS, merged_student
from distill.training.student import answer_loss

Given = dict[str, Response]  # answers by item id


class Answered(NamedTuple):
    """What one model said to the held-out prompts, how it reads the teacher's answers, and its answers to suites."""

    responses: list[Response]
    readings: list[AnswerLoss]
    suites: dict[str, Given]


def answer_with_student(
    config: Config, run: Run, pairs: Sequence[Pair], suites: Sequence[Suite] = ()
) -> tuple[dict[str, Any], dict[str, Answered]]:
    """Answer with the base and with the student; return both models' descriptions too."""
    described, answered = {}, {}
    for name, trained in (("base", None), ("student", run)):
        responder, described[name] = student_responder(config, trained, name)
        answered[name] = _answered(config, run, responder, pairs, suites)
        del responder
        gc.collect()
    return described, answered


def student_responder(
    config: Config, run: Run | None, name: str
) -> tuple[LocalResponder, dict[str, Any]]:
    """Load the student's base, or of a `run` the student as it is released; return its description too."""
    student, date = config.student, config.template_date
    if run:
        registry.check_base(run.trained("adapter"), student.model, student.revision)
    folder = f"{merged_student(student, run).resolve()}" if run else student.model
    revision = None if run else student.revision
    tokenizer = loading.load_tokenizer(folder, revision, student.trust_remote_code)
    told = describe(
        student.model,
        student.revision,
        registry.identity(student.model, student.revision),
        template_hash(tokenizer, date),
    )
    told["adapter_sha256"] = sha256_file(run.trained("adapter") / WEIGHTS) if run else None
    flags = (student.allow_pickle and not run, student.trust_remote_code)
    model = loading.load_model(folder, student.dtype, revision, *flags)
    shaping, old_origin = {**told, "dtype": str(model.dtype)}, None
    if run:
        told["model_sha256"] = registry.folder_digest(Path(folder))
        shaping = {"model": told["model_sha256"], "dtype": str(model.dtype), "date": date}
    origin = digest(shaping)
    if shaping.pop("files", None):
        old_origin = digest(shaping)
    told["dtype"] = str(model.dtype).removeprefix("torch.")
    batch = config.evaluation.max_batch_size
    return LocalResponder(model, tokenizer, name, origin, date, batch, old_origin), told


def _answered(
    config: Config,
    run: Run,
    responder: LocalResponder,
    pairs: Sequence[Pair],
    suites: Sequence[Suite],
) -> Answered:
    prompts = [pair.prompt for pair in pairs]
    requests = requests_to(responder, prompts, [limit(config)] * len(prompts))
    with Ask(responder, config.store_folder() / "responses", run) as ask:
        responses = ask.responses(requests, f"{responder.model} answers")
        given = {suite.name: ask_suite(ask, suite) for suite in suites}
    timed(timing_of(run, responder.model), responder, requests)
    say(f"{responder.model}: loss on the teacher's answers")
    length = config.train.max_length
    readings = answer_loss(responder.network, responder.tokenizer, pairs, responder.date, length)
    return Answered(responses, readings, given)


def requests_to(
    responder: Responder,
    prompts: Sequence[Prompt],
    limits: Sequence[int],
    as_teacher: bool = False,
) -> list[Request]:
    """Make the greedy requests of prompts, with at most `limits` tokens each."""
    return [
        Request.make(
            responder.origin,
            prompt.id,
            prompt.asked_of_teacher() if as_teacher else prompt.messages,
            Sampling(max_new_tokens=most),
        )
        for prompt, most in zip(prompts, limits, strict=True)
    ]


def ask_suite(ask: Ask, suite: Suite, as_teacher: bool = False) -> Given:
    """Ask the student's view of a suite's questions (`as_teacher`: the teacher's); return the answers by item id."""
    most = suite.limits()
    prompts, limits = [i.prompt for i in suite.items], [most[i.id] for i in suite.items]
    requests = requests_to(ask.responder, prompts, limits, as_teacher)
    return by_item(suite.items, ask.responses(requests, f"{ask.responder.model} answers"))


def answer_with_teacher(config: Config, run: Run, suites: Sequence[Suite]) -> dict[str, Given]:
    """Put suites to the teacher; what a paid one took is in the ledger, also when the budget ends it (exit 6)."""
    open_suites = [suite for suite in suites if why_no_teacher(config, suite) is None]
    if not open_suites:
        return {}
    require_terms(config.teacher, config.terms.basis)
    teacher, store = make_responder(config.teacher, config), config.store_folder() / "responses"
    with Ask(teacher, store, run, "evaluate" in run.remade) as ask:
        return {suite.name: ask_suite(ask, suite, as_teacher=True) for suite in open_suites}


def time_teacher(config: Config, run: Run, pairs: Sequence[Pair]) -> None:
    """Time a local teacher as the student is timed; others are paid by the token, or were asked elsewhere."""
    path = timing_of(run, "teacher")
    if not config.teacher.runs_here or path.exists():
        return
    teacher = make_responder(config.teacher, config)
    if isinstance(teacher, LocalResponder):
        prompts = [pair.prompt for pair in pairs]
        limits = [config.teacher.max_new_tokens] * len(prompts)
        timed(path, teacher, requests_to(teacher, prompts, limits, as_teacher=True))


def timing_of(run: Run, model: str) -> Path:
    """Return the file of what was timed of a model."""
    return run.path(f"timings/{model}.jsonl")


def describe(
    reference: str, revision: str | None, identity: str | None, template: str | None
) -> dict[str, Any]:
    """Describe a model for the scorecard: its name, what pins its weights, and its chat template.

    Of a folder, where anything may change beside the weights, its further `files` by their hashes too.
    """
    local = registry.is_folder(reference)
    files = registry.parts(reference) if identity else {}
    commit = identity if identity and len(identity) == 40 else None
    return {
        "name": Path(reference).name if local else reference,
        "hub_id": registry.hub_id(reference),
        "revision": revision or commit,
        "sha256": None if commit else identity,
        "template_hash": template,
        **({"files": files} if files else {}),
    }


def describe_teacher(config: Config) -> dict[str, Any]:
    """Describe the teacher; of recorded answers only what the user stated is known."""
    teacher = config.teacher
    if not teacher.runs_here:
        told = describe(teacher.model or teacher.kind, teacher.revision, None, None)
        return {**told, "reasons": {"sha256": "the answers were recorded elsewhere"}}
    tokenizer = loading.load_tokenizer(teacher.model, teacher.revision)
    identity = registry.identity(teacher.model, teacher.revision)
    template = template_hash(tokenizer, config.template_date)
    return describe(teacher.model, teacher.revision, identity, template)
