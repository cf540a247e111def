"""The generate stage: the teacher's answers to the prompts, and the questions that it writes about documents."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.generation.requests import asking_requests, requests_of, written_prompts
from distill.models import registry
from distill.records import Document, Prompt
from distill.responders.ask import Ask
from distill.responders.local.workers import Crew
from distill.responders.prices import load_prices
from distill.responders.recorded import CannedResponder, RecordedResponder, answers_hash
from distill.responders.responder import Planner, Responder
from distill.responders.terms import require_terms
from distill.responders.token_counts import recounted
from distill.storage.files import read_records, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run

if TYPE_CHECKING:
    from distill.responders.local.local_model import LocalResponder


def main(config: Config, run: Run, crew: Crew | None = None) -> None:
    """Make responses.jsonl from prompts.jsonl, and questions.jsonl, empty unless the teacher writes questions.

    Raises DistillError (exit 10) before anything is asked, where the teacher's terms do not allow it.
    This is the main process of a `crew`, where others answer too.
    """
    run.note("terms", require_terms(config).facts())
    documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
    prompts = read_records(run.path("prompts.jsonl"), Prompt)
    teacher = make_teacher(config, documents, prompts)
    store, again = config.store_folder() / "responses", "generate" in run.remade
    with Ask(teacher, store, run, again, crew) as ask:
        questions = write_questions(config, ask, list(documents.values()))
        write_records(run.path("questions.jsonl"), questions)
        prompts += questions
        requests = requests_of(config, teacher.origin, prompts, documents)
        responses = ask.responses(requests, "teacher")
    if config.teacher.kind == "endpoint":
        responses = recounted(responses, requests, config.teacher.model)
    write_records(run.path("responses.jsonl"), responses)
    if ask.count and config.teacher.kind == "recorded" and config.teacher.dollars is not None:
        run.ledger.spend(dollars=config.teacher.dollars, price="as stated in teacher.dollars")
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

    crew.join(ready, config.store_folder() / "responses", run.ledger.spend)


def write_questions(config: Config, ask: Ask, documents: Sequence[Document]) -> list[Prompt]:
    """Let the teacher write questions about each document, and return the prompts that they become."""
    settings = config.prompts.questions
    if settings is None:
        return []
    if config.teacher.kind == "recorded":
        what, fix = "recorded answers write no questions", "use a local teacher"
        raise DistillError(Exit.CONFIG, "prompts.questions", what, fix)
    groups = [asking_requests(settings, ask.responder.origin, d) for d in documents]
    responses = iter(ask.responses([request for group in groups for request in group], "questions"))
    return [
        prompt
        for document, group in zip(documents, groups, strict=True)
        for prompt in written_prompts(settings, document, islice(responses, len(group)))
    ]
