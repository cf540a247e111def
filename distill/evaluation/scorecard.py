"""What scorecard.json holds: the comparison of evaluation.json, costs, savings, the training.

Money is Decimal until it is written. What is unknown is None, with its reason beside it.
"""

from decimal import Decimal
from typing import Any, Literal

from distill.evaluation.measurements import CardRecord, Comparison, Difference, Model
from distill.evaluation.statistics import FEWEST_DOCUMENTS, Conclusion, conclude

Way = Literal["replace_all", "try_then_escalate", "perfect_router"]
WAYS: tuple[Way, ...] = ("replace_all", "try_then_escalate", "perfect_router")


class HarnessMetric(CardRecord):
    """One metric of another harness, with its standard error."""

    value: float
    stderr: float | None = None


class HarnessTask(CardRecord):
    """One task of another harness."""

    version: Any = None
    n: int | None = None
    metrics: dict[str, HarnessMetric] = {}


class HarnessResult(CardRecord):
    """What another harness measured of the student."""

    harness: str = ""
    adapter_sha256: str | None = None
    dtype: str | None = None
    chat_template: bool = True
    limit: int | None = None
    tasks: dict[str, HarnessTask] = {}


class WorstAnswer(CardRecord):
    """A worst sample as the card shows it, cut short."""

    task: str
    asked: str
    student: str
    teacher: str
    reason: str


class Failures(CardRecord):
    """The student's worst answers, or why there are none."""

    worst: tuple[WorstAnswer, ...] = ()
    reason: str | None = None


class PerMillion(CardRecord):
    """What a million input and a million output tokens cost; a hosted model's time is unknown."""

    dollars_input: Decimal | None = None
    dollars_output: Decimal | None = None
    seconds_input: float | None = None
    seconds_output: float | None = None


class RequestCost(CardRecord):
    """What 1,000 requests take and cost; None with a reason where it is not known.

    Timed here, it is with `concurrency` requests at once in `engine` on `machine`; `loads` holds it
    at each such number, with the range of the last three of `repeats` runs.
    """

    requests: int = 0
    input_tokens: float | None = None  # a request, on average
    output_tokens: float | None = None
    seconds_per_1k: float | None = None
    dollars_per_1k: Decimal | None = None
    output_tokens_per_second: float | None = None
    per_million: PerMillion | None = None
    one_at_a_time: "RequestCost | None" = None
    price: str | None = None
    engine: str | None = None
    machine: str | None = None
    concurrency: int | None = None
    repeats: int = 1
    range_per_1k: tuple[float, float] | None = None  # of its seconds
    loads: "tuple[RequestCost, ...]" = ()
    reasons: dict[str, str] = {}


class DistillationCost(CardRecord):
    """What making the student took and cost, by stage."""

    seconds: float = 0.0
    dollars: Decimal | None = None
    unknown_dollars: Decimal = Decimal(0)  # the most that attempts of unknown outcome add
    reused: float = 0.0  # share of the teacher's answers, by tokens, that an earlier run paid for
    stages: dict[str, float] = {}
    output_tokens: int = 0
    price: str | None = None
    reasons: dict[str, str] = {}


class Costs(CardRecord):
    """What requests cost each model, and what the distillation cost."""

    teacher: RequestCost = RequestCost()
    base: RequestCost = RequestCost()
    student: RequestCost = RequestCost()
    distillation: DistillationCost = DistillationCost()

    def of(self, model: Model) -> RequestCost:
        """Return what requests cost a model."""
        return getattr(self, model)


class Amount(CardRecord):
    """An amount with its interval, or None with the reason; a bound has no interval."""

    value: Decimal | None = None
    low: Decimal | None = None
    high: Decimal | None = None
    reason: str | None = None

    def scaled(self, factor: Decimal | int, plus: Decimal | int = 0) -> "Amount":
        """Return factor x amount + plus; a negative factor turns the interval round."""
        low, high = (self.high, self.low) if factor < 0 else (self.low, self.high)
        value, low, high = (
            None if amount is None else amount * factor + plus for amount in (self.value, low, high)
        )
        return self.model_copy(update={"value": value, "low": low, "high": high})

    def conclude(self, documents: int | None) -> Conclusion:
        """Decide whether the amount is above 0 ("better"), by the rule of all claims."""
        ends = (None if end is None else float(end) for end in (self.low, self.high))
        return conclude(*ends, documents=documents, why_no_interval=self.reason)


