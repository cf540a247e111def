"""Plans of answers that depend on what shares the batch: recorded before they are asked, rerun whole when unfinished.

So an interrupted run ends with the same bytes as one that was not, and it does not matter who answers which plan.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from distill.records import Response
from distill.responders.endpoint.budget import replies
from distill.responders.endpoint.wire import read_stored
from distill.responders.responder import Plan, Planner, Raw, Request
from distill.storage.log import Log

Spend = Callable[[int, int], None]  # is given the input and output tokens of an answer


def lacking(log: Log, requests: Iterable[Request], again: bool = False) -> list[Request]:
    """Return the requests without a stored reply, each once; `again` adds those whose last reply holds no answer."""
    found: dict[str, Request] = {}
    for request in requests:
        identifier = Response.make_id(request.key, request.sample)
        if ("response", identifier) not in log or (again and _failed(log, identifier)):
            found.setdefault(identifier, request)
    return list(found.values())


def _failed(log: Log, identifier: str) -> bool:
    """Tell a server's reply that is no answer (refused, unreadable, broken off) from one; a model that declines has answered."""
    body = next(replies(log, identifier))["body"]
    return "sha256" in body and read_stored(body).stop == "error"


def unfinished(log: Log, missing: Sequence[Request]) -> list[Plan]:
    """Return the stored plans that hold a missing request, in the order they were stored."""
    wanted = {(request.key, request.sample) for request in missing}
    plans = [Plan.model_validate(log.get("plan", key)) for key in log.keys("plan")]
    return [p for p in plans if any((r.key, r.sample) in wanted for r in p.requests)]


def planned(planner: Planner, missing: Sequence[Request], log: Log) -> list[Plan]:
    """Return the plans that bring the missing answers, all of them stored: unfinished ones first, then new ones."""
    begun = unfinished(log, missing)
    theirs = {(request.key, request.sample) for plan in begun for request in plan.requests}
    fresh = planner.plan([r for r in missing if (r.key, r.sample) not in theirs])
    log.append(("plan", plan.id, plan.model_dump(mode="json")) for plan in fresh)
    return begun + fresh


def answers(planner: Planner, plans: Iterable[Plan]) -> Iterator[Raw]:
    """Yield the answers of each plan in turn."""
    for plan in plans:
        yield from planner.ask_plan(plan)


def store_each(
    raws: Iterable[Raw], log: Log, spend: Spend | None, known: Log | None = None
) -> Iterator[Raw]:
    """Store each answer that neither `log` nor `known` has, durably, and yield it then."""
    for raw in raws:
        record = ("response", raw.id)
        if record in log or (known and record in known):
            continue  # a plan that is rerun gives again what was stored before the kill
        if spend:  # first, so that a kill while the answer is being stored hides no spending
            spend(raw.usage.input_tokens, raw.usage.output_tokens)
        log.append([(*record, raw.model_dump(mode="json"))])
        yield raw


def worth_keeping(log: Log, kind: str, body: bytes) -> bool:
    """Tell whether anything reads a stored record again: all but a plan whose every answer is stored.

    The account of money is made anew from every intent and outcome, so these stay.
    """
    return kind != "plan" or bool(lacking(log, Plan.from_line(body).requests))
