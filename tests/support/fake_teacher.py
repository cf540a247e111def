"""A teacher on a loopback port: a real HTTP server, scriptable, that bills every request.

A script maps the number of a request (from 0, as they arrive) and its payload to a `Reply`.
Whatever a reply's fault, `billed` says whether the teacher charged for it, as a real one would
where it had already generated the answer.
"""

import asyncio
import gzip
import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from distill.records import Usage
from distill.responders.prices import TokenPrice

PRICE = TokenPrice.model_validate(
    {
        "model": "*fake*",
        "dollars_per_million_input": "3",
        "dollars_per_million_output": "15",
        "dollars_per_million_cached_input": "0.3",
        "date": "2026-11-01",
        "source": "tests",
    }
)
PRICES = {"fake-1": PRICE}  # of the model that it serves


@dataclass
class Reply:
    """What the teacher does with one request."""

    status: int = 200
    body: bytes | None = None  # None: a whole answer
    headers: dict[str, str] = field(default_factory=dict)
    manner: str = "whole"  # whole, reset, hang, drip, endless, half, silent
    delay: float = 0.0
    hold: Callable[[], object] | None = None  # the reply waits until this holds
    billed: bool | None = None  # None: where the status is 200 and nothing fails
    dollars: Decimal | None = None  # that are charged, whatever the body says
    answer: dict[str, Any] = field(default_factory=dict)  # changes of the answer's body
    message: dict[str, Any] = field(default_factory=dict)  # changes of its message
    finish: str | None = "stop"


Script = Callable[[int, dict[str, Any]], Reply]


