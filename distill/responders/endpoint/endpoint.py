"""The endpoint responder: a teacher behind an OpenAI-compatible server, paid once and never lost.

Before a request is sent its intent is stored; what comes is stored, durably, before it is read.
Every reply counts against the budget, and so does every attempt whose outcome nobody knows.
"""

import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from distill.config.teachers import EndpointTeacher
from distill.errors import DistillError, Exit
from distill.responders.endpoint.batch import BatchClient
from distill.responders.endpoint.client import EndpointClient
from distill.responders.endpoint.failures import words
from distill.responders.endpoint.request_form import headers, read_key
from distill.responders.prices import TokenPrice
from distill.responders.responder import Raw, Request, origin_of
from distill.responders.store import ResponseStore


class EndpointResponder:
    """Asks the server that `settings` describe; `run` names who pays, in store and budget.

    Raises DistillError where the key is missing (exit 2), or a budget has no price (exit 6).
    """

    def __init__(
        self, settings: EndpointTeacher, price: TokenPrice | None = None, run: str | None = None
    ) -> None:
        self.settings, self.price, self.run = settings, price, run
        self.model, self.origin = settings.model, origin_of(settings)
        self.key = read_key(settings.api_key_env)
        words()  # which fails here where the table is wrong, as does what follows for a variable
        headers(settings, self.key)
        self.client: EndpointClient | None = None  # of the last go
        what = fix = ""
        if "max_tokens" in settings.omit:
            what, fix = "without max_tokens an answer has no maximum", "do not omit max_tokens"
        elif not price:
            what = f"the price of {self.model} is unknown, so no budget can be held"
            fix = "add a row to a file of prices and name it in evaluation.prices"
        if what and settings.budget_dollars is not None:
            raise DistillError(Exit.BUDGET, "teacher.budget_dollars", what, fix)

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request, and keep none; `buy` keeps what was paid."""
        with tempfile.TemporaryDirectory() as folder, ResponseStore(Path(folder)) as store:
            yield from self._go(EndpointClient, requests, store)

    def buy(self, requests: Sequence[Request], store: ResponseStore) -> Generator[Raw, None, None]:
        """Yield a raw answer for each request as it is stored; one that failed is not stored.

        Those that wait in a batch job are collected first, whatever `teacher.batch` says now.
        """
        ids = {request.id for request in requests}
        if self.settings.batch or any(not ids.isdisjoint(job.ids) for job in store.jobs()):
            for raw in self._go(BatchClient, requests, store):
                ids.discard(raw.id)
                yield raw
        if not self.settings.batch and ids:
            remaining = [request for request in requests if request.id in ids]
            yield from self._go(EndpointClient, remaining, store)

    def _go(
        self, kind: type[EndpointClient], requests: Sequence[Request], store: ResponseStore
    ) -> Generator[Raw, None, None]:
        self.client = kind(self, requests, store)
        return self.client.run_in_thread()

    def progress(self) -> str:
        """Return what has been spent of what, while `buy` runs."""
        return self.client.budget.line(self.price is not None) if self.client else ""
