"""Answers by the makers' batch interfaces: cheaper, and within a day.

A job is recorded with the intents of its requests before anything is sent, then that it is about to
be submitted, then the server's name for it. So a kill leaves one of three: nothing was submitted,
and the requests are planned anew; it is not known, and the server's list of jobs is searched for
ours; or the job waits. What comes is stored as answers that were asked for one by one are, under
the same keys, and what a job leaves unanswered is asked again. A job that waits is collected before
anything else is bought, also where `teacher.batch` has been unset since.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from itertools import count
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx2

from distill.config.teachers import EndpointTeacher
from distill.errors import DistillError, Exit
from distill.records import canonical, digest
from distill.responders.endpoint.budget import NOTHING, most_dollars
from distill.responders.endpoint.client import AGAIN, EndpointClient, Sending
from distill.responders.endpoint.rate_limits import backoff, retry_after
from distill.responders.endpoint.transport import (
    Failure,
    Received,
    broken,
    classify,
    encode,
)
from distill.responders.endpoint.wire import load_json, plain_message
from distill.responders.endpoint.wires import is_answer, wire_of
from distill.responders.prices import TokenPrice
from distill.responders.responder import Raw, Request, Sampling
from distill.responders.store import Job, ResponseStore, attempt_key
from distill.storage.progress import PLAIN_SECONDS, say

MOST_REQUESTS = 50_000  # of a job, as OpenAI allows
MOST_BYTES = 64 << 20  # of a job: a third of what OpenAI allows, since it is held in memory
TOGETHER = 64  # results that are stored with one fsync
PATIENCE = 100  # attempts to look at a job, which goes on meanwhile
GRACE = 10.0  # seconds in which a submission whose reply was lost may still be under way
HOUR = 3600.0  # seconds
KEPT_DAYS = 30  # after which no maker keeps results
STATUSES = {  # of a request that was sent alone, by the types of Anthropic's errors
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "overloaded_error": 529,
}
NO_INTERFACE = (404, 405, 501)


class Result(NamedTuple):
    """What became of one request of a job; without a status it was not executed."""

    custom_id: str
    status: int | None
    data: bytes
    what: str = ""


class Jobs:
    """OpenAI's form (https://platform.openai.com/docs/api-reference/batch).

    Azure, Groq, Together, Novita and Cerebras have it too.
    """

    path, after = "/batches", "after"
    uploads = True
    ended = frozenset({"completed", "failed", "expired", "cancelled", "canceled"})

    def __init__(self, path: str) -> None:
        self.url = f"/v1{path}"  # what each request of a job goes to

    def line(self, custom_id: str, body: bytes) -> bytes:
        """Return a request as a job holds it."""
        url = self.url
        row = {"custom_id": custom_id, "method": "POST", "url": url, "body": json.loads(body)}
        return canonical(row)

    def upload(self, job: str, lines: Sequence[bytes]) -> tuple[str, bytes]:
        """Return the content type and the bytes of a form that uploads requests."""
        head = 'content-disposition: form-data; name="%s"%s\r\n\r\n'
        file = f'; filename="distill-{job}.jsonl"\r\ncontent-type: application/jsonl'
        parts = [
            f"--{job}\r\n{head % ('purpose', '')}batch\r\n",
            f"--{job}\r\n{head % ('file', file)}",
        ]
        end = f"\r\n--{job}--\r\n".encode()
        return f"multipart/form-data; boundary={job}", "".join(parts).encode() + b"\n".join(
            lines
        ) + end

    def submission(self, job: str, lines: Sequence[bytes], file: str) -> bytes:
        """Return the body that makes a job of an uploaded file."""
        row = {"input_file_id": file, "endpoint": self.url, "completion_window": "24h"}
        return canonical(row | {"metadata": {"distill": job}})

    def status(self, row: dict[str, Any]) -> str:
        """Return how far a job is; some write it in capitals."""
        return str(row.get("status", "")).lower()

    def progress(self, row: dict[str, Any]) -> str:
        """Return in a few words how far a job is."""
        counts = _counts(row)
        return f"{self.status(row)}, {counts.get('completed', 0)} of {counts.get('total', 0)} done"

    def refusal(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return the code and the words with which a job was refused as a whole."""
        errors = row.get("errors")
        rows = errors.get("data") if isinstance(errors, dict) else errors
        first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
        return str(first.get("code", "")), plain_message(first) or "no reason given"

    def results(self, row: dict[str, Any]) -> list[str]:
        """Return the paths of an ended job's results."""
        files = (row.get(name) for name in ("output_file_id", "error_file_id"))
        return [f"/files/{quote(str(file), safe='')}/content" for file in files if file]

    def read(self, line: bytes) -> Result:
        """Read a line of the results; raises ValueError where it is none."""
        row = _object(line)
        name, response, error = str(row.get("custom_id")), row.get("response"), row.get("error")
        if isinstance(response, dict):
            status = response.get("status_code")
            body = canonical(response.get("body"))
            return Result(name, status if isinstance(status, int) else 500, body)
        code = str(error.get("code") if isinstance(error, dict) else "")
        what = plain_message(error) or code or "without a reason"
        untouched = code in ("batch_expired", "batch_cancelled", "batch_canceled")
        return Result(name, None if untouched else 500, canonical({"error": error}), what)

    def is_ours(self, row: dict[str, Any], job: Job) -> bool | None:
        """Tell whether a job in the server's list is this one; None: its results will say."""
        metadata = row.get("metadata")
        marked = isinstance(metadata, dict) and metadata.get("distill") == job.id
        return marked or (bool(job.file) and row.get("input_file_id") == job.file)


