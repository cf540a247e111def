"""Answers by batch interfaces: the same answers, at the batch price, each paid once."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from distill.config.teachers import EndpointTeacher
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.pipeline import STAGES
from distill.records import Response
from distill.responders.endpoint import batch
from distill.responders.endpoint.budget import account, most_dollars
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.request_form import encode
from distill.responders.store import ResponseStore
from distill.status import read_status
from distill.storage.run_folder import open_run
from tests.support.asking import answer_all
from tests.support.batch_server import HALF_PRICE, BatchServer
from tests.support.buying import asks, make_run, settings
from tests.support.fake_teacher import KEY, text_of

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setattr(batch, "GRACE", 0.0)
    with BatchServer(tmp_path / "books") as server:
        yield server


def given(server: BatchServer, **changes: Any) -> EndpointTeacher:
    return settings(server.url, **{"batch": True, **changes})


def buy(
    server: BatchServer, folder: Path, count: int = 10, again: bool = False, **changes: Any
) -> list[Response]:
    """Buy answers; afterwards what the store says was paid is what the server charged."""
    teacher = given(server, **changes)
    try:
        responder = EndpointResponder(teacher, HALF_PRICE, "run")
        return answer_all(responder, asks(teacher, count), folder / "store", again)
    finally:
        hold(server, folder)


def hold(server: BatchServer, folder: Path) -> None:
    if (folder / "store").exists():
        with ResponseStore(folder / "store", writable=False) as store:
            sums = account(store, {"fake-1": HALF_PRICE})
        assert sums.settled <= server.bill <= sums.settled + sums.unknown_most


def test_answers_come_at_the_batch_price(server, tmp_path):
    """Half price: the same texts as asked one by one, and half of what these cost."""
    responses = buy(server, tmp_path)
    assert [r.text for r in responses] == [text_of(f"q{i} please") for i in range(10)]
    assert set(server.paid.values()) == {1} and len(server.jobs) == 1
    with ResponseStore(tmp_path / "store", writable=False) as store:
        half = account(store, {"fake-1": HALF_PRICE}).settled
        assert not list(store.jobs())
    assert half == server.bill > 0
    assert half * 2 == sum(HALF_PRICE.of(r.usage) for r in responses)


def read_requests(server: BatchServer, row: dict[str, Any]) -> list[str]:
    return (server.folder / "files" / row["input_file_id"]).read_text().splitlines()


@pytest.mark.parametrize("end", ["expired", "cancelled", "completed"])
def test_a_job_that_ends_early_is_asked_again_in_part(server, tmp_path, end):
    """Half price: of a job that ends without some lines these are asked again."""
    seen = set[str]()

    def fate(asked: str) -> str:
        first = asked not in seen
        seen.add(asked)
        return "silence" if first and asked[1] in "2468" else "answer"

    server.fate, server.end = fate, end
    assert [r.stop for r in buy(server, tmp_path)] == ["end"] * 10
    assert [len(read_requests(server, row)) for row in server.jobs] == [4, 10]
    with ResponseStore(tmp_path / "store", writable=False) as store:
        unknown = account(store, {"fake-1": HALF_PRICE}).unknown
    assert unknown == (4 if end == "completed" else 0)  # these may have been charged


def test_anthropic_s_form(server, tmp_path):
    """Half price: in part again, an error as an error, a job that is not there in one line."""
    fates = {"q1": ["expired", "answer"], "q2": ["overloaded_error", "answer"]}
    fates["q3"] = ["invalid_request_error"]
    server.fate = lambda asked: (fates.get(asked.split()[0]) or ["answer"]).pop(0)
    responses = buy(server, tmp_path, wire="anthropic")
    assert [r.stop for r in responses] == ["end"] * 3 + ["error"] + ["end"] * 6
    assert responses[3].error == "400: no" and responses[1].text == text_of("q1 please")
    assert set(server.paid.values()) == {1} and [row["count"] for row in server.jobs] == [2, 10]
    sent = json.loads(server.bodies[0])["requests"][0]
    assert set(sent) == {"custom_id", "params"} and sent["params"]["max_tokens"] == 20
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", sent["custom_id"])
    assert server.headers[0]["anthropic-version"]
    server.status = {"POST /messages/batches": 404}
    with pytest.raises(DistillError, match="has no batch interface"):
        buy(server, tmp_path, 12, wire="anthropic")


@pytest.mark.parametrize("path", ["POST /files", "POST /batches"])
def test_a_server_without_the_interface_is_named_before_anything_is_paid(server, tmp_path, path):
    """Half price: 404, in one line, and nothing is left to be waited for."""
    server.status = {path: 404}
    with pytest.raises(DistillError, match="has no batch interface") as error:
        buy(server, tmp_path)
    assert error.value.code == Exit.TEACHER and "unset teacher.batch" in str(error.value)
    assert server.requests[path] == 1 and not server.paid
    with ResponseStore(tmp_path / "store", writable=False) as store:
        assert not list(store.jobs()) and not account(store, {"fake-1": HALF_PRICE}).unknown


def test_direct_and_batch_share_their_answers(server, tmp_path):
    """Half price: a switch between direct and batch asks nothing twice, also while a job waits."""
    buy(server, tmp_path, 5)
    server.looks = 10**9
    teacher = given(server)
    responder = EndpointResponder(teacher, HALF_PRICE, "run")
    with ResponseStore(tmp_path / "store") as store:
        raws = responder.buy(asks(teacher, 10)[5:], store)
        threading.Timer(0.3, lambda: responder.client and responder.client.stop()).start()
        assert list(raws) == []
        assert [job.name for job in store.jobs()] == ["job-0001"]
    server.looks = 0
    responses = buy(server, tmp_path, 10, batch=False)
    assert [r.stop for r in responses] == ["end"] * 10
    assert set(server.paid.values()) == {1} and len(server.jobs) == 2
    assert not server.requests["POST /chat/completions"]


def test_jobs_fit_the_budget(server, tmp_path):
    """Half price: a job's maximum is set aside before it is submitted."""
    teacher = given(server)
    price = HALF_PRICE.in_batch()
    each = [most_dollars(price, len(encode(r, teacher)), 20) for r in asks(teacher, 10)]
    limit = sum((one for one in each if one), Decimal(0)) / 2
    responses = buy(server, tmp_path, budget_dollars=limit)
    assert [r.stop for r in responses] == ["end"] * 10 and server.bill <= limit
    assert len(server.jobs) > 1
    with pytest.raises(DistillError, match="above the limit") as error:
        buy(server, tmp_path, 11, budget_dollars=server.bill)
    assert error.value.code == Exit.BUDGET and len(server.paid) == 10


