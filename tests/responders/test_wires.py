"""The wires other than OpenAI's: what is sent, what is read, and what an error means."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from distill.config.teachers import EndpointTeacher
from distill.config.tree import Config
from distill.errors import Exit
from distill.generation.generate import requests_of, schemas_of
from distill.records import Document, Message, Prompt, canonical
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.network import ways
from distill.responders.endpoint.request_form import encode, headers, path
from distill.responders.endpoint.wire import pack
from distill.responders.responder import Raw, Request, Sampling, origin_of
from distill.responders.store import ResponseStore
from tests.support.asking import answer_all
from tests.support.buying import settings
from tests.support.errors import stops
from tests.support.fake_teacher import KEY, PRICE, FakeTeacher, Reply

ROOT = Path(__file__).parent.parent.parent
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


def test_anthropics_messages_are_asked_and_read(tmp_path, monkeypatch):
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


AZURE = "https://mine.openai.azure.com"


@pytest.mark.parametrize(
    ("url", "version", "place"),
    [
        (AZURE, "2024-10-21", "/openai/deployments/fake-1/chat/completions?api-version=2024-10-21"),
        (f"{AZURE}/openai", "v", "/openai/deployments/fake-1/chat/completions?api-version=v"),
        (
            f"{AZURE}/openai/deployments/d",
            "v",
            "/openai/deployments/d/chat/completions?api-version=v",
        ),
        (f"{AZURE}/openai/v1", None, "/openai/v1/chat/completions"),
        (f"{AZURE}/openai/v1/", "preview", "/openai/v1/chat/completions?api-version=preview"),
        ("https://r.services.ai.azure.com/models", "v", "/models/chat/completions?api-version=v"),
        ("https://gateway.example/azure", "v", "/azure/chat/completions?api-version=v"),
    ],
)
def test_azures_addresses(url, version, place):
    asked = settings(url, api_version=version)
    assert urlsplit(asked.base_urls[0] + path(asked))[2:4] == urlsplit(place)[2:4]
    assert headers(asked, "k")["api-key"] == "k" and "api-key" not in headers(asked, None)
    if version:
        assert origin_of(asked) != origin_of(settings(url, api_version="other"))
    with pytest.raises(ValueError, match="Azure needs api_version"):
        settings(AZURE)


@pytest.mark.parametrize(
    ("url", "form", "place"),
    [
        ("https://api.anthropic.com", "anthropic", "/v1/messages"),
        ("https://api.anthropic.com/", "anthropic", "/v1/messages"),
        ("https://api.anthropic.com/v1", "openai", "/chat/completions"),
        ("https://api.deepseek.com/anthropic", "anthropic", "/v1/messages"),
        ("https://r.services.ai.azure.com/anthropic", "anthropic", "/v1/messages"),
        ("https://api.example.com/v1", "openai", "/chat/completions"),
    ],
)
def test_an_address_that_can_mean_one_wire_only_says_so(url, form, place):
    asked = settings(url)
    assert (asked.form, path(asked)) == (form, place)
    assert bool(ways(asked)) == (form == "anthropic")
    if form == "openai":
        assert path(settings(url, wire="anthropic")) == "/messages"
        assert origin_of(settings(url, wire="anthropic")) != origin_of(asked)
        return
    for changes in ({"api": "completions"}, {"omit": ("max_tokens",)}):
        with pytest.raises(ValueError, match="wire anthropic"):
            settings(url, **changes)


@pytest.mark.parametrize("signals", [{}, {"from_answers": True}, {"endpoint": True}])
def test_what_has_no_distributions_is_refused_as_their_reader(signals):
    own = {"kind": "endpoint", "model": "m", "base_url": "https://api.anthropic.com"}
    logprobs = {"extra_body": {"logprobs": True, "top_logprobs": 5}}
    signals = {"endpoint": own} if "endpoint" in signals else signals
    tree = {"name": "x", "corpus": {"path": "c"}, "student": {"model": "s"}, "signals": signals}
    tree |= {"teacher": own | logprobs, "train": {"loss": {"forward_kl": 1.0}}}
    with pytest.raises(ValueError, match="wire anthropic tells no distributions"):
        Config.model_validate(tree)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "more": {"type": "array", "items": {}}},
    "required": ["city", "more"],
    "additionalProperties": False,
}
LOOSE = {**SCHEMA, "required": ["city"]}


def with_schema(request: Request, responder: EndpointResponder, schema: Any = SCHEMA) -> Request:
    """Return the request with a schema to answer by."""
    turns, sampling = request.messages, request.sampling
    return Request.make(responder.origin, "p", turns, sampling, 0, schema)


@pytest.mark.parametrize(("schema", "strict"), [(SCHEMA, True), (LOOSE, False)])
def test_a_schema_goes_with_the_question_and_into_its_key(tmp_path, schema, strict):
    with FakeTeacher() as teacher:
        responder, request = one(teacher.url, wire=None)
        asked = with_schema(request, responder, schema)
        assert asked.key != request.key and "output_schema" not in request.model_dump()
        answer_all(responder, [request, asked], tmp_path)
        assert Request.model_validate(asked.model_dump()) == asked
    assert "response_format" not in teacher.payloads[0]
    named = {"name": "answer", "schema": schema, "strict": strict}
    assert teacher.payloads[1]["response_format"] == {"type": "json_schema", "json_schema": named}
    body = json.loads(encode(asked, settings(teacher, wire="anthropic")))
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": schema}}


REFUSALS = [  # OpenAI, vLLM, DeepSeek, Anthropic
    "Invalid schema for response_format 'answer': In context=(), 'required' is required",
    "The provided JSON schema contains features not supported by xgrammar.",
    "This response_format type is unavailable now",
    "output_config.format.schema: For 'object' type, 'additionalProperties' must be set to false",
]


@pytest.mark.parametrize("message", REFUSALS)
def test_a_server_that_takes_no_schema_is_one_line_after_one_question(tmp_path, message):
    error = canonical({"error": {"message": message, "type": "invalid_request_error"}})
    wire = "anthropic" if message.startswith("output") else "openai"
    with FakeTeacher(lambda number, payload: Reply(status=400, body=error)) as teacher:
        responder, request = one(teacher.url, wire=wire)
        many = [Request.make(request.key, f"p{i}", request.messages, request.sampling, i, SCHEMA)
                for i in range(9)]  # fmt: skip
        with stops(Exit.TEACHER, "response_format=text"):
            answer_all(responder, many, tmp_path)
    assert len(teacher.payloads) == 1


def test_a_tasks_schema_is_sent_where_it_is_to_be(tmp_path):
    task = {"student": {"user": "{{ text }}"}, "metric": "valid"}
    checker = {"kind": "json_schema", "schema": SCHEMA}
    (tmp_path / "cities.yaml").write_text(json.dumps({**task, "checker": checker}))
    tree: dict[str, Any] = {
        "name": "x",
        "corpus": {"path": "c"},
        "prompts": {"tasks": [str(tmp_path / "cities.yaml")]},
        "student": {"model": "s"},
    }
    teacher = {"kind": "endpoint", "model": "m", "base_url": "http://localhost:1/v1"}
    document = Document.make("a text", "x", split="train")
    turns = (Message(role="user", content="q"),)
    for form, schema in (("text", None), ("json_schema", SCHEMA)):
        teacher["response_format"] = form
        config = Config.model_validate({**tree, "teacher": teacher})
        for name, expected in (("cities", schema), ("chat", None)):
            prompt = Prompt.make(turns, document.id, name)
            sources = {document.id: document}
            schemas = schemas_of(config.teacher, config.prompts.tasks)
            (request,) = requests_of(config.teacher, "o", [prompt], sources, schemas)
            assert request.output_schema == expected


def test_a_stored_reply_of_another_form_is_read_without_a_request(tmp_path):
    """A gateway may answer in Anthropic's form what was asked in OpenAI's."""
    with FakeTeacher() as teacher:
        responder, request = one(teacher.url, wire=None)
        body = {"status": 200, "attempt": 0, "question": 80, **pack(canonical(MESSAGE))}
        raw = Raw(key=request.key, sample=0, model="fake-1", stop=None, body=body)
        with ResponseStore(tmp_path) as store:
            store.append([("response", request.id, raw.model_dump(mode="json"))])
        response = answer_all(responder, [request], tmp_path)[0]
    assert (response.text, response.stop) == ("Paris, France.", "end") and not teacher.payloads


EXCERPTS = re.findall(
    r"```yaml\n(teacher:.*?)```", (ROOT / "docs/teachers.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize("excerpt", EXCERPTS)
def test_the_excerpts_of_the_documents_can_be_loaded(excerpt):
    EndpointTeacher.model_validate(yaml.safe_load(excerpt)["teacher"])
