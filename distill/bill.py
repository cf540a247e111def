"""What a run's teacher will cost, before it is asked: what the store has already, what is left, and its price in ranges.

Nothing is sent. Where the prompts are known, the requests are those that the generate stage will make, so the store says
which are answered; those answers cost nothing, and foretell the others.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from itertools import groupby

from rich.table import Table

from distill.config import Config, Teacher
from distill.corpus.questions import TASK, shares
from distill.estimates import NOTHING, Span
from distill.forecast import BYTES, Forecast, Group, Sample, forecast, more_of
from distill.generation.asking import encode, origin_of
from distill.generation.budget import NOTHING as NO_DOLLARS
from distill.generation.budget import Account, account, cost, most_dollars, next_attempt
from distill.generation.counting import token_counter
from distill.generation.generate import read
from distill.generation.prices import TokenPrice, load_prices
from distill.generation.requests import asking_requests, requests_of, written_prompts
from distill.generation.responder import Raw, Request
from distill.generation.wire import read_stored
from distill.records import Document, Prompt, Response, Usage
from distill.scope import Scope, questions_written
from distill.store import Log
from distill.tables import count, duration, table

READ = 1000  # stored answers of a kind that are read to foretell the others
COUNTED = 300  # questions whose tokens are counted
QUESTION = Span(20, 400)  # bytes of a question that the teacher writes
TO_COME = "questions to come"
ENVELOPE = 400  # bytes of a request around its texts


@dataclass(frozen=True)
class Bill:
    """What the teacher's answers take: what is left to ask, as a forecast; what is stored, and was paid before."""

    left: Forecast
    price: TokenPrice | None
    most: Decimal | None  # that one attempt at each request that is left can cost
    least_seconds: float  # that the limits of the rate allow
    stored: int = 0
    failed: int = 0  # of those left: were asked before, and have no answer
    samples: tuple[Sample, ...] = ()  # stored answers of this run
    paid: Account = Account()


@dataclass(frozen=True)
class Asked:
    """A kind of requests; `unwritten` more follow from questions that are not written yet, of `size` bytes."""

    name: str
    requests: Sequence[Request]
    unwritten: Span = NOTHING
    size: Span = NOTHING


def make_bill(config: Config, work: Scope, origin: str | None = None) -> Bill:
    """Return the bill of a run; `origin` is its responder's, which an endpoint's settings tell."""
    book = load_prices(config.evaluation.prices)
    price = book.teacher(config.teacher.model) if config.teacher.kind == "endpoint" else None
    if work.texts is None:
        return _unread(config, work, price)
    origin = origin or origin_of(config.teacher)
    with Log(config.store_folder() / "responses", writable=False) as log:
        kinds = list(asked(config, origin, log, *work.texts))
        return _read(config, log, kinds, price)


def _read(config: Config, log: Log, kinds: Sequence[Asked], price: TokenPrice | None) -> Bill:
    """Return the bill of requests that are known."""
    teacher = config.teacher
    missing = [[r for r in kind.requests if not _is_stored(log, r)] for kind in kinds]
    groups = [_group(config, log, *pair, price) for pair in zip(kinds, missing, strict=True)]
    lacking = [request for requests in missing for request in requests]
    unwritten = [
        Group(kind.name, kind.unwritten, kind.size, teacher.max_new_tokens) for kind in kinds
    ]
    return Bill(
        left=forecast(_joined(groups), price),
        price=price,
        most=_sum(_most_of_known(teacher, price, lacking), _most(teacher, price, unwritten)),
        least_seconds=_paced(teacher, groups),
        stored=sum(len(kind.requests) for kind in kinds) - len(lacking),
        failed=sum(next_attempt(log, r.key, r.sample) > 0 for r in lacking),
        samples=tuple(sample for group in groups for sample in group.samples),
        paid=account(log, price, config.name, teacher.model),
    )


def _joined(groups: Sequence[Group]) -> list[Group]:
    """Count the questions that are to come among those that are written, whose answers foretell theirs."""
    like = next((group for group in groups if group.name == TASK), None)
    come = next((group for group in groups if group.name == TO_COME), None)
    if like is None or come is None:
        return list(groups)
    size = come.size
    if like.count.high:
        size = Span(min(size.low, like.size.low), max(size.high, like.size.high))
    whole = replace(like, count=like.count + come.count, size=size)
    return [group for group in groups if group not in (like, come)] + [whole]


