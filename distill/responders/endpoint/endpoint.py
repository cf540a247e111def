"""The endpoint responder: a teacher behind an OpenAI-compatible server, paid once and never lost.

Before a request is sent its intent is stored; what comes is stored, durably, before it is read. There is one layer of
retries. Every reply counts against the budget, and so does every attempt whose outcome nobody knows. Async stays in
here: the requests run in a thread of their own, and whoever asked gets a plain iterator.
"""

import os
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from distill.config import EndpointTeacher
from distill.errors import DistillError, Exit
from distill.records import Response
from distill.responders.endpoint.attempts import origin_of
from distill.responders.endpoint.client import Purchase
from distill.responders.prices import TokenPrice, load_prices
from distill.responders.responder import Circumstances, Raw, Request, respond
from distill.storage.log import Log
from distill.storage.progress import say


class EndpointResponder:
    """Asks the server that `settings` describe; `run` names who pays, in the store and for the budget.

    Raises DistillError where the key is missing (exit 2), or a budget is set and no price is known (exit 6).
    """

    def __init__(
        self, settings: EndpointTeacher, price: TokenPrice | None = None, run: str | None = None
    ) -> None:
        self.settings, self.price, self.run = settings, price, run
        self.model, self.origin = settings.model, origin_of(settings)
        self.key = read_key(settings.api_key_env)
        self._purchase: Purchase | None = None
        if settings.budget_dollars is not None and "max_tokens" in settings.omit:
            what, fix = "without max_tokens an answer has no maximum", "do not omit max_tokens"
            raise DistillError(Exit.BUDGET, "teacher.budget_dollars", what, fix)
        if settings.budget_dollars is not None and price is None:
            what = f"the price of {self.model} is unknown, so no budget can be held"
            fix = "add a row to a file of prices and name it in evaluation.prices"
            raise DistillError(Exit.BUDGET, "teacher.budget_dollars", what, fix)

    def respond(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Yield one response for each request."""
        return respond(self, requests)

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request, keeping no store; `buy` keeps what was paid."""
        with tempfile.TemporaryDirectory() as folder, Log(Path(folder)) as log:
            yield from self.buy(requests, log)

    def buy(self, requests: Sequence[Request], log: Log) -> Generator[Raw, None, None]:
        """Yield a raw answer for each request as they are stored in `log`, and last those that could not be had.

        When the caller stops, or Ctrl-C comes, nothing more is sent, and what is in flight is waited for and stored; a
        second Ctrl-C leaves it. Raises DistillError with the fault that ends the run.
        """
        purchase = Purchase(self.settings, self.key, self.price, self.run, requests, log)
        self._purchase = purchase
        thread = threading.Thread(target=purchase.main, name="purchase", daemon=True)
        thread.start()
        try:
            while (raw := purchase.results.get()) is not None:
                yield raw
        finally:
            purchase.halt_from_outside()
            self._wait_for(purchase, thread)
        if purchase.fault:
            raise purchase.fault

    def progress(self) -> str:
        """Say what has been spent of what, while `buy` runs."""
        return self._purchase.progress() if self._purchase else ""

    def _wait_for(self, purchase: Purchase, thread: threading.Thread) -> None:
        """Wait for what is in flight; Ctrl-C leaves it."""
        thread.join(0.2)
        if thread.is_alive():
            say(f"waiting up to {self.settings.drain_timeout:.0f} s for answers in flight")
        try:
            thread.join()
        except KeyboardInterrupt:
            purchase.abandon()
            thread.join(5)
            raise


def make(teacher: EndpointTeacher, circumstances: Circumstances) -> EndpointResponder:
    """Make the responder of a server, at the price in the price table."""
    price = load_prices(circumstances.prices).teacher(teacher.model)
    return EndpointResponder(teacher, price, circumstances.run)


def read_key(variable: str | None) -> str | None:
    """Return the key in an environment variable; raises DistillError (exit 2) where there is none that can be sent."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip(" ")
    if not key:
        fix = f"export {variable}=..., or remove teacher.api_key_env"
        raise DistillError(Exit.CONFIG, "teacher.api_key_env", f"{variable} is not set", fix)
    if not (key.isascii() and key.isprintable()) or " " in key:
        what, fix = f"{variable} holds a space or a newline", "set it to the key alone"
        raise DistillError(Exit.CONFIG, "teacher.api_key_env", what, fix)
    return key
