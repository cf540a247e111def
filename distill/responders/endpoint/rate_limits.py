"""How fast a teacher may be asked: the pace of requests and tokens, pauses that hold all workers, and backoff.

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


def backoff(attempt: int, first: float = FIRST_WAIT, chance: random.Random | None = None) -> float:
    """Return the seconds before attempt `attempt` + 1, doubling from `first`, with half of it drawn at random."""
    most = min(LONGEST_WAIT, first * 2 ** min(attempt, 20))
    return most * (0.5 + (chance or random).random() / 2)


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3), or None where it says nothing usable.

    Read are `retry-after-ms`, a number of seconds, and a date, which is compared with the server's own `date` where
    it sends one. A negative number and garbage count as absent; a date that has passed is 0.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    given = headers.get("retry-after", "")
    seconds = _number(given)
    if seconds is not None:
        return seconds
    until, here = _date(given), _date(headers.get("date", ""))
    if until is None:
        return None
    sent = here if here is not None else time.time() if now is None else now
    return max(0.0, until - sent)


def _number(text: str | None) -> float | None:
    """Return a plain number that is not negative, and no more than FOREVER, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return min(value, FOREVER) if 0 <= value < float("inf") else None


def _date(text: str) -> float | None:
    """Return an HTTP date in seconds since 1970, or None; without a zone it is UTC, as all HTTP dates are."""
    try:
        found = parsedate_to_datetime(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
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
        """Return once no pause holds, with a little jitter behind one; False where the gate is closed for good."""
        while not self.closed.is_set() and (left := self.until - time.monotonic()) > 0:
            await self.sleep(left + random.uniform(0, min(1.0, left / 4)))
        return not self.closed.is_set()


class Pace:
    """Spaces requests evenly, so that no minute holds more requests or tokens than allowed."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self.request = 60 / requests_per_minute if requests_per_minute else 0.0
        self.token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._free = 0.0

    def take(self, tokens: int) -> float:
        """Take the next place in the line for a request of so many tokens; return the seconds until its turn."""
        now = time.monotonic()
        start = max(now, self._free)
        self._free = start + max(self.request, self.token * tokens)
        return start - now


class Replicas:
    """The addresses of one model; the least busy that is not left out is asked."""

    REST, LONGEST_REST = 2.0, 300.0  # seconds that a dead address is left out, doubling

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.addresses = addresses
        self.busy = dict.fromkeys(addresses, 0)
        self._out = dict.fromkeys(addresses, 0.0)  # until when
        self._faults = dict.fromkeys(addresses, 0)

    def pick(self) -> str:
        """Return the address to ask; where all are left out, the one that comes back first."""
        now = time.monotonic()
        alive = [a for a in self.addresses if self._out[a] <= now]
        if alive:
            return min(alive, key=self.busy.__getitem__)
        return min(self.addresses, key=self._out.__getitem__)

    def note(self, address: str, well: bool) -> None:
        """Note how an address did: one that failed is left out for a while, longer each time."""
        if well:
            self._faults[address] = 0
            self._out[address] = 0.0
            return
        now = time.monotonic()
        if self._out[address] > now:
            return  # one death, told by every request that was in flight
        rest = min(self.LONGEST_REST, self.REST * 2 ** min(self._faults[address], 10))
        self._faults[address] += 1
        self._out[address] = now + rest
