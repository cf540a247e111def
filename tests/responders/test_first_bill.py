"""What a server says of money and of itself is not taken at its word: H6, H13, H15, H25, D4.

The teacher is the fake one, over HTTP, with a bill of its own. Wherever it charges, what is settled
is at most its bill, and that at most what is settled and what may have been charged.
"""

import json
from decimal import Decimal
from typing import Any

import pytest

from distill.errors import DistillError, Exit
from distill.generation.generate import say_what_is_odd
from distill.records import Message, Response, Usage
from distill.responders import token_counts
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.wire import pack
from distill.responders.responder import Request, Sampling, origin_of
from distill.responders.store import ResponseStore
from distill.storage.files import read_records
from distill.storage.run_folder import open_run
from tests.support.asking import answer_all
from tests.support.buying import (
    ANSWER,
    account_of,
    always,
    asks,
    buy,
    generate,
    hold_account,
    in_doubt,
    make_run,
    settings,
)
from tests.support.errors import stops
from tests.support.fake_teacher import KEY, PRICE, FakeTeacher, Reply, question, usage_of

USUAL = PRICE.of(usage_of({"prompt": "q0 please"}))  # what an answer is charged by the price
MOST = Decimal("0.0013")  # about what one of these requests can cost at most


def usage(**fields: Any) -> dict[str, Any]:
    """Return the changes of an answer whose usage has these fields too."""
    counted = usage_of({"prompt": "q0 please"})
    tokens = {"prompt_tokens": counted.input_tokens, "completion_tokens": counted.output_tokens}
    return {"usage": {**tokens, **fields}}


def own_key(cost: float, upstream: Decimal, **fields: Any) -> dict[str, Any]:
    """Return what OpenRouter says of a request that it passed on with the user's own key."""
    details = {"upstream_inference_cost": float(upstream)}
    return usage(cost=cost, cost_details=details, **fields)


STATED = {  # what the server says, and what it charges
    "nothing, and charges": (usage(cost=0), USUAL),
    "nothing, and charges nothing": (usage(cost=0), Decimal(0)),
    "next to nothing": (usage(cost=1e-12), USUAL),
    "one's own key": (own_key(0, USUAL), USUAL),
    "one's own key, dearer": (own_key(0, USUAL * 3, is_byok=True), USUAL * 3),
    "one's own key and a fee": (own_key(float(USUAL), USUAL, is_byok=True), USUAL * 2),
    "the server's key, twice": (own_key(float(USUAL), USUAL, is_byok=False), USUAL),
    "a little less": (usage(cost=float(USUAL) / 2), USUAL / 2),
    "a little less than it charges": (usage(cost=float(USUAL) / 2), USUAL),
    "no number": (usage(cost="free"), USUAL),
    "less than nothing": (usage(cost=-4.0), USUAL),
    "more tokens than a count holds": (usage(completion_tokens=10**9), USUAL),
    "more tokens written than allowed": (usage(completion_tokens=21), USUAL),
    "a cost without tokens": ({"usage": {"cost": float(USUAL)}}, USUAL),
}


@pytest.mark.parametrize("name", STATED)
def test_h6_a_cost_is_held_against_the_price_and_budget(tmp_path, name):
    said, charged = STATED[name]
    with FakeTeacher(always(answer=said, dollars=charged)) as teacher:
        found = buy(teacher, tmp_path, 12)  # which holds the account against the bill
    assert {r.stop for r in found} == {"end"} and teacher.bill == 12 * charged
    known = account_of(tmp_path)
    assert known.settled + known.unknown_most >= 12 * USUAL
    limit, changes = Decimal("0.01"), {"revision": "2", "concurrency": 8}
    with FakeTeacher(always(answer=said, dollars=charged)) as teacher:
        for _ in range(2):  # the second go reads the account
            with stops(Exit.BUDGET, "limit"):
                buy(teacher, tmp_path / "limit", 200, budget_dollars=limit, **changes)
    assert teacher.bill <= limit and len(teacher.payloads) < 200


