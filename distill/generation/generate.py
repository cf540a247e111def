"""The generate stage: the teacher's answers to the prompts, and its questions about documents."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from distill.config.teachers import EndpointTeacher, Questions, StatedCost, Teacher
from distill.corpus.prompts import asked, prompts_for_questions, written_prompts
from distill.errors import DistillError, Exit
from distill.models.chat_template import find_turn
from distill.models.loading import student_tokenizer
from distill.reasoning import marked
from distill.records import Document, Prompt, Response
from distill.responders.ask import Ask
from distill.responders.kinds import make_responder
from distill.responders.responder import Request, Sampling
from distill.responders.terms import require_terms
from distill.responders.token_counts import recounted
from distill.storage.files import read_records, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.task import checkable, checker_of, load_task, tasks_of_run

MOST_MARKED = 0.01  # of the answers; one that speaks of such marks is none of a kind


def main(run: Run) -> None:
    """Make responses.jsonl to the prompts asked, and questions.jsonl, which may be empty.

    Raises DistillError (exit 10) before anything is asked, where the terms do not allow it.
    """
    config = run.config
    settings, questions = config.teacher, list[Prompt]()
    run.note("terms", require_terms(settings, config.terms.basis).facts())
    documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
    prompts = asked(run)
    require_turns(run, prompts)
    if config.train.self_answers:
        checkable(prompts, tasks_of_run(run.folder), "train.self_answers")
    sources = {prompt.id: documents[prompt.document_id] for prompt in prompts}
    teacher = make_responder(settings, config, sources)
    store, again = config.store_folder() / "responses", "generate" in run.remade
    with Ask(teacher, store, run, again) as ask:
        if writing := config.prompts.questions:
            if not settings.answers_anything:
                what, fix = "recorded answers write no questions", "use a local teacher"
                raise DistillError(Exit.CONFIG, "prompts.questions", what, fix)
            groups = [question_requests(writing, teacher.origin, d) for d in documents.values()]
            replies = iter(ask.responses([one for group in groups for one in group], "questions"))
            for document, group in zip(documents.values(), groups, strict=True):
                questions += written_prompts(writing, document, islice(replies, len(group)))
        write_records(run.path("questions.jsonl"), questions)
        prompts += questions
        useful = useful_prompts(run, prompts, documents)
        if unasked := len(prompts) - len(useful):
            what = "validation prompts are not asked, since the checker alone reads them"
            say(f"generate: {unasked} {what} (train.metric_for_best_model)")
        schemas = schemas_of(settings, config.prompts.tasks)
        requests = requests_of(settings, teacher.origin, useful, documents, schemas)
        responses = ask.responses(requests, "teacher")
    if settings.paid:
        responses = recounted(responses, requests, settings.model)
    write_records(run.path("responses.jsonl"), responses)
    if ask.count and isinstance(settings, StatedCost) and settings.dollars is not None:
        run.ledger.spend(dollars=settings.dollars, price="as stated in teacher.dollars")
    facts = {"model": teacher.model, "origin": teacher.origin, "answers": len(responses)}
    run.note("teacher", facts)
    line = f"generate: {len(responses)} answers to {len(useful)} prompts"
    if errors := [response.error for response in responses if response.stop == "error"]:
        line += f", {len(errors)} of them failed (--redo generate asks those again), the last: "
        line += str(errors[-1])
    say(line)
    say_what_is_odd(responses)


def say_what_is_odd(responses: Sequence[Response]) -> None:
    """Say how many answers stopped for unknown reasons, and whether many hold marks of thought."""
    notes = Counter(r.error for r in responses if r.error and r.stop in ("end", "length"))
    for note, count in notes.most_common():
        say(f"generate: {count} answers with {note}: taken for complete, unless at max_new_tokens")
    marks = sum(marked(response.text) for response in responses)
    if marks > MOST_MARKED * len(responses):
        what = "hold a mark of reasoning that is no thought's beginning or end"
        say(f"warning: {marks} of {len(responses)} answers {what}: look at responses.jsonl")


def require_turns(run: Run, prompts: Sequence[Prompt]) -> None:
    """Stop where the student's template refuses an order of turns; DistillError (exit 7)."""
    orders = {tuple(message.role for message in p.messages): p.messages for p in prompts}
    if rare := [m for order, m in orders.items() if order not in {("user",), ("system", "user")}]:
        tokenizer = student_tokenizer(run.config.student, run.config.reasoning)
        for messages in rare:
            find_turn(tokenizer, messages, run.config.template_date)


def useful_prompts(
    run: Run, prompts: Sequence[Prompt], documents: Mapping[str, Document]
) -> list[Prompt]:
    """Return the prompts whose answers are of use: all, but for those of validation where answers
    are made, and the checker alone would read them, which reads the student's own."""
    if run.config.train.metric_for_best_model == "checker" and run.config.teacher.makes_answers:
        find, splits = tasks_of_run(run.folder), {name: d.split for name, d in documents.items()}
        mine = [p for p in prompts if splits[p.document_id] == "validation"]
        unread = {p.id for p in mine if checker_of(find(p.task), p)}
        return [prompt for prompt in prompts if prompt.id not in unread]
    return list(prompts)


def requests_of(
    teacher: Teacher,
    origin: str,
    prompts: Iterable[Prompt],
    documents: Mapping[str, Document],
    schemas: Mapping[str, dict[str, Any]] = {},
) -> list[Request]:
    """Return the requests of all prompts: `teacher.n` samples for training, else one each; of
    recorded answers all. `schemas` are those that go with a question, by its task."""
    requests, sampling = list[Request](), Sampling.of(teacher)
    for prompt in prompts:
        document = documents[prompt.document_id]
        samples = teacher.n if teacher.answers_anything else max(1, len(document.recorded_answers))
        messages, schema = prompt.asked_of_teacher(), schemas.get(prompt.task)
        for sample in range(samples if document.split == "train" else 1):
            requests.append(Request.make(origin, prompt.id, messages, sampling, sample, schema))
    return requests


def schemas_of(teacher: Teacher, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the JSON Schemas that a teacher is sent with questions, by their task."""
    if not isinstance(teacher, EndpointTeacher) or teacher.response_format == "text":
        return {}
    tasks = map(load_task, names)
    return {t.name: t.checker["schema"] for t in tasks if t.checker and "schema" in t.checker}


def question_requests(settings: Questions, origin: str, document: Document) -> list[Request]:
    """Return the requests that ask the teacher for questions about a document."""
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    prompts = prompts_for_questions(document, settings)
    return [Request.make(origin, prompt.id, prompt.messages, sampling) for prompt in prompts]
