"""What was paid and what may have been: the budget of a run, and the account that the store gives of every attempt.

An attempt is an intent record, written before its request is sent. It is settled where the answer or a refusal of the
server says what it cost; else its outcome is unknown, and counts with its maximum: as many input tokens as the request
has bytes, and as many output tokens as it may write. Money is Decimal.
"""

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from distill.config import Config
from distill.records import Record, Response, Usage
from distill.responders.endpoint.wire import Reply, read_stored
from distill.responders.prices import MILLION, TokenPrice, load_prices
from distill.storage.log import Log
from distill.storage.run_folder import Run

MARGIN = 256  # tokens of a chat template and a server's own system prompt that no request shows
NOTHING = Decimal(0)
APART = 10  # times that what a server states may be above or below the price, and an answer above its maximum
SENSELESS = 1000  # times its maximum: no bill, but a number gone wrong


def input_bound(question: int) -> int:
    """Return the most tokens that a request of so many bytes can be."""
    return question + MARGIN


def most_dollars(price: TokenPrice | None, question: int, output_tokens: int) -> Decimal | None:
    """Return what a request of `question` bytes can cost at most, or None without a price."""
    if price is None:
        return None
    dearest = max(
        price.dollars_per_million_input, price.dollars_per_million_cached_input or NOTHING
    )
    paid = input_bound(question) * dearest + output_tokens * price.dollars_per_million_output
    return paid / MILLION


class Charge(NamedTuple):
    """What an answer cost: `paid` for certain and `perhaps` beside it, or in `doubt` nothing for certain.

    `claim` is the larger of what the server states and what the price says.
    """

    paid: Decimal | None
    perhaps: Decimal | None
    doubt: str = ""
    claim: Decimal | None = None


def charge(price: TokenPrice | None, reply: Reply, intent: Mapping[str, Any]) -> Charge:
    """Hold what a server states of an answer against the price, and both against what its request allowed.

    The statement counts as paid where it lies within APART of the price; where the price says more, the difference may
    have been charged. In doubt is a cost further apart, and one of more tokens than were allowed, or above the
    attempt's maximum: then the larger of both may have been charged, or the maximum where that is beyond all sense.
    """
    usage, stated = reply.usage, reply.dollars
    counted = not usage.estimated and usage != Usage()
    computed = price.of(usage) if price and counted else None
    claim = max((dollars for dollars in (stated, computed) if dollars is not None), default=None)
    most = Decimal(intent["most"]) if intent.get("most") is not None else None
    read, cap = intent.get("question"), intent.get("cap")
    apart, doubt = False, ""
    if not counted:
        doubt = "answered without a count of tokens"
    elif read is not None and usage.input_tokens > input_bound(read):
        doubt = f"counts {usage.input_tokens:,} tokens read, of at most {input_bound(read):,}"
    elif cap is not None and usage.output_tokens > cap:
        doubt = f"counts {usage.output_tokens:,} tokens written, of at most {cap:,}"
    elif stated is not None and computed is not None:
        apart = max(stated, computed) > APART * min(stated, computed)
        doubt = f"states ${stated:.4g}, where the price says ${computed:.4g}" if apart else ""
    unbounded = "cap" in intent and cap is None  # max_tokens was not sent
    if not doubt and claim is not None and most is not None and not unbounded and claim > most:
        doubt = f"cost ${claim:.4g}, more than its maximum of ${most:.4g}"
    if not doubt:
        paid = computed if stated is None else stated
        perhaps = claim - paid if claim is not None and paid is not None else None
        return Charge(paid, perhaps, "", claim)
    if claim is None or (most is not None and claim > most * SENSELESS):
        return Charge(None, most, doubt, claim)
    return Charge(None, claim if apart or most is None else max(most, claim), doubt, claim)


