"""What a run's teacher will take: what the store has already, what is left, tokens x price, and the hard maximum.

Nothing is sent. Where the prompts are known, the requests are those that the generate stage will make, so the store says
which are answered: these cost nothing, and the others are expected to be like them. Where nothing is answered, half of
`max_new_tokens` is expected. Money is Decimal.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from math import ceil
from typing import NamedTuple

from distill.config import Config, EndpointTeacher
from distill.corpus.questions import shares
from distill.formatting import money
from distill.generation.requests import asking_requests, requests_of, written_prompts
from distill.planning.work import Work, mean_bytes
from distill.records import Record, Response
from distill.responders.ask import read
from distill.responders.endpoint.attempts import origin_of
from distill.responders.endpoint.budget import Account, account, most_dollars
from distill.responders.prices import MILLION, TokenPrice, load_prices
from distill.responders.responder import Request
from distill.storage.log import Log

ANSWER = 0.5  # of max_new_tokens: 0.35 on the quickstart's documentation, 0.66 on GSM8K's problems
READ = 1000  # stored answers of a kind that are read
ESCAPED, ENVELOPE = 1.1, 400  # a request's bytes: its texts', as JSON, and what stands around them


class TeacherCost(Record):
    """What is left to ask of the teacher, expected and at most; dollars and seconds are None where they are not known.

    `dollars_most` is one attempt at each request that writes all it may; a retry that was billed comes on top.
    """

    requests: int
    stored: int
    input_tokens: int
    output_tokens: int
    output_tokens_most: int
    answer_tokens: float  # of one answer, as is expected
    dollars: Decimal | None
    dollars_most: Decimal | None
    paid: Decimal
    paid_perhaps: Decimal  # by attempts whose outcome is not known, at most
    seconds: float | None  # of an endpoint; a local teacher's are the machine's
    notes: tuple[str, ...] = ()


class Unanswered(NamedTuple):
    """Requests of a kind that are left: how many, bytes of a question, cap; how many are stored, and those that were read."""

    count: float
    size: float
    cap: int
    stored: int = 0
    responses: Sequence[Response] = ()


def teacher_cost(config: Config, work: Work, origin: str | None = None) -> TeacherCost | None:
    """Return what the teacher will take, None for one that is asked nothing.

    `origin` is that of a local responder, which only a pilot knows; without it, nothing of the store is read.
    """
    teacher, paid = config.teacher, config.teacher.paid
    if not teacher.makes_answers:
        return None
    price = load_prices(config.evaluation.prices).teacher(teacher.model) if paid else None
    origin = origin or (origin_of(teacher) if isinstance(teacher, EndpointTeacher) else None)
    if work.texts is None or origin is None:
        kinds, spent = _by_size(config, work), Account()
    else:
        with Log(config.store_folder() / "responses", writable=False) as log:
            kinds = _by_request(config, work, origin, log)
            spent = account(log, price, config.name, teacher.model)
    count = sent = output = capped = answer = 0.0
    most = None if price is None or not teacher.limits_answers else Decimal(0)
    for kind in kinds:
        lengths = [response.usage.output_tokens for response in kind.responses]
        mean = sum(lengths) / len(lengths) if lengths else ANSWER * kind.cap
        answer = answer or mean  # the answers come first, then the writing of questions
        count += kind.count
        sent += kind.count * work.teacher.tokens_of(kind.size)
        output += kind.count * mean
        capped += kind.count * kind.cap
        if most is not None:
            each = most_dollars(price, ceil(ESCAPED * kind.size) + ENVELOPE, kind.cap)
            most += (each or 0) * ceil(kind.count)
    expected, settled = None, spent.attempts - spent.unknown
    if price:
        expected = ceil(sent) * price.dollars_per_million_input
        expected = (expected + ceil(output) * price.dollars_per_million_output) / MILLION
    elif settled and not spent.unpriced:  # the server states what answers cost
        expected = spent.settled * ceil(count) / settled
    responses = [response for kind in kinds for response in kind.responses]
    seconds = None if count else 0.0
    if paid and responses:  # as fast as those before came, and as the limits of the rate allow
        pace = sum(response.usage.seconds for response in responses) / len(responses)
        seconds = max(pace * count, teacher.least_seconds(count, sent + capped))
    cost = TeacherCost(
        requests=ceil(count),
        stored=sum(kind.stored for kind in kinds),
        input_tokens=ceil(sent),
        output_tokens=ceil(output),
        output_tokens_most=ceil(capped),
        answer_tokens=answer,
        dollars=expected,
        dollars_most=most,
        paid=spent.settled,
        paid_perhaps=spent.unknown_most,
        seconds=seconds,
    )
    return cost.model_copy(update={"notes": tuple(_notes(config, cost, responses, price))})


def _by_size(config: Config, work: Work) -> list[Unanswered]:
    """Return the answers, and the writing of questions, from the number and size of prompts alone."""
    teacher, questions, size = config.teacher, config.prompts.questions, work.teacher.bytes
    count = work.all_prompts + work.prompts["train"] * (teacher.n - 1)
    answers = Unanswered(count, size, teacher.max_new_tokens)
    if questions is None:
        return [answers]
    asking = work.documents * len(shares(questions.kinds, questions.per_document))
    return [answers, Unanswered(asking, size, questions.max_new_tokens)]


def _by_request(config: Config, work: Work, origin: str, log: Log) -> list[Unanswered]:
    """Return the answers, and the writing of questions, from the requests that the store lacks."""
    (documents, prompts), settings = work.texts or ((), ()), config.prompts.questions

    def stored(request: Request) -> bool:
        return ("response", Response.make_id(request.key, request.sample)) in log

    def unanswered(requests: Sequence[Request], cap: int, to_come: float = 0.0) -> Unanswered:
        missing = [request for request in requests if not stored(request)]
        answered = [request for request in requests if stored(request)]
        sampled = [read(log, request) for request in answered[:: -(-len(answered) // READ) or 1]]
        size = mean_bytes([request.messages for request in missing]) or work.teacher.bytes
        return Unanswered(len(missing) + to_come, size, cap, len(answered), sampled)

    all_prompts, asking, to_come = list(prompts), list[Request](), 0.0
    if settings:
        counts, waiting = list[int](), 0
        for document in documents:
            requests = asking_requests(settings, origin, document)
            asking += requests
            if all(map(stored, requests)):
                replies = [read(log, request) for request in requests]
                counts.append(len(new := written_prompts(settings, document, replies)))
                all_prompts += new
            else:  # each of its questions is answered n times where it is for training
                waiting += config.teacher.n if document.split == "train" else 1
        # Of a document that is not asked yet as many questions are expected as came of the others.
        to_come = waiting * (sum(counts) / len(counts) if counts else settings.per_document)
    by_id = {document.id: document for document in documents}
    requests = requests_of(config, origin, all_prompts, by_id)
    answers = unanswered(requests, config.teacher.max_new_tokens, to_come)
    return [answers, unanswered(asking, settings.max_new_tokens)] if settings else [answers]


def _notes(
    config: Config, cost: TeacherCost, responses: Sequence[Response], price: TokenPrice | None
) -> Iterator[str]:
    """Say what is expected on which grounds; of a paid teacher its price, what was paid, and whether the budget suffices."""
    if responses:
        stops = Counter(response.stop for response in responses).most_common()
        reasons = ", ".join(f"{many} {stop}" for stop, many in stops)
        yield f"expected from {len(responses):,} stored answers, which stopped so: {reasons}"
    else:
        measured = "distill plan --pilot N asks N of them and measures"
        yield f"answers are expected to take {ANSWER:.0%} of their cap; {measured}"
    if not config.teacher.paid:
        return
    if price:
        rates = (price.dollars_per_million_input, price.dollars_per_million_output)
        yield f"${rates[0]} in, ${rates[1]} out a million tokens ({price.date}, {price.source})"
    limit = config.teacher.budget
    if cost.dollars is None:
        why = load_prices(config.evaluation.prices).why_no_teacher(config.teacher.model)
        stop = f"; with the limit of ${limit} a run stops (exit 6)" if limit is not None else ""
        yield f"cost unknown: {why}{stop}"
        return
    perhaps = f" and perhaps {money(cost.paid_perhaps, up=True)}" if cost.paid_perhaps else ""
    total = money(cost.paid + cost.dollars, up=True)
    yield f"paid so far {money(cost.paid, up=True)}{perhaps}; the whole run {total}, retries apart"
    if limit is None:
        yield "no limit: teacher.budget_dollars is not set"
        return
    remaining, most = limit - cost.paid - cost.paid_perhaps, cost.dollars_most
    word = "is expected to suffice" if cost.dollars <= remaining else "does not suffice"
    word = "suffices" if most is not None and most <= remaining else word
    yield f"limit ${limit}, beyond which nothing is asked: {word}"
