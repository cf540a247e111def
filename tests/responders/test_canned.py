"""Canned and recorded answers: from a dictionary, a file or the corpus; errors are one line."""

import json
from pathlib import Path

import pytest

from distill.errors import Exit
from distill.records import Document, Message
from distill.responders.canned import CannedResponder, RecordedResponder, answers_hash
from distill.responders.responder import Request, Sampling
from tests.support.errors import stops


def ask(text: str, prompt_id: str = "p") -> Request:
    message = Message(role="user", content=text)
    return Request.make("o", prompt_id, (message,), Sampling())


def test_a_file_of_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = [{"prompt": "a", "answer": "<think>\nhm\n</think>\n\none\u2028line"}]
    lines += [{"prompt": "b", "answer": "say <think>"}]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    responder = CannedResponder.load(path)
    found = [raw.response("p") for raw in responder.ask([ask("b"), ask("a")])]
    assert [(r.text, r.reasoning) for r in found] == [
        ("say <think>", None),
        ("one\u2028line", "hm"),
    ]
    assert all(r.usage.estimated and r.stop == "end" for r in found)
    with stops(Exit.TEACHER, "has no canned answer"):
        list(responder.ask([ask("c")]))
    before = answers_hash(path)
    path.write_text('{"prompt": "a", "answer": "two"}\n')
    assert answers_hash(path) != before and CannedResponder.load(path).origin != responder.origin


GOOD = b'{"prompt": "x", "answer": "y"}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        *((GOOD + line, "answers.jsonl:2: is no canned answer") for line in (
            b"not json", b"[1]", b'{"prompt": "a"}', b'{"prompt": "a", "answer": 3}', b"[" * 100_000
        )),
        (None, "answers.jsonl.*check teacher.answers"),
        (b"\xff\xfe", "answers.jsonl.*check teacher.answers"),
    ],
    ids=range(7),
)  # fmt: skip
def test_a_bad_line_or_file_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "answers.jsonl"
    if content:
        path.write_bytes(content)
    with stops(Exit.INPUT, says):
        CannedResponder.load(path)


def test_recorded_answers_keep_what_was_stated() -> None:
    said = Document.make("q", "f", {"recorded_answer": "a", "recorded_model": "big-1"})
    silent = Document.make("r", "f", {"recorded_answer": "b"})
    responder = RecordedResponder({"p1": said, "p2": silent}, "unknown")
    found = list(responder.ask([ask("q", "p1"), ask("r", "p2")]))
    assert [(r.reply.text, r.model) for r in found] == [("a", "big-1"), ("b", "unknown")]
    (missing,) = responder.ask([ask("s", "p3")])
    assert missing.reply.stop == "error" and "no recorded answer" in str(missing.error)
    with stops(Exit.INPUT, "no recorded answer"):
        list(RecordedResponder({}, "unknown").ask([ask("s", "p3")]))


def test_a5_a4_several_answers_are_samples_with_their_own_model_and_reasoning() -> None:
    answers = [
        {"text": "    one\n", "reasoning": "1+0", "model": "big-1"},
        {"text": "<think>\n1+1\n</think>\n\ntwo"},
    ]
    responder = RecordedResponder({"p": Document.make("q", "f", {"recorded_answer": answers})}, "m")
    requests = [ask("q", "p").model_copy(update={"sample": n}) for n in range(2)]
    found = [(r.reply.text, r.reply.reasoning, r.model) for r in responder.ask(requests)]
    assert found == [("    one\n", "1+0", "big-1"), ("two", "1+1", "m")]
