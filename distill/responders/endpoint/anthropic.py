"""How Anthropic's Messages API is asked, and its answers put into OpenAI's form; no network.

Names as in `src/anthropic/types` of anthropics/anthropic-sdk-python, which is made from the
service's own description: message.py, usage.py, output_config_param.py.
"""

from typing import TYPE_CHECKING, Any

from distill.config.teachers import EndpointTeacher
from distill.responders.endpoint.openai import sampling_fields

if TYPE_CHECKING:
    from distill.responders.responder import Request

VERSION = "2023-06-01"  # the newest that the service names


def path(settings: EndpointTeacher) -> str:
    """Return what is posted to, behind an address that ends in /v1 or above it."""
    return "/messages" if settings.base_urls[0].endswith("/v1") else "/v1/messages"


def headers(settings: EndpointTeacher, key: str | None) -> dict[str, str]:
    """Return the headers that carry the version, and the key."""
    return {"anthropic-version": VERSION, **({"x-api-key": key} if key else {})}


def body(request: "Request", settings: EndpointTeacher) -> dict[str, Any]:
    """Return the fields of a request; system turns stand beside the others, as one text."""
    system = [message.content for message in request.messages if message.role == "system"]
    turns = [message.model_dump() for message in request.messages if message.role != "system"]
    fields = sampling_fields(request, settings)
    if system:
        fields["system"] = "\n\n".join(system)
    if schema := request.output_schema:
        fields["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    limit = {"max_tokens": request.sampling.max_new_tokens}  # which the service requires
    return {"model": settings.model, "messages": turns, **limit, **fields}


def as_chat(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as OpenAI's form has it: its blocks are parts of the content.

    A block that is neither text nor thinking is a call, of a server's own tools as well; what is
    encrypted (redacted_thinking) says nothing.
    """
    blocks = message.get("content")
    rows = (
        [block for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
    )
    calls = [b for b in rows if b.get("type") not in ("text", "thinking", "redacted_thinking")]
    details = message.get("stop_details")
    choice: dict[str, Any] = {
        "message": {"content": blocks, "tool_calls": calls},
        "finish_reason": message.get("stop_reason"),
    }
    if message.get("stop_reason") == "refusal" and isinstance(details, dict):
        choice["message"]["refusal"] = details.get("explanation")
    usage = message.get("usage")
    usage = dict(usage) if isinstance(usage, dict) else {}
    # what was fresh is counted beside the cache
    parts = [usage.get(f"{name}input_tokens") for name in ("", "cache_creation_", "cache_read_")]
    if isinstance(parts[0], int):
        usage["prompt_tokens"] = sum(part for part in parts if isinstance(part, int) and part > 0)
    return {**message, "choices": [choice], "usage": usage}
