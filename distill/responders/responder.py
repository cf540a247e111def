"""The one seam through which teacher, student and judge are asked: requests go in, responses come out as they finish."""

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from distill.config import Teacher
from distill.records import Document, Message, Record, Response, Stop, Usage, canonical, digest
from distill.responders.endpoint.wire import THINKING, read_stored
from distill.storage.log import Log


class Sampling(Record):
    """How an answer is drawn. Temperature 0 is greedy; everything here is part of the request's key."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512

    @classmethod
    def of(cls, settings: Teacher) -> "Sampling":
        """Return how a teacher or a judge samples."""
        return cls(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
        )


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
        # Written out: a field that is added to these classes must not change the keys of what is stored
        shape = {
            "origin": origin,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_new_tokens": sampling.max_new_tokens,
            },
        }
        key = digest(shape)
        return cls(
            key=key, sample=sample, prompt_id=prompt_id, messages=messages, sampling=sampling
        )


class Scoring(Request):
    """A text as token ids, of each of which a server is to say how likely it was there, and what else was.

    Nothing is drawn but the one token that no server goes without. Another `sample` asks again.
    """

    ids: tuple[int, ...]

    @classmethod
    def of(cls, origin: str, ids: tuple[int, ...], sample: int = 0) -> "Scoring":
        """Build a request whose key is the hash of the ids and of what names the server, its model and its settings."""
        key = digest({"origin": origin, "ids": ids})
        drawn = Sampling(max_new_tokens=1)
        return cls(key=key, sample=sample, prompt_id=key, messages=(), sampling=drawn, ids=ids)


class Raw(Record):
    """One answer exactly as it came, before anything is read from it: this is what the store keeps.

    `body` holds at least `text`; a local model adds the token ids that it drew, its end token included. An endpoint's
    body holds the bytes of the reply (see wire.pack), and nothing is known of how it stopped before they are read.
    """

    key: str
    sample: int
    model: str
    stop: Stop | None
    usage: Usage = Usage()
    body: dict[str, Any]
    error: str | None = None

    @property
    def id(self) -> str:
        """Return the id of the response that this becomes."""
        return Response.make_id(self.key, self.sample)


def parse(raw: Raw, prompt_id: str) -> Response:
    """Read a response out of what came: a leading think block is reasoning, the rest is the answer."""
    if "sha256" in raw.body:
        return _parse_reply(raw, prompt_id)
    text = str(raw.body["text"])
    thinking = THINKING.match(text)
    return Response(
        id=raw.id,
        request_key=raw.key,
        sample=raw.sample,
        prompt_id=prompt_id,
        model=raw.model,
        text=text[thinking.end() :] if thinking else text,
        reasoning=thinking[1].strip() if thinking else None,
        stop=raw.stop or "error",
        usage=raw.usage,
        raw_sha256=hashlib.sha256(canonical(raw.body)).hexdigest(),
        error=raw.error,
    )


def _parse_reply(raw: Raw, prompt_id: str) -> Response:
    """Read a response out of the bytes of an endpoint's reply."""
    reply = read_stored(raw.body)
    return Response(
        id=raw.id,
        request_key=raw.key,
        sample=raw.sample,
        prompt_id=prompt_id,
        model=reply.model or raw.model,
        text=reply.text,
        reasoning=reply.reasoning,
        stop=reply.stop,
        usage=reply.usage.model_copy(update={"seconds": raw.usage.seconds}),
        logprobs=reply.logprobs,
        raw_sha256=raw.body["sha256"],
        error=reply.error,
    )


class Circumstances(NamedTuple):
    """What a responder is made with beside its own settings.

    The run that pays, the date that templates show, a file of prices, and the documents of the prompts by their ids.
    """

    run: str
    date: str
    prices: Path | None
    sources: Mapping[str, Document]


class Responder(Protocol):
    """Answers requests, in the order they finish; `origin` names what shapes its answers, `model` what a reader calls it."""

    model: str
    origin: str

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request."""
        ...

    def respond(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Yield one response for each request: what `ask` yields, parsed."""
        ...


class Plan(Record):
    """Requests that are answered together, in this order, by a stream of so many slots."""

    requests: tuple[Request, ...]
    slots: int

    @property
    def id(self) -> str:
        """Return the plan's id, which depends on everything in it."""
        asked = [[request.key, request.sample] for request in self.requests]
        return digest({"requests": asked, "slots": self.slots})


@runtime_checkable
class Planner(Protocol):
    """A responder whose answers depend, in the last bits, on what shares the batch.

    Its plans are recorded before they are asked and rerun whole when unfinished: same plan, same answers.
    """

    def plan(self, requests: Sequence[Request]) -> list[Plan]:
        """Divide requests into plans; the result depends on the requests only, not on their order."""
        ...

    def ask_plan(self, plan: Plan) -> Iterator[Raw]:
        """Yield the raw answers of one plan."""
        ...


@runtime_checkable
class Buyer(Protocol):
    """A responder whose answers are paid for: it records each attempt before it is sent, and stores what comes."""

    def buy(self, requests: Sequence[Request], log: Log) -> Generator[Raw, None, None]:
        """Yield one raw answer for each request, stored already; one that could not be had is yielded, not stored."""
        ...

    def progress(self) -> str:
        """Say in a few words what has been spent of what, while `buy` runs."""
        ...


def respond(responder: Responder, requests: Sequence[Request]) -> Iterator[Response]:
    """Yield the parsed answers of any responder, each under its request's prompt."""
    prompts = {(request.key, request.sample): request.prompt_id for request in requests}
    for raw in responder.ask(requests):
        yield parse(raw, prompts[raw.key, raw.sample])
