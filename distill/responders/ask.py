"""How a responder is asked: through the store that runs share, so that nothing is paid twice."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

from distill.errors import DistillError, Exit
from distill.records import Response
from distill.responders.endpoint.budget import enter_account
from distill.responders.responder import Buyer, Planner, Raw, Request, Responder
from distill.responders.store import ResponseStore
from distill.storage.progress import say, tracking
from distill.storage.run_folder import Run

PAUSE = 0.3  # seconds between two looks at what another run has stored
ADOPTED = "adopted"  # record of the store: the origin that an older one's answers are taken for


class Ask(ExitStack):
    """Asks one responder for what the store lacks, while its block is open.

    What another run is getting is waited for, and asked for where that run ends without it. What is
    spent enters the ledger of the run `payer`, also after an error. `again` asks anew what a server
    has replied to without an answer; `count` is the number of answers that came now.
    """

    student = False  # whether its answers count as the student's, and not as a teacher's

    def __init__(
        self, responder: Responder, store: Path, payer: Run | None = None, again: bool = False
    ) -> None:
        super().__init__()
        self.responder, self.store = responder, ResponseStore(store, writable=False)
        self.payer, self.again, self.count = payer, again, 0

    def __enter__(self) -> Self:
        self.enter_context(self.store)
        if close := getattr(self.responder, "close", None):  # an engine ends with whoever asks
            self.callback(close)
        if self.payer and isinstance(self.responder, Buyer):
            self.callback(enter_account, self.payer, self.store)
        return self

    def responses(self, requests: Sequence[Request], title: str) -> list[Response]:
        """Return one response a request, in their order; DistillError (exit 4) where all failed."""
        answered: dict[str, Response] = {}
        responses = list[Response]()
        for request in self.fetch(requests, title, answered):
            # where none came: how the request failed, or what another process has stored since
            response = answered.get(request.id) or self.store.response(request)
            responses.append(response.model_copy(update={"prompt_id": request.prompt_id}))
        if responses and all(response.stop == "error" for response in responses):
            what = f"all {len(responses)} requests failed, the last: {responses[-1].error}"
            fix = "see to the server, then ask again with --redo"
            raise DistillError(Exit.TEACHER, self.responder.model, what, fix)
        return responses

    def fetch(
        self, requests: Sequence[Request], title: str, answered: dict[str, Response] | None = None
    ) -> list[Request]:
        """Ask for what the store lacks; return the requests by the store's keys.

        Into `answered` goes the response to each that has one, by its id: each reply is read once.
        """
        requests, former = self._under_old_keys(requests)
        store, responder = self.store, self.responder
        if answered is not None:
            stored = (one for one in requests if ("response", one.id) in store)
            answered |= {request.id: store.response(request) for request in stored}
        if not former and not store.lacking(requests, self.again):
            return requests
        with store.writing(shared=True):
            if former:
                store.append([(ADOPTED, former, responder.origin)])
                what = f"answers under the hash of {responder.model}'s weights alone"
                say(f"{title}: {what} count as those of the model as it is now")
            tried, waiting = set[str](), False
            while missing := [r for r in store.lacking(requests, self.again) if r.id not in tried]:
                ours = store.claim([request.id for request in missing])
                tried |= ours
                claimed = [one for one in missing if one.id in ours]
                if mine := store.lacking(claimed, self.again):  # others have stored since
                    self._ask_for(mine, title, answered)
                elif not ours:
                    if not waiting:
                        what = f"{len(missing)} answers that another run is getting"
                        say(f"{title}: waiting for {what}")
                    waiting = True
                    time.sleep(PAUSE)
        return requests

    def _ask_for(
        self, requests: Sequence[Request], title: str, answered: dict[str, Response] | None
    ) -> None:
        """Ask, show the progress, and put what comes into `answered`."""
        with (
            tracking(title, len(requests), "answers") as tracker,
            closing(self._stored(requests)) as raws,  # a buyer ends before the log closes
        ):
            started, tokens = time.monotonic(), 0
            for raw in raws:
                tokens += raw.reply.usage.output_tokens
                speed = f"{tokens / (time.monotonic() - started):.0f} tokens/s"
                bought = isinstance(self.responder, Buyer) and self.responder.progress()
                tracker.advance(extra=bought or speed)
                if answered is not None and not raw.error:
                    answered[raw.id] = raw.response("")

    def _under_old_keys(self, requests: Sequence[Request]) -> tuple[list[Request], str | None]:
        """Return the requests, by old keys where only these have an answer, and the old origin
        (a model in a folder was known by its weights alone) where its answers are adopted."""
        store, origin = self.store, self.responder.origin
        former: str | None = getattr(self.responder, "old_origin", None)
        if former is None or (store.get(ADOPTED, former) or origin) != origin:
            return list(requests), None
        renamed = list[Request]()
        for one in requests:
            old = Request.make(former, one.prompt_id, one.messages, one.sampling, one.sample)
            only_old = ("response", one.id) not in store and ("response", old.id) in store
            renamed.append(old if only_old else one)
        fresh = renamed != list(requests) and (ADOPTED, former) not in store
        return renamed, former if fresh else None

    def _stored(self, missing: Sequence[Request]) -> Generator[Raw, None, None]:
        """Yield the raw answers, each once it is stored."""
        store, responder = self.store, self.responder
        if isinstance(responder, Buyer):
            with closing(responder.buy(missing, store)) as raws:
                for raw in raws:
                    self.count += 1
                    yield raw
            return
        groups: Iterator[Sequence[Raw]]
        if isinstance(responder, Planner):
            plans = store.planned(responder, missing)
            groups = (group for plan in plans for group in responder.ask_plan(plan))
        else:
            groups = ([raw] for raw in responder.ask(missing))
        # those that come together are stored with one fsync, for which a GPU waits
        for group in groups:  # a plan that is rerun gives again what was stored before the kill
            fresh = [raw for raw in group if ("response", raw.id) not in store]
            for raw in fresh:  # first, so that a kill while they are being stored hides no spending
                self.count += 1
                if self.payer:
                    tokens = (raw.usage.input_tokens, raw.usage.output_tokens)
                    self.payer.ledger.spend(*tokens, self.student)
            store.append(("response", raw.id, raw.model_dump(mode="json")) for raw in fresh)
            yield from fresh
