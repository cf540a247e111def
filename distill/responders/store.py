"""The store of answers that all runs share: what was planned, what was asked, and what came."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import NamedTuple

from distill.records import Record, Response
from distill.responders.endpoint.wire import Reply
from distill.responders.responder import Plan, Planner, Raw, Request, Scoring
from distill.storage.log import Log
from distill.storage.progress import say


class Bill(NamedTuple):
    """What a stored reply took: a reply without its text, and whether it holds an answer."""

    attempt: int | None
    reply: Reply
    answered: bool


class Job(Record):
    """A job of a maker's batch interface, and how far it is."""

    id: str
    model: str
    run: str | None
    address: str
    requests: tuple[tuple[str, int, int], ...]  # key, sample and attempt of each
    file: str = ""
    sent: float | None = None  # when it was about to be submitted
    name: str | None = None  # the server's

    @cached_property
    def ids(self) -> list[str]:
        """Return the ids of the responses that its requests become."""
        return [Response.make_id(key, sample) for key, sample, _ in self.requests]

    @property
    def keys(self) -> list[str]:
        """Return the keys of the attempts that it makes."""
        rows = zip(self.ids, self.requests, strict=True)
        return [attempt_key(identifier, number) for identifier, (_, _, number) in rows]

    @property
    def custom_ids(self) -> list[str]:
        """Return what its requests are called in it."""
        return [f"{self.id}-{number}" for number in range(len(self.requests))]

    def line(self) -> str:
        """Return in a few words what waits, and since when."""
        since = datetime.fromtimestamp(self.sent).strftime("%Y-%m-%d %H:%M") if self.sent else "?"
        name = f"job {self.name}" if self.name else "a job"
        return f"{len(self.requests):,} questions wait in {name} since {since}"


class ResponseStore(Log):
    """The log of requests and answers, by the id of the response that a request becomes.

    What came when it was asked again stands under its attempt. Plans of answers that depend on what
    shares the batch are recorded before they are asked, and rerun in full when unfinished.
    """

    def __init__(self, folder: Path, writable: bool = True) -> None:
        super().__init__(folder, writable)
        self._bills: dict[str, Bill] = {}  # of the replies that were read, by their keys

    def attempts_at(self, identifier: str) -> int:
        """Return how many attempts there were at a request, also of killed runs."""
        return next(n for n in count() if ("intent", attempt_key(identifier, n)) not in self)

    def _attempt_keys(self, identifier: str) -> Iterator[str]:
        """Yield the keys of the attempts at a request, the newest first."""
        for number in reversed(range(self.attempts_at(identifier))):
            yield attempt_key(identifier, number)

    def reply_keys(self, identifier: str) -> Iterator[str]:
        """Yield the keys of the stored replies to a request, the newest first."""
        keys = (*self._attempt_keys(identifier), identifier)
        return (key for key in keys if ("response", key) in self)

    def raw(self, key: str) -> Raw:
        """Return the reply under a key, read, and remember its bill."""
        raw = Raw.model_validate(self.get("response", key))
        self.remember(key, raw)
        return raw

    def remember(self, key: str, raw: Raw) -> None:
        """Remember the bill of the reply under a key."""
        reply = Reply(stop=raw.reply.stop, usage=raw.reply.usage, dollars=raw.reply.dollars)
        self._bills[key] = Bill(raw.body.get("attempt"), reply, holds_answer(raw.reply))

    def bill(self, key: str) -> Bill | None:
        """Return the bill of the reply under a key, or None where there is none."""
        if key not in self._bills and ("response", key) in self:
            self.raw(key)
        return self._bills.get(key)

    def errors(self, identifier: str) -> Iterator[str]:
        """Yield how the attempts at a request failed, the last first."""
        outcomes = (self.get("outcome", key) for key in self._attempt_keys(identifier))
        return (str(outcome["what"]) for outcome in outcomes if outcome is not None)

    def responses(self, request: Request) -> Iterator[Response]:
        """Yield the replies to a request, the newest first, then its errors, the last first."""
        for key in self.reply_keys(request.id):
            yield self.raw(key).response(request.prompt_id)
        for error in (*self.errors(request.id), "no attempt is recorded"):
            yield Raw.failed(request, error).response(request.prompt_id)

    def response(self, request: Request) -> Response:
        """Return the stored response to a request; without one, how the last attempt failed."""
        return next(self.responses(request))

    def lacking(self, requests: Iterable[Request], again: bool = False) -> list[Request]:
        """Return the requests without a reply, or, with `again`, whose last one holds no answer."""
        missing: dict[str, Request] = {}
        for request in requests:
            key = next(self.reply_keys(request.id), None)
            bill = self.bill(key) if key and again else None
            failed = bill and bill.attempt is not None and not bill.answered
            if isinstance(request, Scoring):  # its one token need be no text
                failed = failed and bill and bill.reply.stop == "error"
            if key is None or failed:
                missing.setdefault(request.id, request)
        return list(missing.values())

    def jobs(self) -> Iterator[Job]:
        """Yield the batch jobs that have not ended, as far as is known."""
        for key in self.keys("batch"):
            if ("batch_end", key) not in self:
                sent = self.get("batch_sent", key) or {}
                name = (self.get("batch_name", key) or {}).get("name")
                progress = {"file": sent.get("file", ""), "sent": sent.get("at"), "name": name}
                yield Job.model_validate({**(self.get("batch", key) or {}), "id": key, **progress})

    def planned(self, planner: Planner, missing: Sequence[Request]) -> list[Plan]:
        """Return stored plans of what is missing: unfinished ones that still fit, then new ones."""
        lacking = {request.id for request in missing}
        stored = (Plan.model_validate(self.get("plan", key)) for key in self.keys("plan"))
        unfinished = [p for p in stored if any(request.id in lacking for request in p.requests)]
        begun = [plan for plan in unfinished if planner.fits(plan)]
        if large := len(unfinished) - len(begun):
            what = f"{large} unfinished plans have more rows at once than fit now"
            say(f"{self.folder}: {what}: their missing answers are planned again")
        ids = {request.id for plan in begun for request in plan.requests}
        fresh = planner.plan([request for request in missing if request.id not in ids])
        self.append(("plan", plan.id, plan.model_dump(mode="json")) for plan in fresh)
        return begun + fresh


def holds_answer(reply: Reply) -> bool:
    """Tell whether a server's reply holds an answer: a text, or that the model declines."""
    declined = reply.stop == "filtered" and (reply.error or "").startswith("refusal")
    return declined or (reply.stop != "error" and bool(reply.text.strip()))


def attempt_key(identifier: str, number: int) -> str:
    """Return the key under which an attempt's intent and outcome are stored."""
    return f"{identifier}.{number}"
