"""What a run's teacher will take: what the store lacks, tokens x price, and the hard maximum.

Where the prompts are known, the requests are those that the generate stage will make, so the store
says which are answered: these cost nothing, and the others are expected to be like them. Where
nothing is answered, ANSWER of `max_new_tokens` is expected. Money is Decimal.

`distill plan --pilot N` asks N of these requests first, chosen by the hashes of their texts: the
same ones each time. The generate stage finds their answers in the store. Nothing else here sends.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

from distill.config.teachers import EndpointTeacher, Teacher
from distill.config.tree import Config, Questions
from distill.corpus.prompts import question_shares, written_prompts
from distill.errors import DistillError, Exit
from distill.formatting import money
from distill.generation.generate import question_requests, requests_of, schemas_of
from distill.pipeline import NAMES, STAGES, perform
from distill.planning.preflight import require
from distill.planning.work import Work, mean_bytes
from distill.records import Document, Prompt, Record, Response, digest
from distill.responders.ask import Ask
from distill.responders.endpoint.budget import Account, account, most_dollars
from distill.responders.kinds import make_responder
from distill.responders.prices import MILLION, TokenPrice, load_prices
from distill.responders.responder import Request, origin_of
from distill.responders.store import ResponseStore
from distill.storage.files import read_records
from distill.storage.progress import say
from distill.storage.run_folder import Run, Stage

ANSWER = 0.5  # of max_new_tokens: 0.35 on the quickstart's documentation, 0.66 on GSM8K's problems
READ = 1000  # stored answers of a kind that are read
ESCAPED, ENVELOPE = 1.1, 400  # a request's bytes: its texts', as JSON, and what stands around them


class TeacherCost(Record):
    """What is left to ask, expected and at most; dollars and seconds are None where unknown.

    `dollars_most` is one attempt at each request that writes all it may; retries come on top.
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
    """How many requests of a kind are left, a question's bytes, the cap, and stored answers."""

    requests: float
    size: float
    cap: int
    stored: int = 0
    sampled: Sequence[Response] = ()  # of the stored ones


def teacher_cost(config: Config, work: Work, origin: str | None = None) -> TeacherCost | None:
    """Return what the teacher will take, None for one that is asked nothing.

    `origin` is a local responder's, which only a pilot knows; without it the store is not read.
    """
    teacher, questions = config.teacher, config.prompts.questions
    if not teacher.makes_answers:
        return None
    book = load_prices(config.evaluation.prices)
    server = teacher if isinstance(teacher, EndpointTeacher) else None
    price = listed = book.teacher(teacher.model) if server else None
    if server and server.batch and price:
        price = price.in_batch()
    origin = origin or (origin_of(server) if server else None)
    if work.texts and origin:
        with ResponseStore(config.store_folder() / "responses", writable=False) as store:
            kinds = _by_request(teacher, questions, *work.texts, origin, store, schemas_of(config))
            spent = account(store, {teacher.model: listed}, config.name)
    else:  # from the number and size of prompts alone
        count = work.all_prompts + work.prompts["train"] * (teacher.n - 1)
        kinds, spent = [Unanswered(count, work.teacher.bytes, teacher.max_new_tokens)], Account()
        if questions:
            asking = work.documents * len(question_shares(questions.kinds, questions.per_document))
            kinds.append(Unanswered(asking, work.teacher.bytes, questions.max_new_tokens))
    count = sent = output = capped = answer = 0.0
    most = Decimal(0) if server and price and "max_tokens" not in server.omit else None
    for kind in kinds:
        lengths = [response.usage.output_tokens for response in kind.sampled]
        mean = sum(lengths) / len(lengths) if lengths else ANSWER * kind.cap
        answer = answer or mean  # the answers come first, then the writing of questions
        count += kind.requests
        size = kind.size or work.teacher.bytes
        sent += kind.requests * work.teacher._replace(bytes=size).tokens
        output += kind.requests * mean
        capped += kind.requests * kind.cap
        if most is not None:
            each = most_dollars(price, ceil(ESCAPED * size) + ENVELOPE, kind.cap)
            most += (each or 0) * ceil(kind.requests)
    dollars, settled = None, spent.attempts - spent.unknown
    if price:
        dollars = ceil(sent) * price.dollars_per_million_input
        dollars = (dollars + ceil(output) * price.dollars_per_million_output) / MILLION
    elif settled and not spent.unpriced:  # the server states what answers cost
        dollars = spent.settled * ceil(count) / settled
    sampled = [response for kind in kinds for response in kind.sampled]
    seconds = None if count else 0.0
    if server and sampled:  # as fast as those before came, and as the limits of the rate allow
        pace = sum(response.usage.seconds for response in sampled) / len(sampled)
        seconds = max(pace * count, server.least_seconds(count, sent + capped))
    cost = TeacherCost(
        requests=ceil(count),
        stored=sum(kind.stored for kind in kinds),
        input_tokens=ceil(sent),
        output_tokens=ceil(output),
        output_tokens_most=ceil(capped),
        answer_tokens=answer,
        dollars=dollars,
        dollars_most=most,
        paid=spent.settled,
        paid_perhaps=spent.unknown_most,
        seconds=seconds,
    )
    notes = [*_grounds(cost, sampled)]
    if server:
        why = book.why_no_teacher(teacher.model)
        notes += _money(cost, price, why, server.budget_dollars)
    if server and server.batch and listed:
        less = f"{listed.batch_discount or 0:.0%} less" if price != listed else "no known discount"
        notes.append(f"asked by batch, {less}: answers within a day")
    return cost.model_copy(update={"notes": tuple(notes)})


