"""Answers by the makers' batch interfaces: cheaper, and within a day.

A job is recorded with the intents of its requests before anything is sent, then that it is about to
be submitted, then the server's name for it. So a kill leaves one of three: nothing was submitted,
and the requests are planned anew; it is not known, and the server's list of jobs is searched for
ours; or the job waits, and is collected first. What comes is stored as answers that were asked for
one by one are, under the same keys, and what a job leaves unanswered is asked again.
"""

import asyncio
import time
from collections import Counter
from decimal import Decimal
from functools import partial

from distill.errors import DistillError, Exit
from distill.records import digest
from distill.responders.endpoint.batch_jobs import Jobs, Result, counts_of, status_of
from distill.responders.endpoint.budget import NOTHING, Sending, most_dollars
from distill.responders.endpoint.client import AGAIN, EndpointClient
from distill.responders.endpoint.failures import Failure
from distill.responders.endpoint.network import Received
from distill.responders.endpoint.request_form import encode
from distill.responders.endpoint.wire import Row, object_of, objects_of, plain_message
from distill.responders.responder import Raw, Request, Sampling
from distill.responders.store import Job, attempt_key
from distill.storage.progress import say

MOST_REQUESTS = 50_000  # of a job, as OpenAI allows
MOST_BYTES = 64 << 20  # of a job: a third of what OpenAI allows, since it is held in memory
GRACE = 10.0  # seconds in which a submission whose reply was lost may still be under way
MONTH = 30 * 24 * 3600.0  # seconds, after which no maker keeps results

Sendings = dict[str, Sending]  # the requests of a job by the names that they have in it


