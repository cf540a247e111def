"""Answers that stand in a file or a dictionary, so that whoever builds on this can test a whole pipeline offline.

A file holds JSON lines, each with the text of the last user turn and its answer: {"prompt": "...", "answer": "..."}.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.config import CannedTeacher
from distill.errors import DistillError, Exit
from distill.records import Response, Usage, digest
from distill.responders.responder import Circumstances, Raw, Request, respond


class CannedResponder:
    """Answers from `answers`, keyed by the last user turn; `default` answers what is not there."""

    def __init__(
        self, answers: Mapping[str, str], default: str | None = None, model: str = "canned"
    ) -> None:
        self.answers, self.default, self.model = dict(answers), default, model
        self.origin = digest({"canned": self.answers, "default": default, "model": model})

    @classmethod
    def load(cls, path: Path, model: str = "canned") -> "CannedResponder":
        """Read answers from JSON lines; raises DistillError (exit 3) with the line of any fault."""
        answers: dict[str, str] = {}
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                prompt, answer = _read_answer(line, f"{path}:{number}")
                answers[prompt] = answer
        return cls(answers, model=model)

    def respond(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Yield one response for each request."""
        return respond(self, requests)

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request; raises DistillError (exit 4) where there is none."""
        for request in requests:
            text = self.answers.get(request.messages[-1].content, self.default)
            if text is None:
                asked = request.messages[-1].content[:40]
                raise DistillError(
                    Exit.TEACHER, f"prompt {asked!r}", "has no canned answer", "add one to the file"
                )
            yield raw_text(request, text, self.model)


def make(teacher: CannedTeacher, circumstances: Circumstances) -> CannedResponder:
    """Make the responder of a file of answers."""
    return CannedResponder.load(teacher.answers, teacher.model or "canned")


def raw_text(request: Request, text: str, model: str) -> Raw:
    """Wrap a text as a raw answer; its length is estimated in words, since no tokenizer is known."""
    words = len(" ".join(m.content for m in request.messages).split())
    usage = Usage(input_tokens=words, output_tokens=len(text.split()), estimated=True)
    return Raw(
        key=request.key,
        sample=request.sample,
        model=model,
        stop="end",
        usage=usage,
        body={"text": text},
    )


def answers_hash(path: Path) -> str:
    """Hash a file of canned answers; raises DistillError (exit 3) where it cannot be read."""
    return hashlib.sha256("\n".join(_lines(path)).encode()).hexdigest()[:32]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "is not UTF-8"
        raise DistillError(Exit.INPUT, path, what, "check teacher.answers") from None


def _read_answer(line: str, where: str) -> tuple[str, str]:
    try:
        row: Any = json.loads(line)
        prompt, answer = row["prompt"], row["answer"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = answer = None
    if not isinstance(prompt, str) or not isinstance(answer, str):
        fix = 'write {"prompt": "...", "answer": "..."}'
        raise DistillError(Exit.INPUT, where, "is no canned answer", fix)
    return prompt, answer
