"""What most tests of responders do: ask, and look at what the store then says."""

from collections.abc import Sequence
from pathlib import Path

from distill.records import Response
from distill.responders.ask import Ask
from distill.responders.responder import Request, Responder


def answer_all(
    responder: Responder, requests: Sequence[Request], store: Path, again: bool = False
) -> list[Response]:
    """Ask for what the store lacks; return what it says of each request, failures too."""
    with Ask(responder, store, again=again) as ask:
        ask.fetch(requests, "x")
        return [ask.store.response(request) for request in requests]
