"""Who answers in an evaluation, and how fast: base, the released student, on suites the teacher.

Answers go through the shared store: an evaluation that was killed continues where it was, and what
was asked once is never asked or paid for again. Speed is timed apart from the answers, past the
store, of every model that runs here on the same prompts and after a warm-up: with a stated number
of requests at once, and by answers of one token, which is the prefill. The time is that of our
engine's steps, and another engine's from the first request to the last answer.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from distill.config.teachers import LocalTeacher, Teacher
from distill.evaluation.measurements import ModelFacts
from distill.evaluation.suites import Suite, answer_limit, by_item, why_no_teacher, write_answers
from distill.evaluation.tries import WAYS, way_to_choose
from distill.models import loading, registry
from distill.models.chat_template import template_hash
from distill.models.devices import device, device_name, pick_dtype, release_memory
from distill.records import HEADLINE, Load, Pair, Prompt, Response, Timing, Usage, digest
from distill.responders.ask import Ask
from distill.responders.engines import settled
from distill.responders.kinds import make_responder
from distill.responders.local.local_model import LocalResponder
from distill.responders.local.served_model import EngineResponder
from distill.responders.responder import Request, Responder, Sampling
from distill.responders.terms import require_terms
from distill.storage.files import read_records, sha256_file, write_json, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.task import tasks_of_run
from distill.training.adapters import WEIGHTS, merged_student
from distill.training.inner_run import InnerRun
from distill.training.student import answer_loss

Here = LocalResponder | EngineResponder
# By `evaluation.timing`: how many requests run at once, and how long our own engine is waited for
LOADS = {"quick": (HEADLINE,), "full": (1, HEADLINE, 32)}
SECONDS = {"quick": 5.0, "full": 120.0}
LEAST = 16  # prompts of a run, or two for each request that runs at once
TOKENS = 32  # of a timed answer, at most
REPEATS, MOST_REPEATS, STEADY = 3, 5, 0.05  # a full timing ends where three paces lie so close


def answer(run: Run, pairs: Sequence[Pair], suites: Sequence[Suite]) -> None:
    """Do all that needs the three models; write it below `answers/` and `timings/`."""
    config, facts = run.config, dict[str, ModelFacts]()
    store, prompts = config.store_folder() / "responses", [pair.prompt for pair in pairs]
    limit = answer_limit(config)
    for name in ("base", "student"):
        responder, facts[name] = student_responder(run, name, trained=name == "student")
        requests = requests_to(responder, prompts, [limit] * len(prompts))
        with Ask(responder, store, run) as ask:
            responses = ask.responses(requests, f"{name} answers")
            write_records(run.path(f"answers/{name}.jsonl"), responses)
            for suite in suites:
                write_answers(run.folder, suite, {name: ask_suite(ask, suite)})
            if (tries := config.evaluation.tries) and name == "student":
                find = tasks_of_run(run.folder)
                sampling = Sampling(temperature=tries.temperature, max_new_tokens=limit)
                requests = [
                    Request.make(responder.origin, prompt.id, prompt.messages, sampling, sample)
                    for prompt in prompts
                    if way_to_choose(find(prompt.task), prompt) in WAYS
                    for sample in range(tries.n)
                ]
                answers = ask.responses(requests, f"student, {tries.n} tries")
                write_records(run.path("answers/tries.jsonl"), answers)
            timed(run.path(f"timings/{name}.jsonl"), responder, prompts, config.evaluation.timing)
        say(f"{name}: loss on the teacher's answers")
        date, length = responder.date, config.train.max_length
        losses = answer_loss(responder.network, responder.tokenizer, pairs, date, length)
        write_records(run.path(f"answers/readings/{name}.jsonl"), losses)
        del responder, ask  # so that one model at a time is in memory
        release_memory()
    # A search's default, trained as its winner was, unless it diverged
    if run.path(f"recipe/default-last/adapter/{WEIGHTS}").exists():
        responder, _ = student_responder(InnerRun(run, "recipe/default-last"), "default")
        requests = requests_to(responder, prompts, [limit] * len(prompts))
        with Ask(responder, store, run) as ask:
            responses = ask.responses(requests, "default answers")
            write_records(run.path("answers/default.jsonl"), responses)
        del responder, ask
        release_memory()
    answer_with_teacher(run, prompts, suites)
    facts = {"teacher": describe_teacher(config.teacher, config.template_date), **facts}
    models = {model: of_model.tree() for model, of_model in facts.items()}
    write_json(run.path("answers/models.json"), models)
    write_records(run.path("answers/teacher.jsonl"), [pair.response for pair in pairs])
    write_json(run.path("answers/suites.json"), [s.model_dump(mode="json") for s in suites])


def student_responder(run: Run, name: str, trained: bool = True) -> tuple[Here, ModelFacts]:
    """Return the student as it is released, or the base, and its description."""
    student, date, adapter = run.config.student, run.config.template_date, run.trained("adapter")
    folder, revision, trust = student.model, student.revision, student.trust
    template = (student.chat_template_kwargs, run.config.reasoning)
    if trained:
        registry.check_base(adapter, student.model, student.revision)
        folder, revision = f"{merged_student(student, run).resolve()}", None
        trust = trust._replace(pickle=False)  # ours is none
        template = (None, None)  # its files have that of the training
    tokenizer = loading.load_tokenizer(folder, revision, student.trust, *template)
    identity = registry.identity(student.model, student.revision)
    facts = describe(student.model, student.revision, identity, template_hash(tokenizer, date))
    dtype, changes = str(pick_dtype(student.dtype)), dict[str, str | None](adapter_sha256=None)
    shaping = {**facts.tree(), **changes, "dtype": dtype}
    if trained:
        changes["adapter_sha256"] = sha256_file(adapter / WEIGHTS)
        changes["model_sha256"] = registry.folder_digest(Path(folder))
        shaping = {"model": changes["model_sha256"], "dtype": dtype, "date": date}
    origin = digest(shaping)
    # that of answers which were stored before `files` were part of it
    old_origin = digest(shaping) if shaping.pop("files", None) else None
    facts = facts.model_copy(update={**changes, "dtype": dtype.removeprefix("torch.")})
    size, engines = run.config.evaluation.concurrency, run.config.engines
    engine = settled(run.config.evaluation.engine, engines)
    if engine == "distill":
        load = partial(loading.load_model, folder, student.dtype, revision, trust)
        return LocalResponder(load, tokenizer, name, origin, date, size, old_origin), facts
    model = (folder, revision, student.dtype, tokenizer)
    responder = EngineResponder(engine, engines, *model, date, size, name, trained, trust)
    return responder, facts.model_copy(update={"dtype": responder.dtype})


def requests_to(
    responder: Responder, prompts: Sequence[Prompt], limits: Sequence[int], as_teacher: bool = False
) -> list[Request]:
    """Make the greedy requests of prompts, with at most `limits` tokens each."""
    return [
        Request.make(
            responder.origin,
            prompt.id,
            prompt.asked_of_teacher() if as_teacher else prompt.messages,
            Sampling(max_new_tokens=limit),
        )
        for prompt, limit in zip(prompts, limits, strict=True)
    ]


def ask_suite(ask: Ask, suite: Suite, as_teacher: bool = False) -> dict[str, Response]:
    """Ask a suite's questions in the student's view (or the teacher's), by item id."""
    limit_of = suite.limits()
    prompts, limits = [i.prompt for i in suite.items], [limit_of[i.id] for i in suite.items]
    requests = requests_to(ask.responder, prompts, limits, as_teacher)
    return by_item(suite.items, ask.responses(requests, f"{ask.responder.model} answers"))


def answer_with_teacher(run: Run, prompts: Sequence[Prompt], suites: Sequence[Suite]) -> None:
    """Put suites to the teacher, and time a local one as the student is timed.

    What a paid one took is in the ledger, also when the budget ends it (exit 6).
    """
    config, teacher, path = run.config, run.config.teacher, run.path("timings/teacher.jsonl")
    open_suites = [suite for suite in suites if why_no_teacher(teacher, suite) is None]
    untimed = teacher.runs_here and not path.exists()
    if not open_suites and not untimed:
        return
    if open_suites:
        require_terms(teacher, config.terms.basis)
    responder, store = make_responder(teacher, config), config.store_folder() / "responses"
    with Ask(responder, store, run, "evaluate" in run.remade) as ask:
        for suite in open_suites:
            answers = ask_suite(ask, suite, as_teacher=True)
            write_answers(run.folder, suite, {"teacher": answers})
        if untimed and isinstance(responder, Here):
            timed(path, responder, prompts, config.evaluation.timing, teacher=True)


def describe(
    reference: str, revision: str | None, identity: str | None, template: str | None
) -> ModelFacts:
    """Describe a model for the scorecard: its name, what pins its weights, and its chat template.

    Of a folder, where anything may change beside the weights, its further `files` by hash too.
    """
    local = registry.is_folder(reference)
    files = registry.parts(reference) if identity else {}
    commit = identity if identity and len(identity) == 40 else None
    facts = ModelFacts(
        name=Path(reference).name if local else reference,
        hub_id=registry.hub_id(reference),
        revision=revision or commit,
        sha256=None if commit else identity,
        template_hash=template,
    )
    return facts.model_copy(update={"files": files} if files else {})


def describe_teacher(teacher: Teacher, date: str) -> ModelFacts:
    """Describe the teacher; of one that runs elsewhere only what the user stated is known."""
    if not teacher.runs_here:
        facts = describe(teacher.model or teacher.kind, teacher.revision, None, None)
        reasons = {"sha256": "the answers were recorded elsewhere"}
        return facts.model_copy(update={"reasons": reasons})
    settings = teacher.chat_template_kwargs if isinstance(teacher, LocalTeacher) else {}
    tokenizer = loading.load_tokenizer(teacher.model, teacher.revision, template=settings)
    identity = registry.identity(teacher.model, teacher.revision)
    return describe(teacher.model, teacher.revision, identity, template_hash(tokenizer, date))


def timed(
    path: Path, model: Here, prompts: Sequence[Prompt], level: str = "quick", teacher: bool = False
) -> Timing | None:
    """Time a model on some of the prompts, or return what `path` holds, so that a rerun agrees.

    None where nothing could be timed. A prefix that successive prompts share is computed once.
    """
    levels = sorted({min(many, len(prompts)) for many in LOADS[level] if prompts})
    place, seconds = device(), math.inf  # another engine ends each run that it has begun
    if isinstance(model, LocalResponder):
        place, seconds = model.network.device, SECONDS[level]
    else:
        model.fresh = True
    for old in read_records(path, Timing) if path.exists() else []:
        at = {load.concurrency for load in old.loads}
        # but not where a run goes on on another machine, or after an older distill
        if old.device == device_name(place) and at and at >= set(levels):
            return old
    if not levels:
        return None
    say(f"{model.model}: timed with {' and '.join(map(str, levels))} at once")
    short, limited = (
        evenly(requests_to(model, prompts, [n] * len(prompts), teacher), levels[-1])
        for n in (1, TOKENS)
    )
    # The warm-up, at which an engine starts with as many rows as it will need
    measured(model, limited if math.isinf(seconds) else short, levels[-1], 0.0)
    read = measured(model, short, min(HEADLINE, levels[-1]), seconds)
    runs = [steady(model, limited, at, seconds, level == "quick") for at in levels]
    loads = tuple(run for run in runs if run)
    if not read or len(loads) < len(runs):
        return None
    reading = {"read_tokens": read.usage.input_tokens, "read_seconds": read.usage.seconds}
    timing = Timing(**reading, device=device_name(place), engine=model.engine, loads=loads)
    write_records(path, [timing])
    return timing


def steady(
    model: Here, requests: Sequence[Request], at: int, seconds: float, once: bool
) -> Load | None:
    """Measure a load once, or until three runs in a row agree, and five times at most."""
    runs = list[Load]()
    while run := measured(model, requests, at, seconds):
        runs.append(run)
        last = sorted(runs[-REPEATS:], key=lambda run: run.pace)
        agree = len(last) == REPEATS and last[-1].pace <= (1 + STEADY) * last[0].pace
        if once or agree or len(runs) == MOST_REPEATS:
            middle = last[len(last) // 2]
            ends = (last[0].pace / middle.pace, last[-1].pace / middle.pace)
            return middle.model_copy(update={"repeats": len(runs), "range": ends})
    return None


def measured(model: Here, requests: Sequence[Request], at: int, seconds: float) -> Load | None:
    """Ask some requests, `at` at once, until all are answered, or so many and the time is over.

    None where no answer came, or where memory did not hold so many at once.
    """
    model.concurrency = at
    least = at if seconds else 1  # a warm-up ends with the first answer
    started, inputs, outputs, spent, count = time.monotonic(), 0, 0, 0.0, 0
    for raw in model.ask(evenly(requests, at)):
        usage = raw.reply.usage
        inputs, outputs = inputs + usage.input_tokens, outputs + usage.output_tokens
        spent, count = spent + raw.usage.seconds, count + (not raw.error)
        if count >= least and time.monotonic() - started > seconds:
            break
    held = getattr(model, "most_rows", None) or at
    if held < at or not outputs or not spent:
        return None
    usage = Usage(input_tokens=inputs, output_tokens=outputs, seconds=spent)
    return Load(concurrency=at, requests=count, usage=usage)


def evenly(requests: Sequence[Request], at: int) -> Sequence[Request]:
    """Return the requests, spread evenly, that are asked `at` at once."""
    count = max(LEAST, 2 * at)
    return requests[:: max(1, len(requests) // count)][:count]
