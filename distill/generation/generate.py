"""The generate stage: ask the teacher what the store lacks, and never twice.

What comes is stored before anything is read from it, in a log that all runs share, keyed by content: the model's weights
and template, the messages, the sampling, the sample index. So a filter, a parser or a run may change without a request.
A responder whose answers depend on what shares the batch has its plans stored first; an unfinished one is rerun whole,
so that an interrupted run ends with the same bytes as one that was not.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.generation.requests import asking_requests, requests_of, written_prompts
from distill.models import registry
from distill.records import Document, Prompt, Response
from distill.responders.endpoint.budget import enter_account, faults, replies
from distill.responders.local.plans import Spend, Spending, answers, lacking, planned, store_each
from distill.responders.local.workers import Crew, take_over
from distill.responders.prices import load_prices
from distill.responders.recorded import CannedResponder, RecordedResponder, answers_hash
from distill.responders.responder import (
    Buyer,
    Planner,
    Raw,
    Request,
    Responder,
    parse,
)
from distill.responders.terms import require_terms
from distill.responders.token_counts import recounted
from distill.storage.files import read_records, write_records
from distill.storage.log import Log
from distill.storage.progress import say, tracking
from distill.storage.run_folder import Run

if TYPE_CHECKING:
    from distill.responders.local.local_model import LocalResponder

ADOPTED = "adopted"  # record of the store: the origin that an older one's answers are taken for


def main(config: Config, run: Run, crew: Crew | None = None) -> None:
    """Make responses.jsonl from prompts.jsonl, and questions.jsonl, empty unless the teacher writes questions.

    Raises DistillError (exit 10) before anything is asked, where the teacher's terms do not allow it.
    This is the main process of a `crew`, where others answer too.
    """
    run.note("terms", require_terms(config).facts())
    documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
    prompts = read_records(run.path("prompts.jsonl"), Prompt)
    teacher = make_teacher(config, documents, prompts)
    folder = config.store_folder() / "responses"
    try:
        _generate(config, run, teacher, documents, prompts, folder, crew)
    finally:
        if config.teacher.kind == "endpoint":  # a judge, a reader enter what they take themselves
            enter_account(run, folder)


def _generate(
    config: Config,
    run: Run,
    teacher: Responder,
    documents: dict[str, Document],
    prompts: list[Prompt],
    folder: Path,
    crew: Crew | None,
) -> None:
    """Ask all that is to be asked, and write what the stage makes."""
    spend, again = Spending(run, config.teacher.kind), "generate" in run.remade
    written = write_questions(config, teacher, list(documents.values()), folder, spend, crew, again)
    write_records(run.path("questions.jsonl"), written)
    prompts += written
    requests = requests_of(config, teacher.origin, prompts, documents)
    responses = answer_all(teacher, requests, folder, "teacher", spend, crew, again)
    require_an_answer(responses, teacher.model)
    if config.teacher.kind == "endpoint":
        responses = recounted(responses, requests, config.teacher.model)
    write_records(run.path("responses.jsonl"), responses)
    if spend.answers and config.teacher.kind == "recorded" and config.teacher.dollars is not None:
        run.spend(dollars=config.teacher.dollars, price="as stated in teacher.dollars")
    run.note(
        "teacher", {"model": teacher.model, "origin": teacher.origin, "answers": len(responses)}
    )
    errors = [response.error for response in responses if response.stop == "error"]
    but = f", {len(errors)} of them failed (--redo generate asks those again), the last: "
    but = f"{but}{errors[-1]}" if errors else ""
    say(f"generate: {len(responses)} answers to {len(prompts)} prompts{but}")


def identity(config: Config) -> dict[str, str]:
    """Return the hashes of the teacher's weights and files, of its endpoint, or of the file of its answers."""
    teacher = config.teacher
    if teacher.kind == "local":
        pinned = registry.identity(teacher.model, teacher.revision)
        return {"teacher": pinned, **registry.folder_facts("teacher", teacher.model)}
    if teacher.kind == "endpoint":
        from distill.responders.endpoint.attempts import origin_of

        return {"endpoint": origin_of(teacher)}
    return {"answers": answers_hash(teacher.answers)} if teacher.answers else {}