def _unread(config: Config, work: Scope, price: TokenPrice | None) -> Bill:
    """Return the bill of prompts that are not made yet, from their number and size alone."""
    teacher, questions = config.teacher, config.prompts.questions
    many = work.asked + work.prompts["train"] * (teacher.n - 1)
    groups = [Group("answers", many, work.teacher, teacher.max_new_tokens)]
    if questions:
        kinds = len(shares(questions.kinds, questions.per_document))
        written = questions_written(config, work.documents.high * teacher.n)
        size = work.teacher + QUESTION
        groups.append(Group(TASK, written, size, teacher.max_new_tokens))
        asking = work.documents * kinds
        groups.append(Group("asking", asking, size, questions.max_new_tokens))
    most = _most(teacher, price, groups)
    return Bill(forecast(groups, price), price, most, _paced(teacher, groups))


def asked(
    config: Config, origin: str, log: Log, documents: Sequence[Document], prompts: Sequence[Prompt]
) -> Iterator[Asked]:
    """Yield what a run asks, by task; of documents about which the teacher has written, also its questions."""
    known, settings = {d.id: d for d in documents}, config.prompts.questions
    written, waiting, found = list(prompts), list[Document](), list[int]()
    if settings:
        asking = [asking_requests(settings, origin, document) for document in documents]
        yield Asked("asking", [request for group in asking for request in group])
        for document, group in zip(documents, asking, strict=True):
            if all(_is_stored(log, request) for request in group):
                replies = [read(log, request) for request in group]
                new = written_prompts(settings, document, replies)
                found.append(len(new) * _samples(config.teacher, document))
                written += new
            else:
                waiting.append(document)
    if settings and waiting:
        most = settings.per_document * sum(_samples(config.teacher, d) for d in waiting)
        passage = _mean(len(d.text.encode()) for d in waiting) or NOTHING
        size = QUESTION + (passage if settings.answer_with_passage else NOTHING)
        yield Asked(TO_COME, [], more_of(found, len(waiting), most), size)
    by_task = sorted(written, key=lambda prompt: prompt.task)
    for task, group in groupby(by_task, key=lambda prompt: prompt.task):
        yield Asked(task, requests_of(config, origin, group, known))


def _samples(teacher: Teacher, document: Document) -> int:
    return teacher.n if document.meta["split"] == "train" else 1


def _is_stored(log: Log, request: Request) -> bool:
    return ("response", Response.make_id(request.key, request.sample)) in log


def bytes_of(request: Request) -> int:
    """Return the bytes of what a request asks."""
    return sum(len(message.content.encode()) for message in request.messages)


def _group(
    config: Config, log: Log, kind: Asked, missing: Sequence[Request], price: TokenPrice | None
) -> Group:
    """Return what is left of a kind, with its stored answers."""
    limits = [request.sampling.max_new_tokens for request in kind.requests]
    stored = _spread([r for r in kind.requests if _is_stored(log, r)], READ)
    return Group(
        name=kind.name,
        count=Span(len(missing), len(missing)) + kind.unwritten,
        size=_mean(map(bytes_of, missing)) or kind.size,
        cap=max(limits, default=config.teacher.max_new_tokens),
        samples=tuple(found for r in stored if (found := _sample(log, r, price))),
        bytes_per_token=_rate(config.teacher.model, _spread(missing, COUNTED)),
    )


def _mean(values: Iterable[int]) -> Span | None:
    found = list(values)
    mean = sum(found) / len(found) if found else 0.0
    return Span(mean, mean) if found else None


