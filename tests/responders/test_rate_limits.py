"""Waiting: what Retry-After may hold, backoff, the pace, and replicas that are left out."""

import asyncio
import random
import time
from email.utils import formatdate

import pytest

from distill.responders.endpoint.rate_limits import Gate, Pace, Replicas, backoff, retry_after

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
def test_retry_after(name: str) -> None:
    headers, seconds = HEADERS[name]
    assert retry_after(headers, NOW) == seconds


def test_a_date_without_a_zone_is_no_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        for name in ("date without a zone", "date of C", "old date", "date"):
            test_retry_after(name)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_backoff_doubles_with_jitter_and_ends() -> None:
    chance = random.Random(0)
    for attempt in range(30):
        most = min(60.0, 0.5 * 2**attempt)
        waits = [backoff(attempt, 0.5, chance) for _ in range(50)]
        assert most / 2 <= min(waits) < max(waits) <= most


def test_a_pause_holds_everybody_and_ends_when_closed() -> None:
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


def test_the_pace_is_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    pace = Pace(60, None)
    assert [pace.take(5) for _ in range(4)] == [0, 1, 2, 3]
    pace = Pace(None, 600)
    assert [pace.take(10) for _ in range(3)] == [0, 1, 2]
    assert [Pace(None, None).take(9) for _ in range(3)] == [0, 0, 0]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock that stands still, to be set."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    return clock


def test_replicas_share_the_load_and_rest(now: list[float]) -> None:
    replicas = Replicas(("a", "b"))
    replicas.busy["a"] = 1
    assert replicas.pick() == "b"
    replicas.note("b", well=False)
    assert replicas.pick() == "a"
    now[0] += 2.1
    assert replicas.pick() == "b"
    replicas.note("b", well=False)
    now[0] += 2.1
    assert replicas.pick() == "a", "the second rest is longer"
    replicas.note("a", well=False)
    assert replicas.pick() == "b", "all are out: the one that is back first"


def test_a_death_that_many_requests_tell_of_counts_once(now: list[float]) -> None:
    replicas = Replicas(("a", "b"))
    for _ in range(50):
        replicas.note("b", well=False)
    replicas.busy["a"] = 1
    now[0] += 2.1
    assert replicas.pick() == "b"