class BatchClient(EndpointClient):
    """Buys answers by jobs, several at a time; each worker follows one to its end.

    Where `teacher.batch` is not set it only collects the jobs that wait.
    """

    async def buy(self) -> None:
        """Work until all is asked and collected, as far as the server has it."""
        self.price = self.price and self.price.in_batch()
        self.wanted = {request.id: request for request in self.requests}
        jobs = self.store.jobs()
        self.open = [job for job in jobs if not self.wanted.keys().isdisjoint(job.ids)]
        waiting = {  # what has failed in a job that is not collected to its end is asked again
            identifier
            for job in self.open
            for identifier, (_, _, number) in zip(job.ids, job.requests, strict=True)
            if self._lacks(identifier, number)
        }
        fresh = self.requests if self.settings.batch else ()
        self.queue = [request for request in fresh if request.id not in waiting]
        self.rounds, self.most = Counter[str](), MOST_REQUESTS
        self.running, self.idle, self.narrow = 0, asyncio.Event(), False
        self.jobs = Jobs(self)
        await super().buy()

    def _close(self, abandon: bool = False) -> None:
        super()._close(abandon)
        self.idle.set()

    async def _work(self) -> None:
        """Follow one job after the other until none is left or the gate closes."""
        while (following := await self._next()) is not None:
            self.running += 1
            try:
                await self._follow(*following)
            except Exception as error:
                self._halt(error)
            self.running -= 1
            self.idle.set()
            if self.narrow and self.running:
                return  # the account takes no more at once: another worker goes on

    async def _next(self) -> tuple[Job, Sendings, bool] | None:
        """Return a job that waits, or one of what limits and budget allow, and if it is new."""
        async with self.turn:
            if self.open and not self.gate.closed.is_set():
                return self._reopened(self.open.pop())
            while self.queue and await self.gate.wait():
                sendings, size, over = list[Sending](), 0, None
                for request in self.queue[: self.most]:
                    body = encode(request, self.settings)
                    size += len(body)
                    if sendings and size > MOST_BYTES:
                        break
                    most = most_dollars(self.price, len(body), request.sampling.max_new_tokens)
                    most = most or NOTHING
                    if not self.budget.reserve(most):
                        over = most
                        break
                    number = self.store.attempts_at(request.id)
                    sendings.append(Sending(request, number, body, most))
                if sendings:
                    del self.queue[: len(sendings)]
                    requests = [(s.request.key, s.request.sample, s.number) for s in sendings]
                    facts = {"model": self.settings.model, "run": self.run, "requests": requests}
                    facts["address"] = self.settings.base_urls[0]
                    job = Job.model_validate({"id": digest(facts), **facts})
                    intents = [
                        ("intent", s.key, self._intent(s) | {"batch": job.id}) for s in sendings
                    ]
                    await self.writer.write(("batch", job.id, facts), *intents)
                    return job, dict(zip(job.custom_ids, sendings, strict=True)), True
                # where the budget holds no further request, what is in flight is waited for first
                if not self.running and over is not None:
                    self._halt(self.budget.beyond(over))
                    return None
                self.idle.clear()
                await self.idle.wait()
        return None

    def _reopened(self, job: Job) -> tuple[Job, Sendings, bool]:
        """Return a job of an earlier process; what it may still cost is set aside again."""
        sendings: Sendings = {}
        for name, identifier, row in zip(job.custom_ids, job.ids, job.requests, strict=True):
            key, sample, number = row
            intent = self.store.get("intent", attempt_key(identifier, number)) or {}
            sampling = Sampling(max_new_tokens=intent.get("cap") or 0)
            request = Request(key=key, sample=sample, prompt_id="", messages=(), sampling=sampling)
            most = Decimal(intent.get("most") or 0) if intent.get("run") == self.run else NOTHING
            body = b" " * intent.get("question", 0)  # of which the length counts
            if self._lacks(identifier, number):
                self.budget.reserved += most
                if self.budget.limit is not None:  # else what went before was not read
                    self.budget.unknown -= most
            sendings[name] = Sending(self.wanted.get(identifier, request), number, body, most)
        return job, sendings, False

    def _lacks(self, identifier: str, number: int) -> bool:
        """Tell whether an attempt at a request has neither an answer nor an outcome."""
        key, bill = attempt_key(identifier, number), self.store.bill(identifier)
        ended = ("outcome", key) in self.store or ("response", key) in self.store
        return not ended and (bill is None or bill.attempt != number)

    async def _follow(self, job: Job, sendings: Sendings, fresh: bool) -> None:
        """Submit a job or find it again, wait for its end, and store what came."""
        name, model = job.name, self.settings.model
        if name is None:
            if fresh:
                name = await self._submit(job, sendings)
            elif job.sent is not None:
                name = await self._find(job, sendings)
            if name is None:
                if not self.gate.closed.is_set():
                    await self._give_up(job, sendings, "the job was not submitted", "no")
                return
            await self.writer.write(("batch_name", job.id, {"name": name}))
            job = job.model_copy(update={"name": name, "sent": job.sent or time.time()})
        row = await self.jobs.ended(name, job.line())
        if row is None:
            say(f"{model}: job {name} goes on at the server: {AGAIN}")
        elif row:
            await self._finish(job, sendings, row)
        elif time.time() - (job.sent or 0) < MONTH:
            what, fix = f"job {name} is not known there", f"use the key of then: {AGAIN}"
            raise DistillError(Exit.TEACHER, model, what, fix)
        else:
            await self._give_up(job, sendings, f"job {name} is gone", "unknown")

    async def _finish(self, job: Job, sendings: Sendings, row: Row) -> None:
        """Store the results of a job that has ended, and say what became of those without one."""
        lost = list[str]()
        await self._collect(row, sendings, lost)
        if lost:  # nothing is paid again unasked: the next job's results may go the same way
            await self._give_up(job, sendings, lost[0], "unknown", again=False)
            what, fix = f"results are lost: {lost[0]}", f"see to the server: {AGAIN}"
            raise DistillError(Exit.TEACHER, self.settings.model, what, fix)
        status, errors = status_of(row), row.get("errors")
        if status == "failed":  # as a whole
            errors = objects_of(errors.get("data") if isinstance(errors, dict) else errors)
            first = errors[0] if errors else {}
            if first.get("code") != "token_limit_exceeded" or len(sendings) == 1:
                what = f"the job failed: {plain_message(first) or 'no reason given'}"
                await self._give_up(job, sendings, what, "no", again=False)
                fix = f"see to what it says: {AGAIN}"
                raise DistillError(Exit.TEACHER, self.settings.model, what, fix)
            # more than the account takes at once: smaller ones, one at a time
            self.narrow, self.most = True, max(1, len(sendings) // 2)
            self.rounds.subtract(sending.request.id for sending in sendings.values())
        billed = "unknown" if status in ("completed", "ended") else "no"
        await self._give_up(job, sendings, f"the job is {status}, without a result", billed)

    async def _submit(self, job: Job, sendings: Sendings) -> str | None:
        """Upload a job's requests and submit it; return the server's name for it."""
        jobs, lines = self.jobs, [self.jobs.line(name, s.body) for name, s in sendings.items()]
        try:
            file = await jobs.upload(job.id, lines)
            await self.writer.write(("batch_sent", job.id, {"file": file, "at": time.time()}))
            find = partial(self._find, job.model_copy(update={"file": file}), sendings)
            body = jobs.submission(job.id, lines, file)
            name = (await jobs.call("POST", jobs.path, body, find=find)).get("id")
            return str(name) if name else None
        except DistillError as error:
            if not self.gate.closed.is_set():  # else it may be there: the next go looks
                await self._give_up(job, sendings, error.what, "no", again=False)
            raise

    async def _find(self, job: Job, sendings: Sendings) -> str | None:
        """Return the server's name for a job that may have been submitted, None if it was not."""
        await self.gate.sleep(GRACE)  # what was sent may still be under way
        names = self.store.keys("batch_name")
        others = {(self.store.get("batch_name", key) or {}).get("name") for key in names}
        try:
            async for row in self.jobs.listed():
                name = str(row.get("id"))
                ours = object_of(row.get("metadata")).get("distill") == job.id
                ours = ours or (bool(job.file) and row.get("input_file_id") == job.file)
                if self.jobs.anthropic and name not in others:
                    alike = sum(counts_of(row).values()) == len(sendings)
                    if alike and (ended := await self.jobs.ended(name, job.line())):
                        ours = await self._collect(ended, sendings, [])
                if ours:
                    return name
        except DistillError as error:
            self._halt(error)
        return None

    async def _collect(self, row: Row, sendings: Sendings, lost: list[str]) -> bool:
        """Store the results of a job that has ended, some with each fsync; tell if any is ours."""
        any_ours = False
        async for results in self.jobs.results(row, lost):
            # of two for one request an answer counts before an error
            results.sort(key=lambda result: result.status != 200, reverse=True)
            ours = {r.custom_id: r for r in results if r.custom_id in sendings}
            pairs = [(sendings[name], result) for name, result in ours.items()]
            lacking = [pair for pair in pairs if self._lacks(pair[0].request.id, pair[0].number)]
            await asyncio.gather(*(self._store(*pair) for pair in lacking))
            any_ours = any_ours or bool(ours)
        return any_ours

    async def _store(self, sending: Sending, result: Result) -> None:
        """Deal with a result as with a reply to a request that was sent alone."""
        received = Received(failure=Failure("the job ended before it", "retry"))
        if result.status is not None:
            received = Received.of(result.status, result.data, sending.body)
        failure = received.failure
        try:
            if failure is None:
                await self._keep(sending, received, 0.0)
            else:
                await self._fail(sending, received, failure)
        except DistillError as error:  # the other results are stored first
            self._halt(error)
        self.patience.in_a_row = 0  # a file of errors is no row of failures
        if failure and failure.scope == "retry":
            self._ask_again(sending, failure.what)

    async def _give_up(
        self, job: Job, sendings: Sendings, what: str, billed: str, again: bool = True
    ) -> None:
        """Record what became of a job's requests that have no result, and that it has ended."""
        lacking = [s for s in sendings.values() if self._lacks(s.request.id, s.number)]
        outcome, end = {"what": what, "billed": billed}, ("batch_end", job.id, {"what": what})
        await self.writer.write(*(("outcome", s.key, outcome) for s in lacking), end)
        for sending in lacking:
            unknown = sending.reserved if billed == "unknown" else NOTHING
            self.budget.settle(sending.reserved, NOTHING, unknown)
            if again:
                self._ask_again(sending, what)

    def _ask_again(self, sending: Sending, what: str) -> None:
        """Put a request into the next job, until the retries are used up."""
        request = self.wanted.get(sending.request.id)
        if request is None or not self.settings.batch:
            return
        self.rounds[request.id] += 1
        if self.rounds[request.id] > self.settings.max_retries:
            self.results.put(Raw.failed(request, what, self.settings.model))
        else:
            self.queue.append(request)
