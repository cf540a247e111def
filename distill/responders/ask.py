"""How a responder is asked: through the store that all runs share, so that nothing is asked or paid for twice.

What comes is stored before anything is read from it, in a log keyed by content: the model's weights and template, the
messages, the sampling, the sample index. So a filter, a parser or a run may change without a request. A responder whose
answers depend on what shares the batch has its plans stored first; an unfinished one is rerun in full, so that an
interrupted run ends with the same bytes as one that was not.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

from distill.errors import DistillError, Exit
from distill.records import Response
from distill.responders.endpoint.budget import enter_account, faults, replies
from distill.responders.local.plans import answers, lacking, planned, store_each
from distill.responders.local.workers import Crew, take_over
from distill.responders.responder import Buyer, Planner, Raw, Request, Responder, parse
from distill.storage.log import Log
from distill.storage.progress import say, tracking
from distill.storage.run_folder import Run

ADOPTED = "adopted"  # record of the store: the origin that an older one's answers are taken for


class Ask:
    """Asks one responder for what the store lacks, while its block is open; `log` is the store.

    The store is opened once, to be read; its writer's lock is held only while something is asked. What is spent enters
    the ledger of the run `payer`: of a local model as answers come, of an endpoint at the end of the block, also after
    an error. `again` asks anew what a server has replied to without an answer; `workers` are the processes of the
    launch, where several answer. `count` is the number of answers that came now.
    """

    def __init__(
        self,
        responder: Responder,
        store: Path,
        payer: Run | None = None,
        again: bool = False,
        workers: Crew | None = None,
    ) -> None:
        self.responder, self.log, self.payer = responder, Log(store, writable=False), payer
        self.again, self.workers, self.count = again, workers, 0
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(self.log)
            if self.payer and isinstance(self.responder, Buyer):
                undo.callback(enter_account, self.payer, self.log)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.__exit__(kind, error, trace)

    def responses(self, requests: Sequence[Request], title: str) -> list[Response]:
        """Return one response a request, in their order; `title` stands beside the progress.

        Raises DistillError (exit 4) where every request failed, which is the fault of none of them.
        """
        responses = [read(self.log, request) for request in self.fetch(requests, title)]
        if responses and all(response.stop == "error" for response in responses):
            what = f"all {len(responses)} requests failed, the last: {responses[-1].error}"
            fix = "see to the server, then ask again with --redo"
            raise DistillError(Exit.TEACHER, self.responder.model, what, fix)
        return responses

    def fetch(self, requests: Sequence[Request], title: str) -> list[Request]:
        """Ask for what the store lacks, and store each reply as it comes; return the requests by its keys."""
        wanted, adopted = self._under_old_keys(requests)
        if not adopted and not lacking(self.log, wanted, self.again):
            return wanted
        with self.log.writing():
            if adopted:
                former = self.responder.old_origin  # pyright: ignore
                self.log.append([(ADOPTED, former, self.responder.origin)])
                what = f"stored under the hash of {self.responder.model}'s weights alone"
                now = "count as answers of the model as it is now"
                say(f"{title}: {adopted} answers are {what}, and {now}")
            take_over(self.log)  # what other processes of a killed launch have left
            if missing := lacking(self.log, wanted, self.again):
                with (
                    tracking(title, len(missing), "answers") as tracker,
                    closing(self._stored(missing)) as stored,  # a buyer ends before the log closes
                ):
                    started, tokens = time.monotonic(), 0
                    for raw in stored:
                        tokens += raw.usage.output_tokens
                        speed = f"{tokens / (time.monotonic() - started):.0f} tokens/s"
                        bought = isinstance(self.responder, Buyer) and self.responder.progress()
                        tracker.advance(extra=bought or speed)
        return wanted

    def _under_old_keys(self, requests: Sequence[Request]) -> tuple[list[Request], int]:
        """Return the requests, by old keys where only these have an answer, and how many such are first met now.

        An earlier distill knew a model in a folder by its weights alone (`old_origin`). Its answers are those of the
        first model that asks for them: they are not found any more once a file of that folder has changed.
        """
        log, origin = self.log, self.responder.origin
        former: str | None = getattr(self.responder, "old_origin", None)
        if former is None or (log.get(ADOPTED, former) or origin) != origin:
            return list(requests), 0
        wanted = []
        for request in requests:
            old = Request.make(
                former, request.prompt_id, request.messages, request.sampling, request.sample
            )
            only_old = bool(lacking(log, [request])) and not lacking(log, [old])
            wanted.append(old if only_old else request)
        renamed = sum(one.key != other.key for one, other in zip(wanted, requests, strict=True))
        return wanted, 0 if (ADOPTED, former) in log else renamed

    def _stored(self, missing: Sequence[Request]) -> Generator[Raw, None, None]:
        """Yield the raw answers, each once it is stored, by this process or another of the workers."""
        log, responder = self.log, self.responder
        if isinstance(responder, Buyer):
            with closing(responder.buy(missing, log)) as raws:
                for raw in raws:
                    self.count += 1
                    yield raw
        elif not isinstance(responder, Planner):
            yield from store_each(responder.ask(missing), log, self._spend)
        elif self.workers:
            yield from self.workers.lead(responder, missing, log, self._spend)
        else:
            yield from store_each(
                answers(responder, planned(responder, missing, log)), log, self._spend
            )

    def _spend(self, input_tokens: int, output_tokens: int) -> None:
        """Enter an answer that was made here, before it is stored: a kill between the two hides no spending."""
        self.count += 1
        if self.payer:
            self.payer.ledger.spend(input_tokens=input_tokens, output_tokens=output_tokens)


def read(log: Log, request: Request) -> Response:
    """Read the stored answer of a request as a response to its prompt; without one, how the last attempt failed."""
    return next(readings(log, request))


def readings(log: Log, request: Request) -> Iterator[Response]:
    """Yield what is known of a request: its replies, the newest first, then how its attempts failed, the last first.

    Log-probabilities, which weigh fifty times what the answer does, stay in the store.
    """
    for stored in replies(log, Response.make_id(request.key, request.sample)):
        response = parse(Raw.model_validate(stored), request.prompt_id)
        yield response.model_copy(update={"logprobs": None})
    for what in (*faults(log, request.key, request.sample), "no attempt is recorded"):
        nothing = Raw(
            key=request.key,
            sample=request.sample,
            model="",
            stop="error",
            body={"text": ""},
            error=what,
        )
        yield parse(nothing, request.prompt_id)
