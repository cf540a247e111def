"""The one seam through which teacher, student and judge are asked: requests go in, responses come out as they finish."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from distill.records import Message, Record, Response, digest


class Sampling(Record):
    """How an answer is drawn. Temperature 0 is greedy; everything here is part of the request's key."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512


class Request(Record):
    """One question to a model; `key` names it in the store, together with the sample index."""

    key: str
    sample: int
    prompt_id: str
    messages: tuple[Message, ...]
    sampling: Sampling

    @classmethod
    def make(
        cls,
        origin: str,
        prompt_id: str,
        messages: tuple[Message, ...],
        sampling: Sampling,
        sample: int = 0,
    ) -> "Request":
        """Build a request; `origin` identifies model, weights and chat template (a responder's `origin`)."""
        asked = [m.model_dump() for m in messages]
        key = digest({"origin": origin, "messages": asked, "sampling": sampling.model_dump()})
        return cls(
            key=key, sample=sample, prompt_id=prompt_id, messages=messages, sampling=sampling
        )


class Responder(Protocol):
    """Answers requests, in the order they finish; `origin` names what shapes its answers, `model` what a reader calls it."""

    model: str
    origin: str

    def respond(self, requests: Iterable[Request]) -> Iterator[Response]:
        """Yield one response for each request."""
        ...
