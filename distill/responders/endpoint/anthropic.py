"""How Anthropic's Messages API is asked, and how its answers are read; no network.

Names as in `src/anthropic/types` of anthropics/anthropic-sdk-python, which is made from the
service's own description: message.py, stop_reason.py, usage.py, output_config_param.py.
"""

import re
from typing import TYPE_CHECKING, Any

from distill.config.teachers import EndpointTeacher
from distill.records import Stop, Usage
from distill.responders.endpoint.wire import (
    MESSAGE_CHARS,
    UNKNOWN_FINISH,
    Reply,
    estimated_usage,
    load_json,
    plain_message,
    token_count,
)

if TYPE_CHECKING:
    from distill.responders.responder import Request

VERSION = "2023-06-01"  # the newest that the service names
STOPS: dict[str, Stop] = {
    "end_turn": "end",
    "stop_sequence": "end",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "filtered",
}
ANSWER = re.compile(rb'"type"\s*:\s*"message"')


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
    sampling = request.sampling
    fields: dict[str, Any] = {} if sampling.top_p == 1 else {"top_p": sampling.top_p}
    if "temperature" not in settings.omit:
        fields["temperature"] = sampling.temperature
    if system:
        fields["system"] = "\n\n".join(system)
    if schema := request.output_schema:
        fields["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    limit = {"max_tokens": sampling.max_new_tokens}  # which the service requires
    return {"model": settings.model, "messages": turns, **limit, **fields}


def is_answer(data: bytes) -> bool:
    """Tell a message by its bytes, of which only the start is looked at where they are many.

    A quote within an answer is escaped there, so that no text can look like it.
    """
    return ANSWER.search(data) is not None and b'"stop_reason"' in data and b'"choices"' not in data


def read_reply(data: bytes, question: int = 0) -> Reply:
    """Read an answer from its bytes: thinking blocks are its reasoning, text blocks its text.

    `question` is the request's length in bytes, for an estimate of missing usage.
    """
    texts, thoughts, tools = list[str](), list[str](), 0
    try:
        message = load_json(data)
        blocks = message.get("content") if isinstance(message, dict) else None
        if not isinstance(message, dict) or not isinstance(blocks, list):
            raise ValueError("no content")
        for block in blocks:
            kind = block.get("type") if isinstance(block, dict) else None
            part = block.get(kind) if isinstance(block, dict) and isinstance(kind, str) else None
            if kind in ("text", "thinking"):
                if not isinstance(part, str):
                    raise ValueError(f"a {kind} block without text")
                (texts if kind == "text" else thoughts).append(part)
            # what is encrypted (redacted_thinking) says nothing; a server's tool is a call as well
            tools += kind != "redacted_thinking" and kind not in ("text", "thinking")
    except ValueError as error:
        return Reply(stop="error", error=f"unreadable answer: {error}"[:MESSAGE_CHARS])
    text, reasoning = "".join(texts), "\n".join(thoughts)
    finish, details, model = (message.get(n) for n in ("stop_reason", "stop_details", "model"))
    stop, why = STOPS.get(str(finish), "error"), None
    if tools or finish == "tool_use":
        stop, why = "error", "tool_calls: it called a tool instead of answering"
    elif finish == "pause_turn":
        why = "pause_turn: it paused before its answer was complete"
    elif stop == "error":  # an answer that came, with a name that is not known yet
        stop, why = "end", f"{UNKNOWN_FINISH} {str(finish)[:40]!r}"
    elif stop == "filtered":
        explained = plain_message((details if isinstance(details, dict) else {}).get("explanation"))
        why = f"refusal: {explained}" if explained else "refusal"
    usage = message.get("usage")
    return Reply(
        text=text,
        reasoning=reasoning or None,
        stop=stop,
        usage=_usage(usage if isinstance(usage, dict) else {}, question, len(reasoning + text)),
        model=(isinstance(model, str) and model[:MESSAGE_CHARS]) or None,
        error=why,
    )


def _usage(fields: dict[str, Any], question: int, answer: int) -> Usage:
    """Return the tokens that were counted: input is what was fresh, and beside it the cache."""
    fresh, output = (
        token_count(fields.get("input_tokens")),
        token_count(fields.get("output_tokens")),
    )
    if fresh is None or output is None or (answer and not output):
        return estimated_usage(question, answer)
    cached = token_count(fields.get("cache_read_input_tokens")) or 0
    written = token_count(fields.get("cache_creation_input_tokens")) or 0
    details = fields.get("output_tokens_details")
    details = details if isinstance(details, dict) else {}
    return Usage(
        input_tokens=fresh + written + cached,
        cached_input_tokens=cached,
        output_tokens=output,
        reasoning_tokens=min(output, token_count(details.get("thinking_tokens")) or 0),
    )
