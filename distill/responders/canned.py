"""Answers without a model here: from a file, the corpus, or a function of the user's program.

A file holds JSON lines, each with the text of the last user turn and its answer:
{"prompt": "...", "answer": "..."}.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from distill.callables import find, source_hash
from distill.errors import DistillError, Exit
from distill.records import Document, Usage, digest
from distill.responders.responder import Raw, Request


class CannedAnswer(BaseModel):
    """A line of a file of answers."""

    prompt: str
    answer: str


class CannedResponder:
    """Answers from `answers`, keyed by the last user turn; `default` answers what is not there."""

    def __init__(
        self, answers: Mapping[str, str], default: str | None = None, model: str = "canned"
    ) -> None:
        self.answers, self.default, self.model = dict(answers), default, model
        self.origin = digest({"canned": self.answers, "default": default, "model": model})

    @classmethod
    def load(cls, path: Path, model: str = "canned") -> "CannedResponder":
        """Read answers from JSON lines; raises DistillError (exit 3) with the line of any error."""
        answers: dict[str, str] = {}
        for number, line in enumerate(_text(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = CannedAnswer.model_validate_json(line)
            except ValueError:
                what, fix = "is no canned answer", 'write {"prompt": "...", "answer": "..."}'
                raise DistillError(Exit.INPUT, f"{path}:{number}", what, fix) from None
            answers[row.prompt] = row.answer
        return cls(answers, model=model)

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request; raises DistillError (exit 4) on a lack of one."""
        for request in requests:
            text = self.answers.get(request.messages[-1].content, self.default)
            if text is None:
                where = f"prompt {request.messages[-1].content[:40]!r}"
                what, fix = "has no canned answer", "add one to the file"
                raise DistillError(Exit.TEACHER, where, what, fix)
            yield raw_text(request, text, self.model)


class RecordedResponder:
    """Answers with what the corpus recorded, by prompt; model and cost are as the user stated."""

    def __init__(self, sources: Mapping[str, Document], model: str) -> None:
        self.sources = {key: d for key, d in sources.items() if "recorded_answer" in d.meta}
        self.model = model
        answers = {key: d.meta["recorded_answer"] for key, d in self.sources.items()}
        self.origin = digest({"recorded": answers, "model": model})

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield the recorded answers, of a prompt without one an error; exit 3 where none has."""
        lack = "no recorded answer in the corpus"
        if not self.sources:
            where = f"prompt {requests[0].prompt_id} ({requests[0].messages[-1].content[:40]!r})"
            fix = "end each conversation with the assistant's turn, or choose another teacher"
            raise DistillError(Exit.INPUT, where, lack, fix)
        for request in requests:
            document = self.sources.get(request.prompt_id)
            if document is None:
                yield Raw.failed(request, lack, self.model)
                continue
            answer = document.recorded_answers[request.sample]
            model = answer.get("model") or document.meta.get("recorded_model") or self.model
            raw = raw_text(request, answer["text"], str(model))
            if thought := answer.get("reasoning"):
                raw.body["reasoning"] = thought
            yield raw


class FunctionResponder:
    """Calls a function with a request's messages; the store keys its answers by its source too."""

    def __init__(self, name: str, model: str) -> None:
        self.name, self.model, self.function = name, model or name, find("responder", name)
        self.origin = digest({"python": source_hash("responder", name), "model": self.model})

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request; DistillError (exit 4) where it gives none."""
        for request in requests:
            messages = [{"role": m.role, "content": m.content} for m in request.messages]
            try:
                text = self.function(messages)
                if not isinstance(text, str):
                    raise TypeError(f"returned {type(text).__name__}, and no str")
            except Exception as error:  # a function of the user's may raise anything
                what = f"raised {type(error).__name__}: {error}"
                fix = "correct it; the same call continues"
                raise DistillError(Exit.TEACHER, f"responder {self.name}", what, fix) from error
            yield raw_text(request, text, self.model)


def raw_text(request: Request, text: str, model: str) -> Raw:
    """Wrap a text as a raw answer; its length is estimated in words, for want of a tokenizer."""
    words = sum(len(m.content.split()) for m in request.messages)
    usage = Usage(input_tokens=words, output_tokens=len(text.split()), estimated=True)
    facts = {"key": request.key, "sample": request.sample, "model": model, "usage": usage}
    return Raw(**facts, stop="end", body={"text": text})


def answers_hash(path: Path) -> str:
    """Hash a file of canned answers; raises DistillError (exit 3) where it cannot be read."""
    return hashlib.sha256(_text(path).encode()).hexdigest()[:32]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "is not UTF-8"
        raise DistillError(Exit.INPUT, path, what, "check teacher.answers") from None
