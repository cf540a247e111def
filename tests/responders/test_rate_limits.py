"""Waiting: what Retry-After may hold, backoff, and the pace."""

import asyncio
import time
from email.utils import formatdate
from pathlib import Path

import pytest
import yaml

from distill.responders.endpoint.rate_limits import Gate, backoff, retry_after, stated_wait

NOW = 1_790_000_000.0
HEADERS = {
    "seconds": ({"retry-after": "7"}, 7.0),
    "fraction": ({"retry-after": " 0.5 "}, 0.5),
    "date": ({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30.0),
    "date by the server's clock": (
        {"retry-after": formatdate(130, usegmt=True), "date": formatdate(100, usegmt=True)},
        30.0,
    ),
    "past date": ({"retry-after": formatdate(NOW - 30, usegmt=True)}, 0.0),
    "ms": ({"retry-after-ms": "250"}, 0.25),
    "ms before seconds": ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
    "with its unit": ({"retry-after": "60s"}, 60.0),
    "a date of RFC 3339": ({"retry-after": "2026-09-21T14:13:50Z"}, 30.0),
    "since 1970": ({"retry-after": str(int(NOW + 40))}, 40.0),
    "Azure's ms": ({"x-ms-retry-after-ms": "700"}, 0.7),
    "absent": ({}, None),
    "zero": ({"retry-after": "0"}, 0.0),
    "negative": ({"retry-after": "-1"}, None),
    "ten hours": ({"retry-after": "36000"}, 36000.0),
    "garbage": ({"retry-after": "soon"}, None),
    "infinite": ({"retry-after": "inf"}, None),
    "not a number": ({"retry-after": "nan"}, None),
    "endless": ({"retry-after": "1e300"}, 1e9),
    "date without a zone": (
        {"retry-after": time.strftime("%d %b %Y %T", time.gmtime(NOW + 9))},
        9.0,
    ),
    "date of C": ({"retry-after": time.asctime(time.gmtime(NOW + 9))}, 9.0),
    "old date": ({"retry-after": time.strftime("%A, %d-%b-%y %T GMT", time.gmtime(NOW + 9))}, 9.0),
    "impossible date": ({"retry-after": "Mon, 99 Foo 2026 99:99:99 GMT"}, None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_retry_after(name):
    headers, seconds = HEADERS[name]
    assert retry_after(headers, NOW) == seconds


def test_a_date_without_a_zone_is_no_local_time(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        for name in ("date without a zone", "date of C", "old date", "date"):
            test_retry_after(name)
    finally:
        monkeypatch.undo()
        time.tzset()


SAID = yaml.safe_load(Path("tests/fixtures/waits.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", SAID)
def test_d7_a_delay_in_the_body_is_read(text):
    seconds = SAID[text]
    found = stated_wait({}, text.encode())
    assert found is seconds is None or found == pytest.approx(seconds)
    assert stated_wait({"retry-after": "3"}, text.encode()) == 3, "the header comes first"


def test_d7_headers_of_the_limit_that_is_used_up_are_read():
    now = time.time()
    reset = {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "2m59.56s",
        "x-ratelimit-remaining-tokens": "17997",
        "x-ratelimit-reset-tokens": "7.66s",
    }
    assert stated_wait(reset, b"") == pytest.approx(179.56)
    assert stated_wait({**reset, "x-ratelimit-remaining-requests": "5"}, b"") == pytest.approx(7.66)
    for name, value in (
        ("x-ratelimit-reset", str(int(now + 50))),
        ("x-ratelimit-reset", str(int((now + 50) * 1000))),
        ("ratelimit-reset", "50"),
        ("anthropic-ratelimit-input-tokens-reset", time.strftime("%FT%TZ", time.gmtime(now + 50))),
        ("x-ratelimit-reset", formatdate(now + 50, usegmt=True)),
    ):
        assert stated_wait({name: value}, b"") == pytest.approx(50, abs=2)
    for value in ("soon", "", "nan", "inf", "-5", "1990-01-01T00:00:00Z"):
        assert stated_wait({"x-ratelimit-reset": value}, b"") in (None, 0.0)


def test_backoff_doubles_with_jitter_and_ends():
    for attempt in range(30):
        most = min(60.0, 0.5 * 2**attempt)
        waits = [backoff(attempt, 0.5) for _ in range(50)]
        assert most / 2 <= min(waits) < max(waits) <= most


def test_a_pause_holds_everybody_and_ends_when_closed():
    async def work() -> tuple[float, float, bool]:
        gate, started = Gate(), time.monotonic()
        gate.pause(0.2)
        gate.pause(0.01)
        await asyncio.gather(*(gate.wait() for _ in range(5)))
        first = time.monotonic() - started
        gate.pause(60)
        waiting = asyncio.create_task(gate.wait())
        await asyncio.sleep(0.05)
        gate.closed.set()
        open_ = await waiting
        return first, time.monotonic() - started, open_

    first, whole, open_ = asyncio.run(work())
    assert first >= 0.2 and whole < 50 and not open_


def test_the_pace_is_even(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 100.0)

    async def taken(*limits: int | None, tokens: int = 10) -> list[float]:
        gate = Gate(*limits)
        return [gate.take(tokens) for _ in range(3)]

    assert asyncio.run(taken(60, None)) == [0, 1, 2]
    assert asyncio.run(taken(None, 600)) == [0, 1, 2]
    assert asyncio.run(taken()) == [0, 0, 0]
