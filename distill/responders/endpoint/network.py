"""Where a request goes: the address that was checked, the proxy, the certificates that count.

A name is looked up here, its addresses are checked, and one of these is connected to, so that no
second look-up can give another. Through a proxy the proxy looks it up, and only what the config
says was checked. What the environment says of proxies may hold a password: it stands in no message.
"""

import asyncio
import ipaddress
import os
import socket
import ssl
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpcore2
import httpx2

from distill.config.teachers import EndpointTeacher
from distill.config.values import gives_out_keys, is_here
from distill.errors import DistillError, Exit

CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
FIRST_ADDRESSES = 2.0  # seconds for each address of a name but the last


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
        socket_options: Any = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to an address of `host`; raises Forbidden where any of them is not to be."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except TimeoutError:
            raise httpcore2.ConnectTimeout() from None
        except (OSError, UnicodeError):
            raise httpcore2.ConnectError() from None
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        if any(gives_out_keys(ipaddress.ip_address(address)) for address in addresses):
            raise Forbidden("")
        for address in addresses:
            last = address == addresses[-1]
            seconds = timeout if last else min(FIRST_ADDRESSES, timeout or FIRST_ADDRESSES)
            try:
                return await super().connect_tcp(  # pyright: ignore
                    address, port, seconds, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if last:
                    raise
        raise httpcore2.ConnectError


def trusted() -> ssl.SSLContext:
    """Return what vouches for servers: what the environment names, else what the system has.

    Raises DistillError (exit 2) where a variable names what cannot be read.
    """
    return _trust(tuple((name, os.environ[name]) for name in CERTIFICATES if os.environ.get(name)))


@cache  # reading takes a tenth of a second
def _trust(places: tuple[tuple[str, str], ...]) -> ssl.SSLContext:
    if not places:
        return httpx2.create_ssl_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name, value in places:
        folders = [part for part in value.split(os.pathsep) if Path(part).is_dir()]
        for place in folders or [value]:
            try:
                context.load_verify_locations(**{"capath" if folders else "cafile": place})
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                what = f"{place} " + ("is not there" if missing else "holds no certificates")
                fix = f"name a file of certificates in PEM, or unset {name}"
                raise DistillError(Exit.CONFIG, name, what, fix) from None
    return context


def open_network(settings: EndpointTeacher, **options: Any) -> httpx2.AsyncClient:
    """Return a client that goes the environment's way; raises DistillError (exit 2).

    HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY count as httpx2 reads them, but what is asked on
    this machine in the clear never leaves it.
    """
    parts = [urlsplit(url) for url in settings.base_urls]
    here = {f"http://{p.netloc}": None for p in parts if p.scheme == "http" and is_here(p.hostname)}
    try:
        client = httpx2.AsyncClient(verify=trusted(), mounts=here, **options)
    except (ImportError, ValueError, httpx2.InvalidURL):  # their words may hold a password
        what, fix = "names a proxy that cannot be used", "write http://HOST:PORT, or unset it"
        raise DistillError(Exit.CONFIG, "HTTPS_PROXY or ALL_PROXY", what, fix) from None
    client._transport._pool._network_backend = CheckedNetwork()  # pyright: ignore
    return client


def ways(settings: EndpointTeacher) -> list[str]:
    """Return in words what a plan says of the way to a server: how it is asked, through what."""
    lines = [f"asked by the {settings.form} wire"] if settings.form != "openai" else []
    client = open_network(settings)
    ways = {url: client._transport_for_url(httpx2.URL(url)) for url in settings.base_urls}
    if through := [url for url, way in ways.items() if way is not client._transport]:
        lines.append(
            f"a proxy of the environment is asked for {', '.join(through)}: it looks up the name,"
            " and only names and literal addresses are checked here"
        )
    return lines
