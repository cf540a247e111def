"""What each maker's server sends, through the real client over HTTP: issue 13's servers, D1 to D7.

The fixtures and their sources are those of test_wire.py; here they come from a scripted server.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.errors import Exit
from distill.records import Response
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.store import ResponseStore
from tests.responders.test_wire import CASES
from tests.support.asking import answer_all
from tests.support.buying import asks, settings
from tests.support.errors import stops
from tests.support.fake_teacher import FakeTeacher, Reply, question


def ask(teacher: FakeTeacher, store: Path, case: dict[str, Any], **changes: Any) -> list[Response]:
    """Ask three questions one after the other, with the fields that the case is about."""
    body = {k: v for k, v in case.get("asked", {}).items() if k != "max_completion_tokens"}
    if "max_completion_tokens" in str(case.get("asked")):
        changes["max_tokens_field"] = "max_completion_tokens"
    asked = settings(teacher, concurrency=1, extra_body=body, **changes)
    return answer_all(EndpointResponder(asked, None, "run"), asks(asked, 3), store)


@pytest.mark.parametrize("case", CASES)
def test_d1_to_d7_a_server_is_understood_through_the_client(case, tmp_path):
    """An answer is read; an error ends run or item, or is waited out and asked again."""
    data = json.dumps(case["body"]).encode()
    sent = Reply(status=case["status"], body=data, headers=case.get("headers", {}), billed=False)
    text = "choices" in case["body"] and "text" in str(case["body"]["choices"])[:40]
    api = {"api": "completions"} if text and "reply" in case else {}
    with FakeTeacher(
        lambda n, asked: sent if question(asked) == "q1 please" and n < 3 else Reply()
    ) as teacher:
        fault = case.get("fault", {})
        if fault.get("scope") == "run":
            with stops(Exit.TEACHER):
                ask(teacher, tmp_path, case)
            assert teacher.asked["q1 please"] == 1 and len(teacher.payloads) <= 2
            with ResponseStore(tmp_path, writable=False) as log:
                stored = sum(1 for _ in log.keys("response"))
            assert stored == len(teacher.payloads) - 1, "the refusal is no answer"
            return
        if case.get("wait", 0) > 1:
            with stops(Exit.TEACHER, "asks to wait"):
                ask(teacher, tmp_path, case, max_pause=1)
            assert len(teacher.payloads) <= 2
            return
        found = ask(teacher, tmp_path, case, **api)
        times = teacher.asked["q1 please"]
    one = found[1]
    if fault:
        assert (times > 1) == (fault["scope"] == "retry")
        assert one.stop == ("end" if fault["scope"] == "retry" else "error")
        return
    with ResponseStore(tmp_path, writable=False) as log:
        reply = log.raw(one.id).reply
    flat = {**one.usage.model_dump(), **reply.model_dump(mode="json")}
    assert {name: flat[name] for name in case["reply"]} == case["reply"] and times == 1
    assert not one.usage.estimated
    assert (one.text, one.stop) == (reply.text, reply.stop)
