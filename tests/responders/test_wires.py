"""The wires other than OpenAI's: what is sent, what is read, and what an error means."""

from pathlib import Path
from typing import Any

import pytest

from distill.records import Message, canonical
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.responder import Request, Sampling, origin_of
from tests.support.asking import answer_all
from tests.support.buying import settings
from tests.support.fake_teacher import KEY, PRICE, FakeTeacher, Reply

MESSAGE: dict[str, Any] = {
    "id": "msg_01",
    "type": "message",
    "role": "assistant",
    "model": "claude-x",
    "content": [
        {"type": "thinking", "thinking": 'It is "choices".', "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "b3BhcXVl"},
        {"type": "text", "text": "Paris"},
        {"type": "text", "text": ", France."},
    ],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 12,
        "cache_creation_input_tokens": 5,
        "cache_read_input_tokens": 20,
        "output_tokens": 30,
        "output_tokens_details": {"thinking_tokens": 22},
    },
}


def one(url: str, *turns: str, **changes: Any) -> tuple[EndpointResponder, Request]:
    """Return a responder, and one request of these turns, `ROLE: TEXT`."""
    asked = settings(url, **{"max_retries": 0, "wire": "anthropic", **changes})
    pairs = (turn.split(": ", 1) for turn in turns or ("user: q0 please",))
    messages = tuple(Message(role=role, content=text) for role, text in pairs)  # pyright: ignore
    request = Request.make(origin_of(asked), "p", messages, Sampling(max_new_tokens=20))
    return EndpointResponder(asked, PRICE, "run"), request


def test_anthropics_messages_are_asked_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with FakeTeacher(lambda number, payload: Reply(body=canonical(MESSAGE))) as teacher:
        turns = ("system: Be brief.", "user: q0 please", "assistant: a", "user: and?")
        responder, request = one(teacher.url, *turns, api_key_env="TEACHER_KEY")
        response = answer_all(responder, [request], tmp_path)[0]
    assert teacher.paths == ["/v1/messages"]
    headers = teacher.headers[0]
    assert headers["x-api-key"] == KEY and headers["anthropic-version"] == "2023-06-01"
    assert "authorization" not in headers
    assert teacher.payloads == [
        {
            "model": "fake-1",
            "max_tokens": 20,
            "temperature": 0.0,
            "system": "Be brief.",
            "messages": [
                {"role": "user", "content": "q0 please"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "and?"},
            ],
        }
    ]
    assert (response.text, response.reasoning) == ("Paris, France.", 'It is "choices".')
    assert (response.stop, response.model) == ("end", "claude-x")
    usage = response.usage
    assert (usage.input_tokens, usage.cached_input_tokens) == (37, 20)
    assert (usage.output_tokens, usage.reasoning_tokens, usage.estimated) == (30, 22, False)
