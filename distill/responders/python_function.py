"""A function of the program that calls `distill.run`: messages in, an answer out."""

from collections.abc import Iterator, Sequence

from distill.callables import find, source_hash
from distill.config.teachers import PythonTeacher
from distill.errors import DistillError, Exit
from distill.records import digest
from distill.responders.canned import raw_text
from distill.responders.responder import Circumstances, Raw, Request


class FunctionResponder:
    """Calls a function with a request's messages; the store keys its answers by its source too."""

    def __init__(self, name: str, model: str) -> None:
        self.name, self.model, self.function = name, model or name, find("responder", name)
        self.origin = digest({"python": source_hash("responder", name), "model": self.model})

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request; raises DistillError (exit 4) where it gives none.

        The answers before that are in the store already.
        """
        for request in requests:
            messages = [{"role": m.role, "content": m.content} for m in request.messages]
            try:
                text = self.function(messages)
            except Exception as error:  # a function of the user's may raise anything
                what = f"raised {type(error).__name__}: {error}"
                fix = "correct it; the same call continues"
                raise DistillError(Exit.TEACHER, f"responder {self.name}", what, fix) from error
            if not isinstance(text, str):
                what, fix = f"returned {type(text).__name__}, and no text", "return a str"
                raise DistillError(Exit.TEACHER, f"responder {self.name}", what, fix)
            yield raw_text(request, text, self.model)


def make(teacher: PythonTeacher, circumstances: Circumstances) -> FunctionResponder:
    """Make the responder of a function."""
    return FunctionResponder(teacher.responder, teacher.model)
