"""What stands between us and a teacher: TLS, proxies, redirects, endless headers, encodings."""

import gzip
import json
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DistillError, Exit
from distill.records import Message, Response
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.responder import Request, Sampling, origin_of
from tests.support.asking import answer_all
from tests.support.buying import ANSWER, settings
from tests.support.errors import stops
from tests.support.fake_teacher import KEY, PRICE, FakeTeacher, Reply

CERTIFICATE = (
    Path(__file__).parent.parent / "fixtures" / "self_signed.pem"
)  # of 127.0.0.1, with its key
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_proxy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("TEACHER_KEY", KEY)


def ask(url: str, store: Path, **changes: Any) -> Response:
    """Ask one question with a key; return the answer, or how it failed."""
    changes = {"max_retries": 0, "api_key_env": "TEACHER_KEY", **changes}
    asked = settings(url, **changes)
    turn = (Message(role="user", content="q0 please"),)
    request = Request.make(origin_of(asked), "p", turn, Sampling(max_new_tokens=20))
    return answer_all(EndpointResponder(asked, PRICE, "run"), [request], store)[0]


def secure() -> FakeTeacher:
    """Return a teacher behind TLS, with a certificate that nobody vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return FakeTeacher(tls=context)


def test_c5_a_certificate_that_nobody_vouches_for_gets_no_key(tmp_path):
    with secure() as teacher, pytest.raises(DistillError, match="cannot connect"):
        ask(teacher.url, tmp_path)
    assert not teacher.payloads and not teacher.headers


def test_c5_a_certificate_of_another_host_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with secure() as teacher, pytest.raises(DistillError, match="could be sent"):
        ask(teacher.url.replace("127.0.0.1", "127.0.0.2"), tmp_path)
    assert not teacher.payloads


@contextmanager
def listener(reply: Any) -> Iterator[tuple[int, list[bytes]]]:
    """Listen on a loopback port; answer each connection's first bytes by `reply`."""
    seen: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed
                return
            with connection, suppress(ConnectionError):  # a client that has seen enough
                seen.append(connection.recv(65536))
                made = reply(seen[-1])
                if isinstance(made, bytes):
                    connection.sendall(made)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], seen
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_proxy_of_the_environment_never_sees_a_request_in_the_clear(tmp_path, monkeypatch):
    with listener(lambda head: None) as (port, seen), FakeTeacher() as teacher:
        for name in PROXIES[:3]:
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        assert ask(teacher.url, tmp_path).text == "the answer to q0 please"
    assert not seen


@pytest.mark.parametrize("proxy", ["socks5://u:hidden@127.0.0.1:9", "gopher://u:hidden@h:1"])
def test_a_proxy_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, proxy):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with stops(Exit.CONFIG, "HTTPS_PROXY") as stopped:
        ask("https://127.0.0.1:9/v1", tmp_path)
    assert "hidden" not in str(stopped.value)


@pytest.mark.parametrize(
    "to", ["http://169.254.169.254/latest", "file:///etc/passwd", "//127.0.0.1:1/", "\x7f", ""]
)
def test_c9_a_redirect_is_never_followed(tmp_path, to):
    script = Reply(status=308, headers={"location": to}, body=b"")
    with FakeTeacher(lambda number, payload: script) as teacher:
        with stops(Exit.TEACHER, "a redirect"):
            ask(teacher.url, tmp_path, max_retries=3)
    assert len(teacher.payloads) == 1


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1_000_000,
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 5_000_000,
        b"HTTP/1.1 2OO OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"F" * 5000,
    ],
    ids=["many", "long", "status", "chunk"],
)
def test_c5_a_head_without_end_or_sense_is_a_fault(tmp_path, head):
    started = time.process_time()
    with listener(lambda request: head) as (port, _):
        found = ask(f"http://127.0.0.1:{port}/v1", tmp_path)
    assert found.stop == "error" and "outcome unknown" in str(found.error)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("encoding", "body", "says"),
    [
        ("gzip, gzip", gzip.compress(gzip.compress(ANSWER)), "content encoding"),
        ("br", ANSWER, "content encoding"),
        ("gzip", ANSWER, "damaged gzip"),
        ("gzip", gzip.compress(ANSWER)[:-30], "unreadable"),
        ("deflate", zlib.compress(ANSWER), ""),
        ("GZIP", gzip.compress(ANSWER), ""),
        ("identity", ANSWER, ""),
    ],
)
def test_c6_encodings(tmp_path, encoding, body, says):
    reply = Reply(body=body, headers={"content-encoding": encoding}, billed=True)
    with FakeTeacher(lambda number, payload: reply) as teacher:
        found = ask(teacher.url, tmp_path)
        assert ask(teacher.url, tmp_path) == found and len(teacher.payloads) == 1
    assert says in str(found.error) if says else found.text == "the answer to q0 please"


def test_what_a_server_says_cannot_steer_the_terminal(tmp_path, capfd):
    escape = "\x1b]0;mine\x07\x1b[2J\x9b31m\r\x00"
    error = json.dumps({"error": {"message": f"no {escape}"}}).encode()
    replies = [
        Reply(),
        Reply(answer={"model": f"m{escape}"}),
        Reply(status=400, body=error),
        Reply(status=401, body=error),
    ]
    with FakeTeacher(lambda number, payload: replies[number]) as teacher:
        turns = (Message(role="user", content=f"q{i} please") for i in range(3))
        asked = settings(teacher, max_retries=0, concurrency=1)
        requests = [Request.make(origin_of(asked), "p", (turn,), Sampling()) for turn in turns]
        responder = EndpointResponder(asked, PRICE)
        found = answer_all(responder, requests, tmp_path)
        with pytest.raises(DistillError) as stopped:
            ask(teacher.url, tmp_path, revision="x")
    shown = "".join(capfd.readouterr()) + str(found[2].error) + str(stopped.value)
    assert "is now m" in shown and "401: no" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