class MessageJobs(Jobs):
    """Anthropic's form (https://docs.anthropic.com/en/api/creating-message-batches).

    Its jobs carry no mark: one whose name was lost is known by its results.
    """

    after, uploads, ended = "after_id", False, frozenset({"ended"})

    def __init__(self, path: str) -> None:
        self.path = f"{path}/batches"

    def line(self, custom_id: str, body: bytes) -> bytes:
        """Return a request as a job holds it."""
        return canonical({"custom_id": custom_id, "params": json.loads(body)})

    def submission(self, job: str, lines: Sequence[bytes], file: str) -> bytes:
        """Return the body that makes a job."""
        return b'{"requests":[%s]}' % b",".join(lines)

    def status(self, row: dict[str, Any]) -> str:
        """Return how far a job is."""
        return str(row.get("processing_status", ""))

    def progress(self, row: dict[str, Any]) -> str:
        """Return in a few words how far a job is."""
        left, total = _counts(row).get("processing", 0), sum(_counts(row).values())
        return f"{self.status(row)}, {total - left} of {total} done"

    def results(self, row: dict[str, Any]) -> list[str]:
        """Return the path of an ended job's results, at the address that has our key."""
        return [f"{self.path}/{quote(str(row.get('id')), safe='')}/results"]

    def read(self, line: bytes) -> Result:
        """Read a line of the results; raises ValueError where it is none."""
        row = _object(line)
        name, result = str(row.get("custom_id")), row.get("result")
        result = result if isinstance(result, dict) else {}
        kind, error = str(result.get("type")), result.get("error")
        if kind == "succeeded":
            return Result(name, 200, canonical(result.get("message")))
        if kind in ("expired", "canceled"):
            return Result(name, None, b"", kind)
        inner = error.get("error") if isinstance(error, dict) else None
        status = STATUSES.get(str(inner.get("type")), 500) if isinstance(inner, dict) else 500
        return Result(name, status, canonical(error))

    def is_ours(self, row: dict[str, Any], job: Job) -> bool | None:
        """Return None where a job is of the size and the time of this one, which may be it."""
        try:
            made = datetime.fromisoformat(str(row.get("created_at"))).timestamp()
        except ValueError:
            made = job.sent or 0
        near = -HOUR < made - (job.sent or 0) < HOUR
        return None if near and sum(_counts(row).values()) == len(job.requests) else False


class Following(NamedTuple):
    """A job, its requests by the names that they have in it, and, of a new one, its lines."""

    job: Job
    sendings: dict[str, Sending]
    lines: Sequence[bytes] = ()