def test_a_job_above_the_account_s_limit_is_halved(server, tmp_path):
    """Half price: OpenAI's token_limit_exceeded, after which one smaller job follows the other."""
    server.refusal = "token_limit_exceeded:3"
    assert [r.stop for r in buy(server, tmp_path)] == ["end"] * 10
    assert set(server.paid.values()) == {1}


@pytest.mark.parametrize(
    "name", ["POST /files", "POST /batches", "GET /batches", "GET /files/content"]
)
def test_outages_are_waited_out(server, tmp_path, name):
    """Half price: a 500 at any moment costs nothing; a submission in doubt is looked for."""
    server.status = {name: 500}
    done = server.requests

    def watch(moment: str) -> None:
        if moment == f"{name} done" and done[name] >= 2:
            server.status = {}

    server.watch = watch
    assert [r.stop for r in buy(server, tmp_path)] == ["end"] * 10
    assert set(server.paid.values()) == {1} and done[name] >= 3


def doubled(results: bytes) -> bytes:
    """Return results with each line twice, an error before the answer."""
    rows = [json.loads(line) for line in results.splitlines()]
    wrong = {"status_code": 500, "body": {"error": {"message": "no"}}}
    return b"".join(
        json.dumps(r).encode() + b"\r\n" for r in [r | {"response": wrong} for r in rows] + rows
    )


def as_text(results: bytes) -> bytes:
    """Return results whose bodies are JSON in a string, behind a line of somebody else."""
    rows = [json.loads(line) for line in results.splitlines()]
    for row in rows:
        row["response"]["body"] = json.dumps(row["response"]["body"])
    return b"\n".join(json.dumps(r).encode() for r in [rows[0] | {"custom_id": "other"}, *rows])


@pytest.mark.parametrize("change", [doubled, as_text])
def test_results_in_other_forms(server, tmp_path, change):
    """Half price: custom_ids twice or of others, bodies as text, other ends of lines."""
    server.change = change
    assert [r.text for r in buy(server, tmp_path)] == [text_of(f"q{i} please") for i in range(10)]
    assert len(server.jobs) == 1


