"""What is asked of an endpoint: the bytes of a request, the origin that its key hashes, and the attempts at it."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from distill.config import Teacher
from distill.generation.budget import attempt_key
from distill.generation.responder import Request, Sampling
from distill.generation.wire import VERSION, request_body
from distill.records import Response, digest

PATHS = {"chat": "/chat/completions", "completions": "/completions"}


def sampling_fields(sampling: Sampling, settings: Teacher) -> dict[str, Any]:
    """Return how an answer is drawn, in the server's words; a neutral top_p is not sent."""
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
    }
    sent = {name: value for name, value in fields.items() if name not in settings.omit}
    if "max_tokens" in sent:
        sent[settings.max_tokens_field] = sent.pop("max_tokens")
    return sent if sampling.top_p == 1 else {**sent, "top_p": sampling.top_p}


def origin_of(settings: Teacher) -> str:
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


def encode(request: Request, settings: Teacher) -> bytes:
    """Return the bytes of a request: the fields that were set, and no other."""
    fields = sampling_fields(request.sampling, settings)
    return request_body(settings.model, request.messages, fields, settings.extra_body, settings.api)


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