class FakeTeacher:
    """Serves `/v1/chat/completions` on a loopback port while its `with` block lasts."""

    def __init__(
        self,
        script: Script | None = None,
        price: TokenPrice = PRICE,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        self.script, self.price = script or (lambda number, payload: Reply()), price
        self.tls, self.port = tls, port  # port 0 takes any that is free
        self.payloads: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.bill = Decimal(0)
        self.bills: dict[str, int] = {}  # times that each question was charged
        self.asked: dict[str, int] = {}  # times that each question came
        self.busy = self.busiest = 0
        self._started = threading.Event()
        self._tasks: set[Any] = set()

    def __enter__(self) -> "FakeTeacher":
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *fault: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(
            self._connected, "127.0.0.1", self.port, backlog=512, ssl=self.tls
        )
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._end.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        number, payload = len(self.payloads), json.loads(data or b"{}")
        self.payloads.append(payload)
        self.bodies.append(data)
        self.headers.append(headers)
        self.paths.append(head[0].split()[1])
        self.asked[question(payload)] = self.asked.get(question(payload), 0) + 1
        self.busy += 1
        self.busiest = max(self.busy, self.busiest)
        try:
            reply = self.script(number, payload)
            return await self._send(writer, reply, payload)
        finally:
            self.busy -= 1

    async def _send(
        self, writer: asyncio.StreamWriter, reply: Reply, payload: dict[str, Any]
    ) -> bool:
        body = answer(payload, reply) if reply.body is None else reply.body
        well = reply.status == 200 and reply.body is None and reply.manner in ("whole", "drip")
        if well if reply.billed is None else reply.billed:
            self._charge(payload, body, reply.dollars)
        await asyncio.sleep(reply.delay)
        while reply.hold and not reply.hold():
            await asyncio.sleep(0.005)
        if reply.manner == "hang":
            await asyncio.sleep(60)
        if reply.manner in ("silent", "hang"):
            return False
        if reply.manner == "reset":
            writer.transport.abort()
            return False
        length = f"content-length: {len(body)}"
        if reply.manner == "endless":
            length = "transfer-encoding: chunked"
        lines = [f"HTTP/1.1 {reply.status} x", "content-type: application/json", length]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        return await self._write_body(writer, reply.manner, body)

    async def _write_body(self, writer: asyncio.StreamWriter, manner: str, body: bytes) -> bool:
        if manner == "half":
            writer.write(body[: len(body) // 2])
            await writer.drain()
            return False
        while manner == "endless":
            writer.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
            await writer.drain()
        if manner == "drip":
            for i in range(len(body)):
                writer.write(body[i : i + 1])
                await writer.drain()
                await asyncio.sleep(0.05)
            return True
        writer.write(body)
        await writer.drain()
        return True

    def _charge(self, payload: dict[str, Any], body: bytes, dollars: Decimal | None = None) -> None:
        """Charge `dollars`, else by the answer's usage, else what an answer takes."""
        asked = question(payload)
        self.bills[asked] = self.bills.get(asked, 0) + 1
        if dollars is not None:
            self.bill += dollars
            return
        try:
            given = json.loads(body)["usage"]
            usage = Usage(
                input_tokens=given["prompt_tokens"], output_tokens=given["completion_tokens"]
            )
            stated = given.get("cost")
        except (ValueError, KeyError, TypeError, RecursionError):
            usage, stated = usage_of(payload), None
        if usage.input_tokens <= 0 or usage.output_tokens < 0:
            usage = usage_of(payload)
        self.bill += self.price.of(usage) if stated is None else Decimal(repr(stated))


def question(payload: dict[str, Any]) -> str:
    """Return the text that is asked."""
    if "messages" in payload:
        return str(payload["messages"][-1]["content"])
    return str(payload.get("prompt", ""))


def usage_of(payload: dict[str, Any]) -> Usage:
    """Return the tokens that a whole answer takes: one a word, as this teacher counts."""
    asked = question(payload)
    texts = [str(turn["content"]) for turn in payload.get("messages") or [{"content": asked}]]
    read = sum(len(text.split()) for text in texts) + 5
    return Usage(input_tokens=read, output_tokens=len(text_of(asked).split()))


def text_of(asked: str) -> str:
    """Return the teacher's answer to a question."""
    return f"the answer to {asked}"


def answer(payload: dict[str, Any], reply: Reply | None = None) -> bytes:
    """Return the body of an answer, with the changes of a reply."""
    reply = reply or Reply()
    usage = usage_of(payload)
    content = text_of(question(payload))
    message = {"role": "assistant", "content": content, **reply.message}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reply.finish}
    if "messages" not in payload:
        choice = {"index": 0, "text": content, "finish_reason": reply.finish}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": payload.get("model"),
        "choices": [choice],
        "usage": {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
        },
        **reply.answer,
    }
    return json.dumps(body).encode()


def bomb(size: int) -> bytes:
    """Return gzip of `size` spaces."""
    return gzip.compress(b" " * size)


KEY = "canary-3141592653589793"  # that may stand in no byte that is written
ECHO = json.dumps({"error": {"message": f"what of {KEY}?", "code": "x"}}).encode()
FAULTS: dict[str, dict[str, Any]] = {  # that a run survives, as the fields of a reply
    "429": {"status": 429, "body": ECHO},
    "429 wait": {"status": 429, "body": b"", "headers": {"retry-after-ms": "30"}},
    "429 garbage": {"status": 429, "body": b"<html>", "headers": {"retry-after": "soon"}},
    "500": {"status": 500, "body": ECHO},
    "500 billed": {"status": 500, "body": b"", "billed": True},
    "502 html": {"status": 502, "body": b"<html>bad gateway"},
    "503": {"status": 503, "body": b"", "headers": {"retry-after": "0"}},
    "504 billed": {"status": 504, "body": b"", "billed": True},
    "408": {"status": 408, "body": ECHO},
    "400": {"status": 400, "body": ECHO},
    "422": {"status": 422, "body": b'{"detail": "no"}'},
    "413": {"status": 413, "body": b""},
    "html on 200": {"body": b"<!doctype html>", "billed": False},
    "empty": {"body": b"", "billed": True},
    "error on 200": {"body": ECHO, "billed": True},
    "reset": {"manner": "reset", "billed": True},
    "closed": {"manner": "silent", "billed": True},
    "half": {"manner": "half", "billed": True},
    "endless": {"manner": "endless", "billed": True},
    "hang": {"manner": "hang", "billed": True},
    "bomb": {"body": bomb(3_000_000), "headers": {"content-encoding": "gzip"}, "billed": True},
    "cut JSON": {"body": b'{"choices": [{"mess', "billed": True},
    "not UTF-8": {"body": b'{"choices": "\xff"}', "billed": True},
    "no choices": {"body": b'{"choices": []}', "billed": True},
    "deep": {"body": b'{"choices": ' + b"[" * 50_000, "billed": True},
    "length": {"finish": "length"},
    "filter": {"finish": "content_filter"},
    "refusal": {"message": {"content": None, "refusal": f"{KEY}? no"}},
    "tool": {"finish": "tool_calls", "message": {"content": None, "tool_calls": [{}]}},
    "unknown stop": {"finish": "moon"},
    "no usage": {"answer": {"usage": None}},
    "negative usage": {"answer": {"usage": {"prompt_tokens": -1, "completion_tokens": "x"}}},
    "slow": {"delay": 0.3},
}