def make_teacher(
    config: Config, documents: dict[str, Document], prompts: Iterable[Prompt]
) -> Responder:
    """Make the teacher of the config; a local one loads its weights only when something is asked."""
    teacher = config.teacher
    if teacher.kind == "canned" and teacher.answers:
        return CannedResponder.load(teacher.answers, teacher.model or "canned")
    if teacher.kind == "recorded":
        sources = {prompt.id: documents[prompt.document_id] for prompt in prompts}
        recorded = {key: d for key, d in sources.items() if "recorded_answer" in d.meta}
        return RecordedResponder(recorded, teacher.model or "unknown")
    if teacher.kind == "endpoint":
        from distill.responders.endpoint.endpoint import EndpointResponder

        price = load_prices(config.evaluation.prices).teacher(teacher.model)
        return EndpointResponder(teacher, price, config.name)
    return local_teacher(config)


def local_teacher(config: Config) -> "LocalResponder":
    """Make the teacher that runs on this machine."""
    from distill.responders.local.local_model import LocalResponder

    teacher = config.teacher
    return LocalResponder.load(
        teacher.model, teacher.dtype, teacher.revision, config.template_date, teacher.max_batch_size
    )


def join(config: Config, run: Run, crew: Crew) -> None:
    """Do a share of the work, as another process than the main one."""

    def ready() -> Planner:
        teacher = local_teacher(config)
        teacher.load_weights()  # while the main process loads its own and plans
        return teacher

    crew.join(ready, config.store_folder() / "responses", Spending(run))


def write_questions(
    config: Config,
    teacher: Responder,
    documents: Sequence[Document],
    folder: Path,
    spend: Spend,
    crew: Crew | None = None,
    again: bool = False,
) -> list[Prompt]:
    """Let the teacher write questions about each document, and return the prompts that they become."""
    settings = config.prompts.questions
    if settings is None:
        return []
    if config.teacher.kind == "recorded":
        what, fix = "recorded answers write no questions", "use a local teacher"
        raise DistillError(Exit.CONFIG, "prompts.questions", what, fix)
    asked = [asking_requests(settings, teacher.origin, document) for document in documents]
    requests = [request for group in asked for request in group]
    responses = answer_all(teacher, requests, folder, "questions", spend, crew, again)
    require_an_answer(responses, teacher.model)
    left = iter(responses)
    return [
        prompt
        for document, group in zip(documents, asked, strict=True)
        for prompt in written_prompts(settings, document, islice(left, len(group)))
    ]


def require_an_answer(responses: Sequence[Response], model: str) -> None:
    """Stop where of some requests every one failed (exit 4): that is the fault of none of them."""
    if responses and all(response.stop == "error" for response in responses):
        what = f"all {len(responses)} requests failed, the last: {responses[-1].error}"
        fix = "see to the server, then ask again with --redo"
        raise DistillError(Exit.TEACHER, model, what, fix)


def answer_all(
    responder: Responder,
    requests: Sequence[Request],
    store_folder: Path,
    title: str,
    spend: Spend | None = None,
    crew: Crew | None = None,
    again: bool = False,
) -> list[Response]:
    """Return one response a request, in their order, asking only for what the store in `store_folder` lacks.

    With `again` also for what a server's reply is stored of, but no answer.
    """
    asked = ask_all(responder, requests, store_folder, title, spend, crew, again)
    with Log(store_folder, writable=False) as log:
        return [read(log, request) for request in asked]


