"""The one seam through which teacher, student and judge are asked."""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import Field

from distill.config.teachers import FROM_ENVIRONMENT, EndpointTeacher, Teacher
from distill.reasoning import split_reasoning
from distill.records import Message, Record, Response, Stop, Usage, canonical, digest
from distill.responders.endpoint.wire import Reply, read_stored

if TYPE_CHECKING:
    from distill.responders.store import ResponseStore


VERSION = 1  # of the form of a request to an endpoint: part of its origin


class Sampling(Record):
    """How an answer is sampled; temperature 0 is greedy. All of it is part of the request's key."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512

    @classmethod
    def of(cls, settings: Teacher) -> "Sampling":
        """Return how a teacher or a judge samples."""
        return cls(**{name: getattr(settings, name) for name in cls.model_fields})


def origin_of(settings: EndpointTeacher) -> str:
    """Return the hash of all that shapes an endpoint's answers beside a request, replicas aside."""
    shaping = {
        "endpoint": settings.base_urls[0],
        "api": settings.api,
        "model": settings.model,
        "revision": settings.revision,
        "extra": settings.extra_body,
        "omit": sorted(settings.omit),
        "max_tokens_field": settings.max_tokens_field,
        "wire": VERSION,
    }
    # what came later is left out where it is not set, so that what was stored is found
    later = {
        "template": settings.chat_template_kwargs,
        "form": settings.form if settings.form != "openai" else None,
        "api_version": settings.api_version,
        "headers": {n: v for n, v in settings.headers.items() if not FROM_ENVIRONMENT.search(v)},
    }
    return digest(shaping | {name: value for name, value in later.items() if value})


class Request(Record):
    """One question to a model; `key` names it in the store, together with the sample index."""

    key: str
    sample: int
    prompt_id: str
    messages: tuple[Message, ...]
    sampling: Sampling
    output_schema: Annotated[dict[str, Any] | None, Field(exclude_if=lambda it: it is None)] = None
    """JSON Schema that the server is told to answer by."""

    @property
    def id(self) -> str:
        """Return the id of the response to it."""
        return Response.make_id(self.key, self.sample)

    @classmethod
    def make(
        cls,
        origin: str,
        prompt_id: str,
        messages: tuple[Message, ...],
        sampling: Sampling,
        sample: int = 0,
        output_schema: dict[str, Any] | None = None,
    ) -> "Request":
        """Build a request; `origin`, a responder's, identifies model, weights and chat template."""
        # Field by field: a field that is added to these classes must not change stored keys
        fields = ("temperature", "top_p", "max_new_tokens")
        shape: dict[str, object] = {
            "origin": origin,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "sampling": {name: getattr(sampling, name) for name in fields},
        }
        if output_schema:
            shape["output_schema"] = output_schema
        facts = {"sample": sample, "prompt_id": prompt_id, "messages": messages}
        return cls(key=digest(shape), **facts, sampling=sampling, output_schema=output_schema)


class Encoded(Request):
    """A request whose prompt is token ids already."""

    ids: tuple[int, ...]


class Scoring(Encoded):
    """A text as token ids, at each of which a server lists its distribution; one token, which no
    server goes without, is sampled."""

    @classmethod
    def of(cls, origin: str, ids: tuple[int, ...]) -> "Scoring":
        """Build a request whose key is the hash of the ids and of the server's `origin`."""
        key = digest({"origin": origin, "ids": ids})
        sampling = Sampling(max_new_tokens=1)
        return cls(key=key, sample=0, prompt_id=key, messages=(), sampling=sampling, ids=ids)


class Raw(Record):
    """One answer exactly as it came, before anything is read from it: this is what the store keeps.

    `body` holds at least `text`, and of a local model the ids that it sampled. An endpoint's body
    holds the bytes of the reply (see wire.pack), and its `stop` is None.
    """

    key: str
    sample: int
    model: str
    stop: Stop | None
    usage: Usage = Usage()
    body: dict[str, Any]
    error: str | None = None

    @classmethod
    def failed(cls, request: Request, error: str, model: str = "") -> "Raw":
        """Return what stands for an answer that did not come; it is never stored."""
        facts = {"key": request.key, "sample": request.sample, "model": model}
        return cls(**facts, stop="error", body={"text": ""}, error=error)

    @property
    def id(self) -> str:
        """Return the id of the response that this becomes."""
        return Response.make_id(self.key, self.sample)

    @cached_property
    def reply(self) -> Reply:
        """Return what the answer says, read from its body once; a think block is reasoning."""
        if "sha256" in self.body:
            return read_stored(self.body)
        text, reasoning = str(self.body["text"]), self.body.get("reasoning")
        if reasoning is None:
            text, reasoning = split_reasoning(text)
        stop = self.stop or "error"
        return Reply(text=text, reasoning=reasoning, stop=stop, usage=self.usage, error=self.error)

    def response(self, prompt_id: str) -> Response:
        """Return the response to a prompt. Log-probabilities, fifty times its size, stay behind."""
        reply, sha256 = self.reply, self.body.get("sha256")
        return Response(
            id=self.id,
            request_key=self.key,
            sample=self.sample,
            prompt_id=prompt_id,
            model=reply.model or self.model,
            **{name: getattr(reply, name) for name in ("text", "reasoning", "stop", "error")},
            usage=reply.usage.model_copy(update={"seconds": self.usage.seconds}),
            raw_sha256=sha256 or hashlib.sha256(canonical(self.body)).hexdigest(),
            mean_logprob=self.body.get("mean_logprob"),
        )


class Responder(Protocol):
    """Answers requests; `origin` names what shapes its answers, `model` is its name for readers."""

    model: str
    origin: str

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request, in the order they finish."""
        ...


class Plan(Record):
    """Requests that are answered together, in this order, in `slots` rows of a batch."""

    requests: tuple[Request, ...]
    slots: int

    @property
    def id(self) -> str:
        """Return the plan's id, which depends on everything in it."""
        keys = [[request.key, request.sample] for request in self.requests]
        return digest({"requests": keys, "slots": self.slots})


@runtime_checkable
class Planner(Protocol):
    """A responder whose answers depend, in the last bits, on what shares the batch."""

    def plan(self, requests: Sequence[Request]) -> list[Plan]:
        """Divide requests into plans; the result depends on the requests, not on their order."""
        ...

    def fits(self, plan: Plan) -> bool:
        """Tell whether a recorded plan can be run as it is; else its requests are planned again."""
        ...

    def ask_plan(self, plan: Plan) -> Iterator[Sequence[Raw]]:
        """Yield the raw answers of one plan, those together that come together."""
        ...


@runtime_checkable
class Buyer(Protocol):
    """A responder that is paid: it stores each attempt before it is sent, and what comes."""

    def buy(self, requests: Sequence[Request], store: "ResponseStore") -> Generator[Raw]:
        """Yield one raw answer a request, stored already unless it failed."""
        ...

    def progress(self) -> str:
        """Return in a few words what has been spent of what, while `buy` runs."""
        ...
