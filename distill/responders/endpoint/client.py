"""One go at buying answers: workers that share a gate, a pace, a budget, replicas and a store.

The order for every attempt: reserve its maximum, store its intent, send it, store what came, read
it, settle. One that brings no answer gets an outcome record, which says whether it may be billed.
The first answer of a run is awaited alone, and its bill held against the price.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from decimal import ROUND_UP, Decimal
from itertools import chain
from typing import TYPE_CHECKING

from distill.errors import DistillError, Exit
from distill.records import Usage, digest
from distill.responders.endpoint.budget import (
    APART,
    NOTHING,
    Budget,
    Sending,
    account,
    charge,
    most_dollars,
)
from distill.responders.endpoint.failures import Failure, of_scoring
from distill.responders.endpoint.network import Received, Sender
from distill.responders.endpoint.rate_limits import SEVERAL, Gate, Patience, backoff, stated_wait
from distill.responders.endpoint.request_form import encode, path
from distill.responders.endpoint.wire import Reply, cut_prompt, pack
from distill.responders.responder import Raw, Request, Scoring
from distill.responders.store import ResponseStore, holds_answer
from distill.responders.token_counts import least_tokens
from distill.storage.log import LogWriter
from distill.storage.progress import say

if TYPE_CHECKING:
    from distill.responders.endpoint.endpoint import EndpointResponder

QUARANTINED = 64 << 10  # bytes stored of a body that is no answer
LIMITED = 3  # times teacher.max_pause, without an answer, until limits end the run
REST = 15.0  # seconds that a dead address is left out
AGAIN = "the same command continues"


class EndpointClient:
    """Buys the answers to `requests`; `results` gives them once stored, and ends with None."""

    def __init__(
        self, responder: "EndpointResponder", requests: Sequence[Request], store: ResponseStore
    ) -> None:
        self.settings = settings = responder.settings
        self.key, self.price, self.run = responder.key, responder.price, responder.run
        self.origin, self.requests, self.store = responder.origin, requests, store
        self.capped = "max_tokens" not in settings.omit
        self.results: queue.SimpleQueue[Raw | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self.budget = Budget(None)
        if settings.budget_dollars is not None:  # else the store need not be read through
            before = account(store, {settings.model: self.price}, self.run)
            self.budget = Budget(settings.budget_dollars, before.settled, before.unknown_most)
        # of each address: the requests in flight, and until when it is left out
        self.busy, self.out = (dict.fromkeys(settings.base_urls, start) for start in (0, 0.0))
        facts = self.price and self.price.model_dump(mode="json")
        self.check = digest({"origin": self.origin, "run": self.run, "price": facts})
        checked = store.get("checked", self.check)
        self.alone = checked is None  # until an answer's bill has been held against the price
        self.dearest = Decimal(checked["dearest"]) if checked else Decimal(1)
        answered = checked is not None or ("model", self.origin) in store
        longest = LIMITED * settings.max_pause
        self.patience = Patience(settings.max_consecutive_failures, answered, longest)
        self.before = set[str]()  # ids of what was asked in an earlier go
        self.unsent: str | None = ""  # why no request has been sent; None once one was
        self.noted = set[tuple[str, str]]()  # what is said once
        self.last = time.monotonic()
        self.ready = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.workers: list[asyncio.Task[None]] = []

    def run_in_thread(self) -> Generator[Raw, None, None]:
        """Yield what became of the requests; raises the DistillError that ends the run.

        When the caller stops, or Ctrl-C comes, nothing more is sent, and what is in flight is
        waited for and stored; a second Ctrl-C leaves it.
        """

        def work() -> None:
            try:
                asyncio.run(self.buy())
            except BaseException as error:  # handed to the thread that asked, which raises it
                self.error = self.error or error
            finally:
                self.ready.set()
                self.results.put(None)

        thread = threading.Thread(target=work, name="buy", daemon=True)
        thread.start()
        try:
            yield from iter(self.results.get, None)
        finally:
            self.stop()
            thread.join(0.2)
            if thread.is_alive():
                say(f"waiting up to {self.settings.drain_timeout:.0f} s for answers in flight")
            try:
                thread.join()
            except KeyboardInterrupt:
                self.stop(abandon=True)
                thread.join(5)
                raise
        if self.error:
            raise self.error

    def stop(self, abandon: bool = False) -> None:
        """Send nothing more; `abandon` leaves what is in flight, with its outcomes unknown."""
        self.ready.wait()
        with suppress(RuntimeError):  # the loop has ended
            if self.loop is not None:
                self.loop.call_soon_threadsafe(self._close, abandon)

    def _close(self, abandon: bool = False) -> None:
        """Let the workers end, and cancel those that have not within drain_timeout."""
        self.gate.closed.set()
        self.freed.set()
        for worker in self.workers:
            seconds = 0 if abandon else self.settings.drain_timeout
            asyncio.get_running_loop().call_later(seconds, worker.cancel)

    def _halt(self, error: BaseException) -> None:
        """End the run because of the first error; what is in flight is still waited for."""
        self.error = self.error or error
        self._close()

    async def buy(self) -> None:
        """Work until all is asked; once the gate is closed, wait no longer than drain_timeout."""
        self.gate = Gate(self.settings.requests_per_minute, self.settings.tokens_per_minute)
        self.writer = LogWriter(self.store)
        self.freed = asyncio.Event()  # set where dollars that were set aside are settled
        self.turn = asyncio.Lock()  # of those that are sent alone
        self.loop = asyncio.get_running_loop()
        width = min(self.settings.concurrency, len(self.requests))
        self.sender = Sender(self.settings, self.key, width)
        # the first are spread over all: where they are refused, it is not for being alike
        apart = 1 if self.patience.answered else max(1, -(-len(self.requests) // SEVERAL))
        others = (request for n, request in enumerate(self.requests) if n % apart)
        self.todo = chain(self.requests[::apart], others)
        async with self.sender.http:
            self.workers = [asyncio.create_task(self._work()) for _ in range(width)]
            self.ready.set()
            await asyncio.gather(*self.workers, return_exceptions=True)
        await self.writer.finished()
        if self.unsent and not self.error:
            what = f"none of {len(self.requests)} requests could be sent: {self.unsent}"
            fix = f"see to the server and to teacher.base_url: {AGAIN}"
            raise DistillError(Exit.TEACHER, self.settings.base_urls[0], what, fix)

    async def _work(self) -> None:
        """Take one request after the other until none is left or the gate closes."""
        for request in self.todo:
            try:
                await self._answer(request)
            except Exception as error:
                self._halt(error)
            if self.gate.closed.is_set():
                return

    async def _answer(self, request: Request) -> None:
        """Ask until there is an answer, the item is refused, or the retries are used up."""
        body, number = encode(request, self.settings), self.store.attempts_at(request.id)
        failure = None
        if number:
            self.before.add(request.id)
        for attempt in range(number, number + self.settings.max_retries + 1):
            async with self.turn:
                if alone := self.alone:  # no bill was checked while it waited
                    failure = await self._attempt(request, attempt, body)
            if not alone:
                failure = await self._attempt(request, attempt, body)
            if failure is None or failure.scope == "item":
                return
            if not failure.limited:  # a pause for all was set where the rate was too high
                await self.gate.sleep(backoff(attempt - number, self.settings.initial_backoff))
        if failure:  # it is not stored, so the next go asks again
            self.results.put(Raw.failed(request, failure.what, self.settings.model))

    async def _attempt(self, request: Request, number: int, body: bytes) -> Failure | None:
        """Wait for pauses, for the pace and for the budget, and send unless the gate closes."""
        cap, budget = request.sampling.max_new_tokens, self.budget
        await self.gate.wait()
        await self.gate.sleep(self.gate.take(len(body) // 4 + cap))
        if not await self.gate.wait():
            return None
        # more than the maximum where an answer has cost more: others may as well
        reserved = (most_dollars(self.price, len(body), cap) or NOTHING) * self.dearest
        # what does not fit yet waits for what is in flight
        while not self.gate.closed.is_set() and not budget.reserve(reserved):
            if not budget.reserved:
                self._halt(budget.beyond(reserved))
                return None
            self.freed.clear()
            await self.freed.wait()
        if self.gate.closed.is_set():
            return None
        return await self._send(Sending(request, number, body, reserved))

    async def _send(self, sending: Sending) -> Failure | None:
        """Store the intent, send, and deal with what comes; return the failure if there is one."""
        await self.writer.write(("intent", sending.key, self._intent(sending)))
        if self.gate.closed.is_set():
            outcome = {"what": "not sent", "billed": "no"}
            await self.writer.write(("outcome", sending.key, outcome))
            return None
        started, busy = time.monotonic(), self.busy
        # the least busy that is not left out, else the one that comes back first
        address = min(busy, key=lambda one: (max(0.0, self.out[one] - started), busy[one]))
        busy[address] += 1
        try:
            received = await self.sender.send(address + path(self.settings), sending.body)
        finally:
            busy[address] -= 1
        failure = received.failure
        self.out[address] = time.monotonic() + REST if failure and failure.replica else 0.0
        if failure is None:
            self.unsent = None
            await self._keep(sending, received, time.monotonic() - started)
            return None
        if received.status is not None or failure.billed != "no":
            self.unsent = None
        elif self.unsent is not None:
            self.unsent = failure.what
        if isinstance(sending.request, Scoring):
            failure = of_scoring(failure)
        if failure.scope == "retry" and self._first("address", address):
            say(f"{address}: {failure.what}; asking again")
        await self._fail(sending, received, failure, started)
        return failure

    def _first(self, kind: str, what: str) -> bool:
        """Tell whether this is met for the first time, so that it is said once."""
        first = (kind, what) not in self.noted
        self.noted.add((kind, what))
        return first

    def _intent(self, sending: Sending) -> dict[str, object]:
        """Return what is stored before a request is sent: who pays, the maximum, the tokens."""
        return {
            "model": self.settings.model,
            "run": self.run,
            "most": str(sending.reserved) if self.price else None,
            "question": len(sending.body),
            "cap": sending.request.sampling.max_new_tokens if self.capped else None,
            "at": round(time.time(), 3),
        }

    async def _keep(self, sending: Sending, received: Received, seconds: float) -> None:
        """Store an answer, then read it and settle its cost."""
        request, model, now = sending.request, self.settings.model, time.monotonic()
        body = {
            "status": received.status,
            "attempt": sending.number,
            "question": len(sending.body),
            "seconds": round(seconds, 4),
            **pack(received.data[:QUARANTINED] if received.cut else received.data),
        }
        if received.cut:
            body["cut"] = received.cut
        if not isinstance(request, Scoring):  # tokens: of the answer at most, read at least
            body |= {"cap": request.sampling.max_new_tokens} if self.capped else {}
            body["least"] = least_tokens(request, model)
        # since the answer before, so that their sum is the time that passed
        usage, self.last = Usage(seconds=round(now - self.last, 4)), now
        raw = Raw(
            key=request.key, sample=request.sample, model=model, stop=None, usage=usage, body=body
        )
        # the id may be taken by an earlier reply that held no answer
        key = sending.key if ("response", request.id) in self.store else request.id
        await self.writer.write(("response", key, raw.model_dump(mode="json")))
        self.store.remember(key, raw)
        reply = raw.reply
        if isinstance(request, Scoring):  # long to read
            bill = reply.model_dump(mode="json", include={"stop", "usage", "dollars"})
            await self.writer.write(("usage", sending.key, bill))
        plausible = self._settle(sending, reply)
        self.results.put(raw)
        if cut := cut_prompt(reply.usage, body.get("least")):
            fix = (
                "give it a longer context (Ollama: OLLAMA_CONTEXT_LENGTH) or lower"
                " corpus.chunk.max_chars, then run again with --redo generate"
            )
            raise DistillError(Exit.TEACHER, model, cut, fix)
        scored = isinstance(request, Scoring) and reply.stop != "error"  # its token may be no text
        if not scored and not holds_answer(reply):
            self._count(request, reply.error or "an answer without text")
            return
        self.patience.answered, self.patience.in_a_row = True, 0
        if self.alone and plausible:
            self.alone = False
            await self.writer.write(("checked", self.check, {"dearest": str(self.dearest)}))
        if reply.model is None or not self._first("model", reply.model):
            return
        await self.writer.write(("model", self.origin, {"reported": reply.model}))
        before = (self.store.get("model", self.origin) or {}).get("reported")
        if self.settings.strict_model and reply.model != model:
            what, fix = f"{reply.model} answered for {model}", "name it, or unset strict_model"
            raise DistillError(Exit.TEACHER, "teacher.strict_model", what, fix)
        if reply.model != before:
            say(f"warning: the teacher's model is now {reply.model}, it was {before}")

    def _settle(self, sending: Sending, reply: Reply) -> bool:
        """Settle what was set aside; return whether the bill is plausible, and the run goes on."""
        model = self.settings.model
        cost = charge(self.price, reply, self._intent(sending))
        perhaps = sending.reserved if cost.perhaps is None else cost.perhaps
        self.budget.settle(sending.reserved, cost.paid or NOTHING, perhaps)
        self.freed.set()
        kind = cost.doubt.partition(" ")[0]
        if kind not in ("", "answered") and self._first("doubt", kind):
            say(f"warning: {model}: an answer {cost.doubt}")
        most = most_dollars(self.price, len(sending.body), sending.request.sampling.max_new_tokens)
        claim, bounded = cost.claim or NOTHING, most if self.capped else None
        if self.budget.exceeded() or (bounded is not None and claim > bounded * APART):
            what = f"an answer cost ${claim:.4g}, more than its maximum of ${most or NOTHING:.4g}"
            what = f"{what}: it {cost.doubt}" if "maximum" not in cost.doubt else what
            fix = (
                "see to the server, correct the price table (evaluation.prices), or raise"
                " teacher.max_new_tokens where it counts its reasoning beside the answer"
            )
            self._halt(DistillError(Exit.BUDGET, model, what, fix))
            return False
        if bounded:  # rounded: what is reserved and released comes out even
            times = (claim / bounded).quantize(Decimal("0.001"), ROUND_UP)
            self.dearest = max(self.dearest, times)
        return True

    async def _fail(
        self, sending: Sending, received: Received, failure: Failure, started: float = 0.0
    ) -> None:
        """Store how an attempt failed, and do what that means for item, workers and run."""
        settings, heeded = self.settings, failure.limited or received.status == 503
        wait = stated_wait(received.headers, received.data) if heeded else None
        if wait is not None or failure.limited:  # at once: the other workers are about to send
            retries = sending.number if wait is None else 0
            self.gate.pause(backoff(retries, settings.initial_backoff) + (wait or 0.0))
        outcome: dict[str, object] = {"what": failure.what, "billed": failure.billed}
        if received.status is not None:
            outcome |= {"status": received.status, **pack(received.data[:QUARANTINED])}
        await self.writer.write(("outcome", sending.key, outcome))
        unknown = NOTHING if failure.billed == "no" else sending.reserved
        self.budget.settle(sending.reserved, NOTHING, unknown)
        self.freed.set()
        if failure.scope == "run":
            raise DistillError(Exit.TEACHER, settings.model, failure.what, failure.fix)
        if failure.scope == "item":
            self.results.put(Raw.failed(sending.request, failure.what, settings.model))
        if wait is not None and wait > settings.max_pause:
            what = f"asks to wait {wait:,.0f} s ({failure.what})"
            fix = f"run again then, or raise teacher.max_pause: {AGAIN}"
            raise DistillError(Exit.TEACHER, settings.model, what, fix)
        may_pass = failure.scope == "retry" and not failure.hollow
        pause = None if not may_pass else 0.0 if failure.limited else 2 * settings.initial_backoff
        self._count(sending.request, failure.what, sent=started, pause=pause)
        if self.patience.in_a_row >= SEVERAL:
            # one that is down need not be asked one at a time; one that limits all is, until it
            # answers
            self.alone = failure.limited

    def _count(
        self, request: Request, what: str, sent: float = 0, pause: float | None = None
    ) -> None:
        """Count a failure; raise where the server has failed too often."""
        if given_up := self.patience.failed(request.id in self.before, sent, pause):
            what = f"{given_up}, the last: {what}"
            fix = f"see to the account, the server and the settings of the teacher: {AGAIN}"
            raise DistillError(Exit.TEACHER, self.settings.model, what, fix)
