"""What was paid and what may have been: a run's budget, and the account that the store gives.

An attempt is settled where the answer or a refusal says what it cost; else its outcome is unknown,
and counts with its maximum: as many input tokens as the request has bytes, and as many output
tokens as it may write. Money is Decimal.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.records import Record, Usage
from distill.responders.endpoint.wire import Reply
from distill.responders.prices import MILLION, TokenPrice, load_prices
from distill.responders.responder import Request
from distill.responders.store import ResponseStore, attempt_key
from distill.storage.run_folder import Run

MARGIN = 256  # tokens of a chat template and a server's own system prompt that no request shows
NOTHING = Decimal(0)
APART = 10  # times that a bill may be above or below the price, and above an answer's maximum
SENSELESS = 1000  # times its maximum: no bill, but a number gone wrong


def most_dollars(price: TokenPrice | None, question: int, output_tokens: int) -> Decimal | None:
    """Return what a request of `question` bytes can cost at most, or None without a price."""
    if price is None:
        return None
    cached = price.dollars_per_million_cached_input or NOTHING
    dearest = max(price.dollars_per_million_input, cached)
    paid = (question + MARGIN) * dearest + output_tokens * price.dollars_per_million_output
    return paid / MILLION


class Sending(NamedTuple):
    """One attempt at a request: its number, its bytes, and the dollars set aside for it."""

    request: Request
    number: int
    body: bytes
    reserved: Decimal

    @property
    def key(self) -> str:
        """Return the key of the attempt's records."""
        return attempt_key(self.request.id, self.number)


class Charge(NamedTuple):
    """What an answer cost: `paid` for certain and `perhaps` beside it, or in `doubt` only perhaps.

    `claim` is the larger of what the server states and what the price says.
    """

    paid: Decimal | None
    perhaps: Decimal | None
    doubt: str = ""
    claim: Decimal | None = None


