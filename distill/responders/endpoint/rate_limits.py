"""How fast a teacher may be asked: pace of requests and tokens, pauses of all workers, backoff.

Waits are measured by a monotonic clock, so a clock that is set changes none of them.
"""

import asyncio
import random
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds of backoff, before jitter
FOREVER = 1e9  # seconds; a longer wait is as good as this one
REST, LONGEST_REST = 2.0, 300.0  # seconds that a dead address is left out, doubling


def backoff(attempt: int, first: float = FIRST_WAIT, chance: random.Random | None = None) -> float:
    """Return the seconds before attempt `attempt` + 1: doubling from `first`, half of it random."""
    most = min(LONGEST_WAIT, first * 2 ** min(attempt, 20))
    return most * (0.5 + (chance or random).random() / 2)


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3), or None.

    Read are `retry-after-ms`, a number of seconds, and a date, which is compared with the server's
    own `date` where it sends one. A negative number and garbage count as absent; a date that has
    passed is 0.
    """
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    header = headers.get("retry-after", "")
    if (seconds := _number(header)) is not None:
        return seconds
    until, here = _date(header), _date(headers.get("date", ""))
    if until is None:
        return None
    sent = here if here is not None else time.time() if now is None else now
    return max(0.0, until - sent)


def _number(text: str) -> float | None:
    """Return a plain number that is not negative, and no more than FOREVER, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return min(value, FOREVER) if 0 <= value < float("inf") else None


def _date(text: str) -> float | None:
    """Return an HTTP date in seconds since 1970, or None; without a zone it is UTC, as all are."""
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


class Gate:
    """Holds all workers while a pause lasts; made and used in one event loop."""

    def __init__(self) -> None:
        self.until = 0.0
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


class Pace:
    """Spaces requests evenly, so that no minute holds more requests or tokens than allowed."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self.request = 60 / requests_per_minute if requests_per_minute else 0.0
        self.token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._free = 0.0

    def take(self, tokens: int) -> float:
        """Queue a request of so many tokens; return the seconds until its turn."""
        now = time.monotonic()
        start = max(now, self._free)
        self._free = start + max(self.request, self.token * tokens)
        return start - now


class Replicas:
    """The addresses of one model; the least busy that is not left out is asked."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.busy = dict.fromkeys(addresses, 0)
        self._out = dict.fromkeys(addresses, 0.0)  # until when
        self._failures = dict.fromkeys(addresses, 0)

    def pick(self) -> str:
        """Return the address to ask; where all are left out, the one that comes back first."""
        now = time.monotonic()
        alive = [address for address, until in self._out.items() if until <= now]
        times = self.busy if alive else self._out
        return min(alive or self._out, key=lambda address: times[address])

    def note(self, address: str, well: bool) -> None:
        """Note how an address did: one that failed is left out for a while, longer each time."""
        now = time.monotonic()
        if well:
            self._failures[address], self._out[address] = 0, 0.0
        elif self._out[address] <= now:  # else it is one death, which all in flight tell of
            rest = min(LONGEST_REST, REST * 2 ** min(self._failures[address], 10))
            self._failures[address] += 1
            self._out[address] = now + rest