def _by_request(
    teacher: Teacher,
    questions: Questions | None,
    documents: Sequence[Document],
    prompts: Sequence[Prompt],
    origin: str,
    store: ResponseStore,
    schemas: Mapping[str, Any],
) -> list[Unanswered]:
    """Return the answers, and the writing of questions, from the requests that the store lacks."""

    def stored(request: Request) -> bool:
        return ("response", request.id) in store

    def unanswered(requests: Sequence[Request], cap: int, to_come: float = 0.0) -> Unanswered:
        missing = [request for request in requests if not stored(request)]
        answered = [request for request in requests if stored(request)]
        sampled = [store.response(r) for r in answered[:: -(-len(answered) // READ) or 1]]
        size = mean_bytes([request.messages for request in missing])
        return Unanswered(len(missing) + to_come, size, cap, len(answered), sampled)

    by_id, cap = {document.id: document for document in documents}, teacher.max_new_tokens
    if questions is None:
        return [unanswered(requests_of(teacher, origin, prompts, by_id, schemas), cap)]
    all_prompts, asking, counts, waiting = list(prompts), list[Request](), list[int](), 0
    for document in documents:
        requests = question_requests(questions, origin, document)
        asking += requests
        if all(map(stored, requests)):
            replies = [store.response(request) for request in requests]
            counts.append(len(new := written_prompts(questions, document, replies)))
            all_prompts += new
        else:  # each of its questions is answered n times where it is for training
            waiting += teacher.n if document.split == "train" else 1
    # Of a document that is not asked yet as many questions are expected as came of the others.
    to_come = waiting * (sum(counts) / len(counts) if counts else questions.per_document)
    answers = unanswered(requests_of(teacher, origin, all_prompts, by_id, schemas), cap, to_come)
    return [answers, unanswered(asking, questions.max_new_tokens)]


def _grounds(cost: TeacherCost, sampled: Sequence[Response]) -> Iterator[str]:
    """Say how much is asked, and what that is expected from."""
    if cost.requests:
        tokens = f"{cost.input_tokens:,} tokens in, {cost.output_tokens:,} out"
        yield f"{cost.requests:,} requests, {tokens} (at most {cost.output_tokens_most:,})"
        if cost.dollars is not None:
            most = f"at most {money(cost.dollars_most, up=True)}, retries apart"
            yield f"{money(cost.dollars, up=True)} expected, {most}"
    if sampled:
        stops = Counter(response.stop for response in sampled).most_common()
        reasons = ", ".join(f"{many} {stop}" for stop, many in stops)
        yield f"expected from {len(sampled):,} stored answers, which stopped so: {reasons}"
    else:
        measured = "distill plan --pilot N asks N of them and measures"
        yield f"answers are expected to take {ANSWER:.0%} of their cap; {measured}"


def _money(
    cost: TeacherCost, price: TokenPrice | None, why_none: str, limit: Decimal | None
) -> Iterator[str]:
    """Say the price of a paid teacher, what was paid, and whether the budget suffices."""
    if price:
        rates = (price.dollars_per_million_input, price.dollars_per_million_output)
        yield f"${rates[0]} in, ${rates[1]} out a million tokens ({price.date}, {price.source})"
    if cost.dollars is None:
        stop = f"; with the limit of ${limit} a run stops (exit 6)" if limit is not None else ""
        yield f"cost unknown: {why_none}{stop}"
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


def pilot(run: Run, count: int) -> str:
    """Ask `count` questions of a run and return the teacher's origin.

    The run's documents and prompts are made first where they are missing. What the pilot cost is
    in the ledger as `pilot`, also when it was stopped. Raises DistillError (exit 2) where no
    teacher is asked, and as the generate stage does.
    """
    config, origin = run.config, ""
    if not config.teacher.makes_answers:
        what = f"a teacher of kind {config.teacher.kind} is not asked anything"
        raise DistillError(Exit.CONFIG, "--pilot", what, "leave it out")
    require(run, [stage for stage in STAGES if stage.name == "generate"])
    perform(run, STAGES[: NAMES.index("generate")])

    def main(run: Run) -> None:
        nonlocal origin
        documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
        prompts = read_records(run.path("prompts.jsonl"), Prompt)
        sources = {prompt.id: documents[prompt.document_id] for prompt in prompts}
        at_once = {"batch": False} if isinstance(config.teacher, EndpointTeacher) else {}
        teacher = make_responder(config.teacher.model_copy(update=at_once), config, sources)
        settings, origin, answered = config.prompts.questions, teacher.origin, 0
        with Ask(teacher, config.store_folder() / "responses", run) as ask:
            if settings:  # half of what is asked goes to the writing of questions
                ordered = sorted(documents.values(), key=lambda document: digest(document.text))
                pairs = [(d, question_requests(settings, origin, d)) for d in ordered]
                pairs = pairs[: max(1, count // 2 // max(1, len(pairs[0][1])))] if pairs else []
                pairs = [(d, requests) for d, requests in pairs if len(requests) <= count]
                first = [request for _, requests in pairs for request in requests]
                replies, answered = iter(ask.responses(first, "pilot")), len(first)
                for document, requests in pairs:
                    replied = islice(replies, len(requests))
                    prompts += written_prompts(settings, document, replied)
            requests = requests_of(config.teacher, origin, prompts, documents, schemas_of(config))
            answered += len(ask.responses(choose_requests(requests, count - answered), "pilot"))
        say(f"pilot: {answered} answers in the store, {ask.count} of them asked for now")

    with run.lock():
        run.do(Stage("pilot", (), (), (), main))
    return origin


def choose_requests(requests: Iterable[Request], count: int) -> list[Request]:
    """Choose requests by the hash of what is asked alone: two teachers get the same questions."""
    asked = {digest([[m.model_dump() for m in r.messages], r.sample]): r for r in requests}
    return [asked[key] for key in sorted(asked)][: max(0, count)]
