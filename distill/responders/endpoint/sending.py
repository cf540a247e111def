"""What is sent to an endpoint: the bytes of a request, and the origin that its key hashes."""

import re

from distill.config.teachers import EndpointTeacher
from distill.records import canonical, digest
from distill.responders.responder import Request, Scoring

VERSION = 1  # of the form of a request: part of every request's origin
PATHS = {"chat": "/chat/completions", "completions": "/completions"}


def origin_of(settings: EndpointTeacher) -> str:
    """Return the hash of all that shapes an answer beside its request, replicas aside."""
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
    """Return the bytes of a request: the fields that were set, and no other; `extra_body` wins.

    A neutral top_p is not sent. Without a chat interface the contents are joined by blank lines: no
    template is applied.
    """
    if isinstance(request, Scoring):
        content = {"prompt": request.ids}
    elif settings.api == "chat":
        content = {"messages": [message.model_dump() for message in request.messages]}
    else:
        content = {"prompt": "\n\n".join(message.content for message in request.messages)}
    sampling = request.sampling
    fields = {} if sampling.top_p == 1 else {"top_p": sampling.top_p}
    if "temperature" not in settings.omit:
        fields["temperature"] = sampling.temperature
    if "max_tokens" not in settings.omit:
        fields[settings.max_tokens_field] = sampling.max_new_tokens
    return canonical({"model": settings.model, **content, **fields, **settings.extra_body})


def key_pattern(key: str) -> re.Pattern[bytes]:
    """Return what matches a key as it is, and as JSON may escape it."""
    forms = (rb"(?:\\?%s|\\u00(?i:%02x))" % (re.escape(c.encode()), ord(c)) for c in key)
    return re.compile(b"".join(forms))
