"""`distill plan --pilot N`: asks N questions of the run and keeps their answers, so that the plan's ranges narrow.

The run's documents and prompts are made first where they are missing, by their own stages. The questions are chosen by
the hashes of their texts, from every task its share; the same ones each time, so that nothing is asked twice, and the
generate stage finds their answers in the store.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.generation.budget import enter_account
from distill.generation.generate import answer_all, make_teacher
from distill.generation.plans import Spending
from distill.generation.requests import asking_requests, requests_for, written_prompts
from distill.generation.responder import Request
from distill.progress import say
from distill.records import Document, Prompt, Response, digest
from distill.run import Run, Stage
from distill.store import read_records

NAME = "pilot"  # what the ledger calls it


class Question(NamedTuple):
    """A request, and the task that it is of."""

    task: str
    request: Request


def pilot(run: Run, count: int) -> str:
    """Ask `count` questions of a run whose prompts are made, and return the teacher's origin.

    For whoever holds the run's lock. Raises DistillError (exit 2) for a teacher that is not asked.
    """
    origins: list[str] = []

    def main(config: Config, run: Run) -> None:
        origins.append(_pilot(config, run, count))

    run.do(Stage(NAME, (), (), (), main))
    return origins[0]


def require_teacher(config: Config) -> None:
    """Stop where no teacher is asked (exit 2)."""
    if config.teacher.kind not in ("local", "endpoint"):
        what = f"a teacher of kind {config.teacher.kind} is not asked anything"
        raise DistillError(Exit.CONFIG, "--pilot", what, "leave it out")


def _pilot(config: Config, run: Run, count: int) -> str:
    """Ask, and enter what it cost in the ledger, also when it was stopped."""
    documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
    prompts = read_records(run.path("prompts.jsonl"), Prompt)
    teacher = make_teacher(config, documents, prompts)
    folder = config.store_folder() / "responses"
    spend = Spending(run, config.teacher.kind)
    ask = partial(answer_all, teacher, store_folder=folder, title=NAME, spend=spend)
    try:
        first = _about_documents(config, teacher.origin, documents.values(), count)
        replies = iter(ask(requests=[request for _, group in first for request in group]))
        for document, group in first:
            prompts += _written(config, document, islice(replies, len(group)))
        left = count - sum(len(group) for _, group in first)
        known = (
            Question(prompt.task, request)
            for prompt in prompts
            for request in requests_for(
                config, teacher.origin, prompt, documents[prompt.document_id]
            )
        )
        answers = ask(requests=spread(known, left))
    finally:
        enter_account(run, folder)
    say(
        f"pilot: {count - left + len(answers)} answers in the store, {spend.answers} of them asked for now"
    )
    return teacher.origin


def _about_documents(
    config: Config, origin: str, documents: Iterable[Document], count: int
) -> list[tuple[Document, list[Request]]]:
    """Return documents that the teacher is to write questions about, with the requests for them: half of `count`."""
    settings = config.prompts.questions
    if settings is None:
        return []
    ordered = sorted(documents, key=lambda document: digest(document.text))
    asked = [(document, asking_requests(settings, origin, document)) for document in ordered]
    fitting = max(1, count // 2 // max(1, len(asked[0][1]))) if asked else 0
    return [pair for pair in asked[:fitting] if len(pair[1]) <= count]


def _written(config: Config, document: Document, replies: Iterable[Response]) -> list[Prompt]:
    settings = config.prompts.questions
    return written_prompts(settings, document, replies) if settings else []


def spread(questions: Iterable[Question], count: int) -> list[Request]:
    """Choose `count` requests, from each task its share, in the order of their hashes; fewer where there are fewer."""
    ordered = sorted(questions, key=lambda q: (q.task, _hash(q.request)))
    tasks = [[q.request for q in group] for _, group in groupby(ordered, key=lambda q: q.task)]
    shares = _shares([len(requests) for requests in tasks], count)
    return [r for requests, share in zip(tasks, shares, strict=True) for r in requests[:share]]


def _hash(request: Request) -> str:
    """Return a hash of what is asked, and of nothing else: two teachers are tried with the same questions."""
    return digest([[message.model_dump() for message in request.messages], request.sample])


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """Divide `count` in proportion to sizes, what is left over going to the largest remainders (after Hamilton)."""
    whole = sum(sizes)
    count = min(max(count, 0), whole)
    found = [size * count // whole for size in sizes]
    behind = sorted(range(len(sizes)), key=lambda i: (-(sizes[i] * count % whole), i))
    for place in behind[: count - sum(found)]:
        found[place] += 1
    return found
