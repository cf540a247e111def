"""Measure the client of a paid teacher: answers a second and CPU a request, beside a bare client in
the same run.

    python scripts/benchmarks/benchmark_endpoint.py --requests 10000 --repeats 2 \\
        --json endpoint.json

The server is a process on this machine that answers after 200 ms; the limit is concurrency / 0.2 s.
Ours stores an intent before every request and every answer durably before it counts; the bare
client (httpx2, one task a connection, JSON parsed, nothing kept) shows what the library and the two
processes on these cores leave room for.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx2

from distill.config.teachers import EndpointTeacher
from distill.records import Message
from distill.responders.ask import Ask
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.request_form import encode
from distill.responders.responder import Request, Sampling, origin_of
from distill.storage.progress import console

QUESTION = "Say in one sentence what this function does. " + "It reads a line and returns it. " * 12
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "It returns the next line of a file. " * 6},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 110, "completion_tokens": 54, "total_tokens": 164},
}


class Server(asyncio.Protocol):
    """Answers each request on a kept connection after `delay` seconds, with as little work as can
    be."""

    delay = 0.2
    body = json.dumps(ANSWER).encode()
    reply = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin a connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.seen = transport, b""

    def data_received(self, data: bytes) -> None:
        """Take bytes; once a request is whole, answer it later."""
        self.seen += data
        head, found, rest = self.seen.partition(b"\r\n\r\n")
        if found and len(rest) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            self.seen = b""
            asyncio.get_running_loop().call_later(self.delay, self._answer)

    def _answer(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self.reply % (len(self.body), self.body))


def serve(delay: float, pipe: Connection) -> None:
    """Be the server process until it is ended; the port goes through `pipe`."""

    async def forever() -> None:
        Server.delay = delay
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Server, "127.0.0.1", 0, backlog=512)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def ask_all(settings: EndpointTeacher, requests: list[Request]) -> int:
    """Ask as a run does; return how many answers the store holds."""
    with tempfile.TemporaryDirectory() as folder:
        with Ask(EndpointResponder(settings, None, "run"), Path(folder)) as ask:
            ask.responses(requests, "ours")
            return sum(1 for _ in ask.store.keys("response"))


def ask_bare(settings: EndpointTeacher, requests: list[Request]) -> int:
    """Ask with the HTTP library alone; return how many answers came."""
    todo, url = iter(requests), settings.base_urls[0] + "/chat/completions"
    headers = {"content-type": "application/json"}

    async def work(client: httpx2.AsyncClient) -> int:
        found = 0
        for request in todo:
            got = await client.post(url, content=encode(request, settings), headers=headers)
            found += bool(got.json()["choices"])
        return found

    async def everybody() -> int:
        width = settings.concurrency
        limits = httpx2.Limits(max_connections=width, max_keepalive_connections=width)
        async with httpx2.AsyncClient(limits=limits, timeout=60) as client:
            return sum(await asyncio.gather(*(work(client) for _ in range(width))))

    return asyncio.run(everybody())


def timed(
    client: Callable[[EndpointTeacher, list[Request]], int],
    settings: EndpointTeacher,
    requests: list[Request],
) -> dict[str, float]:
    """Run one client over all requests; return answers a second, and milliseconds of its CPU a
    request."""
    started, cpu = time.monotonic(), time.process_time()
    found = client(settings, requests)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    if found != len(requests):
        sys.exit(f"{client.__name__}: {found} answers to {len(requests)} requests")
    return {"per_second": found / seconds, "cpu_ms": 1000 * cpu / found}


def measure(port: int, count: int, concurrency: int, repeats: int) -> dict[str, list[Any]]:
    """Time both clients `repeats` times, interleaved."""
    settings = EndpointTeacher.model_validate(
        {
            "kind": "endpoint",
            "model": "m",
            "base_url": f"http://127.0.0.1:{port}/v1",
            "concurrency": concurrency,
        }
    )
    origin, sampling = origin_of(settings), Sampling()
    requests = [
        Request.make(origin, str(i), (Message(role="user", content=f"{i}: {QUESTION}"),), sampling)
        for i in range(count)
    ]
    found: dict[str, list[Any]] = {"bare": [], "ours": []}
    for _ in range(repeats):
        found["bare"].append(timed(ask_bare, settings, requests))
        found["ours"].append(timed(ask_all, settings, requests))
    return found


def show(found: dict[str, list[Any]], limit: float) -> None:
    """Print the table: medians and ranges."""
    print(f"{'':6}{'answers/s':>12}{'range':>18}{'of the limit':>14}{'CPU ms each':>13}")
    for name, rows in found.items():
        rates = [row["per_second"] for row in rows]
        middle, cpu = statistics.median(rates), statistics.median(row["cpu_ms"] for row in rows)
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        print(f"{name:6}{middle:12.1f}{spread:>18}{100 * middle / limit:12.1f} %{cpu:13.2f}")


def main() -> None:
    """Start the server, time both clients, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    console.quiet = True
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(given.delay, there))
    process.start()
    try:
        found = measure(here.recv(), given.requests, given.concurrency, given.repeats)
    finally:
        process.terminate()
    limit = given.concurrency / given.delay
    print(f"limit {limit:.0f}/s: {given.concurrency} at a time, {given.delay:g} s each")
    show(found, limit)
    if given.json:
        facts = {"requests": given.requests, "concurrency": given.concurrency, "limit": limit}
        given.json.write_text(json.dumps({**facts, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
