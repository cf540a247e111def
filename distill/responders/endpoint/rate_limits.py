"""How fast a teacher may be asked: pace of requests and tokens, pauses of all workers, backoff.

Waits are measured by a monotonic clock, so a clock that is set changes none of them.
"""

import asyncio
import math
import random
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from distill.responders.endpoint.wire import TABLE

LONGEST_WAIT = 60.0  # seconds of backoff
FOREVER = 1e9  # seconds; a longer wait is as good as this one
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LOOKED_AT = 64 << 10  # bytes of a body
SINCE_1970 = 1e9  # seconds; a wait is shorter
WAITS = TABLE["waits"]
NUMBER = r"\d{1,12}(?:\.\d{1,12})?"
PART = re.compile(rf"({NUMBER})\s?({WAITS['unit']})?", re.IGNORECASE)
DURATION = rf"((?:{NUMBER}\s?(?:{WAITS['unit']})?\s?){{1,5}})"
DELAY = re.compile(rf"(?:{WAITS['delay']}){DURATION}", re.IGNORECASE)
SEVERAL = 5  # requests that bring no answer, before any has: the run fails, and not they


def backoff(attempt: int, first: float) -> float:
    """Return the seconds before attempt `attempt` + 1: doubling from `first`, half of it random."""
    return min(LONGEST_WAIT, first * 2 ** min(attempt, 20)) * random.uniform(0.5, 1)


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3), or None.

    Milliseconds have headers of their own; a date is compared with the server's own `date` where it
    sends one. A negative number and garbage count as absent.
    """
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        if (milliseconds := _until(headers.get(name, ""), 0)) is not None:
            return milliseconds / 1000
    here, now = _date(headers.get("date", "")), time.time() if now is None else now
    return _until(headers.get("retry-after", ""), now if here is None else here)


def stated_wait(headers: Mapping[str, str], data: bytes) -> float | None:
    """Return the seconds that a reply asks to wait in any way that makers have, or None.

    Its Retry-After; what its text says (Google's `"retryDelay": "34s"`, OpenAI's and Groq's "try
    again in 6m0s", Azure's "retry after 24 seconds", OpenRouter's headers within the body); its
    headers of the limit that is used up.
    """
    if (seconds := retry_after(headers)) is not None:
        return seconds
    now, text = time.time(), data[:LOOKED_AT].decode("utf-8", "replace")
    if match := DELAY.search(text):
        return _duration(match[1])
    names = [name.lower() for name in headers if re.fullmatch(WAITS["header"], name.lower())]
    empty = [n for n in names if headers.get(n.replace("reset", "remaining"), "").strip() == "0"]
    waits = [_until(headers[name], now) for name in empty or names]
    if seconds := [wait for wait in waits if wait is not None]:
        return max(seconds) if empty else min(seconds)
    match = re.search(WAITS["inside"], text, re.IGNORECASE) or re.search(
        WAITS["draft"], headers.get("ratelimit", "")
    )
    return _until(match[1], now) if match else None


def _duration(text: str) -> float:
    """Return the seconds of "34s", "6m0s", "1h2m3.5s", "344ms", "24 seconds", or of a number."""
    parts = [(float(number), unit.lower()) for number, unit in PART.findall(text)]
    seconds = (n * (0.001 if u.startswith(("ms", "mil")) else UNITS[u[:1]]) for n, u in parts)
    return min(sum(seconds), FOREVER)


def _until(text: str, now: float) -> float | None:
    """Return the seconds until what a text names, in any form; 0 for what has passed, or None."""
    try:
        seconds = float(text)
    except ValueError:
        if re.fullmatch(DURATION, text.strip(), re.IGNORECASE):
            return _duration(text)
        date = _date(text)
        return None if date is None else max(0.0, date - now)
    if not 0 <= seconds < math.inf:
        return None
    if seconds > SINCE_1970:  # in seconds or in milliseconds
        seconds = max(0.0, seconds / (1000 if seconds > 1000 * SINCE_1970 else 1) - now)
    return min(seconds, FOREVER)


def _date(text: str) -> float | None:
    """Return an HTTP date, or one of RFC 3339, in seconds since 1970; without a zone it is UTC."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        with suppress(ValueError, TypeError, IndexError, OverflowError):
            moment = read(text.strip())
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return None


class Gate:
    """Holds all workers while a pause lasts, and spaces requests by the limits of a minute."""

    def __init__(
        self, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
    ) -> None:
        self.request = 60 / requests_per_minute if requests_per_minute else 0.0  # seconds
        self.token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self.until = self.free = 0.0
        self.closed = asyncio.Event()  # set once: nothing more is sent

    def pause(self, seconds: float) -> None:
        """Let nobody through for `seconds` from now; a longer pause that was set before stays."""
        self.until = max(self.until, time.monotonic() + seconds)

    async def sleep(self, seconds: float) -> None:
        """Wait, or return at once when the gate is closed for good."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self.closed.wait(), seconds)
            except TimeoutError:
                return

    async def wait(self) -> bool:
        """Return once no pause holds, with jitter behind one; False once the gate is closed."""
        while not self.closed.is_set() and (seconds := self.until - time.monotonic()) > 0:
            await self.sleep(seconds + random.uniform(0, min(1.0, seconds / 4)))
        return not self.closed.is_set()

    def take(self, tokens: int) -> float:
        """Queue a request of so many tokens; return the seconds until its turn."""
        now = time.monotonic()
        start = max(now, self.free)
        self.free = start + max(self.request, self.token * tokens)
        return start - now


class Patience:
    """Counts failures, to give up a server that has nothing to say before the rest is paid for."""

    def __init__(self, most: int, answered: bool, longest: float) -> None:
        self.most, self.answered = most, answered  # in a row; whether there was any answer
        self.longest = longest  # seconds of nothing but limits
        self.in_a_row = self.fruitless = 0
        self._began = self._counted = 0.0

    def failed(self, before: bool, sent: float, pause: float | None) -> str | None:
        """Count a failure; return why to give up, if it was one too many.

        What may pass has a `pause`: all that were in flight tell of it, so that it counts once
        until then, by when the attempt was `sent`: a limit once for all that have waited as they
        were told, a server that is down once in a while. What failed for good `before`, in an
        earlier go, may do so again and says nothing of the server.
        """
        now = time.monotonic()
        if pause is None:
            self.fruitless += not self.answered
            if self.fruitless == SEVERAL:
                return f"none of the first {SEVERAL} requests brought an answer"
            if before:
                return None
        elif sent < self._counted + pause:
            return None
        self._began = self._began if self.in_a_row else now
        self.in_a_row, self._counted = self.in_a_row + 1, now
        if pause == 0 and now - self._began > self.longest:
            return f"{self.in_a_row} limits and no answer in {now - self._began:,.0f} s"
        return f"{self.in_a_row} failures in a row" if self.in_a_row >= self.most else None