def ask_all(
    responder: Responder,
    requests: Sequence[Request],
    store_folder: Path,
    title: str,
    spend: Spend | None = None,
    crew: Crew | None = None,
    again: bool = False,
) -> list[Request]:
    """Ask for what the store in `store_folder` lacks, and `again` for what has failed.

    Returns the requests with the keys of their answers there.

    `spend` is told the input and output tokens of each answer that was generated now, by this process.
    """
    former: str = getattr(responder, "old_origin", None) or ""  # a model in a folder has one
    asked, old = list(requests), 0
    with Log(store_folder, writable=False) as log:
        if former and (log.get(ADOPTED, former) or responder.origin) == responder.origin:
            asked = under_old_keys(log, former, requests)
            old = sum(one.key != other.key for one, other in zip(asked, requests, strict=True))
        adopting = old > 0 and (ADOPTED, former) not in log
        missing = lacking(log, asked, again)
    if missing or adopting:
        with Log(store_folder) as log:
            if adopting:
                log.append([(ADOPTED, former, responder.origin)])
                what = (
                    f"{old} answers are stored under the hash of {responder.model}'s weights alone"
                )
                say(f"{title}: {what}, and count as answers of the model as it is now")
            take_over(log)
            if missing := lacking(log, missing, again):
                _ask(responder, missing, log, title, spend, crew)
    return asked


def under_old_keys(log: Log, former: str, requests: Sequence[Request]) -> list[Request]:
    """Return the requests, those whose answer only an earlier distill has stored under its key, of origin `former`.

    It knew a model in a folder by its weights alone. Its answers are those of the first model that asks for them
    (`ADOPTED`): they are not found any more once a file of that folder has changed.
    """
    renamed = (
        Request.make(former, r.prompt_id, r.messages, r.sampling, r.sample) for r in requests
    )
    return [
        old if lacking(log, [new]) and not lacking(log, [old]) else new
        for old, new in zip(renamed, requests, strict=True)
    ]


def read(log: Log, request: Request) -> Response:
    """Read the stored answer of a request as a response to its prompt; without one, how the last attempt failed.

    Log-probabilities, which weigh fifty times what the answer does, stay in the store.
    """
    return next(readings(log, request))


def readings(log: Log, request: Request) -> Iterator[Response]:
    """Yield what is known of a request: its replies, the newest first, then how its attempts failed, the last first."""
    for stored in replies(log, Response.make_id(request.key, request.sample)):
        response = parse(Raw.model_validate(stored), request.prompt_id)
        yield response.model_copy(update={"logprobs": None})
    for what in (*faults(log, request.key, request.sample), "no attempt is recorded"):
        nothing = Raw(
            key=request.key,
            sample=request.sample,
            model="",
            stop="error",
            body={"text": ""},
            error=what,
        )
        yield parse(nothing, request.prompt_id)


def _ask(
    responder: Responder,
    missing: list[Request],
    log: Log,
    title: str,
    spend: Spend | None,
    crew: Crew | None,
) -> None:
    """Ask for all that is missing, and store each answer as it comes."""
    if isinstance(responder, Buyer):
        _buy(responder, missing, log, title, spend)
        return
    with tracking(title, len(missing), "answers") as tracker:
        started, tokens = time.monotonic(), 0
        for raw in _stored(responder, missing, log, spend, crew):
            tokens += raw.usage.output_tokens
            tracker.advance(extra=f"{tokens / (time.monotonic() - started):.0f} tokens/s")


def _stored(
    responder: Responder,
    missing: list[Request],
    log: Log,
    spend: Spend | None,
    crew: Crew | None,
) -> Iterator[Raw]:
    """Return the raw answers, each once it is stored, by this process or another of the crew."""
    if not isinstance(responder, Planner):
        return store_each(responder.ask(missing), log, spend)
    if crew:
        return crew.lead(responder, missing, log, spend)
    return store_each(answers(responder, planned(responder, missing, log)), log, spend)


def _buy(buyer: Buyer, missing: list[Request], log: Log, title: str, spend: Spend | None) -> None:
    """Let a buyer store what it is paid for; when we stop, it ends before the log is closed."""
    with (
        tracking(title, len(missing), "answers") as tracker,
        closing(buyer.buy(missing, log)) as raws,
    ):
        for raw in raws:
            if spend:
                spend(raw.usage.input_tokens, raw.usage.output_tokens)
            tracker.advance(extra=buyer.progress())
