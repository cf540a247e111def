"""What a run asks its teacher: the requests of its prompts, and those for questions about its documents.

Pure functions of the config and the run's files, so that a plan, a pilot and the generate stage mean the same requests.
"""

from collections.abc import Iterable, Iterator, Mapping

from distill.config import Config, Questions
from distill.corpus.prompts import prompts_for_questions, prompts_from_questions
from distill.records import Document, Prompt, Response
from distill.responders.responder import Request, Sampling


def requests_of(
    config: Config, origin: str, prompts: Iterable[Prompt], documents: Mapping[str, Document]
) -> list[Request]:
    """Return the requests of all prompts, in their order."""
    found = ((prompt, documents[prompt.document_id]) for prompt in prompts)
    return [request for pair in found for request in requests_for(config, origin, *pair)]


def requests_for(
    config: Config, origin: str, prompt: Prompt, document: Document
) -> Iterator[Request]:
    """Yield the requests of a prompt: `teacher.n` samples for training, else one."""
    teacher, sampling = config.teacher, Sampling.of(config.teacher)
    for sample in range(teacher.n if document.split == "train" else 1):
        yield Request.make(origin, prompt.id, prompt.asked_of_teacher(), sampling, sample)


def asking_requests(settings: Questions, origin: str, document: Document) -> list[Request]:
    """Return the requests that ask the teacher for questions about a document."""
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    prompts = prompts_for_questions(document, settings)
    return [Request.make(origin, prompt.id, prompt.messages, sampling) for prompt in prompts]


def written_prompts(
    settings: Questions, document: Document, replies: Iterable[Response]
) -> list[Prompt]:
    """Return the prompts that the replies about a document become."""
    return prompts_from_questions(document, (reply.text for reply in replies), settings)
