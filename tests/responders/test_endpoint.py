"""The endpoint responder against a real server on a loopback port: faults C1 to C13."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.pipeline import STAGES
from distill.records import Response
from distill.responders.endpoint import client as client_module
from distill.responders.endpoint.budget import attempts
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.request_form import secrets_pattern
from distill.responders.store import ResponseStore
from distill.storage.files import read_records
from distill.storage.run_folder import Run
from tests.support.asking import answer_all
from tests.support.buying import (
    ANSWER,
    MODEL,
    account_of,
    always,
    asks,
    buy,
    first,
    generate,
    hold_account,
    in_doubt,
    make_run,
    settings,
)
from tests.support.errors import stops
from tests.support.fake_teacher import (
    FAULTS,
    KEY,
    PRICE,
    PRICES,
    FakeTeacher,
    Reply,
    bomb,
    question,
)


@pytest.fixture(autouse=True)
def _a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)


def test_answers_come_in_order_and_are_paid_once(tmp_path):
    with FakeTeacher() as teacher:
        found = buy(teacher, tmp_path, 20)
        assert buy(teacher, tmp_path, 20) == found and len(teacher.payloads) == 20
        asked = settings(teacher)  # without a store, and of nothing
        (raw,) = EndpointResponder(asked, PRICE).ask(asks(asked, 1))
        assert not list(EndpointResponder(asked, PRICE).ask([]))
    assert [r.text for r in found] == [f"the answer to q{i} please" for i in range(20)]
    assert {(r.stop, r.model) for r in found} == {("end", MODEL)}
    assert raw.reply.text == found[0].text


TURN = {"messages": [{"role": "user", "content": "q0 please"}]}
THINKS = {"chat_template_kwargs": {"enable_thinking": False}}
SENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {**TURN, "temperature": 0.0, "max_tokens": 20}),
    (THINKS, {**TURN, "temperature": 0.0, "max_tokens": 20, **THINKS}),
    (
        {"omit": ("temperature",), "max_tokens_field": "max_completion_tokens"},
        {**TURN, "max_completion_tokens": 20},
    ),
    (
        {"extra_body": {"top_k": 1}, "api": "completions"},
        {"prompt": "q0 please", "temperature": 0.0, "max_tokens": 20, "top_k": 1},
    ),
]


@pytest.mark.parametrize(("changes", "payload"), SENT)
def test_only_what_was_set_is_sent(tmp_path, changes, payload):
    with FakeTeacher() as teacher:
        buy(teacher, tmp_path, **changes)
    assert teacher.payloads == [{"model": MODEL, **payload}]
    assert teacher.paths[0].endswith("/chat/completions") is ("messages" in payload)


@pytest.mark.parametrize("refused", [{"api": "completions"}, {"extra_body": THINKS}])
def test_the_template_s_variables_have_one_place(refused):
    """B7: as vLLM takes them."""
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        settings("http://127.0.0.1:1/v1", **THINKS, **refused)
    with pytest.raises(ValueError, match="no variable of a chat template"):
        settings("http://127.0.0.1:1/v1", chat_template_kwargs={"messages": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"base_url": "http://127.0.0.1:9/v1"},
        {"base_url": "http://127.0.0.1:1/v2"},
        {"model": "other"},
        {"extra_body": {"top_k": 1}},
        {"omit": ("temperature",)},
        {"api": "completions"},
        {"revision": "2"},
        THINKS,
        {"headers": {"X-Beta": "on"}},
    ],
)
def test_what_shapes_an_answer_is_in_its_key(change):
    one, other = settings("http://127.0.0.1:1/v1"), settings("http://127.0.0.1:1/v1", **change)
    assert asks(one, 1)[0].key != asks(other, 1)[0].key
    unshaped: dict[str, Any] = {
        "concurrency": 3,
        "chat_template_kwargs": {},
        "headers": {"X": "$O"},
    }
    same = settings(("http://127.0.0.1:1/v1/", "http://127.0.0.1:2/v1"), **unshaped)
    assert asks(one, 1)[0].key == asks(same, 1)[0].key


def test_c1_c13_a_pause_holds_all_workers_whatever_the_clock_says(tmp_path, monkeypatch):
    clock, times = iter(range(10**9, 0, -(10**6))), list[float]()
    monkeypatch.setattr(client_module.time, "time", lambda: float(next(clock)))

    def script(number: int, payload: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        limited = Reply(status=429, headers={"retry-after-ms": "300", "retry-after": "9000"})
        return limited if number == 0 else Reply(delay=0.1)

    with FakeTeacher(script) as teacher:
        found = buy(teacher, tmp_path, 6, concurrency=2)
    assert {r.stop for r in found} == {"end"} and len(times) == 7
    after = sorted(times)[2:]  # the second was on its way when the first was refused
    assert 0.3 <= after[0] - times[0] < 60


def test_c1_too_long_a_pause_stops_and_resumes(tmp_path):
    limited = Reply(status=429, headers={"retry-after": "36000"})
    with FakeTeacher(lambda number, _: limited if number == 3 else Reply()) as teacher:
        with stops(Exit.TEACHER, "36,000 s"):
            buy(teacher, tmp_path, 9, concurrency=1)
        assert len(teacher.payloads) == 4
        assert len(buy(teacher, tmp_path, 9)) == 9 and len(teacher.payloads) == 10


PASSING = [
    *("429", "500", "502 html", "503", "504 billed", "html on 200", "empty", "error on 200"),
    *("reset", "half", "hang", "closed"),
]


@pytest.mark.parametrize("name", PASSING)
def test_c2_c5_what_passes_is_tried_again_within_bounds(tmp_path, name, capsys):
    patience = {"read_timeout": 1} if name == "hang" else {}
    with FakeTeacher(first(6, **FAULTS[name])) as teacher:
        (found,) = buy(teacher, tmp_path, **patience)
        assert found.stop == "error" and found.error and len(teacher.payloads) == 4
        assert capsys.readouterr().err.count(f"{teacher.url}: ") == 1, "whoever waits is told once"
        assert buy(teacher, tmp_path, **patience)[0].text == "the answer to q0 please"
    assert len(teacher.payloads) == 7 or patience


@pytest.mark.parametrize("status", [400, 413, 422])
def test_c3_a_refused_item_fails_and_the_run_goes_on(tmp_path, status):
    error = {"error": {"message": "too long", "code": "context_length_exceeded"}}
    bad = Reply(status=status, body=json.dumps(error).encode())
    with FakeTeacher(lambda _, asked: bad if question(asked)[:2] == "q1" else Reply()) as teacher:
        found = buy(teacher, tmp_path, 4)
        assert [r.stop for r in found] == ["end", "error", "end", "end"]
        assert found[1].error == f"{status}: too long"
        assert buy(teacher, tmp_path, 4) == found, "asked again, and refused again"
        assert len(teacher.payloads) == 5 and teacher.asked["q1 please"] == 2


@pytest.mark.parametrize("status", [401, 402, 403, 404, 301, 307])
def test_c3_c9_what_concerns_all_stops_the_run(tmp_path, status):
    with FakeTeacher() as elsewhere:
        to = {"location": elsewhere.url + "/chat/completions"}
        script = always(status=status, headers=to, body=b'{"error": {"message": "no"}}')
        with FakeTeacher(script) as teacher, stops(Exit.TEACHER) as stopped:
            buy(teacher, tmp_path, 50, concurrency=4)
    assert str(status) in stopped.value.what
    assert set(teacher.asked.values()) == {1}, "none is asked again"
    assert len(teacher.payloads) <= 4 and not elsewhere.payloads


def test_c5_a_dead_server_trips_the_breaker_and_a_dead_replica_is_left_out(tmp_path):
    dead, slow = "http://127.0.0.1:9/v1", always(delay=0.02)
    asked = settings(dead, max_consecutive_failures=5)
    with stops(Exit.TEACHER, r"5 failures in a row.*cannot connect"):
        answer_all(EndpointResponder(asked, PRICE), asks(asked, 50), tmp_path / "dead")
    assert account_of(tmp_path / "dead").unknown == 0, "nothing was sent, so nothing is in doubt"
    with FakeTeacher(slow) as teacher, FakeTeacher(slow) as other:
        asked = settings((teacher.url, dead, other.url), concurrency=4)
        found = answer_all(EndpointResponder(asked, PRICE, "run"), asks(asked, 40), tmp_path)
    counts = len(teacher.payloads), len(other.payloads)
    assert {r.stop for r in found} == {"end"} and sum(counts) == 40 and min(counts) > 5
    assert account_of(tmp_path).attempts < 50, "a dead address is asked a few times only"


BOUNDLESS: dict[str, dict[str, Any]] = {
    "drip": {"manner": "drip"},
    "endless": {"manner": "endless"},
    "bomb": {"body": bomb(20_000_000), "headers": {"content-encoding": "gzip"}},
    "flood": {"body": b'{"choices": "' + b" " * 20_000_000},
}


@pytest.mark.parametrize("name", BOUNDLESS)
def test_c5_c6_time_and_size_are_bounded(tmp_path, name):
    with FakeTeacher(always(**BOUNDLESS[name], billed=True)) as teacher:
        found = buy(teacher, tmp_path, max_retries=0, total_timeout=1, max_body_bytes=100_000)
    assert found[0].stop == "error"
    assert name in ("drip", "endless") or "more than 100,000 bytes" in str(found[0].error)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.jsonl")) < 200_000
    (doubt,) = in_doubt(tmp_path)
    assert doubt.most and doubt.most >= teacher.bill


UNREADABLE = {
    "cut": ANSWER[:50],
    "NaN": ANSWER.replace(b'"index": 0', b'"index": NaN'),
    "no object": b"[1, 2]",
    "a number": b"7",
    "wrong type": ANSWER.replace(b'"the answer to q0 please"', b"7"),
    "no choices": b'{"choices": []}',
    "null": ANSWER.replace(b'"the answer to q0 please"', b"null"),
    "not UTF-8": ANSWER.replace(b"answer", b"ans\xff"),
    "deep": b'{"choices": ' + b"[" * 100_000,
    "long number": b'{"choices": [{"index": ' + b"9" * 5000 + b"}]}",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_c6_what_cannot_be_read_is_kept_and_failed(tmp_path, name):
    with FakeTeacher(always(body=UNREADABLE[name], billed=True)) as teacher:
        found = buy(teacher, tmp_path)
        assert found[0].stop == "error" and "unreadable" in str(found[0].error)
        assert buy(teacher, tmp_path) == found and len(teacher.payloads) == 1
    with ResponseStore(tmp_path, writable=False) as log:
        assert log.raw(found[0].id).body["sha256"] == found[0].raw_sha256
    assert account_of(tmp_path).unknown == 1


def test_c9_the_key_stays_with_its_host_and_out_of_every_byte(tmp_path, capfd):
    echo = json.dumps({"error": {"message": f"what is {KEY}?"}}).encode()
    faults = [
        {"status": 400, "body": echo},
        {"status": 500, "body": echo},
        {"message": {"content": f"your key is {KEY}"}},
        {"manner": "reset"},
        {"status": 401, "body": echo},
    ]
    script = [Reply(**fault) for fault in faults].__getitem__
    with FakeTeacher(lambda number, _: script(number)) as teacher, stops(Exit.TEACHER) as stopped:
        buy(teacher, tmp_path, 9, concurrency=1, api_key_env="TEACHER_KEY", max_retries=1)
    assert {h["authorization"] for h in teacher.headers} == {f"Bearer {KEY}"}
    printed = "".join(capfd.readouterr()) + str(stopped.value)
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY not in printed and KEY.encode() not in written
    assert len(teacher.payloads) == 5


@pytest.mark.parametrize("value", ["", "  ", "two words", "a\nb", "clé"])
def test_a5_a_key_that_cannot_be_sent_stops_before(value, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", value)
    asked = settings("http://localhost:1/v1", api_key_env="TEACHER_KEY")
    with stops(Exit.CONFIG, "TEACHER_KEY") as stopped:
        EndpointResponder(asked)
    assert not value.strip() or value not in str(stopped.value)


REFUSED = (
    "file:///etc/passwd ftp://host/v1 https://key@host/v1 https://user:key@host/v1 http://host/v1 "
    "http://192.168.0.7:8000/v1 https://169.254.169.254/latest https://2852039166/ "
    "https://0xA9FEA9FE/ https://0251.0376.0251.0376/ https://[::ffff:169.254.169.254]/ "
    "https://metadata.google.internal/ https://host/v1?key=1 https://[broken/v1 https:///v1"
).split()
H21 = (  # a cloud's metadata service, written otherwise
    "169.254.169.254. metadata.google.internal. metadata.google.internal.. Metadata.goog "
    "metadata.goog instance-data 168.63.129.16 100.100.100.200 192.0.0.192 0xa83f8110 "
    "169.254.43518 025177524776 169.254.170.2 [fd00:ec2::254] [fd00:ec2:0:0::0254] [fd20:ce::254] "
    "[::169.254.169.254] [::ffff:168.63.129.16] [::ffff:0:169.254.169.254] [64:ff9b::a9fe:a9fe] "
    "[64:ff9b::a9fe:aa02] [64:ff9b:1::a9fe:a9fe] [64:ff9b:1:a9fe:a9:fe00::] [2002:a9fe:a9fe::1] "
    "[2002:a83f:8110::] [2001:0:1:2:3:4:5601:5601] [fe80::a9fe:a9fe] [fe80::1%25eth0] "
    "\uff11\uff16\uff19.254.169.254 169\u3002254\u3002169\u3002254 \u2460\u2465\u2468.254.169.254"
).split()


@pytest.mark.parametrize("url", [*REFUSED, "", *(f"https://{host}/v1" for host in H21)])
def test_a6_addresses_that_are_refused(url):
    with pytest.raises(ValueError):
        settings(url)


def test_a6_addresses_that_are_fine():
    addresses = "api.example.com 8.8.8.8 [2606:4700::6810:84e5] [64:ff9b::808:808] 100.64.0.1"
    near = [f"https://{host}/v1" for host in (*addresses.split(), "169.253.169.254", "[::]")]
    for url in (*near, "http://localhost:8000/v1", "http://[::1]:8000/v1"):
        assert settings(url).base_urls == (url,)
    assert settings("http://10.0.0.7:8000/v1", allow_insecure=True)
    with pytest.raises(ValueError):
        settings("http://169.254.169.254/", allow_insecure=True)


def test_c10_another_model_is_recorded_and_told(tmp_path, capsys):
    june, july = (Reply(answer={"model": f"fake-1-{month}"}) for month in ("june", "july"))
    with FakeTeacher(lambda number, _: june if number < 2 else july) as teacher:
        found = buy(teacher, tmp_path, 4, concurrency=1)
        assert [r.model for r in found] == ["fake-1-june"] * 2 + ["fake-1-july"] * 2
        assert "is now fake-1-july, it was fake-1-june" in capsys.readouterr().err
        with stops(Exit.TEACHER, "fake-1-july answered for fake-1"):
            buy(teacher, tmp_path, 9, concurrency=1, strict_model=True)
    assert len(teacher.payloads) == 5


def test_c11_the_budget_stops_before_the_request_that_could_exceed_it(tmp_path):
    limit = Decimal("0.01")
    with FakeTeacher(always(delay=0.01)) as teacher:
        with pytest.raises(DistillError, match="limit") as stopped:
            buy(teacher, tmp_path, 100, budget_dollars=limit, concurrency=8)
        spent, sent = teacher.bill, len(teacher.payloads)
        assert stopped.value.code == Exit.BUDGET
        assert limit * Decimal("0.8") < spent <= limit and sent < 100
        with pytest.raises(DistillError):
            buy(teacher, tmp_path, 100, budget_dollars=limit)
        assert teacher.bill <= limit, "a second go has no second budget"
        buy(teacher, tmp_path, 100, budget_dollars=Decimal(1))
    assert len(teacher.payloads) == 100


@pytest.mark.parametrize(("status", "well", "retries"), [(504, 0, 0), (500, 10, 2)])
def test_c11_failures_that_may_be_billed_count_against_the_budget(tmp_path, status, well, retries):
    """Of every `well` requests one is answered; the others fail, and are billed."""
    limit, failed = Decimal("0.01"), Reply(status=status, body=b"", billed=True)
    teacher = FakeTeacher(lambda n, _: Reply() if well and n % well == 0 else failed)
    with teacher, stops(Exit.BUDGET):
        buy(teacher, tmp_path, 100, budget_dollars=limit, concurrency=8, max_retries=retries)
    assert teacher.bill <= limit
    assert max(teacher.asked.values()) <= retries + 1


def test_c11_a_budget_without_a_price_is_refused():
    asked = settings("http://localhost:1/v1", budget_dollars=Decimal(1))
    with stops(Exit.BUDGET, "unknown"):
        EndpointResponder(asked, None)
    with pytest.raises(DistillError, match="max_tokens"):
        EndpointResponder(asked.model_copy(update={"omit": ("max_tokens",)}), PRICE)


def test_c12_a_caller_that_stops_loses_no_answer_in_flight(tmp_path):
    with FakeTeacher(always(delay=0.2)) as teacher, ResponseStore(tmp_path) as log:
        asked = settings(teacher, concurrency=4)
        raws = EndpointResponder(asked, PRICE, "run").buy(asks(asked, 50), log)
        next(raws)
        raws.close()
        sent = len(teacher.payloads)
        assert sent < 50 and len(list(log.keys("response"))) == sent
    hold_account(teacher, tmp_path)
    assert account_of(tmp_path).unknown == 0


def test_d4_a_disk_that_fills_up_ends_a_run_and_loses_nothing(tmp_path):
    with FakeTeacher() as teacher:
        config, shown = make_run(tmp_path, teacher, 30), tmp_path / "shown"
        full = (16_000, 16_000)  # bytes a file, about half of what the answers take
        child = command(config, limits={resource.RLIMIT_FSIZE: full})
        assert child.wait(60) == Exit.STATE and "Traceback" not in shown.read_text()
        assert "error: " in shown.read_text() and 0 < len(teacher.payloads) < 30
        store = tmp_path / "runs/.store/responses"
        hold_account(teacher, store)
        with ResponseStore(store, writable=False) as log:
            kept = len(list(log.keys("response")))
        assert kept >= len(teacher.payloads) - 4, "at most what was in flight could not be stored"
        assert generate(str(config)) == 0
        assert sum(times - 1 for times in teacher.bills.values()) <= 4
        hold_account(teacher, store)


def test_d5_d6_another_filter_and_another_run_ask_nothing(tmp_path):
    with FakeTeacher() as teacher:
        config = make_run(tmp_path, teacher)
        assert generate(str(config)) == 0
        copied = tmp_path / "runs/other"
        copied.mkdir()
        for name in ("documents.jsonl", "prompts.jsonl"):
            shutil.copy(tmp_path / "runs/mine" / name, copied / name)
        for verb, *words in (
            ["filter"],
            ["filter", "filters.repetition=false", "--redo"],
            ["generate", "--redo"],
            ["generate", "name=other"],
        ):
            more = [str(config), *words]
            assert (generate(*more) if verb == "generate" else main([verb, *more])) == 0
        assert len(teacher.payloads) == 12 and set(teacher.bills.values()) == {1}
    answers = [tmp_path / f"runs/{name}/responses.jsonl" for name in ("mine", "other")]
    assert answers[0].read_bytes() == answers[1].read_bytes()
    ledger = Run(Config.model_validate_json(config.read_text())).ledger.entries()
    assert sum(entry.dollars or 0 for entry in ledger) == teacher.bill


def command(
    config: Path, limits: dict[int, tuple[int, int]] | None = None
) -> subprocess.Popen[str]:
    """Start `distill generate`; what it prints goes to the file `shown` beside its config."""

    def prepare() -> None:
        # A test runner in the background of a script ignores Ctrl-C, and its children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for name, limit in (limits or {}).items():
            resource.setrlimit(name, limit)

    with config.with_name("shown").open("a") as shown:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.buying", str(config)],
            cwd=Path(__file__).parent.parent.parent,
            # no git: one that the limit of a file stops leaves its lock in this checkout
            env={**os.environ, "GIT_DIR": os.devnull},
            stderr=shown,
            stdout=shown,
            text=True,
            preexec_fn=prepare,
        )


def wait_until(what: Any) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def held_after(teacher: FakeTeacher, count: int) -> threading.Event:
    """Let a teacher answer `count` requests, and those that follow only once the event is set."""
    free = threading.Event()
    teacher.script = lambda number, payload: Reply(hold=free.is_set if number >= count else None)
    return free


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_c12_ctrl_c_drains_and_re_bills_nothing(tmp_path, sent):
    with FakeTeacher() as teacher:
        free, config = held_after(teacher, 4), make_run(tmp_path, teacher)
        child, shown = command(config), tmp_path / "shown"
        wait_until(lambda: len(teacher.payloads) == 8)
        child.send_signal(sent)
        wait_until(lambda: "waiting up to" in shown.read_text())
        free.set()
        assert child.wait(60) == 130 and "Traceback" not in shown.read_text()
        assert len(teacher.payloads) == 8
        assert generate(str(config)) == 0
        assert len(teacher.payloads) == 12 and set(teacher.bills.values()) == {1}
        hold_account(teacher, tmp_path / "runs/.store/responses")
    entries = Run(Config.model_validate_json(config.read_text())).ledger.entries()
    assert sum(e.dollars or 0 for e in entries) == teacher.bill
    assert not sum(e.unknown for e in entries)
    with ResponseStore(tmp_path / "runs/.store/responses", writable=False) as log:
        # begun as the signal came
        unsent = sum(a.what == "not sent" for a in attempts(log, PRICES))
    assert sum(e.attempts for e in entries) == 12 + unsent


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_c12_d1_a_second_ctrl_c_or_a_kill_re_bills_what_was_in_flight(tmp_path, capsys, end):
    store, shown = tmp_path / "runs/.store/responses", tmp_path / "shown"
    with FakeTeacher() as teacher:
        free, config = held_after(teacher, 4), make_run(tmp_path, teacher, drain_timeout=3600)
        child = command(config)
        wait_until(lambda: len(teacher.payloads) == 8)
        if end == signal.SIGINT:
            child.send_signal(end)
            wait_until(lambda: "waiting up to" in shown.read_text())
        child.send_signal(end)
        assert child.wait(60) == (130 if end == signal.SIGINT else -end)
        assert "Traceback" not in shown.read_text()
        free.set()
        hold_account(teacher, store)
        assert main(["status", str(config)]) == 0
        printed, doubts = capsys.readouterr().out, in_doubt(store, "mine")
        assert len(doubts) == 4 and "4 requests may have been billed" in printed
        assert all(doubt.key in printed for doubt in doubts)
        assert generate(str(config)) == 0
        assert sum(times - 1 for times in teacher.bills.values()) == 4
        hold_account(teacher, store)
    run = Run(Config.model_validate_json(config.read_text()))
    found = read_records(run.path("responses.jsonl"), Response)
    assert [r.text for r in found] == [f"the answer to q{i} please" for i in range(12)]
    entries = run.ledger.entries()
    paid, doubt = (sum(getattr(e, n) or 0 for e in entries) for n in ("dollars", "unknown_dollars"))
    assert paid <= teacher.bill <= paid + doubt
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in written


def test_a_budget_may_change_between_goes_and_an_address_may_not(tmp_path):
    stage = next(stage for stage in STAGES if stage.name == "generate")
    with FakeTeacher() as teacher:
        tree = json.loads(make_run(tmp_path, teacher, 6).read_text())

        def perform(**changes: Any) -> bool:
            tree["teacher"] |= {"api_key_env": None, **changes}
            return Run(Config.model_validate_json(json.dumps(tree), strict=True)).perform(stage)

        with stops(Exit.BUDGET):
            perform(budget_dollars="0.0001")
        assert not teacher.payloads
        assert perform(budget_dollars="1.5") and len(teacher.payloads) == 6
        assert not perform(concurrency=2, budget_dollars=None)
        with pytest.raises(DistillError, match="endpoint"):
            perform(base_url="http://127.0.0.1:9/v1")


def test_a_key_is_found_as_json_may_write_it():
    key = 'a/b"c+Z'
    pattern = secrets_pattern(settings("http://localhost:1/v1"), key)
    forms = [
        key,
        r"a\/b\"c+Z",
        r"\u0061/b\"c+\u005A",
        r"\u0061\u002f\u0062\u0022\u0063\u002B\u005a",
    ]
    assert pattern
    for form in forms:
        assert pattern.sub(b"-", f"<{form}>".encode()) == b"<->"
    assert pattern.sub(b"-", b"a/b") == b"a/b"