def _spread(requests: Sequence[Request], most: int) -> list[Request]:
    """Return at most so many requests, evenly from all."""
    step = max(1, -(-len(requests) // most))
    return list(requests[::step])


def _rate(model: str, requests: Sequence[Request]) -> Span:
    """Return the bytes of a token: as the teacher's tokenizer counts, where the cache has it, else those of any text."""
    counter = token_counter(model) if requests else None
    if counter is None:
        return BYTES
    texts = [message.content for request in requests for message in request.messages]
    rate = sum(len(text.encode()) for text in texts) / max(1, sum(map(counter, texts)))
    return Span(rate * 0.95, rate * 1.05)  # for what was not among those counted


def _sample(log: Log, request: Request, price: TokenPrice | None) -> Sample | None:
    """Read a stored answer as a sample; None where nobody knows what it took."""
    raw = Raw.model_validate(log.get("response", Response.make_id(request.key, request.sample)))
    size, body = bytes_of(request), raw.body
    if "sha256" not in body:
        return Sample(
            size, raw.usage, None, raw.stop or "error", raw.usage.seconds, raw.usage.seconds
        )
    reply, refused = read_stored(body), not 200 <= int(body["status"]) < 300
    if reply.usage == Usage() and not refused:
        return None
    dollars = Decimal(0) if refused else cost(price, reply.usage, reply.dollars)
    waited = float(body.get("seconds", 0))
    return Sample(size, reply.usage, dollars, reply.stop, waited, raw.usage.seconds)


def _most_of_known(
    teacher: Teacher, price: TokenPrice | None, requests: Sequence[Request]
) -> Decimal | None:
    """Return what is set aside for one attempt at each request; None without a price or a cap."""
    if price is None or "max_tokens" in teacher.omit:
        return None
    bounds = (
        most_dollars(price, len(encode(r, teacher)), r.sampling.max_new_tokens) for r in requests
    )
    return sum(filter(None, bounds), NO_DOLLARS)


def _most(teacher: Teacher, price: TokenPrice | None, groups: Sequence[Group]) -> Decimal | None:
    """Return about what is set aside for one attempt at each request of groups that are known by size alone."""
    if price is None or "max_tokens" in teacher.omit:
        return None
    bounds = (
        (most_dollars(price, math.ceil(g.size.high) + ENVELOPE, g.cap), math.ceil(g.count.high))
        for g in groups
    )
    return sum(((dollars or NO_DOLLARS) * count for dollars, count in bounds), NO_DOLLARS)


def _sum(one: Decimal | None, other: Decimal | None) -> Decimal | None:
    return None if one is None or other is None else one + other


def _paced(teacher: Teacher, groups: Sequence[Group]) -> float:
    """Return the seconds that the limits of requests and tokens a minute take at least."""
    many = sum(g.count.low for g in groups)
    tokens = sum(g.count.low * (g.size.low / 4 + g.cap) for g in groups)  # as limits.Pace counts
    requests = 60 * many / teacher.requests_per_minute if teacher.requests_per_minute else 0.0
    spent = 60 * tokens / teacher.tokens_per_minute if teacher.tokens_per_minute else 0.0
    return max(requests, spent)


def seconds_of(bill: Bill, teacher: Teacher) -> Span | None:
    """Return the time that is left, None where no answer tells how long one takes.

    At best as many answers are waited for at once as are allowed, at worst they come as slowly as those before.
    """
    if bill.left.seconds is None or bill.left.waiting is None:
        return None
    at_once = teacher.concurrency if teacher.kind == "endpoint" else 1
    low = min(bill.left.seconds.low, bill.left.waiting.low / at_once)
    return Span(max(low, bill.least_seconds), max(bill.left.seconds.high, bill.least_seconds))


def show(bill: Bill, config: Config) -> Iterator[Table | str]:
    """Yield the bill's table, and what it rests on."""
    left, teacher = bill.left, config.teacher
    shown = table(f"teacher {teacher.model}", "", ">a request", f">{count(left.count)} left")
    for name, tokens in (("input tokens", left.input), ("output tokens", left.output)):
        shown.add_row(name, count(_each(tokens, left.count)), count(tokens))
    if left.seconds and teacher.kind == "local":
        each = _each(left.seconds, left.count)
        shown.add_row("seconds", f"{each.low:.2f} to {each.high:.2f}", duration(left.seconds))
    if left.dollars:
        low, high = left.dollars
        each = _each(Span(float(low), float(high)), left.count)
        shown.add_row("dollars", money(Decimal(each.low), Decimal(each.high)), money(low, high))
    if bill.most is not None:
        shown.add_row("at most, unless retried", "", money(bill.most, bill.most))
    lines = [_basis(bill), *_stops(bill)]
    if teacher.kind == "endpoint":
        lines += [*_cost(bill, config), *_limit(bill, teacher), _time(bill, teacher)]
    if left.count.high:
        yield shown
    yield from (f"teacher: {line}" for line in lines)


def _each(whole: Span, of: Span) -> Span:
    """Return a range for one of `of` things."""
    return Span(whole.low / max(1, of.low), whole.high / max(1, of.high))


def money(low: Decimal, high: Decimal) -> str:
    """Write a range of dollars to the cent, or to three digits below a dollar; its ends are rounded outwards."""
    places = 2 if high >= 1 or not high else 2 - high.adjusted()
    unit = Decimal(1).scaleb(-places)
    least, most = low.quantize(unit, ROUND_FLOOR), high.quantize(unit, ROUND_CEILING)
    return f"${most:,f}" if low == high else f"${least:,f} to ${most:,f}"


def _basis(bill: Bill) -> str:
    """Say what the ranges rest on."""
    known = len(bill.left.samples)
    if not bill.left.count.high:
        return "every answer is stored"
    if not known:
        return "answers of one token to their cap; plan --pilot N asks N of them and narrows this"
    estimated = sum(sample.usage.estimated for sample in bill.left.samples)
    but = f", of which {estimated} have estimated tokens" if estimated else ""
    part = (
        ""
        if bill.left.seconds
        else "; kinds of which fewer are known keep the wide range are not narrowed"
    )
    return f"foretold at 95 % from {known} stored answers{but}{part}"


def _stops(bill: Bill) -> Iterator[str]:
    """Say how the stored answers stopped, and what failed."""
    known = len(bill.samples)
    for stop, words in (
        ("length", "cut off at their cap"),
        ("filtered", "filtered"),
        ("error", "failed"),
    ):
        many = sum(sample.stop == stop for sample in bill.samples)
        if many:
            yield f"{many} of {known} stored answers ({many / known:.0%}) are {words}"
    if bill.failed:
        yield f"{bill.failed} of those left were asked before and have no answer"


def _cost(bill: Bill, config: Config) -> Iterator[str]:
    """Name the price, what was paid, and what the whole run costs."""
    price, paid = bill.price, bill.paid
    if price:
        cached = price.dollars_per_million_cached_input
        yield (
            f"${price.dollars_per_million_input} a million tokens of input"
            + (f" (${cached} cached, which is not counted on)" if cached is not None else "")
            + f", ${price.dollars_per_million_output} of output ({price.date}, {price.source})"
        )
    if bill.left.dollars is None:
        why = load_prices(config.evaluation.prices).why_no_teacher(config.teacher.model)
        yield f"cost unknown: {why}"
        return
    doubt = f" and perhaps ${paid.unknown_most:.4f}" if paid.unknown_most else ""
    whole = money(*(paid.settled + end for end in bill.left.dollars))
    yield f"paid so far ${paid.settled:.4f}{doubt}; the whole run {whole}; retries are not counted"


def _limit(bill: Bill, teacher: Teacher) -> Iterator[str]:
    """Say whether the limit suffices."""
    limit, dollars = teacher.budget_dollars, bill.left.dollars
    if limit is None:
        yield "no limit: teacher.budget_dollars is not set"
    elif dollars is None:
        yield f"limit ${limit}: a run stops, since the cost is unknown (exit 6)"
    else:
        spent = bill.paid.settled + bill.paid.unknown_most
        suffices = spent + dollars[1] <= limit
        fails = spent + dollars[0] > limit
        word = "suffices" if suffices else "does not suffice" if fails else "may not suffice"
        yield f"limit ${limit}: {word}"


def _time(bill: Bill, teacher: Teacher) -> str:
    """Say how long the answers take, as far as anything tells."""
    limits = (
        f" (at least {bill.least_seconds:,.0f} s by the limits a minute)"
        if bill.least_seconds
        else ""
    )
    if bill.left.seconds is None:
        return f"time unknown before an answer{limits}; {teacher.concurrency} at once"
    return f"time from the stored answers, {teacher.concurrency} at once{limits}"
