"""The makers' batch interfaces: how they are asked, what a job is made of, what its results say."""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import count
from typing import NamedTuple
from urllib.parse import quote

import httpx2

from distill.errors import DistillError, Exit
from distill.records import canonical
from distill.responders.endpoint.client import AGAIN, EndpointClient
from distill.responders.endpoint.failures import Failure, error_of, status_like
from distill.responders.endpoint.network import Received, broken
from distill.responders.endpoint.rate_limits import backoff, retry_after
from distill.responders.endpoint.request_form import path
from distill.responders.endpoint.wire import Row, load_json, object_of, objects_of
from distill.storage.progress import PLAIN_SECONDS, say

PATIENCE = 100  # attempts to look at a job, which goes on meanwhile
GONE = (404, 410)
ENDED = {"completed", "failed", "expired", "cancelled", "canceled", "ended"}
UNTOUCHED = {"batch_expired", "batch_cancelled", "batch_canceled"}


class Result(NamedTuple):
    """What became of one request of a job; without a status it was not executed."""

    custom_id: str
    status: int | None
    data: bytes


class Jobs:
    """Asks for jobs, in OpenAI's form or Anthropic's.

    https://platform.openai.com/docs/api-reference/batch, which Azure, Groq, Together, Novita and
    Cerebras have too; https://docs.anthropic.com/en/api/creating-message-batches
    """

    def __init__(self, client: EndpointClient) -> None:
        self.client, self.settings = client, client.settings
        self.address, self.url = self.settings.base_urls[0], path(self.settings).partition("?")[0]
        self.anthropic = self.settings.form == "anthropic"  # whose jobs carry no mark, and no file
        self.path = f"{self.url}/batches" if self.anthropic else "/batches"

    def line(self, custom_id: str, body: bytes) -> bytes:
        """Return a request as a job holds it."""
        row = {"custom_id": custom_id}
        if self.anthropic:
            return canonical(row | {"params": json.loads(body)})
        row |= {"method": "POST", "url": f"/v1{self.url}", "body": json.loads(body)}
        return canonical(row)

    async def upload(self, job: str, lines: Sequence[bytes]) -> str:
        """Upload a job's requests, where its form wants that; return the file's name."""
        if self.anthropic:
            return ""
        part = (f"distill-{job}.jsonl", b"\n".join(lines), "application/jsonl")
        fields = {"data": {"purpose": "batch"}, "files": {"file": part}}
        form = httpx2.Request("POST", self.address, **fields)
        kind = form.headers["content-type"]
        return str((await self.call("POST", "/files", form.read(), kind)).get("id"))

    def submission(self, job: str, lines: Sequence[bytes], file: str) -> bytes:
        """Return the body that makes a job, of its lines or of the file that holds them."""
        if self.anthropic:
            return b'{"requests":[%s]}' % b",".join(lines)
        row = {"input_file_id": file, "endpoint": f"/v1{self.url}", "completion_window": "24h"}
        return canonical(row | {"metadata": {"distill": job}})

    def files(self, row: Row) -> list[str]:
        """Return the paths of an ended job's results, at the address that has our key."""
        if self.anthropic:
            return [f"{self.path}/{quote(str(row.get('id')), safe='')}/results"]
        files = (row.get(name) for name in ("output_file_id", "error_file_id"))
        return [f"/files/{quote(str(file), safe='')}/content" for file in files if file]

    def read(self, line: bytes) -> Result | None:
        """Read a line of the results; None where it is unreadable."""
        try:
            row = read_object(self.client.sender.masked(line))
        except ValueError:
            return None
        name = str(row.get("custom_id"))
        answer = object_of(row.get("result" if self.anthropic else "response"))
        if self.anthropic:
            kind, error = answer.get("type"), answer.get("error")
            if kind == "succeeded":
                return Result(name, 200, canonical(answer.get("message")))
            if kind in ("expired", "canceled"):
                return Result(name, None, b"")
            return Result(name, status_like(error_of(error)[1], 500), canonical(error))
        if answer:
            status, body = answer.get("status_code"), answer.get("body")
            data = body.encode() if isinstance(body, str) else canonical(body)
            return Result(name, status if isinstance(status, int) else 500, data)
        failed = {"error": row.get("error")}
        return Result(name, None if UNTOUCHED & error_of(failed)[1] else 500, canonical(failed))

    async def ended(self, name: str, what: str) -> Row | None:
        """Return a job's row once it has ended, an empty one where the server knows none.

        None where the gate closes. Meanwhile `what` is said to wait.
        """
        last, place = 0.0, f"{self.path}/{quote(name, safe='')}"
        for look in count():
            row = await self.call("GET", place, tries=PATIENCE, but=GONE)
            if not row or status_of(row) in ENDED:
                return row
            if self.client.gate.closed.is_set():
                return None
            if not last or time.monotonic() - last > PLAIN_SECONDS:
                last, counts = time.monotonic(), counts_of(row)
                numbers = [f"{number} {kind}" for kind, number in counts.items() if number]
                how = ", ".join([status_of(row), *numbers])
                say(f"{self.settings.model}: {what}: {how}; Ctrl-C leaves it there")
            await self.client.gate.sleep(backoff(look, self.settings.initial_backoff))

    async def listed(self) -> AsyncIterator[Row]:
        """Yield the rows of the account's jobs, the newest first."""
        after = ""
        while not self.client.gate.closed.is_set():
            page = await self.call("GET", f"{self.path}?limit=100{after}", tries=PATIENCE)
            rows = objects_of(page.get("data"))
            for row in rows:
                yield row
            if not rows or not page.get("has_more"):
                return
            name = "after_id" if self.anthropic else "after"
            after = f"&{name}={quote(str(rows[-1].get('id')), safe='')}"

    async def results(self, row: Row, lost: list[str]) -> AsyncIterator[list[Result]]:
        """Yield an ended job's results as they come, from the first on where that broke off.

        Of results that are gone, and lines that are unreadable each time, `lost` says so.
        """
        for place in self.files(row):
            for retry in count():
                bad, received = 0, Received(200)
                try:
                    async with self.client.sender.http.stream(
                        "GET", self.address + place
                    ) as response:
                        if not response.is_success:
                            data = self.client.sender.masked(await response.aread())
                            status, fields = response.status_code, response.headers
                            received = Received.of(status, data, headers=fields)
                        else:
                            async for lines in _lines(response, self.settings.max_body_bytes):
                                results = [self.read(line) for line in lines if line.strip()]
                                bad += results.count(None)
                                yield [result for result in results if result]
                except httpx2.TransportError as error:
                    received = Received(failure=broken(error))
                failure = received.failure
                if bad and not failure:
                    failure = Failure(f"{bad} lines of results cannot be read", "retry")
                if failure is None:
                    break
                last = received.status == 200 and retry == self.settings.max_retries
                if last or received.status in GONE:
                    lost.append(f"{place}: {failure.what}")
                    break
                await self._try_again(received, failure, retry)

    async def call(
        self,
        method: str,
        place: str,
        content: bytes = b"",
        kind: str = "application/json",
        tries: int | None = None,
        but: Sequence[int] = (),
        find: Callable[[], Awaitable[str | None]] | None = None,
    ) -> Row:
        """Return what a server replies, asked for again while what fails may pass.

        It is empty for a status of `but`. `find` says what a request in doubt has made. Raises
        DistillError (exit 4).
        """
        for retry in count():
            url = self.address + place
            received = await self.client.sender.send(url, content, is_reply, method, kind)
            failure = received.failure
            if received.cut:
                failure = Failure(received.cut, "item", "unknown")
            if failure is None:
                return read_object(received.data)
            if received.status in but:
                break
            if find and failure.billed == "unknown" and (name := await find()):
                return {"id": name}
            await self._try_again(received, failure, retry, tries)
        return {}

    async def _try_again(
        self, received: Received, failure: Failure, retry: int, tries: int | None = None
    ) -> None:
        """Wait before the next attempt; raises DistillError where another is of no use."""
        last = retry == (tries or self.settings.max_retries) or self.client.gate.closed.is_set()
        if failure.scope != "retry" or last:
            what = failure.what
            fix = failure.fix if failure.scope == "run" else f"see to the server: {AGAIN}"
            if received.status in (404, 405, 501):
                what, fix = f"has no batch interface ({what})", "unset teacher.batch"
            raise DistillError(Exit.TEACHER, self.address, what, fix)
        wait = min(retry_after(received.headers) or 0.0, self.settings.max_pause)
        await self.client.gate.sleep(max(wait, backoff(retry, self.settings.initial_backoff)))


async def _lines(response: httpx2.Response, most: int) -> AsyncIterator[list[bytes]]:
    """Yield the lines of a reply as they come, each of `most` bytes at most."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        rest = rest[:most]
        yield lines
    yield [rest]


def read_object(data: bytes) -> Row:
    """Return a JSON object; raises ValueError where it is none."""
    value = load_json(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def is_reply(data: bytes) -> bool:
    """Tell a file, a job or a list of jobs from what is none."""
    try:
        return bool({"id", "data"} & read_object(data).keys())
    except ValueError:
        return False


def status_of(row: Row) -> str:
    """Return how far a job is; some write it in capitals."""
    return str(row.get("processing_status") or row.get("status")).lower()


def counts_of(row: Row) -> dict[str, int]:
    """Return how many requests of a job there are of each kind."""
    counts = object_of(row.get("request_counts")).items()
    return {name: number for name, number in counts if isinstance(number, int)}
