"""Where a request goes: names that lead astray, proxies, private authorities, extra headers."""

import asyncio
import base64
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DistillError, Exit
from distill.responders.endpoint import network
from distill.responders.endpoint.network import ways
from distill.responders.endpoint.request_form import headers as request_headers
from distill.responders.responder import origin_of
from tests.responders.test_transport import PROXIES, ask
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
def test_h21_a_name_that_leads_to_a_metadata_service_is_not_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, beside: tuple[str, ...]
) -> None:
    name_server(monkeypatch, (*beside, address))
    connections = list[Any]()
    monkeypatch.setattr(
        asyncio.BaseEventLoop, "create_connection", lambda *a, **named: connections.append(named)
    )
    url = "http://teacher.test:80/v1"
    with stops(Exit.TEACHER, "leads to a cloud's metadata service") as stopped:
        ask(url, tmp_path, allow_insecure=True, max_retries=3)
    assert not connections and "base_url" in str(stopped.value)


def test_h21_the_address_that_was_checked_is_the_one_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that gives another address to every second question changes nothing."""
    with FakeTeacher() as teacher:
        asked = name_server(monkeypatch, ("127.0.0.1",), ("169.254.169.254",))
        url = teacher.url.replace("127.0.0.1", "teacher.test")
        assert ask(url, tmp_path, allow_insecure=True).text == "the answer to q0 please"
    assert asked == ["teacher.test"]
    assert teacher.headers[0]["host"].startswith("teacher.test:")


def test_h21_a_dead_address_of_several_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTeacher() as teacher:
        name_server(monkeypatch, ("127.0.0.99", "::1", "127.0.0.1"))
        url = teacher.url.replace("127.0.0.1", "teacher.test")
        assert ask(url, tmp_path, allow_insecure=True).text == "the answer to q0 please"


@contextmanager
def authority(folder: Path) -> Iterator[tuple[Path, ssl.SSLContext]]:
    """Make a private authority and a server's certificate of it; yield the authority's, and TLS."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    folder.mkdir()
    new = "req -x509 -newkey rsa:2048 -nodes -days 2".split()
    openssl(*new, "-subj", "/CN=our authority", "-keyout", "ca.key", "-out", "ca.pem")
    names = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "server.key", "-out", "server.pem")
    openssl(*new, "-subj", "/CN=teacher", *names, *signed)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    yield folder / "ca.pem", context


def test_a_private_authority_counts_in_each_usual_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with authority(tmp_path / "ca") as (certificate, tls), FakeTeacher(tls=tls) as teacher:
        with pytest.raises(DistillError, match="cannot connect"):
            ask(teacher.url, tmp_path / "none")
        named = subprocess.run(
            ["openssl", "x509", "-hash", "-noout", "-in", str(certificate)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        folder = tmp_path / "hashed"
        folder.mkdir()
        (folder / f"{named.stdout.strip()}.0").write_bytes(certificate.read_bytes())
        for name in network.CERTIFICATES:
            value = f"/nowhere:{folder}" if name == "SSL_CERT_DIR" else str(certificate)
            monkeypatch.setenv(name, value)
            assert ask(teacher.url, tmp_path / name).text == "the answer to q0 please", name
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", network.CERTIFICATES)
@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_h24_certificates_that_cannot_be_read_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None
) -> None:
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
def test_a_proxy_with_a_password_carries_tls_and_is_told_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    variable: str,
) -> None:
    certificate = Path(__file__).parent.parent / "fixtures" / "self_signed.pem"
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with connecting_proxy(f"me:{PASSWORD}") as (port, heads), FakeTeacher(tls=tls) as teacher:
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
def test_the_environment_names_the_proxy(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], url: str, through: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bool(ways(settings(url, allow_insecure=True))) == through


def test_headers_come_from_the_environment_and_go_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
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


def test_a_header_of_the_environment_is_in_no_key_and_one_of_the_config_is() -> None:
    plain = settings("http://localhost:1/v1")
    assert origin_of(settings("http://localhost:1/v1", headers={"X-Org": "$ORG"})) == origin_of(
        plain
    )
    assert origin_of(settings("http://localhost:1/v1", headers={"X-Beta": "on"})) != origin_of(
        plain
    )


@pytest.mark.parametrize(
    ("headers", "value", "says"),
    [
        ({"X-Org": "$ORG"}, None, "ORG is not set"),
        ({"X-Org": "${ORG}"}, "", "ORG is not set"),
        ({"X-Org": "$ORG"}, "hidden\r\nX-Evil: 1", "no header can"),
        ({"X-Org": "$ORG"}, "hiddén", "no header can"),
    ],
)
def test_a_header_that_cannot_be_sent_stops_before(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], value: str | None, says: str
) -> None:
    monkeypatch.delenv("ORG", raising=False)
    if value is not None:
        monkeypatch.setenv("ORG", value)
    with stops(Exit.CONFIG, says) as stopped:
        request_headers(settings("http://localhost:1/v1", headers=headers), None)
    assert "hidd" not in str(stopped.value)


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer abc"}, {"Cookie": "a=b"}, {"Host": "a"}, {"a\r\nb": "c"}]
)
def test_a_header_that_the_config_may_not_hold(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"header|secret"):
        settings("http://localhost:1/v1", headers=headers)