def charge(price: TokenPrice | None, reply: Reply, intent: Mapping[str, Any]) -> Charge:
    """Hold what a server states against the price, and both against what the request allowed.

    The statement counts as paid where it lies within APART of the price; where the price says more,
    the difference may have been charged. In doubt is a cost further apart, and one of more tokens
    than were allowed, or above the attempt's maximum: then the larger of both may have been
    charged, or the maximum where that is beyond all sense.
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
    elif read is not None and usage.input_tokens > read + MARGIN:
        doubt = f"counts {usage.input_tokens:,} tokens read, of at most {read + MARGIN:,}"
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


@dataclass
class Budget:
    """Keeps settled + unknown + reserved within a limit; without a limit it only counts.

    `settled` and `unknown` begin with what the run spent before.
    """

    limit: Decimal | None
    settled: Decimal = NOTHING
    unknown: Decimal = NOTHING
    reserved: Decimal = NOTHING

    def exceeded(self, dollars: Decimal = NOTHING) -> bool:
        """Tell whether all that may have been spent, with these dollars too, passes the limit."""
        most = self.settled + self.unknown + self.reserved + dollars
        return self.limit is not None and most > self.limit

    def reserve(self, dollars: Decimal) -> bool:
        """Set dollars aside; False, and nothing is set aside, where they could exceed the limit."""
        fits = not self.exceeded(dollars)
        self.reserved += dollars if fits else NOTHING
        return fits

    def beyond(self, most: Decimal) -> DistillError:
        """Return the error of a next request that does not fit in."""
        what = (
            f"${self.settled:.4f} paid and ${self.unknown:.4f} perhaps; the next request can cost"
            f" ${most:.4f}, above the limit of ${self.limit}"
        )
        fix = "raise it: the same command continues"
        return DistillError(Exit.BUDGET, "teacher.budget_dollars", what, fix)

    def settle(self, reserved: Decimal, paid: Decimal, perhaps: Decimal = NOTHING) -> None:
        """Turn a reservation into what was really paid, and what may have been beside it."""
        self.reserved -= reserved
        self.settled += paid
        self.unknown += perhaps

    def line(self, priced: bool) -> str:
        """Return what is spent and perhaps spent: by the run with a limit, else by this go."""
        if not priced and not self.settled:
            return "cost unknown"
        perhaps = f" + ${self.unknown:.4f} perhaps" if self.unknown else ""
        limit = f", limit ${self.limit}" if self.limit is not None else ""
        return f"${self.settled:.4f}{perhaps}{limit}"


class Attempt(Record):
    """One attempt as the store tells it; `billed` is yes, no or unknown, `most` its maximum.

    An unknown one has no answer, or one in doubt. One that is settled may have cost `perhaps`
    beside its `dollars`: the price says more than the server.
    """

    key: str
    billed: str
    dollars: Decimal | None = None
    perhaps: Decimal = NOTHING
    most: Decimal | None = None
    usage: Usage = Usage()
    what: str = ""
    answered: bool = False


@dataclass
class Account:
    """Sums over attempts: dollars settled, how many are unknown, and what these cost at most."""

    attempts: int = 0
    settled: Decimal = NOTHING
    input_tokens: int = 0
    output_tokens: int = 0
    unknown: int = 0
    unknown_most: Decimal = NOTHING
    unpriced: int = 0  # settled or unknown, but without a price


Prices = Mapping[str, TokenPrice | None]  # by model


def account(store: ResponseStore, prices: Prices, run: str | None = None) -> Account:
    """Sum up every attempt at these models in a store, or those of one run."""
    sums = Account()
    for attempt in attempts(store, prices, run):
        sums.attempts += 1
        if attempt.billed == "yes":
            sums.settled += attempt.dollars or NOTHING
            sums.unknown_most += attempt.perhaps
            sums.input_tokens += attempt.usage.input_tokens
            sums.output_tokens += attempt.usage.output_tokens
            sums.unpriced += attempt.dollars is None
        elif attempt.billed == "unknown":
            sums.unknown += 1
            sums.unknown_most += attempt.most or NOTHING
            sums.unpriced += attempt.most is None
    return sums


def enter_account(run: Run, store: ResponseStore) -> None:
    """Enter in the ledger what the store knows of a run's spending and the ledger does not.

    So what a kill hid is entered too.
    """
    prices = paid_models(run.config)
    if not prices:
        return
    now = account(store, prices, run.config.name)
    before = [*run.ledger.entries(), *run.ledger.parts()]  # another may have asked in this stage
    entries = [entry for entry in before if entry.attempts or entry.unknown_dollars is not None]

    def fresh(number: int, name: str) -> int:
        return number - sum(getattr(entry, name) for entry in entries)

    def dollars(amount: Decimal, name: str) -> Decimal | None:
        amounts = (Decimal(getattr(entry, name) or 0) for entry in entries)
        return None if now.unpriced else amount - sum(amounts, NOTHING)

    tokens_in = fresh(now.input_tokens, "paid_input_tokens")
    tokens_out = fresh(now.output_tokens, "paid_output_tokens")
    run.ledger.spend(
        input_tokens=tokens_in,
        paid_input_tokens=tokens_in,
        output_tokens=tokens_out,
        paid_output_tokens=tokens_out,
        dollars=dollars(now.settled, "dollars"),
        price="; ".join(f"{p.model} of {p.date}, {p.source}" for p in prices.values() if p) or None,
        attempts=fresh(now.attempts, "attempts"),
        unknown=fresh(now.unknown, "unknown"),
        unknown_dollars=dollars(now.unknown_most, "unknown_dollars"),
    )


def paid_models(config: Config) -> dict[str, TokenPrice | None]:
    """Return the models that a run pays for by the token, with their prices.

    These are its teacher's, its reader's and its judge's.
    """
    reader = config.soft_teacher() if config.captures else None
    roles = (config.teacher, reader, config.evaluation.judge)
    paid = [settings for settings in roles if settings and settings.paid]
    book = load_prices(config.evaluation.prices) if paid else None
    return {settings.model: book.teacher(settings.model) for settings in paid if book}


def attempts(store: ResponseStore, prices: Prices, run: str | None = None) -> Iterator[Attempt]:
    """Yield every attempt at these models, or those of one run, in the order they were begun."""
    for key in store.keys("intent"):
        intent = store.get("intent", key) or {}
        if run in (None, intent.get("run")) and intent.get("model") in prices:
            yield _attempt(store, prices[intent["model"]], key, intent)


def _attempt(
    store: ResponseStore, price: TokenPrice | None, key: str, intent: dict[str, Any]
) -> Attempt:
    """Read what became of one attempt from the records beside its intent."""
    most = Decimal(intent["most"]) if intent.get("most") is not None else None
    if (outcome := store.get("outcome", key)) is not None:
        return Attempt(key=key, most=most, billed=outcome["billed"], what=outcome["what"])
    if (usage := store.get("usage", key)) is not None:  # beside a reply that is long to read
        reply = Reply.model_validate(usage)
    else:
        identifier, number = key.rsplit(".", 1)
        bill = store.bill(key) or store.bill(identifier)
        if not bill or bill.attempt != int(number):
            return Attempt(key=key, most=most, billed="unknown", what="no word of how it ended")
        reply = bill.reply
    cost = charge(price.in_batch() if price and "batch" in intent else price, reply, intent)
    attempt = Attempt(key=key, billed="unknown", most=cost.perhaps, what=cost.doubt, answered=True)
    if cost.doubt:
        return attempt
    paid = {"dollars": cost.paid, "perhaps": cost.perhaps or NOTHING, "usage": reply.usage}
    return attempt.model_copy(update={"billed": "yes", "most": most, **paid})