class BatchClient(EndpointClient):
    """Buys answers by jobs, several at a time; each worker follows one to its end.

    Where `teacher.batch` is not set it only collects the jobs that wait.
    """

    def __init__(
        self,
        settings: EndpointTeacher,
        key: str | None,
        price: TokenPrice | None,
        run: str | None,
        requests: Sequence[Request],
        store: ResponseStore,
    ) -> None:
        super().__init__(settings, key, price, run, requests, store)
        self.price = price and price.in_batch()
        form = MessageJobs if settings.form == "anthropic" else Jobs
        self.form = form(wire_of(settings).path(settings).partition("?")[0])
        self.address = settings.base_urls[0]
        self.requests = {request.id: request for request in requests}
        self.open = [job for job in store.jobs() if not self.requests.keys().isdisjoint(job.ids)]
        waiting = {  # what has failed in a job that is not collected to its end is asked again
            identifier
            for job in self.open
            for identifier, (_, _, number) in zip(job.ids, job.requests, strict=True)
            if not self._has_ended(identifier, number)
        }
        self.queue = [r for r in requests if settings.batch and r.id not in waiting]
        self.rounds, self.most = Counter[str](), MOST_REQUESTS
        self.running, self.idle, self.narrow, self.told = 0, asyncio.Event(), False, 0.0

    def _close(self) -> None:
        super()._close()
        self.idle.set()

    async def _work(self) -> None:
        """Follow one job after the other until none is left or the gate closes."""
        while (following := await self._next()) is not None:
            self.running += 1
            try:
                await self._follow(following)
            except Exception as error:
                self._halt(error)
            self.running -= 1
            self.idle.set()
            if self.narrow and self.running:
                return  # the account takes no more at once: another worker goes on

    async def _next(self) -> Following | None:
        """Return a job that waits, or a new one of what the limits and the budget allow, recorded.

        Where the budget does not hold all that is left, what is in flight is waited for first.
        """
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
                    if most is not None and not self.budget.reserve(most):
                        over = most
                        break
                    number = self.store.attempts_at(request.id)
                    sendings.append(Sending(request, number, body, most or NOTHING))
                if over is None or (sendings and not self.running):
                    del self.queue[: len(sendings)]
                    return await self._recorded(sendings)
                for sending in sendings:
                    self.budget.settle(sending.reserved, NOTHING)
                if not self.running:
                    self._halt(self.beyond(over))
                    return None
                self.idle.clear()
                await self.idle.wait()
        return None

    async def _recorded(self, sendings: Sequence[Sending]) -> Following:
        """Record a new job with the intents of its requests."""
        rows = [(s.request.key, s.request.sample, s.number) for s in sendings]
        body = {"model": self.settings.model, "run": self.run, "address": self.address}
        body["requests"] = rows
        job = Job.model_validate({"id": digest(body), **body})
        intents = [("intent", s.key, self._intent(s) | {"batch": job.id}) for s in sendings]
        await self.writer.write(("batch", job.id, body), *intents)
        named = dict(zip(job.custom_ids, sendings, strict=True))
        lines = [self.form.line(name, s.body) for name, s in named.items()]
        return Following(job, named, lines)

    def _reopened(self, job: Job) -> Following:
        """Return a job of an earlier process; what it may still cost is set aside again."""
        named = dict[str, Sending]()
        for name, identifier, row in zip(job.custom_ids, job.ids, job.requests, strict=True):
            key, sample, number = row
            intent = self.store.get("intent", attempt_key(identifier, number)) or {}
            sampling = Sampling(max_new_tokens=intent.get("cap") or 0)
            request = Request(key=key, sample=sample, prompt_id="", messages=(), sampling=sampling)
            most = Decimal(intent.get("most") or 0) if intent.get("run") == self.run else NOTHING
            body = b" " * intent.get("question", 0)  # of which the length counts
            sending = Sending(self.requests.get(identifier, request), number, body, most)
            if self._lacks(sending):
                self.budget.reserved += most
                if self.budget.limit is not None:  # else what went before was not read
                    self.budget.unknown -= most
            named[name] = sending
        return Following(job, named)

    def _has_ended(self, identifier: str, number: int) -> bool:
        """Tell whether an attempt at a request has an answer or an outcome."""
        key = attempt_key(identifier, number)
        if ("outcome", key) in self.store or ("response", key) in self.store:
            return True
        bill = self.store.bill(identifier)
        return bill is not None and bill.attempt == number

    def _lacks(self, sending: Sending) -> bool:
        return not self._has_ended(sending.request.id, sending.number)

    async def _follow(self, following: Following) -> None:
        """Submit a job or find it again, wait for its end, and store what came."""
        job = following.job
        if job.name is None:
            if following.lines:
                name = await self._submit(following)
            else:
                name = await self._find(following) if job.sent is not None else None
            if name is None:
                if not self.gate.closed.is_set():
                    await self._give_up(following, "the job was not submitted", "no")
                return
            await self.writer.write(("batch_name", job.id, {"name": name}))
            job = job.model_copy(update={"name": name, "sent": job.sent or time.time()})
        self._tell(job, "submitted", now=True)
        row = await self._ended(job, str(job.name))
        if row is None and not self.gate.closed.is_set():
            if time.time() - (job.sent or 0) < KEPT_DAYS * 24 * HOUR:
                what, fix = f"job {job.name} is not known there", f"use the key of then: {AGAIN}"
                raise DistillError(Exit.TEACHER, self.address, what, fix)
            await self._give_up(following, f"job {job.name} is gone", "unknown")
        elif row is None:
            say(f"{self.settings.model}: job {job.name} goes on at the server: {AGAIN}")
        else:
            await self._collect(following, row)

    async def _ended(self, job: Job, name: str) -> dict[str, Any] | None:
        """Return a job's row once it has ended; None where nothing is there, or the gate closes."""
        path = f"{self.form.path}/{quote(name, safe='')}"
        for look in count():
            received = await self._insist("GET", path, tries=PATIENCE, but=404)
            row = {} if received.failure else _object(received.data)
            if self.form.status(row) in self.form.ended:
                return row
            if received.failure or self.gate.closed.is_set():
                return None
            self._tell(job, self.form.progress(row))
            await self.gate.sleep(backoff(look, self.settings.initial_backoff))
        return None

    async def _submit(self, following: Following) -> str | None:
        """Upload a job's requests and submit it; return the server's name for it.

        A submission whose outcome is not known is searched for before it is made again.
        """
        job, form, file = following.job, self.form, ""
        try:
            if form.uploads:
                kind, content = form.upload(job.id, following.lines)
                file = str(
                    _object((await self._insist("POST", "/files", content, kind)).data)["id"]
                )
        except (DistillError, KeyError):
            await self._give_up(following, "not submitted", "no", again=False)
            raise
        for retry in count():
            now = {"file": file, "at": round(time.time(), 3)}
            await self.writer.write(("batch_sent", job.id, now))
            body = form.submission(job.id, following.lines, file)
            received = await self._exchange("POST", form.path, body)
            failure = received.failure
            if failure is None:
                return str(_object(received.data)["id"])
            if failure.billed == "unknown":
                sent = job.model_copy(update={"sent": now["at"], "file": file})
                again = following._replace(job=sent)
                if (name := await self._find(again)) or self.gate.closed.is_set():
                    return name
            if failure.scope != "retry" or retry == self.settings.max_retries:
                await self._give_up(following, failure.what, "no", again=False)
                raise self._error(received, failure)
            await self._pause(received, retry)
        return None

    async def _find(self, following: Following) -> str | None:
        """Return the server's name for a job that may have been submitted, None where it was not.

        None too where the gate closes. What was sent may still be under way, so it is waited for.
        """
        job, after = following.job, ""
        await self.gate.sleep(min(GRACE, (job.sent or 0) + GRACE - time.time()))
        names = self.store.keys("batch_name")
        known = {(self.store.get("batch_name", key) or {}).get("name") for key in names}
        while not self.gate.closed.is_set():
            path = f"{self.form.path}?limit=100{after}"
            page = _object((await self._insist("GET", path)).data)
            rows = [row for row in page.get("data") or [] if isinstance(row, dict)]
            for row in rows:
                name = str(row.get("id"))
                ours = name not in known and self.form.is_ours(row, job)
                if ours is None and (ended := await self._ended(job, name)):
                    before = sum(map(self._lacks, following.sendings.values()))
                    await self._fetch(ended, following)
                    ours = sum(map(self._lacks, following.sendings.values())) < before
                if ours:
                    return name
            if not rows or not page.get("has_more"):
                return None
            after = f"&{self.form.after}={quote(str(rows[-1].get('id')), safe='')}"
        return None

    async def _fetch(self, row: dict[str, Any], following: Following) -> None:
        """Store all results of a job that has ended."""
        for path in self.form.results(row):
            for retry in count():
                received = await self._download(path, following.sendings)
                if received.failure is None:
                    break
                if received.failure.scope != "retry" or retry == self.settings.max_retries:
                    raise self._error(received, received.failure)
                await self._pause(received, retry)

    async def _collect(self, following: Following, row: dict[str, Any]) -> None:
        """Store the results of a job that has ended; what is without one is asked again."""
        status, sendings = self.form.status(row), following.sendings
        await self._fetch(row, following)
        code, why = self.form.refusal(row)
        if status == "failed" and code != "token_limit_exceeded":
            await self._give_up(following, why, "no", again=False)
            what, fix = f"the job failed: {why}", f"see to what it says: {AGAIN}"
            raise DistillError(Exit.TEACHER, self.settings.model, what, fix)
        if status == "failed":  # more than the account takes at once: smaller ones, one at a time
            self.narrow, self.most = True, max(1, len(sendings) // 2)
        billed = "unknown" if status in ("completed", "ended") else "no"
        await self._give_up(following, f"the job is {status}, without a result", billed)

    async def _download(self, path: str, sendings: dict[str, Sending]) -> Received:
        """Store the results at a path as they come, some with each fsync."""
        lines, rest, most = list[bytes](), bytearray(), self.settings.max_body_bytes
        try:
            async with self.http.stream("GET", self.address + path) as response:
                if not response.is_success:
                    data = await response.aread()
                    status = response.status_code
                    return Received(status, response.headers, data, "", classify(status, data))
                async for part in response.aiter_bytes():
                    first, *others = part.split(b"\n")
                    rest += first
                    for other in others:
                        lines.append(bytes(rest))
                        rest = bytearray(other)
                    if len(rest) > most:
                        raise ValueError(f"a line of more than {most:,} bytes")
                    if len(lines) >= TOGETHER:
                        await self._take(lines, sendings)
                        lines = []
            await self._take([*lines, bytes(rest)], sendings)
        except httpx2.TransportError as error:
            return broken(error)
        except ValueError as error:
            what = f"unreadable results: {error}"
            return Received(failure=Failure(what=what, scope="retry", billed="no"))
        return Received(200)

    async def _take(self, lines: Sequence[bytes], sendings: dict[str, Sending]) -> None:
        """Store some results; raises ValueError before any is stored where a line is none."""
        key = self.secrets
        plain = (key.sub(b"[key]", line) if key else line for line in lines)
        results = [self.form.read(line) for line in plain if line.strip()]
        known = [(sendings[r.custom_id], r) for r in results if r.custom_id in sendings]
        await asyncio.gather(
            *(self._store(sending, r) for sending, r in known if self._lacks(sending))
        )

    async def _store(self, sending: Sending, result: Result) -> None:
        """Deal with a result as with a reply to a request that was sent alone."""
        status, data = result.status, result.data
        if status is None:
            what = f"not executed: {result.what}"
            received = Received(failure=Failure(what=what, scope="retry", billed="no"))
        elif 200 <= status < 300 and is_answer(data):
            received = Received(status, {}, data)
        else:
            received = Received(status, {}, data, "", classify(status, data, sending.body))
        try:
            if received.failure is None:
                await self._keep(sending, received, 0.0)
            else:
                await self._fail(sending, received, received.failure, 0.0)
        except DistillError as error:  # the other results are stored first
            self._halt(error)
        self.patience.in_a_row = 0  # a file of errors is no row of failures
        if received.failure and received.failure.scope == "retry":
            self._ask_again(sending, received.failure.what)

    async def _give_up(
        self, following: Following, what: str, billed: str, again: bool = True
    ) -> None:
        """Record what became of a job's requests that have no result, and that it has ended."""
        lacking = [s for s in following.sendings.values() if self._lacks(s)]
        outcome = {"what": what, "billed": billed}
        end = ("batch_end", following.job.id, {"what": what})
        await self.writer.write(*(("outcome", s.key, outcome) for s in lacking), end)
        for sending in lacking:
            unknown = sending.reserved if billed == "unknown" else NOTHING
            self.budget.settle(sending.reserved, NOTHING, unknown)
            if again:
                self._ask_again(sending, what)

    def _ask_again(self, sending: Sending, what: str) -> None:
        """Put a request into the next job, until the retries are used up."""
        request = self.requests.get(sending.request.id)
        if request is None or not self.settings.batch:
            return
        self.rounds[request.id] += not self.narrow
        if self.rounds[request.id] > self.settings.max_retries:
            self._hand_on(Raw.failed(request, what, self.settings.model))
        else:
            self.queue.append(request)

    def _tell(self, job: Job, how: str, now: bool = False) -> None:
        """Say what is waited for and since when, now and then."""
        if now or time.monotonic() - self.told > PLAIN_SECONDS:
            self.told = time.monotonic()
            say(f"{self.settings.model}: {job.line()}: {how}; Ctrl-C leaves it there")

    async def _insist(
        self,
        method: str,
        path: str,
        content: bytes = b"",
        kind: str = "application/json",
        tries: int | None = None,
        but: int = 0,
    ) -> Received:
        """Return a reply, asked for again while what fails may pass; status `but` is one too.

        Raises DistillError (exit 4).
        """
        for retry in count():
            received = await self._exchange(method, path, content, kind)
            failure = received.failure
            if failure is None or received.status == but:
                return received
            last = retry == (tries or self.settings.max_retries)
            if failure.scope != "retry" or last or self.gate.closed.is_set():
                raise self._error(received, failure)
            await self._pause(received, retry)
        raise AssertionError

    async def _pause(self, received: Received, retry: int) -> None:
        wait = min(retry_after(received.headers) or 0.0, self.settings.max_pause)
        await self.gate.sleep(max(wait, backoff(retry, self.settings.initial_backoff)))

    def _error(self, received: Received, failure: Failure) -> DistillError:
        """Return the error of a run that cannot go on."""
        what, fix = failure.what, f"see to the server: {AGAIN}"
        if failure.scope == "run":
            fix = failure.fix
        if received.status in NO_INTERFACE:
            what, fix = f"has no batch interface ({failure.what})", "unset teacher.batch"
        return DistillError(Exit.TEACHER, self.address, what, fix)

    async def _exchange(
        self, method: str, path: str, content: bytes = b"", kind: str = "application/json"
    ) -> Received:
        """Send one request about jobs and return what came, without our key."""
        settings, headers = self.settings, {"content-type": kind}
        try:
            async with asyncio.timeout(settings.total_timeout):
                url = self.address + path
                reply = await self.http.request(method, url, content=content, headers=headers)
        except TimeoutError:
            what = f"no complete reply in {settings.total_timeout:g} s"
            return Received(failure=Failure(what=what, scope="retry", billed="unknown"))
        except httpx2.TransportError as error:
            return broken(error)
        data, status = reply.content, reply.status_code
        data = self.secrets.sub(b"[key]", data) if self.secrets else data
        failure = None if reply.is_success else classify(status, data)
        if failure is None:
            try:
                _object(data)
            except ValueError as error:
                what = f"unreadable reply: {error}"
                failure = Failure(what=what, scope="retry", billed="unknown")
        return Received(status, reply.headers, data, "", failure)


def _object(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a reply; raises ValueError where it is none."""
    value = load_json(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _counts(row: dict[str, Any]) -> dict[str, int]:
    """Return how many requests of a job there are of each kind."""
    counts = row.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    return {name: number for name, number in counts.items() if isinstance(number, int)}
