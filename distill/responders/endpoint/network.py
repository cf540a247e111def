"""How a request leaves this machine, and what comes back of it.

A name is looked up here, its addresses are checked, and one of these is connected to, so that no
second look-up can give another. Through a proxy the proxy looks it up, and only what the config
says was checked. Nothing here quotes an HTTP exception or a proxy: they may hold the key.
"""

import asyncio
import ipaddress
import os
import socket
import ssl
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httpcore2
import httpx2

from distill.config.teachers import EndpointTeacher
from distill.config.values import gives_out_keys, is_here
from distill.errors import DistillError, Exit
from distill.responders.endpoint.failures import Failure, classify, words
from distill.responders.endpoint.request_form import headers, secrets_pattern
from distill.responders.endpoint.wire import is_answer

CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
FIRST_ADDRESSES = 2.0  # seconds for each address of a name but the last
UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class Received(NamedTuple):
    """What came of one request: an answer, readable or not, or its failure.

    `cut` says why the body is not complete. Of a request that got no reply there is no status.
    """

    status: int | None = None
    headers: Mapping[str, str] = {}
    data: bytes = b""
    cut: str = ""
    failure: Failure | None = None

    @classmethod
    def of(
        cls,
        status: int,
        data: bytes,
        request: bytes = b"",
        headers: Mapping[str, str] = {},
        cut: str = "",
        is_answer: Callable[[bytes], bool] = is_answer,
    ) -> "Received":
        """Return what a reply is: an answer, be it cut, or a failure."""
        answered = 200 <= status < 300 and (bool(cut) or is_answer(data))
        failure = None if answered else classify(status, data, request, headers)
        return cls(status, headers, data, cut, failure)


class Sender:
    """Sends over up to `width` connections; what comes is held to the limits, without secrets."""

    def __init__(self, settings: EndpointTeacher, key: str | None, width: int) -> None:
        self.settings, self.secrets = settings, secrets_pattern(settings, key)
        self.http = open_http(settings, headers(settings, key), width)

    def masked(self, data: bytes) -> bytes:
        """Return what came, without a secret that it repeats."""
        return self.secrets.sub(b"[key]", data) if self.secrets else data

    async def send(
        self,
        url: str,
        body: bytes,
        is_answer: Callable[[bytes], bool] = is_answer,
        method: str = "POST",
        kind: str = "application/json",
    ) -> Received:
        """Send `body` and return what came, within the limits of time and size."""
        parts, size, cut = list[bytes](), 0, ""
        most, seconds = self.settings.max_body_bytes, self.settings.total_timeout
        sending = self.http.stream(method, url, content=body, headers={"content-type": kind})
        try:
            async with asyncio.timeout(seconds), sending as response:
                async for part in response.aiter_raw():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        cut = f"more than {most:,} bytes"
                        break
        except TimeoutError:
            what = f"no complete answer in {seconds:g} s: outcome unknown"
            return Received(failure=Failure(what, "retry", "unknown"))
        except httpx2.TransportError as error:
            return Received(failure=broken(error))
        data, encoding = b"".join(parts), response.headers.get("content-encoding", "").lower()
        if not cut and encoding not in ("", "identity"):
            data, cut = decoded(data, encoding, most)
        status, data = response.status_code, self.masked(data)
        return Received.of(status, data, body, response.headers, cut, is_answer)


def decoded(data: bytes, encoding: str, limit: int) -> tuple[bytes, str]:
    """Undo a content encoding that was not asked for, or say why that cannot be done."""
    if encoding not in ("gzip", "deflate"):
        return data, f"content encoding {encoding[:20]!r}"
    try:
        plain = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, limit + 1)
    except zlib.error:
        return data, f"damaged {encoding}"
    return (data, f"more than {limit:,} bytes of {encoding}") if len(plain) > limit else (plain, "")


