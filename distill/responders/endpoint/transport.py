"""Sends one request and reads its reply within limits of time and size; what goes wrong on the way is a Fault.

Nothing here quotes an HTTP exception: its text may hold headers, and with them the key.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import httpx2

from distill.responders.endpoint.wire import Fault, decoded, is_answer

UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
WORDS = {
    "ConnectError": "cannot connect",
    "ConnectTimeout": "no connection in time",
    "ReadTimeout": "no bytes in time",
    "ReadError": "the connection broke",
    "RemoteProtocolError": "the connection broke off",
    "WriteTimeout": "the request could not be sent in time",
    "WriteError": "the connection broke while sending",
}


@dataclass(frozen=True)
class Received:
    """A reply as it came; `cut` says why its body is not whole, where it is not."""

    status: int
    headers: Mapping[str, str]
    data: bytes
    cut: str = ""

    @property
    def is_answer(self) -> bool:
        """Tell a reply that is kept as an answer, readable or not, from an error."""
        well = 200 <= self.status < 300
        return well and (bool(self.cut) or is_answer(self.status, self.data))


async def post(
    client: httpx2.AsyncClient, url: str, body: bytes, total: float, most_bytes: int
) -> Received | Fault:
    """Send `body` and return the reply, or how it failed; `total` seconds bound all of it, `most_bytes` the reply."""
    try:
        async with asyncio.timeout(total), client.stream("POST", url, content=body) as response:
            return await _read(response, most_bytes)
    except TimeoutError:
        what = f"no whole answer in {total:g} s"
        return Fault(what=f"{what}: outcome unknown", scope="retry", billed="unknown")
    except httpx2.TransportError as error:
        name = type(error).__name__
        what = WORDS.get(name, f"the connection failed ({name})")
        if isinstance(error, UNSENT):
            return Fault(what=what, scope="retry", billed="no", replica=True)
        what = f"{what}: outcome unknown"
        return Fault(what=what, scope="retry", billed="unknown", replica=True)


async def _read(response: httpx2.Response, most_bytes: int) -> Received:
    """Read a body up to `most_bytes`, also where it was compressed without being asked to."""
    parts, size, cut = [], 0, ""
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > most_bytes:
            cut = f"more than {most_bytes:,} bytes"
            break
    data, encoding = b"".join(parts), response.headers.get("content-encoding", "").lower()
    if not cut:
        try:
            data = decoded(data, encoding, most_bytes)
        except ValueError as error:
            cut = str(error)
    return Received(response.status_code, response.headers, data, cut)