class BreakEven(CardRecord):
    """After how many requests, and days, the savings have paid for the distillation."""

    requests: Amount = Amount()
    days: Amount = Amount()


class Saving(CardRecord):
    """What a way to use the student saves, or the headline's with one thing changed (`case`)."""

    way: Way | None = None
    case: str | None = None
    teacher_dollars_per_1k: Decimal | None = None
    student_dollars_per_1k: Decimal | None = None
    requests_per_month: int = 0
    dollars_per_1k: Amount  # negative where it costs more than the teacher
    dollars_per_month: Amount
    break_even: BreakEven


class TeacherPrice(CardRecord):
    """The price that the student is compared with; hypothetical where another model answered."""

    name: str = ""
    hypothetical: bool = False
    answers_dollars: Decimal | None = None
    dollars_per_1k: Decimal | None = None
    price: str | None = None
    hosted: bool = False


class Rent(CardRecord):
    """How many machines the requests of a month need, their rent, and how busy they are."""

    machines: int
    dollars_per_month: Decimal
    in_use: Decimal


class StudentPrice(CardRecord):
    """What the student's requests cost on its machine."""

    dollars_per_1k: Decimal | None = None
    price: str | None = None
    utilisation: Decimal = Decimal(1)
    month_of_machines: Rent | None = None


class Economics(CardRecord):
    """What the student saves: prices, the share it can take, the three ways, what could change."""

    requests: int  # that these figures are over: those that a test covers, or all where none does
    of: int  # held-out requests in all
    documents: int | None = None  # that they are of: with few, no saving is claimed
    teacher: TeacherPrice
    student: StudentPrice
    tests: tuple[str, ...] = ()  # that decide whether an answer is acceptable
    when_served: bool = False  # they can be run on a new request
    unscored: int = 0
    share: Amount
    share_of_price: Amount
    share_if_unscored_fail: Amount | None = None
    quality: Difference  # student minus teacher, beside replace_all
    distillation_dollars: Decimal | None = None
    requests_per_month: int
    headline: Way
    rows: tuple[Saving, ...]
    sensitivity: tuple[Saving, ...] = ()
    reasons: dict[str, str] = {}

    def saving(self, way: Way | None = None) -> Saving:
        """Return the saving of one way, or of the headline's."""
        return next(row for row in self.rows if row.way == (way or self.headline))


class Funnel(CardRecord):
    """How many prompts and answers came in, and what was kept and dropped; in all, and by task."""

    prompts: int = 0
    answers: int = 0
    kept_train: int = 0
    kept_validation: int = 0
    kept_heldout: int = 0
    dropped: dict[str, int] = {}
    tasks: "dict[str, Funnel]" = {}


class OnPolicyRound(CardRecord):
    """One round of training on the student's own answers."""

    answers: int = 0
    ended: float | None = None
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class TrainingSummary(CardRecord):
    """What training took, and which step's adapter is evaluated."""

    steps: int | None = None
    best_step: int | None = None
    adapter_step: int | None = None
    examples: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    dtype: str | None = None
    adapter_sha256: str | None = None
    validation_loss_first: float | None = None
    validation_loss_best: float | None = None
    loss: dict[str, Any] = {}  # the mix of losses
    labels: str | None = None
    on_policy: tuple[OnPolicyRound, ...] = ()


class Scorecard(Comparison):
    """The content of scorecard.json; every number, or null with a reason in `reasons`."""

    name: str = ""
    external: HarnessResult | None = None
    failures: Failures = Failures()
    cost: Costs = Costs()
    economics: Economics | None = None
    funnel: Funnel = Funnel()
    training: TrainingSummary = TrainingSummary()
    reasons: dict[str, str] = {}

    @property
    def few_documents(self) -> str:
        """Say why so few documents decide nothing; empty where they are enough."""
        documents = (self.overall or self.environment.settings).documents
        if documents is None or documents >= FEWEST_DOCUMENTS:
            return ""
        return (
            f"It takes {FEWEST_DOCUMENTS} documents to decide a difference: if all of {documents} "
            f"pointed one way, p would be {2 / 2 ** max(1, documents):.3g}."
        )
