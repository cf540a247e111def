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
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from distill.config.teachers import EndpointTeacher
from distill.config.values import gives_out_keys, ip_of
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
        socket_options: Iterable[Any] | None = None,
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
                return await super().connect_tcp(
                    address, port, seconds, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if last:
                    raise
        raise httpcore2.ConnectError


def proxy_of(url: str) -> str | None:
    """Return the proxy that the environment names for an address, or None.

    HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, whose entries may be networks too. What is
    asked on this machine in the clear never leaves it.
    """
    parts, proxies = urlsplit(url), getproxies()
    host, port = parts.hostname or "", parts.port
    address = ip_of(host)
    if parts.scheme == "http" and (host == "localhost" or (address and address.is_loopback)):
        return None
    for entry in proxies.get("no", "").split(","):
        try:
            if address and address in ipaddress.ip_network(entry.strip().strip("[]"), strict=False):
                return None
        except ValueError:  # a name
            continue
    if proxy_bypass(
        f"{host}:{port}" if port and not isinstance(address, ipaddress.IPv6Address) else host
    ):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all") or None
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def trusted() -> ssl.SSLContext | bool:
    """Return what vouches for servers: what the environment names, else what the system has.

    Raises DistillError (exit 2) where a variable names what cannot be read.
    """
    places = [(name, os.environ[name]) for name in CERTIFICATES if os.environ.get(name)]
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
    return context if places else True


def ways(settings: EndpointTeacher) -> list[str]:
    """Return in words what a plan says of the way to a server: how it is asked, through what."""
    lines = [f"asked by the {settings.form} wire"] if settings.form != "openai" else []
    through = [url for url in settings.base_urls if proxy_of(url)]
    if through:
        lines.append(
            f"a proxy of the environment is asked for {', '.join(through)}: it looks up the name,"
            " and only names and literal addresses are checked here"
        )
    return lines


def transports(
    settings: EndpointTeacher, limits: httpx2.Limits
) -> tuple[httpx2.AsyncBaseTransport, dict[str, httpx2.AsyncBaseTransport]]:
    """Return the direct way to a server, and the ways through proxies by the address behind them.

    Raises DistillError (exit 2) on a proxy or certificates that cannot be used.
    """
    context, mounts = trusted(), dict[str, httpx2.AsyncBaseTransport]()
    direct = httpx2.AsyncHTTPTransport(verify=context, limits=limits)
    direct._pool = httpcore2.AsyncConnectionPool(
        ssl_context=context if isinstance(context, ssl.SSLContext) else None,
        max_connections=limits.max_connections,
        max_keepalive_connections=limits.max_keepalive_connections,
        keepalive_expiry=limits.keepalive_expiry,
        network_backend=CheckedNetwork(),
    )
    for url in settings.base_urls:
        if proxy := proxy_of(url):
            parts = urlsplit(url)
            try:
                through = httpx2.AsyncHTTPTransport(verify=context, limits=limits, proxy=proxy)
            except (ImportError, ValueError, httpx2.InvalidURL):  # their words may hold a password
                where, what = "HTTPS_PROXY or ALL_PROXY", "names a proxy that cannot be used"
                fix = "write http://HOST:PORT, or unset it"
                raise DistillError(Exit.CONFIG, where, what, fix) from None
            mounts[f"{parts.scheme}://{parts.netloc}"] = through
    return direct, mounts
