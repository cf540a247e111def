"""What scorecard.json holds: the comparison of evaluation.json, costs, savings, the training.

What is unknown is None, with its reason beside it.
"""

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field

from distill.evaluation.measurements import CardRecord, Comparison, Difference, Model
from distill.evaluation.statistics import FEWEST_DOCUMENTS, Estimate

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
    """What a million input and a million output tokens cost."""

    dollars_input: float | None = None
    dollars_output: float | None = None


class RequestCost(CardRecord):
    """What 1,000 requests take and cost; None with a reason where it is not known.

    Timed here, it is with `concurrency` requests at once in `engine` on `machine`; `loads` holds it
    at each such number, with the range of the last three of `repeats` runs.
    """

    requests: int = 0
    input_tokens: float | None = None  # a request, on average
    output_tokens: float | None = None
    seconds_per_1k: float | None = None
    dollars_per_1k: float | None = None
    output_tokens_per_second: float | None = None
    per_million: PerMillion | None = None
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
    tries: RequestCost | None = None  # of the student, all tries at a request together
    distillation: DistillationCost = DistillationCost()

    def of(self, model: Model) -> RequestCost:
        """Return what requests cost a model."""
        return getattr(self, model)


class BreakEven(CardRecord):
    """After how many requests, and days, the savings have paid for the distillation."""

    requests: Estimate = Estimate()
    days: Estimate = Estimate()


class Saving(CardRecord):
    """What a way to use the student saves, or the headline's with one thing changed (`case`)."""

    way: Way | None = None
    case: str | None = None
    teacher_dollars_per_1k: float | None = None
    student_dollars_per_1k: float | None = None
    dollars_per_1k: Estimate  # negative where it costs more than the teacher
    dollars_per_month: Estimate
    break_even: BreakEven


class TeacherPrice(CardRecord):
    """The price that the student is compared with; hypothetical where another model answered."""

    name: str = ""
    hypothetical: bool = False
    answers_dollars: float | None = None
    dollars_per_1k: float | None = None
    price: str | None = None
    hosted: bool = False


class Rent(CardRecord):
    """How many machines the requests of a month need, their rent, and how busy they are."""

    machines: int
    dollars_per_month: float
    in_use: float


class StudentPrice(CardRecord):
    """What the student's requests cost on its machine."""

    dollars_per_1k: float | None = None
    price: str | None = None
    utilisation: float = 1.0
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
    share: Estimate
    share_of_price: Estimate
    quality: Difference  # student minus teacher, beside replace_all
    distillation_dollars: float | None = None
    requests_per_month: int
    headline: Way
    rows: tuple[Saving, ...]
    sensitivity: tuple[Saving, ...] = ()
    reasons: dict[str, str] = {}

    def saving(self, way: Way | None = None) -> Saving:
        """Return the saving of one way, or of the headline's."""
        return next(row for row in self.rows if row.way == (way or self.headline))


class Funnel(CardRecord):
    """How many prompts and answers came in, and what was kept and dropped."""

    prompts: int = 0
    answers: int = 0
    kept_train: int = 0
    kept_validation: int = 0
    kept_heldout: int = 0
    only_signals: Annotated[int, Field(exclude_if=lambda count: not count)] = 0
    dropped: dict[str, int] = {}


class OnPolicyRound(CardRecord):
    """One round of training on the student's own answers."""

    answers: int = 0
    ended: float | None = None
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class SelfAnswersRound(OnPolicyRound):
    """One training from the base on the student's own right answers too; no steps: nothing new."""

    prompts: int = 0
    right: int = 0
    distinct: int = 0
    solved: int = 0
    teacher_rows: int = 0
    student_rows: int = 0


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
    validation_prompts: int | None = None  # where a checker chooses the checkpoint
    validation_right: float | None = None  # the best share of them
    loss: dict[str, Any] = {}  # the mix of losses
    labels: str | None = None
    self_answers: tuple[SelfAnswersRound, ...] = ()
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
