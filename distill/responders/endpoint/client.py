"""One go at buying answers from an endpoint: workers that share a gate, a pace, a budget, replicas and a store.

The order for every attempt: reserve its maximum, store its intent, send it, store what came, read it, settle. An
attempt that brings no answer gets an outcome record, which says whether it may be billed. The first answer of a run is
awaited alone, and its bill held against the price, before others are asked for: a server that bills many times its
maximum does so once.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from decimal import ROUND_UP, Decimal
from itertools import chain
from typing import Any

import httpx2

from distill.config import EndpointTeacher
from distill.errors import DistillError, Exit
from distill.records import Usage, digest
from distill.responders.endpoint.attempts import PATHS, Attempt, encode, origin_of, refusal, spelled
from distill.responders.endpoint.budget import (
    APART,
    NOTHING,
    Budget,
    account,
    bill_of,
    charge,
    most_dollars,
    next_attempt,
)
from distill.responders.endpoint.progress_line import Tally
from distill.responders.endpoint.rate_limits import Gate, Pace, Replicas, backoff, retry_after
from distill.responders.endpoint.transport import Received, post
from distill.responders.endpoint.wire import (
    Fault,
    Reply,
    classify,
    pack,
    read_stored,
)
from distill.responders.prices import TokenPrice
from distill.responders.responder import Raw, Request, Scoring
from distill.storage.log import Log, LogWriter
from distill.storage.progress import say

QUARANTINED = 64 << 10  # bytes kept of a body that is no answer
SEVERAL = 5  # requests that bring no answer, before any has, are the run's fault and not theirs
AGAIN = "the same command continues"


class Purchase:
    """Buys the answers to `requests`; `results` gives them as they are stored, and ends with None."""

    def __init__(
        self,
        settings: EndpointTeacher,
        key: str | None,
        price: TokenPrice | None,
        run: str | None,
        requests: Sequence[Request],
        log: Log,
    ) -> None:
        self.settings, self.key, self.price, self.run, self.log = settings, key, price, run, log
        self.origin = origin_of(settings)
        self.spelled = spelled(key) if key else None
        self.count = len(requests)
        self.results: queue.SimpleQueue[Raw | None] = queue.SimpleQueue()
        self.fault: BaseException | None = None
        self.budget = self._budget_so_far()
        self.tally = Tally(self.budget, self.price is not None, self.count)
        self.pace = Pace(self.settings.requests_per_minute, self.settings.tokens_per_minute)
        self.replicas = Replicas(self.settings.base_urls)
        self.straight = 0
        facts = price and price.model_dump(mode="json")
        self.check = digest({"origin": self.origin, "run": run, "price": facts})
        checked = log.get("checked", self.check)
        self.alone = checked is None  # until an answer's bill has been held against the price
        self.dearest = Decimal(checked["dearest"]) if checked else Decimal(1)
        self.answered = checked is not None or ("model", self.origin) in log
        # the first are spread over all: where they are refused, it is not for being alike
        apart = 1 if self.answered else max(1, -(-self.count // SEVERAL))
        others = (request for n, request in enumerate(requests) if n % apart)
        self.todo, self.fruitless = chain(requests[::apart], others), 0
        self.unsent: str | None = ""  # why no request has been sent; None once one was
        self.warned, self.told = set[str](), set[str]()
        self.last = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._workers: list[asyncio.Task[None]] = []

    def main(self) -> None:
        """Run to the end in this thread; `results` ends with None, whatever happens."""
        try:
            asyncio.run(self._run())
            if self.unsent and not self.fault:
                what = f"none of {self.count} requests could be sent: {self.unsent}"
                fix = f"see to the server and to teacher.base_url: {AGAIN}"
                self.fault = DistillError(Exit.TEACHER, self.settings.base_urls[0], what, fix)
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
        self.gate, self.scribe, self.freed = Gate(), LogWriter(self.log), asyncio.Event()
        self.turn = asyncio.Lock()  # of those that are sent alone
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
            fault = await self._try(request, number + retry, body)
            if fault is None or fault.scope == "item":
                return
            if not fault.limited:  # a pause for all was set where the rate was too high
                await self.gate.sleep(backoff(retry, self.settings.initial_backoff))
        if fault:
            self._give_up(request, fault)

    async def _try(self, request: Request, number: int, body: bytes) -> Fault | None:
        """Make an attempt, alone until a bill has been checked; return the fault where another may bring an answer."""
        if self.alone:
            async with self.turn:
                if self.alone:
                    return await self._make(request, number, body)
        return await self._make(request, number, body)

    async def _make(self, request: Request, number: int, body: bytes) -> Fault | None:
        """Wait for pauses, for the pace and for the budget, and make an attempt unless nothing more is to be sent."""
        await self.gate.wait()
        await self.gate.sleep(self.pace.take(len(body) // 4 + request.sampling.max_new_tokens))
        if not await self.gate.wait():
            return None
        attempt = Attempt(request, number, body, await self._reserve(body, request))
        return None if self.gate.closed.is_set() else await self._attempt(attempt)

    async def _reserve(self, body: bytes, request: Request) -> Decimal:
        """Set aside what a request can cost at most, waiting for what is in flight where it does not fit yet.

        Where an answer has cost more than its maximum, others may as well.
        """
        most = most_dollars(self.price, len(body), request.sampling.max_new_tokens)
        if most is None:
            return NOTHING
        most *= self.dearest
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
        if not isinstance(got, Fault) or got.billed != "no":
            self.unsent = None
        elif self.unsent is not None:
            self.unsent = got.what
        if isinstance(got, Received) and got.is_answer:
            self.replicas.note(address, well=True)
            await self._keep(attempt, got, time.monotonic() - started)
            return None
        if isinstance(got, Fault):
            fault = got
        else:
            fault = classify(got.status, self._clean(got.data), attempt.body)
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
        """Return what is stored before a request is sent: who pays, how much at most, and for how many tokens."""
        most = attempt.reserved if self.price else None
        capped = "max_tokens" not in self.settings.omit
        return {
            "model": self.settings.model,
            "run": self.run,
            "most": None if most is None else str(most),
            "question": len(attempt.body),
            "cap": attempt.request.sampling.max_new_tokens if capped else None,
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
        again = ("response", attempt.identifier) in self.log  # an earlier reply held no answer
        key = attempt.key if again else attempt.identifier
        await self.scribe.write(("response", key, raw.model_dump(mode="json")))
        reply = read_stored(raw.body)
        if isinstance(attempt.request, Scoring):
            await self.scribe.write(("usage", attempt.key, bill_of(reply)))
        plausible = self._settle(attempt, reply)
        self.straight = 0
        self._hand_on(raw.model_copy(update={"usage": reply.usage}))
        if reply.stop == "error":
            self._count_fruitless(reply.error or "")
            return
        self.answered = True
        if self.alone and plausible:
            self.alone = False
            await self.scribe.write(("checked", self.check, {"dearest": str(self.dearest)}))
        await self._watch_model(reply.model)

    def _raw(self, attempt: Attempt, body: dict[str, Any]) -> Raw:
        """Wrap a body; its seconds are those since the answer before, so that their sum is the time that passed."""
        now = time.monotonic()
        usage, self.last = Usage(seconds=round(now - self.last, 4)), now
        request, model = attempt.request, self.settings.model
        return Raw(
            key=request.key, sample=request.sample, model=model, stop=None, usage=usage, body=body
        )

    def _settle(self, attempt: Attempt, reply: Reply) -> bool:
        """Turn what was set aside into what was paid, and what may have been; tell whether more may be bought so.

        An answer far above its maximum, by the server's own word, ends the run.
        """
        intent = self._intent(attempt)
        found = charge(self.price, reply, intent)
        perhaps = attempt.reserved if found.perhaps is None else found.perhaps
        self.budget.settle(attempt.reserved, found.paid or NOTHING, perhaps)
        self.freed.set()
        kind = found.doubt.partition(" ")[0]
        if kind not in ("", "answered", *self.told):
            self.told.add(kind)
            say(f"warning: {self.settings.model}: an answer {found.doubt}")
        claim, cap = found.claim or NOTHING, intent["cap"]
        if (most := most_dollars(self.price, len(attempt.body), cap or 0)) is not None and cap:
            if claim > most * APART:
                what = f"an answer cost ${claim:.4g}, more than its maximum of ${most:.4g}"
                what = f"{what}: it {found.doubt}" if "maximum" not in found.doubt else what
                fix = "see to the server, correct the price table (evaluation.prices), or raise"
                fix = (
                    f"{fix} teacher.max_new_tokens where it counts its reasoning beside the answer"
                )
                self.halt(DistillError(Exit.BUDGET, self.settings.model, what, fix))
                return False
            if most:
                # rounded, so that what is reserved and released later comes out even
                times = (claim / most).quantize(Decimal("0.001"), ROUND_UP)
                self.dearest = max(self.dearest, times)
        if self.budget.exceeded:
            what = f"an answer cost ${claim:.4f}, more than its maximum of ${attempt.reserved:.4f}"
            fix = "correct the price table (evaluation.prices) or raise teacher.budget_dollars"
            self.halt(DistillError(Exit.BUDGET, "teacher.budget_dollars", what, fix))
        return not self.budget.exceeded

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
        unknown = NOTHING if fault.billed == "no" else attempt.reserved
        self.budget.settle(attempt.reserved, NOTHING, unknown)
        self.freed.set()
        if fault.scope == "run":
            raise DistillError(Exit.TEACHER, self.settings.model, fault.what, fault.fix)
        if fault.scope == "item":
            self._hand_on(self._failed(attempt.request, fault.what))
            self._count_fruitless(fault.what)
        if asked is not None and asked > self.settings.max_pause:
            what = f"asks to wait {asked:,.0f} s ({fault.what})"
            fix = f"run again then, or raise teacher.max_pause: {AGAIN}"
            raise DistillError(Exit.TEACHER, self.settings.model, what, fix)
        self._count(fault)

    async def _record(self, attempt: Attempt, fault: Fault, got: Received | None = None) -> None:
        """Store an attempt's outcome with the bytes that came; no refusal is an answer, so the next go asks again."""
        body: dict[str, Any] = {"what": fault.what, "billed": fault.billed}
        if got is not None:
            body |= {"status": got.status, **pack(self._clean(got.data)[:QUARANTINED])}
        await self.scribe.write(("outcome", attempt.key, body))

    def _pause(self, asked: float | None, number: int, fault: Fault) -> None:
        """Hold all workers for as long as the server asks, or for a backoff where the rate was too high."""
        if asked is None and not fault.limited:
            return
        jitter = backoff(number if asked is None else 0, self.settings.initial_backoff)
        self.gate.pause(jitter + (asked or 0.0))

    def _count(self, fault: Fault) -> None:
        """Count failures in a row, and raise where there are so many that asking on is no use."""
        self.straight += not fault.limited
        if self.straight >= SEVERAL:  # a server that is down is no reason to ask it one at a time
            self.alone = False
        if self.straight >= self.settings.max_consecutive_failures:
            what = f"{self.straight} failures in a row, the last: {fault.what}"
            fix = f"see to the server: {AGAIN}"
            raise DistillError(Exit.TEACHER, self.settings.model, what, fix)

    def _count_fruitless(self, what: str) -> None:
        """Count requests that brought no answer before any did; raise where they show that none will."""
        self.fruitless += not self.answered
        if self.fruitless == SEVERAL:
            what = f"none of the first {SEVERAL} requests brought an answer, the last: {what}"
            fix = f"see to the account, the server and the settings of the teacher: {AGAIN}"
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