SENSELESS = {
    "cost": usage(cost=1e30),
    "written": usage(completion_tokens=999_999_999),
    "read": usage(prompt_tokens=999_999_999),
    "upstream": own_key(0, Decimal("1e12")),
    "145 times": usage(cost=float(MOST * 145)),
    "145 times in tokens": usage(completion_tokens=int(MOST * 145 / 15 * 10**6)),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_h6_h15_a_number_gone_wrong_is_named_and_stops_the_run(tmp_path, name):
    with FakeTeacher(always(answer=SENSELESS[name], dollars=USUAL)) as teacher:
        with stops(Exit.BUDGET, "more than its maximum") as stopped:
            buy(teacher, tmp_path, 40, concurrency=16)
        assert len(teacher.payloads) == 1 and "price table" in stopped.value.fix
        (doubt,) = in_doubt(tmp_path, "run")
        assert doubt.most and MOST / 2 < doubt.most < MOST * (146 if "145" in name else 2)
        assert doubt.what.startswith(("states $", "counts "))
        teacher.script = always()  # mended: the answer that was paid is there
        found = buy(teacher, tmp_path, 40, concurrency=16)
    assert len(teacher.payloads) == 40 and {r.stop for r in found} == {"end"}


def test_h15_a_later_bill_stops_too_and_a_dearer_server_keeps_to_the_budget(tmp_path):
    limit = Decimal("0.05")
    large = usage(cost=float(MOST * 145))
    with FakeTeacher(lambda n, _: Reply(answer=large if n >= 20 else {}, delay=0.01)) as teacher:
        with pytest.raises(DistillError, match="more than its maximum"):
            buy(teacher, tmp_path / "later", 300, concurrency=4)
        assert len(teacher.payloads) <= 24
    dear = usage(completion_tokens=200)  # of 20: 0.003 dollars, more than twice the maximum
    with FakeTeacher(always(answer=dear, delay=0.01)) as teacher:
        with stops(Exit.BUDGET):
            buy(teacher, tmp_path / "dear", 300, concurrency=16, budget_dollars=limit)
    assert limit / 2 < teacher.bill <= limit


def test_h15_only_the_first_answer_of_a_run_is_awaited_alone(tmp_path):
    with FakeTeacher() as teacher:
        teacher.script = lambda number, payload: Reply(
            hold=lambda: len(teacher.payloads) >= 9 if number else teacher.busiest == 1
        )
        buy(teacher, tmp_path, 9, concurrency=8)
        teacher.script = always(hold=lambda: len(teacher.payloads) >= 17)
        asked = settings(teacher, concurrency=8)
        responder = EndpointResponder(asked, PRICE, "run")
        answer_all(responder, asks(asked, 17)[9:], tmp_path)  # all eight at once
    assert len(teacher.payloads) == 17 and teacher.busiest == 8


def refused(status: int, body: Any) -> dict[str, Any]:
    return {"status": status, "body": json.dumps(body).encode(), "billed": False}


def says(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


TOLD = {  # a text that says that it is about the account; more in the fixtures of servers
    "key expired": refused(400, says("key expired")),
    "402": refused(402, says("no")),
    "Zhipu": refused(200, {"code": 1113, "msg": "Your account is in arrears."}),
    "Zhipu's words": refused(200, {"code": 1113, "msg": "您的账户已欠费，请充值后重试。"}),
    "200, quota": refused(200, says("x", code="insufficient_quota")),
    "200, said": refused(200, {"success": False, "message": "Insufficient balance"}),
}
REPEATED = {  # what nobody knows but by its repetition
    "400": refused(400, says("no")),
    "another text each": {"status": 400, "body": None, "billed": False},
    "413": {"status": 413, "body": b"<html>", "billed": False},
    "200, a code": refused(200, {"code": 7, "msg": "no"}),
    "unreadable": {"body": b'{"choices": [7]}', "billed": True},
}


@pytest.mark.parametrize("name", [*TOLD, *REPEATED])
def test_h13_a_refusal_of_the_account_is_no_answer(tmp_path, name):
    reply = {**TOLD, **REPEATED}[name]

    def script(number: int, payload: dict[str, Any]) -> Reply:
        body = json.dumps(says(f"{question(payload)}?")).encode()
        return Reply(**{**reply, "body": body if reply["body"] is None else reply["body"]})

    with FakeTeacher(script) as teacher:
        with stops(Exit.TEACHER):
            buy(teacher, tmp_path, 40, concurrency=8, max_retries=0)
        assert len(teacher.payloads) == (1 if name in TOLD else 5)
        sent, teacher.script = len(teacher.payloads), always()
        found = buy(teacher, tmp_path, 40, concurrency=8)
    paid = 5 if name == "unreadable" else 0  # these wait for --redo
    assert len(teacher.payloads) == sent + 40 - paid
    assert sum(r.stop == "end" for r in found) == 40 - paid


@pytest.mark.parametrize("first", [True, False])
def test_h13_a_question_that_sounds_like_a_refusal_ends_no_run(tmp_path, first):
    words = "my credit balance is too low and my api key expired"
    no = Reply(**refused(400, says(f"cannot read: {words}")))
    with FakeTeacher(lambda _, asked: no if words in question(asked) else Reply()) as teacher:
        asked = settings(teacher)
        turns = (Message(role="user", content=words),)
        requests = asks(asked, 9)
        place = 0 if first else 5
        requests.insert(place, Request.make(origin_of(asked), "p", turns, Sampling()))
        found = answer_all(EndpointResponder(asked, PRICE, "run"), requests, tmp_path)
    assert [r.stop for r in found].count("error") == 1 and len(teacher.payloads) == 10


def test_h13_five_refused_of_a_few_that_are_left_end_no_run(tmp_path):
    """A go that finds only what is refused, the others being answered, ends no run."""
    no = Reply(**refused(400, says("no")))
    with FakeTeacher(lambda _, asked: no if int(question(asked)[1:3]) > 9 else Reply()) as teacher:
        assert sum(r.stop == "error" for r in buy(teacher, tmp_path, 16)) == 6
        assert sum(r.stop == "error" for r in buy(teacher, tmp_path, 16)) == 6
        assert len(teacher.payloads) == 22
        teacher.script = always()
        assert {r.stop for r in buy(teacher, tmp_path, 16)} == {"end"}


@pytest.fixture(autouse=True)
def _a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)


FAILING = {
    "q1 please": refused(400, says("no")),
    "q2 please": {"body": b'{"choices": [', "billed": True},
    "q3 please": {"finish": "tool_calls", "message": {"content": None, "tool_calls": [{}]}},
    "q4 please": {"status": 500, "body": b"", "billed": False},
    "q5 please": refused(200, {"code": 1301, "msg": "no"}),
}
DECLINED = {
    "q6 please": {"message": {"content": None, "refusal": "I cannot"}},
    "q7 please": {"finish": "content_filter"},
    "q8 please": {"message": {"content": "I'm sorry, but I can't help with that."}},
    "q9 please": {"finish": "length"},
}


def test_h13_redo_asks_what_failed_and_nothing_else(tmp_path):
    replies = FAILING | DECLINED
    with FakeTeacher(lambda _, asked: Reply(**replies.get(question(asked), {}))) as teacher:
        config = make_run(tmp_path, teacher, 16, max_retries=0)
        assert generate(str(config)) == 0 and len(teacher.payloads) == 16
        assert generate(str(config)) == 0 and len(teacher.payloads) == 16, "it is done"
        run = open_run(config)
        before = read_records(run.path("responses.jsonl"), Response)
        assert sum(r.stop == "error" for r in before) == len(FAILING)
        assert generate(str(config), "--redo") == 0 and len(teacher.payloads) == 21
        assert {q for q, times in teacher.asked.items() if times == 2} == set(FAILING)
        after = read_records(run.path("responses.jsonl"), Response)
        assert [(r.text, r.stop, r.error) for r in after] == [
            (r.text, r.stop, r.error) for r in before
        ]
        teacher.script = lambda number, payload: Reply(**DECLINED.get(question(payload), {}))
        assert generate(str(config), "--redo") == 0 and len(teacher.payloads) == 26
        after = read_records(run.path("responses.jsonl"), Response)
        assert not any(r.stop == "error" for r in after)
        assert [r for r in before if r.stop != "error"] == [r for r in after if r in before]
        assert generate(str(config), "--redo") == 0 and len(teacher.payloads) == 26
        hold_account(teacher, tmp_path / "runs/.store/responses")
        paid = sum((e.dollars or Decimal(0) for e in run.ledger.entries()), Decimal(0))
        perhaps = sum((e.unknown_dollars or Decimal(0) for e in run.ledger.entries()), Decimal(0))
    assert paid <= teacher.bill <= paid + perhaps


def test_h13_refusals_in_a_store_of_before_are_read_and_asked_again_by_redo(tmp_path):
    """As commit 07339c8 stored them: the refusal is the response, an object in a 200 an answer."""
    stored = [(400, says("Your credit balance is too low")), (200, {"code": 1113, "msg": "no"})]
    with FakeTeacher() as teacher, ResponseStore(tmp_path) as log:
        asked = settings(teacher)
        requests = asks(asked, 3)
        for request, (status, said) in zip(requests, stored, strict=False):
            identifier = Response.make_id(request.key, 0)
            body = {"status": status, "attempt": 0, **pack(json.dumps(said).encode())}
            refusal = {"what": f"{status}: {said}", "billed": "no"} if status == 400 else {}
            most = {"model": "fake-1", "run": "run", "most": str(MOST), "question": 99}
            raw = {"key": request.key, "sample": 0, "model": "fake-1", "stop": None, "usage": {}}
            log.append([("intent", f"{identifier}.0", most)])
            if refusal:
                log.append([("outcome", f"{identifier}.0", refusal)])
            log.append([("response", identifier, {**raw, "body": {**body, **refusal}})])
        for request in requests[:2]:
            assert log.response(request).stop == "error"
    with FakeTeacher() as teacher:
        responder = EndpointResponder(asked, PRICE, "run")
        responder.settings = settings(teacher)
        found = answer_all(responder, requests, tmp_path)
        assert [r.stop for r in found] == ["error", "error", "end"] and len(teacher.payloads) == 1
        found = answer_all(responder, requests, tmp_path, again=True)
        assert {r.stop for r in found} == {"end"} and len(teacher.payloads) == 3
        assert answer_all(responder, requests, tmp_path, again=True) == found
        assert len(teacher.payloads) == 3
        hold_account(teacher, tmp_path)


@pytest.mark.parametrize("manner", ["dead", "refusing", "paid for nothing"])
def test_h25_nothing_but_failures_is_exit_4(tmp_path, manner, capsys):
    replies = {
        "dead": Reply(status=500, body=b"", billed=False),
        "refusing": Reply(**refused(400, says("no"))),
        "paid for nothing": Reply(finish="abort"),
    }
    with FakeTeacher(lambda number, payload: replies[manner]) as teacher:
        config = make_run(tmp_path, teacher, 4, max_retries=1)
        elsewhere = ["teacher.base_url=http://127.0.0.1:9/v1"] if manner == "dead" else []
        assert generate(str(config), *elsewhere) == Exit.TEACHER
        shown = capsys.readouterr().err
        dead = "none of 4 requests could be sent: cannot connect"
        assert (dead if manner == "dead" else "all 4 requests failed, the last: ") in shown
        assert "Traceback" not in shown
        assert not (tmp_path / "runs/mine/responses.jsonl").exists()
        replies[manner] = Reply()
        assert generate(str(config), "--redo") == 0
    found = read_records(tmp_path / "runs/mine/responses.jsonl", Response)
    assert {r.stop for r in found} == {"end"}


KEPT_ALIVE = {
    "blanks": b" " * 2200 + ANSWER,
    "comments": b": OPENROUTER PROCESSING\n\n" * 200 + ANSWER,
    "after it": ANSWER + b"\n: keep-alive\n\n: keep-alive",
    "between": b"\xef\xbb\xbf\0: kept\r\r" + ANSWER + b"\ndata: [DONE]\n\n",
    "indented": b" \t\n" * 1000 + json.dumps(json.loads(ANSWER), indent=1).encode(),
}


@pytest.mark.parametrize("name", KEPT_ALIVE)
def test_d4_an_answer_is_read_behind_what_kept_the_connection(tmp_path, name):
    with FakeTeacher(always(body=KEPT_ALIVE[name], billed=True, dollars=USUAL)) as teacher:
        found = buy(teacher, tmp_path, 3)
        assert buy(teacher, tmp_path, 3) == found and len(teacher.payloads) == 3
    assert {(r.stop, r.text) for r in found} == {("end", "the answer to q0 please")}
    assert account_of(tmp_path).settled == teacher.bill


NOTHING = {  # H5: what holds no answer, and is charged nevertheless
    "no text": {"message": {"content": ""}},
    "only a thought": {"message": {"content": "<think>\nhm\n</think>"}},
    "filtered without a word": {"message": {"content": ""}, "finish": "content_filter"},
    "a message": {"body": b'{"message": "hello"}', "billed": True},
    "a stream": {"body": b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "billed": True},
    "3,000 blanks": {"body": b" " * 3000, "billed": True},
    "HTML": {"body": b"<html>", "billed": True},
    "refused": refused(400, says("no")),
}


@pytest.mark.parametrize("answered", [0, 30], ids=["from the start", "later"])
@pytest.mark.parametrize("name", NOTHING)
def test_h5_h14_h25_a_server_with_nothing_to_say_is_given_up(tmp_path, name, answered):
    """H5: 5 requests from the start, 20 in a row later; --redo asks them again, and only them."""
    nothing = Reply(**NOTHING[name])
    with FakeTeacher(lambda n, _: Reply() if n < answered else nothing) as teacher:
        with stops(Exit.TEACHER, "in a row" if answered else "none of the first 5"):
            buy(teacher, tmp_path, 200, concurrency=4)
        sent = len(teacher.payloads)
        assert sent == 5 if not answered else 50 <= sent <= 54
        teacher.script = always()
        asked = settings(teacher, concurrency=4)
        responder = EndpointResponder(asked, PRICE, "run")
        found = answer_all(responder, asks(asked, 200), tmp_path, again=True)
        assert {r.stop for r in found} == {"end"} and all(r.text for r in found)
        assert len(teacher.payloads) == sent + 200 - answered
        hold_account(teacher, tmp_path)


@pytest.mark.parametrize("answered", [0, 30])
@pytest.mark.parametrize("wait", ["0", None])
def test_h14_a_limit_without_end_is_given_up(tmp_path, wait, answered):
    """H14, D7: 300 questions, each limited: all in flight a few times, then one at a time."""
    headers = {"retry-after": wait} if wait else {}
    limited = Reply(status=429, headers=headers, body=b"{}")
    with FakeTeacher(lambda n, _: Reply() if n < answered else limited) as teacher:
        with stops(Exit.TEACHER, "20 failures in a row"):
            buy(teacher, tmp_path, 300, concurrency=8)
        assert 20 <= len(teacher.payloads) - answered <= 20 + 5 * 8


def test_h14_limits_without_an_answer_for_minutes_are_given_up(tmp_path):
    """H14: few limits, each with a long wait; three times `max_pause` is the end."""
    limited = Reply(status=429, headers={"retry-after-ms": "60"}, body=b"{}")
    with FakeTeacher(lambda n, _: limited) as teacher:
        with stops(Exit.TEACHER, "limits and no answer in"):
            buy(teacher, tmp_path, 300, concurrency=2, max_pause=0.1, max_retries=100)
        assert len(teacher.payloads) < 20


def test_h14_a_server_that_answers_one_at_a_time_is_asked_so(tmp_path):
    """H14: of 24 in flight 23 are limited, and none of them is given up."""
    with FakeTeacher() as teacher:
        limited = Reply(status=429, headers={"retry-after-ms": "1"})
        teacher.script = lambda n, _: limited if teacher.busy > 1 else Reply(delay=0.02)
        found = buy(teacher, tmp_path, 60, concurrency=24, max_retries=100)
    assert {r.stop for r in found} == {"end"}


def test_h5_a_few_empty_answers_among_others_are_kept(tmp_path):
    with FakeTeacher(lambda n, _: Reply(message={"content": ""} if n % 4 else {})) as teacher:
        found = buy(teacher, tmp_path, 40)
        assert sum(r.text == "" and r.stop == "end" for r in found) == 30
        assert buy(teacher, tmp_path, 40) == found and len(teacher.payloads) == 40


@pytest.mark.parametrize("tokenizer", [False, True])
def test_d6_a_prompt_that_was_cut_stops_the_run(tmp_path, tokenizer, monkeypatch):
    """D6: 8,000 words and `prompt_tokens: 2050`; the answer is never taken for one."""
    long = {role: f"{role} " * 4000 for role in ("system", "user")}
    if tokenizer:
        monkeypatch.setattr(token_counts, "token_counter", lambda name: lambda text: len(text) // 4)
    cut = Reply(answer={"usage": {"prompt_tokens": 2050, "completion_tokens": 9}})
    with FakeTeacher(lambda number, payload: cut) as teacher:
        asked = settings(teacher)
        turns = tuple(Message(role=role, content=text) for role, text in long.items())  # pyright: ignore
        requests = [
            Request.make(origin_of(asked), "p", turns, Sampling(max_new_tokens=20), sample)
            for sample in range(9)
        ]
        responder = EndpointResponder(asked, PRICE, "run")
        with stops(Exit.TEACHER, r"read 2,050 tokens of a prompt of at least (7,600|10,800)"):
            answer_all(responder, requests, tmp_path)
        assert len(teacher.payloads) == 1
        with ResponseStore(tmp_path, writable=False) as log:
            assert log.response(requests[0]).stop == "error"
        whole = {"usage": {"prompt_tokens": 20_000, "completion_tokens": 9}}
        teacher.script = always(answer=whole)
        assert {r.stop for r in answer_all(responder, requests, tmp_path, again=True)} == {"end"}
        hold_account(teacher, tmp_path)


FINISHES = {  # D2: name, what it counts as
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn", "STOP"), "end"),
    **dict.fromkeys(("EndTurn", "COMPLETE", "finish_reason_stop", "FinishReason.STOP"), "end"),
    **dict.fromkeys(("length", "max_tokens", "MAX_TOKENS", "model_length", "maxTokens"), "length"),
    **dict.fromkeys(("content_filter", "SAFETY", "RECITATION", "content_filter: x"), "filtered"),
    **dict.fromkeys(("tool_calls", "abort", "error", "cancelled", "network_error"), "error"),
    **dict.fromkeys((None, "", "moon", "weiter"), "end"),
}


@pytest.mark.parametrize("finish", FINISHES)
def test_d2_why_an_answer_stopped(tmp_path, finish):
    """D2: the text of an unknown reason is kept, and is cut off where it fills what was allowed."""
    with FakeTeacher(always(finish=finish)) as teacher:
        (found,) = buy(teacher, tmp_path)
        assert found.stop == FINISHES[finish]
        noted = finish in (None, "", "moon", "weiter")
        assert ("unknown finish_reason" in str(found.error)) == noted
    full = {"usage": {"prompt_tokens": 9, "completion_tokens": 20}}
    with FakeTeacher(always(finish=finish, answer=full)) as teacher:
        (found,) = buy(teacher, tmp_path / "full")
        assert found.stop == ("length" if noted else FINISHES[finish])


def test_d2_unknown_reasons_and_d3_lone_marks_are_counted(tmp_path, capsys):
    responses = [
        Response(
            id=str(n),
            request_key="k",
            sample=0,
            prompt_id="p",
            model="m",
            text="Sure! <think>a" if n < 3 else "Paris.",
            stop="end",
            usage=Usage(),
            raw_sha256="x",
            error="unknown finish_reason 'moon'" if n < 5 else None,
        )
        for n in range(200)
    ]
    say_what_is_odd(responses)
    shown = capsys.readouterr().err
    assert "5 answers with unknown finish_reason 'moon'" in shown
    assert "3 of 200 answers hold a mark of reasoning" in shown
    say_what_is_odd([r.model_copy(update={"error": None}) for r in responses[2:]])
    assert "mark" not in capsys.readouterr().err, "1 of 198 may speak of one"


def test_d2_d3_what_was_bought_before_is_read_by_the_better_reader(tmp_path):
    """D2, D3: replies of an older store, without `cap` and `least`, make no request."""
    texts = ("Paris.", "Okay, the user asks.\n</think>\n\nParis.")
    with ResponseStore(tmp_path) as log:
        asked = settings("http://127.0.0.1:9/v1")
        requests = asks(asked, 2)
        for request, text in zip(requests, texts, strict=True):
            choice = {"message": {"content": text}, "finish_reason": None}
            body = {"status": 200, "attempt": 0, **pack(json.dumps({"choices": [choice]}).encode())}
            raw = {"key": request.key, "sample": 0, "model": "fake-1", "stop": None, "usage": {}}
            log.append([("response", request.id, {**raw, "body": body})])
    found = answer_all(EndpointResponder(asked, PRICE, "run"), requests, tmp_path)
    assert [(r.text, r.stop) for r in found] == [("Paris.", "end")] * 2
    assert found[1].reasoning == "Okay, the user asks."
