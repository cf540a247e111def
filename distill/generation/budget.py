"""What was paid and what may have been: the budget of a run, and the account that the store gives of every attempt.

An attempt is an intent record, written before its request is sent. It is settled where the answer or a refusal of the
server says what it cost; else its outcome is unknown, and counts with its maximum: as many input tokens as the request
has bytes, and as many output tokens as it may write. Money is Decimal.
"""

from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.generation.prices import MILLION, TokenPrice, load_prices
from distill.generation.wire import Reply, read_stored
from distill.records import Record, Response, Usage
from distill.run import Run
from distill.store import Log

MARGIN = 256  # tokens of a chat template and a server's own system prompt that no request shows
NOTHING = Decimal(0)


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


def cost(price: TokenPrice | None, usage: Usage, stated: Decimal | None = None) -> Decimal | None:
    """Return an answer's cost: what the server states, else what the price says; None where neither is known."""
    if stated is not None:
        return stated
    return price.of(usage) if price else None


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

    def settle(self, reserved: Decimal, paid: Decimal) -> None:
        """Turn a reservation into what was really paid."""
        self.reserved -= reserved
        self.settled += paid

    def doubt(self, reserved: Decimal) -> None:
        """Turn a reservation into an attempt that may have been billed, at its maximum."""
        self.reserved -= reserved
        self.unknown += reserved

    @property
    def exceeded(self) -> bool:
        """Tell whether a bill was higher than what was reserved for it, so that the limit is passed."""
        return self.limit is not None and self.committed > self.limit


class Attempt(Record):
    """One attempt as the store tells it; `billed` is yes, no or unknown, `most` its maximum in dollars."""

    key: str
    model: str
    billed: str
    dollars: Decimal | None = None
    most: Decimal | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    what: str = ""


class Account(Record):
    """The sums over attempts: settled dollars, and the number and maximum of those that may have been billed."""

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
            sums["input_tokens"] += attempt.input_tokens
            sums["output_tokens"] += attempt.output_tokens
            sums["unpriced"] += attempt.dollars is None
        elif attempt.billed == "unknown":
            sums["unknown"] += 1
            sums["unknown_most"] += attempt.most or NOTHING
            sums["unpriced"] += attempt.most is None
    return Account.model_validate(sums)


def enter_account(run: Run, folder: Path) -> None:
    """Enter in the ledger what the store knows of a run's spending and the ledger does not, also what a kill hid."""
    prices = paid_models(run.config)
    if not prices:
        return
    with Log(folder, writable=False) as log:
        now = _sum(account(log, price, run.config.name, model) for model, price in prices.items())
    entered = [entry for entry in run.ledger() if entry.attempts]

    def sum_of(name: str) -> Decimal:
        return sum((Decimal(getattr(entry, name) or 0) for entry in entered), NOTHING)

    known = not now.unpriced
    run.spend(
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
    paid = [settings for settings in asked if settings and settings.kind == "endpoint"]
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


def unknown_outcomes(log: Log, run: str | None = None) -> list[Attempt]:
    """Return the attempts that may have been billed though no answer of theirs is stored."""
    return [attempt for attempt in attempts(log, None, run) if attempt.billed == "unknown"]


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
    if reply.usage.estimated or reply.usage == Usage():
        return Attempt(**known, billed="unknown", what="answered without a count of tokens")
    usage = reply.usage
    return Attempt(
        **known,
        billed="yes",
        dollars=cost(price, usage, reply.dollars),
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
    stored = log.get("response", identifier)
    if stored is None or stored["body"].get("attempt") != int(number):
        return None
    return read_stored(stored["body"])


def attempt_key(identifier: str, number: int) -> str:
    """Return the key under which an attempt's intent and outcome are stored."""
    return f"{identifier}.{number}"


def next_attempt(log: Log, request_key: str, sample: int) -> int:
    """Return the number of the next attempt at a request: a killed run's attempts are never reused."""
    identifier, number = Response.make_id(request_key, sample), 0
    while ("intent", attempt_key(identifier, number)) in log:
        number += 1
    return number


def last_fault(log: Log, request_key: str, sample: int) -> str | None:
    """Return how the last attempt at a request failed, or None where none is recorded."""
    identifier = Response.make_id(request_key, sample)
    for number in reversed(range(next_attempt(log, request_key, sample))):
        outcome = log.get("outcome", attempt_key(identifier, number))
        if outcome is not None:
            return str(outcome["what"])
    return None
