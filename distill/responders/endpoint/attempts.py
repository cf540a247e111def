"""What is asked of an endpoint: the bytes of a request, the origin that its key hashes, and the attempts at it."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from distill.config import EndpointTeacher
from distill.records import Response, canonical, digest
from distill.responders.endpoint.budget import attempt_key
from distill.responders.endpoint.wire import VERSION, Fault, request_body
from distill.responders.responder import Request, Sampling, Scoring

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
# What a server says that does not score, and what to do about it; the first that fits counts. Words of vLLM's, of
# `transformers serve`, of pydantic's
REFUSALS = (
    (r"greater than max allowed", "start vLLM with --max-logprobs=K, or lower signals.k"),
    (
        r"context length|maximum .*length|max_model_len",
        "serve a longer context, or lower train.max_length",
    ),
    (r"", "signals need a server that gives prompt_logprobs, as vLLM does, or signals.model"),
)


def sampling_fields(sampling: Sampling, settings: EndpointTeacher) -> dict[str, Any]:
    """Return how an answer is drawn, in the server's words; a neutral top_p is not sent."""
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
    }
    sent = {name: value for name, value in fields.items() if name not in settings.omit}
    if "max_tokens" in sent:
        sent[settings.max_tokens_field] = sent.pop("max_tokens")
    return sent if sampling.top_p == 1 else {**sent, "top_p": sampling.top_p}


def origin_of(settings: EndpointTeacher) -> str:
    """Return the hash of all that shapes an answer beside messages and sampling; replicas are one endpoint."""
    return digest(
        {
            "endpoint": settings.base_urls[0],
            "api": settings.api,
            "model": settings.model,
            "revision": settings.revision,
            "extra": settings.extra_body,
            "omit": sorted(settings.omit),
            "max_tokens_field": settings.max_tokens_field,
            "wire": VERSION,
        }
    )


def encode(request: Request, settings: EndpointTeacher) -> bytes:
    """Return the bytes of a request: the fields that were set, and no other."""
    fields = sampling_fields(request.sampling, settings)
    if isinstance(request, Scoring):
        asked = {"model": settings.model, "prompt": request.ids}
        return canonical({**asked, **fields, **settings.extra_body})
    return request_body(settings.model, request.messages, fields, settings.extra_body, settings.api)


def refusal(request: Request, fault: Fault) -> Fault:
    """Return what a refusal means: an answer less is an item less, but a text that is not scored ends the run."""
    of_form = fault.scope == "item" or fault.what.startswith(("400", "422"))
    if not (isinstance(request, Scoring) and of_form):
        return fault
    fix = next(fix for words, fix in REFUSALS if re.search(words, fault.what))
    return fault.model_copy(update={"scope": "run", "fix": fix})


@dataclass(frozen=True)
class Attempt:
    """One sending of a request: its number, its bytes, and the dollars set aside for it."""

    request: Request
    number: int
    body: bytes
    reserved: Decimal

    @property
    def identifier(self) -> str:
        """Return the id of the response that this may become."""
        return Response.make_id(self.request.key, self.request.sample)

    @property
    def key(self) -> str:
        """Return the key of the attempt's records."""
        return attempt_key(self.identifier, self.number)


def spelled(key: str) -> re.Pattern[bytes]:
    """Return what matches a key as it is, and as JSON may escape it."""
    forms = (rb"(?:\\?%s|\\u00(?i:%02x))" % (re.escape(c.encode()), ord(c)) for c in key)
    return re.compile(b"".join(forms))
