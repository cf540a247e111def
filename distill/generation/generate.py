"""The generate stage: the teacher's answers to the prompts, and the questions that it writes about documents."""

from collections.abc import Sequence
from itertools import islice

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.generation.requests import asking_requests, requests_of, written_prompts
from distill.records import Document, Prompt
from distill.responders import kinds
from distill.responders.ask import Ask
from distill.responders.kinds import make_responder
from distill.responders.local.workers import Workers
from distill.responders.responder import Planner
from distill.responders.terms import require_terms
from distill.responders.token_counts import recounted
from distill.storage.files import read_records, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run


def main(config: Config, run: Run, workers: Workers | None = None) -> None:
    """Make responses.jsonl from prompts.jsonl, and questions.jsonl, empty unless the teacher writes questions.

    Raises DistillError (exit 10) before anything is asked, where the teacher's terms do not allow it.
    This is the main process of `workers`, where others answer too.
    """
    run.note("terms", require_terms(config.teacher, config.terms.basis).facts())
    documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
    prompts = read_records(run.path("prompts.jsonl"), Prompt)
    sources = {prompt.id: documents[prompt.document_id] for prompt in prompts}
    teacher = make_responder(config.teacher, config, sources)
    store, again = config.store_folder() / "responses", "generate" in run.remade
    with Ask(teacher, store, run, again, workers) as ask:
        questions = write_questions(config, ask, list(documents.values()))
        write_records(run.path("questions.jsonl"), questions)
        prompts += questions
        requests = requests_of(config, teacher.origin, prompts, documents)
        responses = ask.responses(requests, "teacher")
    if config.teacher.paid:
        responses = recounted(responses, requests, config.teacher.model)
    write_records(run.path("responses.jsonl"), responses)
    if ask.count and config.teacher.stated_dollars is not None:
        run.ledger.spend(
            dollars=config.teacher.stated_dollars, price="as stated in teacher.dollars"
        )
    run.note(
        "teacher", {"model": teacher.model, "origin": teacher.origin, "answers": len(responses)}
    )
    errors = [response.error for response in responses if response.stop == "error"]
    but = f", {len(errors)} of them failed (--redo generate asks those again), the last: "
    but = f"{but}{errors[-1]}" if errors else ""
    say(f"generate: {len(responses)} answers to {len(prompts)} prompts{but}")


def identity(config: Config) -> dict[str, str]:
    """Return the hashes of what the teacher's answers depend on."""
    return kinds.identity(config.teacher)


def join(config: Config, run: Run, workers: Workers) -> None:
    """Do a share of the work, as another process than the main one."""

    from distill.responders.local.local_model import LocalResponder

    def ready() -> Planner:
        teacher = make_responder(config.teacher, config)
        assert isinstance(teacher, LocalResponder)
        assert teacher.network  # loaded while the main process loads its own and plans
        return teacher

    workers.join(ready, config.store_folder() / "responses", run.ledger.spend)


def write_questions(config: Config, ask: Ask, documents: Sequence[Document]) -> list[Prompt]:
    """Let the teacher write questions about each document, and return the prompts that they become."""
    settings = config.prompts.questions
    if settings is None:
        return []
    if not config.teacher.answers_anything:
        what, fix = "recorded answers write no questions", "use a local teacher"
        raise DistillError(Exit.CONFIG, "prompts.questions", what, fix)
    groups = [asking_requests(settings, ask.responder.origin, d) for d in documents]
    responses = iter(ask.responses([request for group in groups for request in group], "questions"))
    return [
        prompt
        for document, group in zip(documents, groups, strict=True)
        for prompt in written_prompts(settings, document, islice(responses, len(group)))
    ]
