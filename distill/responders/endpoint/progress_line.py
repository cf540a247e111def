"""The line that a buyer shows while it buys: what was spent, what may have been, how fast, how much in all, the limit."""

import time
from decimal import Decimal

from distill.records import Usage
from distill.responders.endpoint.budget import Budget


class Tally:
    """Counts what one go at `count` requests buys; money is the budget's, which knows what was spent before it."""

    def __init__(self, budget: Budget, priced: bool, count: int) -> None:
        self.budget, self.priced, self.count = budget, priced, count
        self.settled, self.unknown = budget.settled, budget.unknown  # before this go
        self.done = self.tokens = 0
        self.started = time.monotonic()

    def add(self, usage: Usage) -> None:
        """Count a request that has ended, with an answer or for good without one."""
        self.done += 1
        self.tokens += usage.output_tokens

    def line(self) -> str:
        """Say what is spent, perhaps spent, spent an hour, and in all at this rate; with a limit, of the whole run.

        Without a limit the store is not read for what went before, so the sums are of this go.
        """
        hours = max(time.monotonic() - self.started, 1e-9) / 3600
        speed = f"{self.tokens / hours / 3600:,.0f} tokens/s"
        if not self.priced and not self.budget.settled:
            return f"cost unknown, {speed}"
        budget, now = self.budget, self.budget.settled - self.settled
        doubts = budget.unknown - self.unknown
        spent = _both(budget.settled, budget.unknown)
        ahead = Decimal(self.count - self.done) / max(1, self.done)
        whole = _both(budget.settled + now * ahead, budget.unknown + doubts * ahead)
        limit = f", limit ${budget.limit}" if budget.limit is not None else ""
        return f"{spent}, in all about {whole}{limit}, ${float(now) / hours:.2f}/h, {speed}"


def _both(settled: Decimal, perhaps: Decimal) -> str:
    """Write what is settled, and what may have been billed beside it."""
    return f"${settled:.4f}" + (f" + ${perhaps:.4f} perhaps" if perhaps else "")
