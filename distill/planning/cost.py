"""What a run's teacher will take: what the store lacks, tokens x price, and the hard maximum.

Where the prompts are known, the requests are those that the generate stage will make, so the store
says which are answered: these cost nothing, and the others are expected to be like them. Where
nothing is answered, ANSWER of `max_new_tokens` is expected. Nothing here sends but a pilot.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import islice
from math import ceil, inf
from typing import NamedTuple

from distill.config.teachers import EndpointTeacher
from distill.config.tree import Config
from distill.corpus.prompts import asked, question_shares, written_prompts
from distill.errors import DistillError, Exit
from distill.formatting import money
from distill.generation.generate import question_requests, requests_of, schemas_of, useful_prompts
from distill.pipeline import NAMES, STAGES, perform
from distill.planning.preflight import require
from distill.planning.work import TextSize, Work, text_of
from distill.records import Document, Record, Response, Usage, digest
from distill.responders.ask import Ask
from distill.responders.endpoint.budget import Account, account, most_dollars
from distill.responders.kinds import make_responder
from distill.responders.prices import PriceBook, load_prices
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
    stored_tokens: int  # read and written for these
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


class Asking(NamedTuple):
    """Requests of a kind: how many are left, the size and the cap of each, and what is stored."""

    requests: float
    prompt: TextSize
    cap: int
    stored: int = 0
    sampled: Sequence[Response] = ()  # of the stored answers

    @property
    def answer(self) -> float:
        """Return the tokens of an answer, as is expected."""
        lengths = [response.usage.output_tokens for response in self.sampled]
        return sum(lengths) / len(lengths) if lengths else ANSWER * self.cap

    @property
    def stored_tokens(self) -> float:
        """Return the tokens that the stored answers took, by those that were read."""
        usages = [response.usage for response in self.sampled]
        total = sum(usage.input_tokens + usage.output_tokens for usage in usages)
        return self.stored * total / max(1, len(usages))


def teacher_cost(config: Config, work: Work, origin: str | None = None) -> TeacherCost | None:
    """Return what the teacher will take, None for one that is asked nothing.

    `origin` is a local responder's, which only a pilot knows; without it the store is not read.
    """
    teacher, questions, spent = config.teacher, config.prompts.questions, Account()
    if not teacher.makes_answers:
        return None
    server = teacher if isinstance(teacher, EndpointTeacher) else None
    book = load_prices(config.evaluation.prices)
    price = listed = book.teacher(teacher.model) if server else None
    if server and server.batch and listed:
        price = listed.in_batch()
    origin = origin or (origin_of(server) if server else None)
    if work.texts and origin:
        with ResponseStore(config.store_folder() / "responses", writable=False) as store:
            kinds = _by_request(config, work, origin, store)
            spent = account(store, {teacher.model: listed}, config.name)
    else:  # from the number and size of prompts alone
        count = work.all_prompts - work.unasked + work.prompts["train"] * (teacher.n - 1)
        kinds = [Asking(count, work.teacher, teacher.max_new_tokens)]
        if questions:
            asking = work.documents * len(question_shares(questions.kinds, questions.per_document))
            kinds.append(Asking(asking, work.teacher, questions.max_new_tokens))
    sampled = [response for kind in kinds for response in kind.sampled]
    count = sum(kind.requests for kind in kinds)
    sent = ceil(sum(kind.requests * kind.prompt.tokens for kind in kinds))
    output = ceil(sum(kind.requests * kind.answer for kind in kinds))
    capped = ceil(sum(kind.requests * kind.cap for kind in kinds))
    most = dollars = None
    if server and price and "max_tokens" not in server.omit:
        most = Decimal(0)
        for kind in kinds:
            each = most_dollars(price, ceil(ESCAPED * kind.prompt.bytes) + ENVELOPE, kind.cap)
            most += (each or 0) * ceil(kind.requests)
    settled = spent.attempts - spent.unknown
    if price:
        dollars = price.of(Usage(input_tokens=sent, output_tokens=output))
    elif settled and not spent.unpriced:  # the server states what answers cost
        dollars = spent.settled * ceil(count) / settled
    seconds = None if count else 0.0
    if server and sampled:  # as fast as those before came, and as the limits of the rate allow
        pace = sum(response.usage.seconds for response in sampled) / len(sampled)
        by_count = count / (server.requests_per_minute or inf)
        limits = 60 * max(by_count, (sent + capped) / (server.tokens_per_minute or inf))
        seconds = max(pace * count, limits)
    cost = TeacherCost(
        requests=ceil(count),
        stored=sum(kind.stored for kind in kinds),
        stored_tokens=ceil(sum(kind.stored_tokens for kind in kinds)),
        input_tokens=sent,
        output_tokens=output,
        output_tokens_most=capped,
        answer_tokens=kinds[0].answer,
        dollars=dollars,
        dollars_most=most,
        paid=spent.settled,
        paid_perhaps=spent.unknown_most,
        seconds=seconds,
    )
    return cost.model_copy(update={"notes": tuple(_notes(cost, sampled, server, book))})


def _by_request(config: Config, work: Work, origin: str, store: ResponseStore) -> list[Asking]:
    """Return the answers, and the writing of questions, from the requests that the store lacks."""
    teacher, questions = config.teacher, config.prompts.questions
    schemas = schemas_of(teacher, config.prompts.tasks)
    documents, (*all_prompts,) = work.texts or ((), ())
    by_id = {document.id: document for document in documents}

    def stored(request: Request) -> bool:
        return ("response", request.id) in store

    def left(requests: Sequence[Request], cap: int, to_come: float = 0.0) -> Asking:
        missing = [request for request in requests if not stored(request)]
        answered = [request for request in requests if stored(request)]
        sampled = [store.response(r) for r in answered[:: len(answered) // READ + 1]]
        size = TextSize.of([text_of(request.messages) for request in missing]).bytes
        each = work.teacher._replace(bytes=size or work.teacher.bytes)
        return Asking(len(missing) + to_come, each, cap, len(answered), sampled)

    if questions is None:
        requests = requests_of(teacher, origin, all_prompts, by_id, schemas)
        return [left(requests, teacher.max_new_tokens)]
    asking, counts, waiting = list[Request](), list[int](), 0
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
    requests = requests_of(teacher, origin, all_prompts, by_id, schemas)
    answers = left(requests, teacher.max_new_tokens, to_come)
    return [answers, left(asking, questions.max_new_tokens)]


def _notes(
    cost: TeacherCost, sampled: Sequence[Response], server: EndpointTeacher | None, book: PriceBook
) -> Iterator[str]:
    """Say what is asked, what that is expected from, and whether a budget suffices."""
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
    if not server:
        return
    limit, price = server.budget_dollars, book.teacher(server.model)
    if price:
        yield f"{price.rates} ({price.date}, {price.source})"
    if server.batch:
        less = price and price.batch_discount
        discount = f"{less:.0%} less" if less else "no known discount"
        yield f"asked by batch, {discount}: answers within a day"
    if cost.dollars is None:
        stop = f"; with the limit of ${limit} a run stops (exit 6)" if limit is not None else ""
        yield f"cost unknown: {book.why_no_teacher(server.model)}{stop}"
        return
    perhaps = f" and perhaps {money(cost.paid_perhaps, up=True)}" if cost.paid_perhaps else ""
    total = money(cost.paid + cost.dollars, up=True)
    yield f"paid so far {money(cost.paid, up=True)}{perhaps}; the whole run {total}, retries apart"
    if limit is None:
        yield "no limit: teacher.budget_dollars is not set"
    else:
        remaining = limit - cost.paid - cost.paid_perhaps
        word = "is expected to suffice" if cost.dollars <= remaining else "does not suffice"
        if cost.dollars_most is not None and cost.dollars_most <= remaining:
            word = "suffices"
        yield f"limit ${limit}, beyond which nothing is asked: {word}"


def pilot(run: Run, count: int) -> str:
    """Ask `count` questions of a run and return the teacher's origin.

    The run's documents and prompts are made first where they are missing. The same questions are
    chosen each time, and the generate stage finds their answers in the store. What the pilot cost
    is in the ledger as `pilot`, also when it was stopped. Raises DistillError (exit 2) where no
    teacher is asked, and as the generate stage does.
    """
    config, origin = run.config, ""
    if not config.teacher.makes_answers:
        what = f"a teacher of kind {config.teacher.kind} is not asked anything"
        raise DistillError(Exit.CONFIG, "--pilot", what, "leave it out")
    require(run, [stage for stage in STAGES if stage.name == "generate"])
    perform(run, STAGES[: NAMES.index("select")])

    def main(run: Run) -> None:
        nonlocal origin
        documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
        prompts = asked(run, 0.25)  # of which it is certain that the run asks them
        prompts = useful_prompts(run, prompts, documents)
        sources = {prompt.id: documents[prompt.document_id] for prompt in prompts}
        at_once = {"batch": False} if isinstance(config.teacher, EndpointTeacher) else {}
        teacher = make_responder(config.teacher.model_copy(update=at_once), config, sources)
        settings, origin, answered = config.prompts.questions, teacher.origin, 0
        with Ask(teacher, config.store_folder() / "responses", run) as ask:
            if settings:  # half of what is asked goes to the writing of questions
                each = len(question_shares(settings.kinds, settings.per_document))
                many = max(1, count // 2 // each) if each <= count else 0
                by_text = {digest(document.text): document for document in documents.values()}
                first = [by_text[key] for key in sorted(by_text)][:many]
                requests = [r for d in first for r in question_requests(settings, origin, d)]
                replies, answered = iter(ask.responses(requests, "pilot")), len(requests)
                for document in first:
                    prompts += written_prompts(settings, document, islice(replies, each))
            schemas = schemas_of(config.teacher, config.prompts.tasks)
            requests = requests_of(config.teacher, origin, prompts, documents, schemas)
            # by the hash of what is asked alone: two teachers get the same questions
            by_key = {digest([[m.model_dump() for m in r.messages], r.sample]): r for r in requests}
            rest = [by_key[key] for key in sorted(by_key)][: max(0, count - answered)]
            answered += len(ask.responses(rest, "pilot"))
        say(f"pilot: {answered} answers in the store, {ask.count} of them asked for now")

    with run.lock():
        run.do(Stage("pilot", (), (), (), main))
    return origin