class Budget:
    """Keeps settled + unknown + reserved within a limit; without one it only counts."""

    def __init__(
        self, limit: Decimal | None, settled: Decimal = NOTHING, unknown: Decimal = NOTHING
    ) -> None:
        self.limit, self.settled, self.unknown = limit, settled, unknown
        self.reserved = NOTHING

    @property
    def committed(self) -> Decimal:
        """Return the dollars that may have been spent when all that is in flight has ended."""
        return self.settled + self.unknown + self.reserved

    def reserve(self, dollars: Decimal) -> bool:
        """Set dollars aside for a request; False, and nothing is set aside, where they could exceed the limit."""
        if self.limit is not None and self.committed + dollars > self.limit:
            return False
        self.reserved += dollars
        return True

    def settle(self, reserved: Decimal, paid: Decimal, perhaps: Decimal = NOTHING) -> None:
        """Turn a reservation into what was really paid, and what may have been beside it."""
        self.reserved -= reserved
        self.settled += paid
        self.unknown += perhaps

    @property
    def exceeded(self) -> bool:
        """Tell whether a bill was higher than what was reserved for it, so that the limit is passed."""
        return self.limit is not None and self.committed > self.limit


class Attempt(Record):
    """One attempt as the store tells it; `billed` is yes, no or unknown, `most` its maximum in dollars.

    One that is settled may have cost `perhaps` beside its `dollars`: the price says more than the server.
    """

    key: str
    model: str
    billed: str
    dollars: Decimal | None = None
    perhaps: Decimal = NOTHING
    most: Decimal | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    what: str = ""
    answered: bool = False


class Account(Record):
    """The sums over attempts: settled dollars, the number of those that may have been billed, and at most what beside."""

    attempts: int = 0
    settled: Decimal = NOTHING
    input_tokens: int = 0
    output_tokens: int = 0
    unknown: int = 0
    unknown_most: Decimal = NOTHING
    unpriced: int = 0  # settled or unknown, but without a price


def account(
    log: Log, price: TokenPrice | None, run: str | None = None, model: str | None = None
) -> Account:
    """Sum up every attempt in a log, or those of one run and model; memory does not grow with their number."""
    sums = dict.fromkeys(Account.model_fields, NOTHING)
    for attempt in attempts(log, price, run, model):
        sums["attempts"] += 1
        if attempt.billed == "yes":
            sums["settled"] += attempt.dollars or NOTHING
            sums["unknown_most"] += attempt.perhaps
            sums["input_tokens"] += attempt.input_tokens
            sums["output_tokens"] += attempt.output_tokens
            sums["unpriced"] += attempt.dollars is None
        elif attempt.billed == "unknown":
            sums["unknown"] += 1
            sums["unknown_most"] += attempt.most or NOTHING
            sums["unpriced"] += attempt.most is None
    return Account.model_validate(sums)


def enter_account(run: Run, log: Log) -> None:
    """Enter in the ledger what the store knows of a run's spending and the ledger does not, also what a kill hid."""
    prices = paid_models(run.config)
    if not prices:
        return
    now = _sum(account(log, price, run.config.name, model) for model, price in prices.items())
    entered = [entry for entry in run.ledger.entries() if entry.attempts]

    def sum_of(name: str) -> Decimal:
        return sum((Decimal(getattr(entry, name) or 0) for entry in entered), NOTHING)

    known = not now.unpriced
    run.ledger.spend(
        input_tokens=now.input_tokens - int(sum_of("paid_input_tokens")),
        output_tokens=now.output_tokens - int(sum_of("paid_output_tokens")),
        dollars=now.settled - sum_of("dollars") if known else None,
        price="; ".join(f"{p.model} of {p.date}, {p.source}" for p in prices.values() if p) or None,
        attempts=now.attempts - int(sum_of("attempts")),
        unknown=now.unknown - int(sum_of("unknown")),
        unknown_dollars=now.unknown_most - sum_of("unknown_dollars") if known else None,
        paid=True,
    )


def paid_models(config: Config) -> dict[str, TokenPrice | None]:
    """Return the models that a run pays for by the token, with their prices: its teacher, its reader and its judge."""
    reader = config.soft_teacher() if config.captures else None
    asked = (config.teacher, reader, config.evaluation.judge)
    paid = [settings for settings in asked if settings and settings.paid]
    book = load_prices(config.evaluation.prices) if paid else None
    return {settings.model: book.teacher(settings.model) for settings in paid if book}