@pytest.mark.parametrize("way", ["gone", "torn"])
def test_results_that_are_lost_end_the_run_and_are_asked_again_by_the_next(server, tmp_path, way):
    """Half price: an expired file or a line that cannot be read does not hold a run for ever."""
    server.status = {"GET /files/content": 404} if way == "gone" else {}
    server.change = lambda results: results[:-9] if way == "torn" else results
    said = "404" if way == "gone" else "1 lines of results cannot be read"
    with pytest.raises(DistillError, match=said) as error:
        buy(server, tmp_path)
    assert error.value.code == Exit.TEACHER and len(server.jobs) == 1
    server.status, server.change = {}, bytes
    assert [r.stop for r in buy(server, tmp_path)] == ["end"] * 10
    assert len(server.jobs) == 2 and sum(server.paid.values()) == (20 if way == "gone" else 11)


def test_a_job_in_doubt_is_known_whatever_the_server_s_clock_says(server, tmp_path):
    """Half price: Anthropic's jobs carry no mark, and a clock may be wrong by days."""
    server.skew = timedelta(days=-3)
    done, submit = server.requests, server.messages

    def lost(method: str, path: str, parts: list[str], body: bytes) -> object:
        reply = submit(method, path, parts, body)
        return reply if method == "GET" or len(server.jobs) > 1 else b"<html>"

    server.messages = lost  # executed, and the reply is lost
    assert [r.stop for r in buy(server, tmp_path, wire="anthropic")] == ["end"] * 10
    assert set(server.paid.values()) == {1} and done["POST /messages/batches"] == 1


def test_an_account_that_takes_nothing_more_ends_the_run(server, tmp_path):
    """Half price: where not even one question fits, no job after the other is refused for ever."""
    server.refusal = "token_limit_exceeded:0"
    with pytest.raises(DistillError, match="the job failed: token_limit_exceeded"):
        buy(server, tmp_path)
    assert len(server.jobs) < 10 and not server.paid


SOFT: dict[str, Any] = {"train": {"loss": {"forward_kl": 1}}}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"evaluation": {"judge": "asked"}}, "a judge is not asked by batch"),
        (SOFT, "prompt_logprobs are not asked by batch"),
        (SOFT | {"signals": {"endpoint": "asked"}}, "prompt_logprobs are not asked by batch"),
        ({"teacher": {"kind": "local", "model": "m", "batch": True}}, "teacher.local.batch"),
    ],
)
def test_what_cannot_go_by_batch_is_refused_by_the_config(tmp_path, changes, name):
    """Half price: before any request."""
    asked = settings("http://127.0.0.1:9/v1", batch=True).model_dump(mode="json")
    tree: dict[str, Any] = {"corpus": {"path": "."}, "student": {"model": "s"}, "teacher": asked}
    tree |= changes
    for section in tree.values():
        section |= {key: asked for key, value in section.items() if value == "asked"}
    with pytest.raises(ValueError, match=name):
        Config.model_validate({"name": "x", **tree})


def test_a_run_that_waits_says_so_and_can_be_left(server, tmp_path):
    """Half price: Ctrl-C leaves the job there, `status` says so, the same command goes on."""
    config = make_run(tmp_path, server.url, 5, batch=True, initial_backoff=0.05)
    server.looks = 10**9
    environment = {**os.environ, "TEACHER_KEY": KEY}
    command = [sys.executable, "-m", "tests.support.buying", str(config)]
    waiting = subprocess.Popen(
        command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while server.requests["GET /batches"] < 2 and time.monotonic() < end:
        time.sleep(0.02)
    waiting.send_signal(signal.SIGINT)
    shown = waiting.communicate(timeout=30)[1]
    assert waiting.returncode == Exit.INTERRUPTED and "Traceback" not in shown
    assert "5 questions wait in job job-0000 since 20" in shown
    assert "job job-0000 goes on at the server: the same command continues" in shown
    status = read_status(open_run(config), STAGES)
    assert not status.doubts and len(status.jobs) == 1
    assert re.match(r"5 questions wait in job job-0000 since 20\d\d-", status.jobs[0])
    server.looks = 0
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "generate: 5 answers to 5 prompts" in again.stderr
    assert len(server.jobs) == 1 and not read_status(open_run(config), STAGES).jobs
