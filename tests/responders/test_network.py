"""Where a request goes: names that lead astray, proxies, private authorities, extra headers."""

import asyncio
import base64
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from distill.errors import DistillError, Exit
from distill.responders.endpoint import network
from distill.responders.endpoint.network import ways
from distill.responders.endpoint.request_form import headers as request_headers
from tests.responders.test_transport import CERTIFICATE, PROXIES, ask, secure
from tests.support.buying import settings
from tests.support.errors import stops
from tests.support.fake_teacher import KEY, FakeTeacher, Reply

PASSWORD = "hidden-pass-7"
LOOK_UP = socket.getaddrinfo


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *(name.lower() for name in PROXIES), *network.CERTIFICATES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEACHER_KEY", KEY)


def name_server(monkeypatch: pytest.MonkeyPatch, *answers: tuple[str, ...]) -> list[str]:
    """Let names under .test lead to these addresses, one answer a look-up; return the look-ups."""
    asked = list[str]()

    def look_up(host: Any, port: Any, *rest: Any, **named: Any) -> list[Any]:
        if not str(host).endswith(".test"):
            return LOOK_UP(host, port, *rest, **named)
        addresses = answers[min(len(asked), len(answers) - 1)]
        asked.append(host)
        return [entry for a in addresses for entry in LOOK_UP(a, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


@pytest.mark.parametrize(
    "address",
    "169.254.169.254 168.63.129.16 100.100.100.200 fd00:ec2::254 fe80::1 ::ffff:a9fe:a9fe"
    " 64:ff9b::a9fe:a9fe 2002:a9fe:a9fe::1".split(),
)
@pytest.mark.parametrize("beside", [(), ("127.0.0.1",)], ids=["alone", "beside another"])
def test_h21_a_name_of_a_metadata_service_is_not_connected_to(
    tmp_path, monkeypatch, address, beside
):
    name_server(monkeypatch, (*beside, address))
    connections = list[Any]()
    monkeypatch.setattr(
        asyncio.BaseEventLoop, "create_connection", lambda *a, **named: connections.append(named)
    )
    url = "http://teacher.test:80/v1"
    with stops(Exit.TEACHER, "leads to a cloud's metadata service") as stopped:
        ask(url, tmp_path, allow_insecure=True, max_retries=3)
    assert not connections and "base_url" in str(stopped.value)


def test_h21_the_address_that_was_checked_is_the_one_connected_to(tmp_path, monkeypatch):
    """A name server that gives another address to every second question changes nothing."""
    with FakeTeacher() as teacher:
        asked = name_server(monkeypatch, ("127.0.0.1",), ("169.254.169.254",))
        url = teacher.url.replace("127.0.0.1", "teacher.test")
        assert ask(url, tmp_path, allow_insecure=True).text == "the answer to q0 please"
    assert asked == ["teacher.test"]
    assert teacher.headers[0]["host"].startswith("teacher.test:")


def test_h21_a_dead_address_of_several_is_passed_over(tmp_path, monkeypatch):
    with FakeTeacher() as teacher:
        name_server(monkeypatch, ("127.0.0.99", "::1", "127.0.0.1"))
        url = teacher.url.replace("127.0.0.1", "teacher.test")
        assert ask(url, tmp_path, allow_insecure=True).text == "the answer to q0 please"


def test_a_private_authority_counts_in_each_usual_variable(tmp_path, monkeypatch):
    with secure() as teacher:
        with pytest.raises(DistillError, match="cannot connect"):
            ask(teacher.url, tmp_path / "none")
        named = subprocess.run(
            ["openssl", "x509", "-hash", "-noout", "-in", str(CERTIFICATE)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        folder = tmp_path / "hashed"
        folder.mkdir()
        (folder / f"{named.stdout.strip()}.0").write_bytes(CERTIFICATE.read_bytes())
        for name in network.CERTIFICATES:
            value = f"/nowhere:{folder}" if name == "SSL_CERT_DIR" else str(CERTIFICATE)
            monkeypatch.setenv(name, value)
            assert ask(teacher.url, tmp_path / name).text == "the answer to q0 please", name
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", network.CERTIFICATES)
@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_h24_certificates_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, name, content):
    place = tmp_path / "ca.pem"
    if content is not None:
        place.write_bytes(content)
    monkeypatch.setenv(name, str(place))
    with stops(Exit.CONFIG, name):
        ask("https://127.0.0.1:9/v1", tmp_path / "store")


@contextmanager
def connecting_proxy(login: str) -> Iterator[tuple[int, list[str]]]:
    """Serve as a proxy that tunnels by CONNECT for whoever has the login; yield port and heads."""
    heads, token = list[str](), base64.b64encode(login.encode()).decode()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        heads.append(head)
        if f"proxy-authorization: basic {token}".lower() not in head.lower():
            writer.write(b"HTTP/1.1 407 who are you\r\ncontent-length: 0\r\n\r\n")
            writer.close()
            return
        target, port = head.split()[1].rsplit(":", 1)
        there = await asyncio.open_connection(target, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(carry(reader, there[1]), carry(there[0], writer))

    loop, ports = asyncio.new_event_loop(), list[int]()
    ready = threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()

    thread = threading.Thread(target=lambda: (loop.create_task(serve()), loop.run_forever()))
    thread.daemon = True
    thread.start()
    assert ready.wait(10)
    yield ports[0], heads
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_with_a_password_carries_tls(tmp_path, monkeypatch, capfd, variable):
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with connecting_proxy(f"me:{PASSWORD}") as (port, heads), secure() as teacher:
        monkeypatch.setenv(variable, f"http://me:{PASSWORD}@127.0.0.1:{port}")
        assert ask(teacher.url, tmp_path / "well").text == "the answer to q0 please"
        assert heads[0].startswith(f"CONNECT 127.0.0.1:{teacher.port} ") and len(heads) == 1
        assert "it looks up the name" in ways(settings(teacher.url))[0]
        monkeypatch.setenv(variable, f"http://me:{PASSWORD}x@127.0.0.1:{port}")
        with stops(Exit.TEACHER, r"the proxy refuses \(407\)") as stopped:
            ask(teacher.url, tmp_path / "ill")
        monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
        assert ask(teacher.url, tmp_path / "direct").text == "the answer to q0 please"
    assert len(heads) == 2 and KEY not in "".join(heads)
    said = "".join(capfd.readouterr()) + str(stopped.value) + str(ways(settings(teacher.url)))
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert PASSWORD not in said and PASSWORD.encode() not in written


@pytest.mark.parametrize(
    ("variables", "url", "through"),
    [
        ({"HTTPS_PROXY": "p:1"}, "https://api.example.com/v1", True),
        ({"HTTP_PROXY": "http://p:1"}, "http://10.0.0.7:8000/v1", True),
        ({"HTTP_PROXY": "http://p:1"}, "http://127.0.0.1:8000/v1", False),
        ({"ALL_PROXY": "http://p:1"}, "http://localhost:8000/v1", False),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": ".b, x"}, "https://a.b/v1", False),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "https://10.1.2.3/v1", False),
    ],
)
def test_the_environment_names_the_proxy(monkeypatch, variables, url, through):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bool(ways(settings(url, allow_insecure=True))) == through


def test_headers_come_from_the_environment_and_go_nowhere_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ORG", "org-0815-hidden")
    monkeypatch.setenv("TEAM", "engineering")
    headers = {"X-Org": "$ORG", "X-Both": "${TEAM}:$ORG", "X-Beta": "on", "X-Team": "$TEAM"}
    echo = {"content": "org-0815-hidden sees engineering"}
    replies = [Reply(message=echo), Reply(status=401, body=b'{"error": "not org-0815-hidden"}')]
    with FakeTeacher(lambda number, payload: replies[number]) as teacher:
        answer = ask(teacher.url, tmp_path / "a", headers=headers)
        with stops(Exit.TEACHER, "not") as stopped:
            ask(teacher.url, tmp_path / "b", headers=headers)
    # a plain word is no secret: an answer without it would be another answer
    assert answer.text == "[key] sees engineering"
    sent = teacher.headers[0]
    assert (sent["x-org"], sent["x-beta"]) == ("org-0815-hidden", "on")
    assert sent["x-both"] == "engineering:org-0815-hidden"
    said = "".join(capfd.readouterr()) + str(stopped.value)
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert "hidden" not in said and b"hidden" not in written


@pytest.mark.parametrize(
    ("headers", "value", "says"),
    [
        ({"Cookie": "a=b"}, "", "secret"),
        ({"Host": "a"}, "", "no header"),
        ({"a\r\nb": "c"}, "", "no header"),
        ({"X-Org": "$ORG"}, None, "ORG is not set"),
        ({"X-Org": "${ORG}"}, "", "ORG is not set"),
        ({"X-Org": "$ORG"}, "hidden\r\nX-Evil: 1", "no header can"),
        ({"X-Org": "$ORG"}, "hiddén", "no header can"),
    ],
)
def test_a_header_that_cannot_be_sent_stops_before(monkeypatch, headers, value, says):
    monkeypatch.delenv("ORG", raising=False)
    if value is not None:
        monkeypatch.setenv("ORG", value)
    if "X-Org" not in headers:
        with pytest.raises(ValueError, match=says):
            settings("http://localhost:1/v1", headers=headers)
        return
    with stops(Exit.CONFIG, says) as stopped:
        request_headers(settings("http://localhost:1/v1", headers=headers), None)
    assert "hidd" not in str(stopped.value)
