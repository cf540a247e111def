"""Runs whose teacher is the fake one, as far as the generate stage, and buying from it."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from distill.cli import main
from distill.config.teachers import EndpointTeacher
from distill.config.tree import Config
from distill.records import Document, Message, Prompt, Response
from distill.responders.endpoint.budget import Account, Attempt, account, attempts
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.responder import Request, Sampling, origin_of
from distill.responders.store import ResponseStore
from distill.storage.files import write_records
from distill.storage.run_folder import Run
from tests.support.asking import answer_all
from tests.support.fake_teacher import PRICE, PRICES, FakeTeacher, Reply, Script, answer

MODEL = "fake-1"
ANSWER = answer({"model": MODEL, "messages": [{"role": "user", "content": "q0 please"}]})


def settings(teacher: FakeTeacher | str | tuple[str, ...], **changes: Any) -> EndpointTeacher:
    """Return settings that retry soon, with timeouts that a busy machine does not reach."""
    url = teacher.url if isinstance(teacher, FakeTeacher) else teacher
    given = {
        "kind": "endpoint",
        "model": MODEL,
        "base_url": url,
        "max_new_tokens": 20,
        "initial_backoff": 0.01,
        "max_retries": 3,
        "connect_timeout": 20,
        "read_timeout": 20,
        "total_timeout": 30,
        "drain_timeout": 30,
        **changes,
    }
    return EndpointTeacher.model_validate(given)


def make_run(folder: Path, teacher: FakeTeacher | str, count: int = 12, **changes: Any) -> Path:
    """Write a run whose prompts are made, ready for its generate stage; return its config."""
    turns = [{"role": "user", "content": f"q{i} please"} for i in range(count)]
    documents = [Document.make(f"text {i}", "x", split="train") for i in range(count)]
    prompts = [
        Prompt.make((Message.model_validate(turn),), document.id, "chat")
        for turn, document in zip(turns, documents, strict=True)
    ]
    table = [{**PRICE.model_dump(mode="json"), "date": "2026-11-01"}]
    (folder / "corpus.txt").write_text("A text that is long enough to be taken for a document.")
    (folder / "prices.yaml").write_text(json.dumps({"tokens": table}))
    given = settings(teacher, **changes).model_dump(mode="json", exclude_unset=True)
    given = {"api_key_env": "TEACHER_KEY", "concurrency": 4} | given
    tree = {
        "name": "mine",
        "runs": str(folder / "runs"),
        "corpus": {"path": str(folder / "corpus.txt")},
        "teacher": given,
        "terms": {"basis": "our own fake teacher"},
        "evaluation": {"prices": str(folder / "prices.yaml")},
        "student": {"model": "s"},
    }
    run = Run(Config.model_validate(tree))
    write_records(run.path("documents.jsonl"), documents)
    write_records(run.path("prompts.jsonl"), prompts)
    (folder / "c.yaml").write_text(json.dumps(tree))
    return folder / "c.yaml"


def generate(*words: str) -> int:
    """Be `distill generate WORDS`, but for its look ahead: these runs have no real student."""
    with patch("distill.api.require"):
        return main(["generate", *words])


def asks(teacher: EndpointTeacher, count: int, **sampling: Any) -> list[Request]:
    drawn = Sampling(max_new_tokens=teacher.max_new_tokens, **sampling)
    return [
        Request.make(
            origin_of(teacher), f"p{i}", (Message(role="user", content=f"q{i} please"),), drawn
        )
        for i in range(count)
    ]


def buy(teacher: FakeTeacher, store: Path, count: int = 1, **changes: Any) -> list[Response]:
    """Buy some answers, and hold the store's account against the teacher's bill."""
    asked = settings(teacher, **changes)
    try:
        responder = EndpointResponder(asked, PRICE, "run")
        return answer_all(responder, asks(asked, count), store)
    finally:
        if store.exists():
            hold_account(teacher, store)


def account_of(store: Path) -> Account:
    """Return what a store's account says of the fake teacher."""
    with ResponseStore(store, writable=False) as log:
        return account(log, PRICES)


def in_doubt(store: Path, run: str | None = None) -> list[Attempt]:
    """Return the requests to the fake teacher that may have been billed."""
    with ResponseStore(store, writable=False) as log:
        return [one for one in attempts(log, PRICES, run) if one.billed == "unknown"]


def hold_account(teacher: FakeTeacher, store: Path) -> None:
    """Assert settled <= bill <= settled + most unknown, and an intent for every request."""
    found = account_of(store)
    assert found.settled <= teacher.bill <= found.settled + found.unknown_most
    if not found.unknown_most:
        assert found.settled == teacher.bill
    assert found.attempts >= len(teacher.payloads)


def always(**reply: Any) -> Script:
    return lambda number, payload: Reply(**reply)


def first(count: int, **reply: Any) -> Script:
    return lambda number, payload: Reply(**reply) if number < count else Reply()


if __name__ == "__main__":
    sys.exit(generate(*sys.argv[1:]))
