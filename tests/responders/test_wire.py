"""The wire: what the servers send, as fixtures with their sources, and what nobody should."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.records import canonical
from distill.responders.endpoint import wire
from distill.responders.endpoint.failures import classify
from distill.responders.endpoint.rate_limits import stated_wait
from distill.responders.responder import Raw

FIXTURES = Path(__file__).parent.parent / "fixtures" / "servers"
CASES = [
    pytest.param(case, id=f"{path.stem}: {case['name']}")
    for path in sorted(FIXTURES.glob("*.json"))
    for case in json.loads(path.read_text())["cases"]
]


def test_every_fixture_names_its_source():
    found = sorted(FIXTURES.glob("*.json"))
    makers = (
        "vllm sglang llamacpp ollama lmstudio tgi openai azure gemini anthropic"
        " anthropic_compatible mistral deepseek groq together fireworks openrouter transformers xai"
        " others"
    )
    assert set(makers.split()) == {path.stem for path in found}
    assert all(len(json.loads(path.read_text())["source"]) > 40 for path in found)


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_answer_is_understood(case):
    """Answers are read in test_servers.py, through the client."""
    data = json.dumps(case["body"]).encode()
    assert (case["status"] == 200 and wire.is_answer(data)) is ("fault" not in case)
    if "fault" in case:
        asked = {"temperature": 0.0, "max_tokens": 20, **case.get("asked", {})}
        failure = classify(case["status"], data, canonical(asked), case.get("headers", {}))
        found = failure._asdict()
        assert {name: found[name] for name in case["fault"]} == case["fault"]
        assert str(case["status"]) in failure.what and "without a message" not in failure.what
        wait = stated_wait(case.get("headers", {}), data) if failure.limited else None
        assert wait == pytest.approx(case["wait"]) if case.get("wait", 1e8) < 1e8 else wait != 0


@pytest.mark.parametrize("data", [b"plain", "é\u2028".encode(), b"\xff\xfe", b"", b"\x00"])
def test_packed_bytes_come_back(data):
    body = json.loads(json.dumps(wire.pack(data)))
    assert wire.unpack(body) == data and len(body["sha256"]) == 64


@pytest.mark.parametrize("cost", [True, -1, float("nan"), "$1", [], 1e400, 10**400])
def test_h6_a_strange_cost_is_none(cost):
    assert wire._number(cost) is None and wire._number("1e999999999") is None
    assert wire._number(0.1) == wire._number("0.1") == Decimal("0.1")


@pytest.mark.parametrize(
    "given",
    [
        [],
        {"content": [1]},
        {"content": [{"token": "a", "logprob": None}]},
        {"content": [{"token": "a", "logprob": 1e400}]},
        {"content": [{"token": "a", "logprob": -1, "top_logprobs": {"b": -2}}]},
        {"tokens": ["a", "b"], "token_logprobs": [-1]},
        {"tokens": ["a"], "token_logprobs": [None]},
    ],
)
def test_log_probabilities_that_cannot_be_read_cost_no_answer(given):
    choice = {"message": {"content": "a"}, "finish_reason": "stop", "logprobs": given}
    reply = wire.read_reply(json.dumps({"choices": [choice]}).replace("Infinity", "1e999").encode())
    assert (reply.text, reply.stop, reply.logprobs) == ("a", "end", None)


def test_half_a_surrogate_pair_is_replaced():
    text = r'"a \ud800 b \ud83d\ude00"'
    data = f'{{"choices": [{{"message": {{"content": {text}}}, "finish_reason": "stop"}}]}}'
    reply = wire.read_reply(data.encode())
    assert reply.text == "a \ufffd b \U0001f600" and reply.model_dump_json()


ANSWER = b'{"choices": [{"message": {"content": "Paris"}, "finish_reason": "stop"}]}'


def test_h5_an_event_stream_and_two_answers_are_named():
    for data, says in ((b"data: " + ANSWER, "an event stream"), (ANSWER + b"{}", "JSON breaks")):
        assert says in str(wire.read_reply(data).error)


ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    "error choices message content usage text finish_reason logprobs tokens".split()
)
BODIES = st.recursive(
    JSON, lambda inner: st.dictionaries(FIELDS, inner | st.lists(inner, max_size=2)), max_leaves=12
)


@settings(max_examples=100, deadline=None)
@given(st.binary() | BODIES.map(lambda body: json.dumps(body).encode()), st.integers(100, 599))
def test_no_body_breaks_the_reader(data, status):
    wire.is_answer(data)
    assert classify(status, data).what
    stored = {"status": 200, "question": 10, **wire.pack(data)}
    raw = Raw(key="k", sample=0, model="m", stop=None, body=stored)
    response = raw.response("p")
    assert response.stop != "error" or response.error
    assert response.model_dump_json()
