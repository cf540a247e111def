"""One go at buying answers from an endpoint: workers that share a gate, a pace, a budget, replicas and a store.

The order for every attempt: reserve its maximum, store its intent, send it, store what came, read it, settle. An
attempt that brings no answer gets an outcome record, which says whether it may be billed.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import httpx2

from distill.config import Teacher
from distill.errors import DistillError, Exit
from distill.generation.asking import PATHS, Attempt, encode, origin_of, refusal, spelled
from distill.generation.budget import (
    NOTHING,
    Budget,
    account,
    bill_of,
    cost,
    most_dollars,
    next_attempt,
)
from distill.generation.limits import Gate, Pace, Replicas, backoff, retry_after
from distill.generation.prices import TokenPrice
from distill.generation.responder import Raw, Request, Scoring
from distill.generation.scribe import Scribe
from distill.generation.tally import Tally
from distill.generation.transport import Received, post
from distill.generation.wire import (
    Fault,
    Reply,
    classify,
    pack,
    read_stored,
)
from distill.progress import say
from distill.records import Usage
from distill.store import Log

QUARANTINED = 64 << 10  # bytes kept of a body that is no answer
AGAIN = "the same command continues"


class Purchase:
    """Buys the answers to `requests`; `results` gives them as they are stored, and ends with None."""

    def __init__(
        self,
        settings: Teacher,
        key: str | None,
        price: TokenPrice | None,
        run: str | None,
        requests: Sequence[Request],
        log: Log,
    ) -> None:
        self.settings, self.key, self.price, self.run, self.log = settings, key, price, run, log
        self.origin = origin_of(settings)
        self.spelled = spelled(key) if key else None
        self.todo, self.count = iter(requests), len(requests)
        self.results: queue.SimpleQueue[Raw | None] = queue.SimpleQueue()
        self.fault: BaseException | None = None
        self.budget = self._budget_so_far()
        self.tally = Tally(self.budget, self.price is not None, self.count)
        self.pace = Pace(self.settings.requests_per_minute, self.settings.tokens_per_minute)
        self.replicas = Replicas(self.settings.base_urls)
        self.straight = 0
        self.warned, self.told = set[str](), set[str]()
        self.last = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._workers: list[asyncio.Task[None]] = []

    def main(self) -> None:
        """Run to the end in this thread; `results` ends with None, whatever happens."""
        try:
            asyncio.run(self._run())
        except BaseException as error:  # handed to the thread that asked, which raises it
            self.fault = self.fault or error
        finally:
            self._ready.set()
            self.results.put(None)

    def halt_from_outside(self) -> None:
        """Send nothing more; for the thread that asked."""
        self._call(self._close)

    def abandon(self) -> None:
        """Leave what is in flight; its outcomes are unknown."""
        self._call(lambda: [worker.cancel() for worker in self._workers])

    def _call(self, work: Callable[[], object]) -> None:
        self._ready.wait()
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(work)
            except RuntimeError:  # the loop has ended
                return

    def progress(self) -> str:
        """Say in a line what is spent, what may be, how fast, how much in all, and the limit."""
        return self.tally.line()

    def _close(self) -> None:
        self.gate.closed.set()
        self.freed.set()

    def halt(self, fault: BaseException) -> None:
        """End the run because of `fault`, the first one counts; what is in flight is still waited for."""
        self.fault = self.fault or fault
        self._close()

    async def _run(self) -> None:
        self.gate, self.scribe, self.freed = Gate(), Scribe(self.log), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        width = min(self.settings.concurrency, self.count)
        async with self._client(width) as self.client:
            self._workers = [asyncio.create_task(self._work()) for _ in range(width)]
            self._ready.set()
            await self._finish(self._workers)
        await self.scribe.finished()

    async def _finish(self, workers: list[asyncio.Task[None]]) -> None:
        """Wait for all workers; once the gate is closed, no longer than the drain timeout."""
        closing = asyncio.create_task(self.gate.closed.wait())
        everybody = asyncio.gather(*workers, return_exceptions=True)
        await asyncio.wait([everybody, closing], return_when=asyncio.FIRST_COMPLETED)
        if not everybody.done():
            await asyncio.wait(workers, timeout=self.settings.drain_timeout)
        for worker in workers:
            worker.cancel()
        closing.cancel()
        await everybody

    def _client(self, width: int) -> httpx2.AsyncClient:
        settings = self.settings
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        timeout = httpx2.Timeout(settings.read_timeout, connect=settings.connect_timeout, pool=None)
        try:
            return httpx2.AsyncClient(
                headers=headers,
                timeout=timeout,
                limits=httpx2.Limits(max_connections=width, max_keepalive_connections=width),
                follow_redirects=False,
                # a proxy of the environment may carry TLS, and never sees a key in the clear
                trust_env=all(url.startswith("https://") for url in settings.base_urls),
            )
        except (ImportError, ValueError):  # their words may hold the proxy's password
            what, fix = "names a proxy that cannot be used", "write http://HOST:PORT, or unset it"
            raise DistillError(Exit.CONFIG, "HTTPS_PROXY or ALL_PROXY", what, fix) from None

    async def _work(self) -> None:
        """Take one request after the other until none is left or the gate closes."""
        for request in self.todo:
            try:
                await self._answer(request)
            except Exception as error:
                self.halt(error)
            if self.gate.closed.is_set():
                return

    async def _answer(self, request: Request) -> None:
        """Ask until there is an answer, the item is refused, or the retries are used up."""
        body = encode(request, self.settings)
        number = next_attempt(self.log, request.key, request.sample)
        fault = None
        for retry in range(self.settings.max_retries + 1):
            if not await self._turn(len(body) // 4 + request.sampling.max_new_tokens):
                return
            attempt = await self._prepare(request, number + retry, body)
            fault = None if self.gate.closed.is_set() else await self._attempt(attempt)
            if fault is None or fault.scope == "item":
                return
            if not fault.limited:  # a pause for all was set where the rate was too high
                await self.gate.sleep(backoff(retry, self.settings.initial_backoff))
        if fault:
            self._give_up(request, fault)

    async def _turn(self, tokens: int) -> bool:
        """Wait for pauses and for the pace; False where nothing more is to be sent."""
        await self.gate.wait()
        await self.gate.sleep(self.pace.take(tokens))
        return await self.gate.wait()

    async def _prepare(self, request: Request, number: int, body: bytes) -> Attempt:
        return Attempt(request, number, body, await self._reserve(body, request))

    async def _reserve(self, body: bytes, request: Request) -> Decimal:
        """Set aside what a request can cost at most, waiting for what is in flight where it does not fit yet."""
        most = most_dollars(self.price, len(body), request.sampling.max_new_tokens)
        if most is None:
            return NOTHING
        while not self.gate.closed.is_set() and not self.budget.reserve(most):
            if not self.budget.reserved:
                self.halt(self._budget_reached(most))
            self.freed.clear()
            if self.budget.reserved:
                await self.freed.wait()
        return most

    def _budget_reached(self, most: Decimal) -> DistillError:
        budget = self.budget
        what = (
            f"${budget.settled:.4f} paid and ${budget.unknown:.4f} perhaps; "
            f"the next request can cost ${most:.4f}, above the limit of ${budget.limit}"
        )
        return DistillError(Exit.BUDGET, "teacher.budget_dollars", what, f"raise it: {AGAIN}")

    def _budget_so_far(self) -> Budget:
        """Return the budget with what this run has spent before, from the store."""
        limit = self.settings.budget_dollars
        if limit is None:  # then the store need not be read through
            return Budget(None)
        before = account(self.log, self.price, self.run, self.settings.model)
        return Budget(limit, before.settled, before.unknown_most)

    async def _attempt(self, attempt: Attempt) -> Fault | None:
        """Store the intent, send, and deal with what comes; return the fault where it is no answer."""
        await self.scribe.write(("intent", attempt.key, self._intent(attempt)))
        if self.gate.closed.is_set():
            await self._record(attempt, Fault(what="not sent", scope="retry", billed="no"))
            return None
        address = self.replicas.pick()
        self.replicas.busy[address] += 1
        started = time.monotonic()
        try:
            url = address + PATHS[self.settings.api]
            got = await post(
                self.client,
                url,
                attempt.body,
                self.settings.total_timeout,
                self.settings.max_body_bytes,
            )
        finally:
            self.replicas.busy[address] -= 1
        if isinstance(got, Received) and got.is_answer:
            self.replicas.note(address, well=True)
            await self._keep(attempt, got, time.monotonic() - started)
            return None
        fault = got if isinstance(got, Fault) else classify(got.status, self._clean(got.data))
        fault = refusal(attempt.request, fault)
        self.replicas.note(address, well=not fault.replica)
        self._tell(address, fault)
        await self._fail(attempt, fault, got if isinstance(got, Received) else None)
        return fault

    def _tell(self, address: str, fault: Fault) -> None:
        """Say what the first attempt failed with that an address will see again, for whoever sits and waits."""
        if fault.scope == "retry" and address not in self.told:
            self.told.add(address)
            say(f"{address}: {fault.what}; asking again")

    def _intent(self, attempt: Attempt) -> dict[str, Any]:
        """Return what is stored before a request is sent: who pays, and how much at most."""
        most = attempt.reserved if self.price else None
        return {
            "model": self.settings.model,
            "run": self.run,
            "most": None if most is None else str(most),
            "question": len(attempt.body),
            "at": round(time.time(), 3),
        }

    async def _keep(self, attempt: Attempt, got: Received, seconds: float) -> None:
        """Store an answer, then read it and settle its cost."""
        data = self._clean(got.data)
        if got.cut:
            data = data[:QUARANTINED]
        raw = self._raw(
            attempt,
            {
                "status": got.status,
                "attempt": attempt.number,
                "question": len(attempt.body),
                "seconds": round(seconds, 4),
                **({"cut": got.cut} if got.cut else {}),
                **pack(data),
            },
        )
        await self.scribe.write(("response", attempt.identifier, raw.model_dump(mode="json")))
        reply = read_stored(raw.body)
        if isinstance(attempt.request, Scoring):
            await self.scribe.write(("usage", attempt.key, bill_of(reply)))
        self._settle(attempt, reply)
        self.straight = 0
        self._hand_on(raw.model_copy(update={"usage": reply.usage}))
        await self._watch_model(reply.model)

    def _raw(self, attempt: Attempt, body: dict[str, Any]) -> Raw:
        """Wrap a body; its seconds are those since the answer before, so that their sum is the time that passed."""
        now = time.monotonic()
        usage, self.last = Usage(seconds=round(now - self.last, 4)), now
        request, model = attempt.request, self.settings.model
        return Raw(
            key=request.key, sample=request.sample, model=model, stop=None, usage=usage, body=body
        )

    def _settle(self, attempt: Attempt, reply: Reply) -> None:
        """Turn what was set aside into what was paid, or into a doubt where the server did not count."""
        paid = cost(self.price, reply.usage, reply.dollars)
        known = reply.usage != Usage() and not reply.usage.estimated
        if paid is None or not known:
            self.budget.doubt(attempt.reserved)
        else:
            self.budget.settle(attempt.reserved, paid)
        self.freed.set()
        if self.budget.exceeded:
            what = (
                f"an answer cost ${paid or 0:.4f}, more than its maximum of ${attempt.reserved:.4f}"
            )
            fix = "correct the price table (evaluation.prices) or raise teacher.budget_dollars"
            self.halt(DistillError(Exit.BUDGET, "teacher.budget_dollars", what, fix))

    async def _watch_model(self, reported: str | None) -> None:
        """Note which model answers; warn where it is another than before, or stop with `strict_model`."""
        if reported is None or reported in self.warned:
            return
        self.warned.add(reported)
        await self.scribe.write(("model", self.origin, {"reported": reported}))
        first = (self.log.get("model", self.origin) or {}).get("reported")
        asked = self.settings.model
        if self.settings.strict_model and reported != asked:
            what, fix = f"{reported} answered for {asked}", "name it, or unset strict_model"
            self.halt(DistillError(Exit.TEACHER, "teacher.strict_model", what, fix))
        elif reported != first:
            say(f"warning: the teacher's model is now {reported}, it was {first}")

    async def _fail(self, attempt: Attempt, fault: Fault, got: Received | None) -> None:
        """Store how an attempt failed, and do what that means for the item, for all workers, or for the run."""
        heeded = got is not None and (fault.limited or got.status == 503)
        asked = retry_after(got.headers) if got and heeded else None
        self._pause(asked, attempt.number, fault)  # at once: the others are about to send
        await self._record(attempt, fault, got)
        if fault.billed == "no":
            self.budget.settle(attempt.reserved, NOTHING)
        else:
            self.budget.doubt(attempt.reserved)
        self.freed.set()
        if fault.scope == "run":
            raise DistillError(Exit.TEACHER, self.settings.model, fault.what, fault.fix)
        if fault.scope == "item":
            self._hand_on(self._failed(attempt.request, fault.what))
        if asked is not None and asked > self.settings.max_pause:
            what = f"asks to wait {asked:,.0f} s ({fault.what})"
            fix = f"run again then, or raise teacher.max_pause: {AGAIN}"
            raise DistillError(Exit.TEACHER, self.settings.model, what, fix)
        self._count(fault)

    async def _record(self, attempt: Attempt, fault: Fault, got: Received | None = None) -> None:
        """Store an attempt's outcome with the bytes that came; an item that was refused for good is its response."""
        body: dict[str, Any] = {"what": fault.what, "billed": fault.billed}
        if got is not None:
            body |= {"status": got.status, **pack(self._clean(got.data)[:QUARANTINED])}
        records = [("outcome", attempt.key, body)]
        if fault.scope == "item":
            refused = self._raw(attempt, {**body, "attempt": attempt.number})
            records.append(("response", attempt.identifier, refused.model_dump(mode="json")))
        await self.scribe.write(*records)

    def _pause(self, asked: float | None, number: int, fault: Fault) -> None:
        """Hold all workers for as long as the server asks, or for a backoff where the rate was too high."""
        if asked is None and not fault.limited:
            return
        jitter = backoff(number if asked is None else 0, self.settings.initial_backoff)
        self.gate.pause(jitter + (asked or 0.0))

    def _count(self, fault: Fault) -> None:
        """Count failures in a row, and raise where there are so many that asking on is no use."""
        self.straight += not fault.limited
        if self.straight >= self.settings.max_consecutive_failures:
            what = f"{self.straight} failures in a row, the last: {fault.what}"
            fix = f"see to the server: {AGAIN}"
            raise DistillError(Exit.TEACHER, self.settings.model, what, fix)

    def _hand_on(self, raw: Raw) -> None:
        """Give the one that asked what became of a request."""
        self.tally.add(raw.usage)
        self.results.put(raw)

    def _give_up(self, request: Request, fault: Fault) -> None:
        """Hand on an item whose retries are used up; it is not stored, so the next go asks again."""
        self._hand_on(self._failed(request, fault.what))

    def _failed(self, request: Request, what: str) -> Raw:
        return Raw(
            key=request.key,
            sample=request.sample,
            model=self.settings.model,
            stop="error",
            body={"text": ""},
            error=what,
        )

    def _clean(self, data: bytes) -> bytes:
        """Take our key out of what a server sends back."""
        return self.spelled.sub(b"[key]", data) if self.spelled else data