def _sum(accounts: Iterable[Account]) -> Account:
    """Add accounts up."""
    rows = list(accounts)
    return Account.model_validate(
        {name: sum((getattr(row, name) for row in rows), 0) for name in Account.model_fields}
    )


def attempts(
    log: Log, price: TokenPrice | None, run: str | None = None, model: str | None = None
) -> Iterator[Attempt]:
    """Yield every attempt of a log, or of one run and model, in the order they were begun."""
    for key in log.keys("intent"):
        intent = log.get("intent", key) or {}
        if run in (None, intent.get("run")) and model in (None, intent.get("model")):
            yield _attempt(log, price, key, intent)


def unknown_outcomes(
    log: Log, run: str | None = None, prices: Mapping[str, TokenPrice | None] | None = None
) -> list[Attempt]:
    """Return the attempts that may have been billed: without an answer, or for other dollars than their model's price."""
    found = (
        attempts(log, None, run)
        if prices is None
        else (
            attempt
            for model, price in prices.items()
            for attempt in attempts(log, price, run, model)
        )
    )
    return [attempt for attempt in found if attempt.billed == "unknown"]


def _attempt(log: Log, price: TokenPrice | None, key: str, intent: dict[str, Any]) -> Attempt:
    """Read what became of one attempt from the records beside its intent."""
    most = Decimal(intent["most"]) if intent.get("most") is not None else None
    known = {"key": key, "model": str(intent.get("model", "")), "most": most}
    outcome = log.get("outcome", key)
    if outcome is not None:
        return Attempt(**known, billed=outcome["billed"], what=outcome["what"])
    reply = _reply(log, key)
    if reply is None:
        return Attempt(**known, billed="unknown", what="no word of how it ended")
    found, usage = charge(price, reply, intent), reply.usage
    if found.doubt:
        doubt = {"most": found.perhaps, "what": found.doubt}
        return Attempt(**known | doubt, billed="unknown", answered=True)
    return Attempt(
        **known,
        answered=True,
        billed="yes",
        dollars=found.paid,
        perhaps=found.perhaps or NOTHING,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
    )


def bill_of(reply: Reply) -> dict[str, Any]:
    """Return what a reply says that it took, for a record beside one that is long to read."""
    return reply.model_dump(mode="json", include={"stop", "usage", "dollars"})


def _reply(log: Log, key: str) -> Reply | None:
    """Return what an attempt brought, as far as money goes, or None where nothing came."""
    if (noted := log.get("usage", key)) is not None:
        return Reply.model_validate(noted)
    identifier, number = key.rsplit(".", 1)
    stored = log.get("response", key) or log.get("response", identifier)
    if stored is None or stored["body"].get("attempt") != int(number):
        return None
    return read_stored(stored["body"])


def replies(log: Log, identifier: str) -> Iterator[dict[str, Any]]:
    """Yield the stored replies to the request of a response's id, the newest first.

    The first reply stands under the id itself; what came when it had failed, and was asked again, under its attempt.
    """
    keys = [identifier]
    while ("intent", attempt_key(identifier, len(keys) - 1)) in log:
        keys.append(attempt_key(identifier, len(keys) - 1))
    for key in reversed(keys):
        if (stored := log.get("response", key)) is not None:
            yield stored


def attempt_key(identifier: str, number: int) -> str:
    """Return the key under which an attempt's intent and outcome are stored."""
    return f"{identifier}.{number}"


def next_attempt(log: Log, request_key: str, sample: int) -> int:
    """Return the number of the next attempt at a request: a killed run's attempts are never reused."""
    identifier, number = Response.make_id(request_key, sample), 0
    while ("intent", attempt_key(identifier, number)) in log:
        number += 1
    return number


def faults(log: Log, request_key: str, sample: int) -> Iterator[str]:
    """Yield how the attempts at a request failed, the last first."""
    identifier = Response.make_id(request_key, sample)
    for number in reversed(range(next_attempt(log, request_key, sample))):
        outcome = log.get("outcome", attempt_key(identifier, number))
        if outcome is not None:
            yield str(outcome["what"])


def last_fault(log: Log, request_key: str, sample: int) -> str | None:
    """Return how the last attempt at a request failed, or None where none is recorded."""
    return next(faults(log, request_key, sample), None)