def broken(error: httpx2.TransportError) -> Failure:
    """Say what it means that a connection was not made, or broke."""
    if isinstance(error, Forbidden):
        what = "the name of teacher.base_url leads to a cloud's metadata service"
        return Failure(what, "run", fix="correct teacher.base_url, or see to who answers for it")
    if isinstance(error, httpx2.ProxyError):  # its text begins with the status that came
        status = str(error)[:3]
        what = f"the proxy refuses ({status if status.isdigit() else 'no status'})"
        scope = "run" if status == "407" else "retry"
        return Failure(what, scope, fix=words().fixes[407], replica=True)
    if isinstance(error, UNSENT):
        return Failure("cannot connect", "retry", replica=True)
    what = f"the connection broke ({type(error).__name__}): outcome unknown"
    return Failure(what, "retry", "unknown", replica=True)


class Forbidden(httpx2.ConnectError):
    """A name led to the address of a cloud's metadata service."""


class CheckedNetwork(httpcore2.AnyIOBackend):
    """Connects to what it has looked up and checked itself."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to an address of `host`; raises Forbidden where any of them is not to be."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                rows = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except TimeoutError:
            raise httpcore2.ConnectTimeout() from None
        except (OSError, UnicodeError):
            raise httpcore2.ConnectError() from None
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in rows))
        if any(gives_out_keys(ipaddress.ip_address(address)) for address in addresses):
            raise Forbidden("")
        connect = cast("httpcore2.AsyncNetworkBackend", super()).connect_tcp
        for address in addresses[:-1]:
            seconds = min(FIRST_ADDRESSES, timeout or FIRST_ADDRESSES)
            with suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout):
                return await connect(address, port, seconds, local_address, socket_options)
        return await connect(addresses[-1], port, timeout, local_address, socket_options)


def open_http(
    settings: EndpointTeacher, fields: Mapping[str, str] = {}, width: int = 1
) -> httpx2.AsyncClient:
    """Return a client that goes the environment's way; raises DistillError (exit 2).

    HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY count as httpx2 reads them, but what is asked on
    this machine in the clear never leaves it.
    """
    parts = [urlsplit(url) for url in settings.base_urls]
    here = {f"http://{p.netloc}": None for p in parts if p.scheme == "http" and is_here(p.hostname)}
    try:
        client = httpx2.AsyncClient(
            headers=fields,
            verify=trusted(),
            mounts=here,
            timeout=httpx2.Timeout(
                settings.read_timeout, connect=settings.connect_timeout, pool=None
            ),
            limits=httpx2.Limits(max_connections=width, max_keepalive_connections=width),
            follow_redirects=False,
        )
    except (ImportError, ValueError, httpx2.InvalidURL):  # their words may hold a password
        what, fix = "names a proxy that cannot be used", "write http://HOST:PORT, or unset it"
        raise DistillError(Exit.CONFIG, "HTTPS_PROXY or ALL_PROXY", what, fix) from None
    client._transport._pool._network_backend = CheckedNetwork()  # pyright: ignore
    return client


def trusted() -> ssl.SSLContext:
    """Return what vouches for servers: what the environment names, else what the system has.

    Raises DistillError (exit 2) where a variable names what cannot be read.
    """
    places = [(name, os.environ[name]) for name in CERTIFICATES if os.environ.get(name)]
    if not places:
        return httpx2.create_ssl_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name, value in places:
        folders = any(Path(part).is_dir() for part in value.split(os.pathsep))
        try:
            context.load_verify_locations(**{"capath" if folders else "cafile": value})
        except OSError:
            what, fix = f"{value} holds no certificates", f"name a file in PEM, or unset {name}"
            raise DistillError(Exit.CONFIG, name, what, fix) from None
    return context


def ways(settings: EndpointTeacher) -> list[str]:
    """Return in words what a plan says of the way to a server: how it is asked, through what."""
    lines = [f"asked by the {settings.form} wire"] if settings.form != "openai" else []
    client = open_http(settings)
    ways = {url: client._transport_for_url(httpx2.URL(url)) for url in settings.base_urls}
    if through := [url for url, way in ways.items() if way is not client._transport]:
        lines.append(
            f"a proxy of the environment is asked for {', '.join(through)}: it looks up the name,"
            " and only names and literal addresses are checked here"
        )
    return lines
