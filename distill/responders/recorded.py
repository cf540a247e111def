"""Answers that came with the corpus; model, license and cost are as the user stated them."""

from collections.abc import Iterator, Mapping, Sequence

from distill.config import RecordedTeacher
from distill.errors import DistillError, Exit
from distill.records import Document, digest
from distill.responders.canned import CannedResponder, raw_text
from distill.responders.responder import Circumstances, Raw, Request


class RecordedResponder(CannedResponder):
    """Answers with what the corpus recorded, by prompt; model, license and cost are as the user stated them."""

    def __init__(self, recorded: Mapping[str, Document], model: str) -> None:
        super().__init__({}, model=model)
        self.recorded = recorded
        answers = {key: d.meta["recorded_answer"] for key, d in recorded.items()}
        self.origin = digest({"recorded": answers, "model": model})

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield the recorded answer of each request's prompt; raises DistillError (exit 3) where there is none."""
        for request in requests:
            document = self.recorded.get(request.prompt_id)
            if document is None:
                asked = request.messages[-1].content[:40]
                raise DistillError(
                    Exit.INPUT,
                    f"prompt {request.prompt_id} ({asked!r})",
                    "no recorded answer in the corpus",
                    "end each conversation with the assistant's turn, or choose another teacher",
                )
            stated = str(document.meta.get("recorded_model") or self.model)
            yield raw_text(request, document.meta["recorded_answer"], stated)


def make(teacher: RecordedTeacher, circumstances: Circumstances) -> RecordedResponder:
    """Make the responder of the answers that the documents of the prompts hold."""
    sources = circumstances.sources.items()
    recorded = {key: d for key, d in sources if "recorded_answer" in d.meta}
    return RecordedResponder(recorded, teacher.model or "unknown")
