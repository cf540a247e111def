"""`distill plan --pilot N`: asks N questions of the run and keeps their answers, so that the plan rests on them.

The run's documents and prompts are made first where they are missing, by their own stages. The questions are chosen by
the hashes of their texts; the same ones each time, so that nothing is asked twice, and the generate stage finds their
answers in the store.
"""

from collections.abc import Iterable
from itertools import islice

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.generation.requests import asking_requests, requests_of, written_prompts
from distill.records import Document, Prompt, digest
from distill.responders.ask import Ask
from distill.responders.kinds import make_responder
from distill.responders.responder import Request
from distill.storage.files import read_records
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage


def require_teacher(config: Config) -> None:
    """Stop where no teacher is asked (exit 2)."""
    if not config.teacher.makes_answers:
        what = f"a teacher of kind {config.teacher.kind} is not asked anything"
        raise DistillError(Exit.CONFIG, "--pilot", what, "leave it out")


def pilot(run: Run, count: int) -> str:
    """Ask `count` questions of a run whose prompts are made, and return the teacher's origin.

    For whoever holds the run's lock. What it cost is in the ledger as `pilot`, also when it was stopped.
    """
    origins: list[str] = []

    def main(config: Config, run: Run) -> None:
        documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
        prompts = read_records(run.path("prompts.jsonl"), Prompt)
        sources = {prompt.id: documents[prompt.document_id] for prompt in prompts}
        teacher, settings = (
            make_responder(config.teacher, config, sources),
            config.prompts.questions,
        )
        store = config.store_folder() / "responses"
        origins.append(teacher.origin)
        answered = 0
        with Ask(teacher, store, run) as ask:
            if settings:  # half of what is asked goes to the writing of questions
                ordered = sorted(documents.values(), key=lambda document: digest(document.text))
                pairs = [(d, asking_requests(settings, teacher.origin, d)) for d in ordered]
                pairs = pairs[: max(1, count // 2 // max(1, len(pairs[0][1])))] if pairs else []
                pairs = [(d, requests) for d, requests in pairs if len(requests) <= count]
                first = [request for _, requests in pairs for request in requests]
                replies = iter(ask.responses(first, "pilot"))
                answered = len(first)
                for document, requests in pairs:
                    new = written_prompts(settings, document, islice(replies, len(requests)))
                    prompts += new
            requests = requests_of(config, teacher.origin, prompts, documents)
            answered += len(ask.responses(choose_requests(requests, count - answered), "pilot"))
        say(f"pilot: {answered} answers in the store, {ask.count} of them asked for now")

    run.do(Stage("pilot", (), (), (), main))
    return origins[0]


def choose_requests(requests: Iterable[Request], count: int) -> list[Request]:
    """Choose `count` requests by the hash of what is asked, and of nothing else: two teachers get the same questions."""

    def place(request: Request) -> str:
        return digest([[message.model_dump() for message in request.messages], request.sample])

    return sorted(requests, key=place)[: max(0, count)]
