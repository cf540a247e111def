"""What evaluation.json and scorecard.json hold, as records: comparisons, tasks, agreement, suites, judge, costs, savings.

Every figure is a number, or None with its reason beside it. A file that an earlier version wrote is read too: what it
lacks has a default, and what this version does not know is passed over. Only what was set is written (`CardRecord.tree`),
so a field that does not apply to a row does not stand in its JSON. Money is Decimal until it is written.
"""

from decimal import Decimal
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from distill.evaluation.claims import Conclusion, Discordant, Noninferiority, conclude
from distill.formatting import plain_numbers
from distill.records import Record

Model = Literal["teacher", "base", "student"]
Rival = Literal["teacher", "base"]
Way = Literal["replace_all", "try_then_escalate", "perfect_router"]
MODELS: tuple[Model, ...] = ("teacher", "base", "student")
RIVALS: tuple[Rival, ...] = ("teacher", "base")
WAYS: tuple[Way, ...] = ("replace_all", "try_then_escalate", "perfect_router")
Rank = Literal["best", "typical", "worst"]
Ends = tuple[float | None, float | None]


class CardRecord(Record):
    """A part of evaluation.json or scorecard.json."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    def tree(self) -> dict[str, Any]:
        """Return the record for JSON: what was set, numbers of six significant digits."""
        return plain_numbers(self)


class Claim(CardRecord):
    """The margin of non-inferiority, chosen before, and what the interval says to it."""

    margin: float
    verdict: Noninferiority


class Difference(CardRecord):
    """A paired difference with its interval and, of shares that pass, what it allows to claim."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    n: int | None = None  # stated where the difference stands apart from its row
    documents: int | None = None
    smallest_visible: float | None = None
    reasons: dict[str, str] = {}
    mcnemar: Discordant | None = None
    non_inferiority: Claim | None = None

    def conclude(self, n: int | None = None, documents: int | None = None) -> Conclusion:
        """Decide the difference, which is over `n` items of some documents."""
        p = self.mcnemar.p if self.mcnemar else None
        n, documents = n or self.n, documents or self.documents
        return conclude(self.low, self.high, documents, p, n, self.reason)


class Ratio(CardRecord):
    """The share of the gap recovered, with its interval."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


class CountedAgainst(CardRecord):
    """The result in which every missing score counts against the student."""

    unscored_by_model: dict[str, int] = {}
    student: float | None = None
    student_minus_teacher: Difference = Difference()
    student_minus_base: Difference = Difference()


class MetricRow(CardRecord):
    """One metric of some items: the models' means, the paired differences, the gap recovered."""

    metric: str = ""
    n: int = 0
    documents: int | None = None
    tokens: int | None = None  # of what is measured token by token
    unscored: int = 0
    teacher: float | None = None
    base: float | None = None
    student: float | None = None
    intervals: dict[Model, Ends] = {}
    student_minus_teacher: Difference = Difference()
    student_minus_base: Difference = Difference()
    gap_recovered: Ratio = Ratio()
    reasons: dict[str, str] = {}
    failures: dict[str, dict[str, int]] = {}
    if_missing_counts_against_student: CountedAgainst | None = None

    def mean(self, model: Model) -> float | None:
        """Return a model's mean score."""
        return {"teacher": self.teacher, "base": self.base, "student": self.student}[model]

    def against(self, rival: Rival) -> Difference:
        """Return the student minus a rival."""
        return self.student_minus_teacher if rival == "teacher" else self.student_minus_base

    def conclude(self, rival: Rival) -> Conclusion:
        """Decide whether the student is better than a rival."""
        return self.against(rival).conclude(self.n, self.documents)


class AnswerLengths(CardRecord):
    """How long a model's answers are, and the shares that were cut off or empty."""

    n: int = 0
    tokens: float | None = None
    characters: float | None = None
    truncated: float | None = None
    empty: float | None = None


class Results(CardRecord):
    """The rows of some tasks, and of all their checks together."""

    tasks: dict[str, MetricRow] = {}
    overall: MetricRow | None = None


class Contamination(CardRecord):
    """How many items stand in the training data, and the results with those items left in."""

    n: int = 0
    flagged: int = 0
    unsearchable: int = 0
    kinds: dict[str, int] = {}
    rate: Difference = Difference()
    items: tuple[str, ...] = ()
    examples: tuple[dict[str, str], ...] = ()
    method: str = ""
    all_items: Results | None = None


class SuiteResult(Results):
    """What the models made of a suite; its facts come from the suite's file."""

    description: str = ""
    source: str | None = None
    license: str | None = None
    sha256: str | None = None
    lengths: dict[str, AnswerLengths] = {}
    contamination: Contamination | None = None


class Sample(CardRecord):
    """One item with all models' answers: the student's best, typical or worst of a task."""

    task: str
    rank: Rank
    item: str = ""
    metric: str = ""
    messages: tuple[dict[str, str], ...] = ()
    reference: str | None = None
    answers: dict[str, str] = {}
    scores: dict[str, float | None] = {}
    reasons: dict[str, str] = {}


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


class ProbeRow(CardRecord):
    """How often the rival of a real answer won and lost among the probes of one kind."""

    n: int = 0
    wins: float | None = None
    losses: float | None = None
    unparsed: float | None = None


class ProbeResult(CardRecord):
    """What a judge let win of its probes, and whether it may be used."""

    n: int = 0
    null: ProbeRow = ProbeRow()
    injected: ProbeRow = ProbeRow()
    duplicate: ProbeRow = Field(default=ProbeRow(), alias="copy")
    flip_rate: float | None = None
    passed: bool = False
    reason: str | None = None

    def kinds(self) -> dict[str, ProbeRow]:
        """Return the rows by the kind of probe."""
        return {"null": self.null, "injected": self.injected, "copy": self.duplicate}


class WinRate(CardRecord):
    """The win rate over the pairs of like length."""

    n: int | None = None
    within: float | None = None
    win_rate: Difference = Difference()


class DuelRow(CardRecord):
    """How often the student's answer wins against a rival's, a tie counted half."""

    n: int | None = None
    documents: int | None = None
    unanswered: int | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    unparsed: int | None = None
    flip_rate: float | None = None
    win_rate: Difference = Difference()
    characters: tuple[float, float] | None = None
    length_matched: WinRate = WinRate()


class JudgeResult(CardRecord):
    """What a judge prefers, and what it made of its probes."""

    model: str
    probe: ProbeResult
    warnings: tuple[str, ...] = ()
    teacher: DuelRow = DuelRow()
    base: DuelRow = DuelRow()

    def against(self, rival: Rival) -> DuelRow:
        """Return the duels of the student and a rival."""
        return self.teacher if rival == "teacher" else self.base


class ModelFacts(CardRecord):
    """A model's name, and what pins its weights and its chat template."""

    model_config = ConfigDict(extra="allow")

    name: str = ""
    hub_id: str | None = None
    revision: str | None = None
    sha256: str | None = None
    template_hash: str | None = None
    adapter_sha256: str | None = None
    dtype: str | None = None
    model_sha256: str | None = None  # of merged/
    merged_sha256: str | None = None  # as an earlier version recorded it
    reasons: dict[str, str] = {}


class Settings(CardRecord):
    """How intervals were made, and how the models were asked."""

    confidence: float = 0.95
    samples: int = 10_000
    seed: int = 0
    margin: float = 0.05
    items: int | None = None
    documents: int | None = None
    max_new_tokens: int | None = None
    teacher_temperature: float = 0.0
    teacher_sees_more: bool = False


class CorpusFacts(CardRecord):
    """The corpus that the items are of."""

    model_config = ConfigDict(extra="allow")

    documents: int | None = None
    corpus_sha256: str | None = None
    python: str | None = None
    contaminated: int = 0


class Environment(CardRecord):
    """The code and the machine that measured."""

    model_config = ConfigDict(extra="allow")

    distill: str = ""
    revision: str | None = None
    libraries: dict[str, str] = {}
    processor: str = ""
    cores: int | None = None
    platform: str | None = None
    settings: Settings = Settings()  # in scorecard.json; evaluation.json has them beside


class Comparisons(Results):
    """All that compares the models on the held-out items."""

    agreement: dict[str, MetricRow] = {}
    lengths: dict[str, AnswerLengths] = {}
    samples: tuple[Sample, ...] = ()

    @field_validator("agreement", mode="before")
    @classmethod
    def _rows(cls, agreement: Any) -> Any:
        return {k: v for k, v in (agreement or {}).items() if not isinstance(v, str)}


class EvaluationResult(Comparisons):
    """The content of evaluation.json."""

    models: dict[Model, ModelFacts]
    contamination: Contamination | None = None
    suites: dict[str, SuiteResult] = {}
    judge: JudgeResult | None = None
    settings: Settings
    corpus: CorpusFacts
    environment: Environment


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


class OneAtATime(CardRecord):
    """What 1,000 requests take and cost where each is asked by itself."""

    requests: int = 0
    seconds_per_1k: float | None = None
    output_tokens_per_second: float | None = None
    dollars_per_1k: Decimal | None = None


class PerMillion(CardRecord):
    """What a million tokens read and a million written cost; a hosted model's time is its own affair."""

    dollars_input: Decimal | None = None
    dollars_output: Decimal | None = None
    seconds_input: float | None = None
    seconds_output: float | None = None


class RequestCost(CardRecord):
    """What 1,000 requests take and cost; None with a reason where it is not known."""

    requests: int = 0
    input_tokens: float | None = None  # a request, on average
    output_tokens: float | None = None
    seconds_per_1k: float | None = None
    dollars_per_1k: Decimal | None = None
    output_tokens_per_second: float | None = None
    per_million: PerMillion | None = None
    one_at_a_time: OneAtATime | None = None
    price: str | None = None
    reasons: dict[str, str] = {}


class DistillationCost(CardRecord):
    """What making the student took and cost, by stage.

    `unknown_dollars` is the most that attempts of unknown outcome may have cost beyond that; `reused` the share of the
    teacher's answers, by tokens, that the store had already: an earlier run paid for them.
    """

    seconds: float = 0.0
    dollars: Decimal | None = None
    unknown_dollars: Decimal = Decimal(0)
    reused: float = 0.0
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
        return {"teacher": self.teacher, "base": self.base, "student": self.student}[model]

    def prices(self) -> list[str]:
        """Return every price that a figure rests on, once."""
        used = (self.teacher, self.base, self.student, self.distillation)
        return list(dict.fromkeys(cost.price for cost in used if cost.price))


class Amount(CardRecord):
    """An amount with its interval, or None with the reason.

    `low` and `high` are None also where a case is a bound of its own and has no interval.
    """

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
    """After how many requests, and days at the volume, the savings have paid for the distillation."""

    requests: Amount = Amount()
    days: Amount = Amount()


class Saving(CardRecord):
    """What one way to use the student saves; negative where it costs more than the teacher."""

    way: Way
    dollars_per_1k: Amount
    dollars_per_month: Amount
    break_even: BreakEven


class Case(CardRecord):
    """The headline's saving with one thing changed."""

    case: str
    teacher_dollars_per_1k: Decimal | None = None
    student_dollars_per_1k: Decimal | None = None
    requests_per_month: int = 0
    dollars_per_1k: Amount
    dollars_per_month: Amount
    break_even: BreakEven


class TeacherPrice(CardRecord):
    """Whose price the student is compared with; hypothetical where the answers were not that model's."""

    name: str = ""
    hypothetical: bool = False
    answers_dollars: Decimal | None = None
    dollars_per_1k: Decimal | None = None
    batch_dollars_per_1k: Decimal | None = None
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
    """What the student saves: what is compared, the share it can take, the three ways, the headline, what could change."""

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
    sensitivity: tuple[Case, ...] = ()
    reasons: dict[str, str] = {}

    def saving(self, way: Way | None = None) -> Saving:
        """Return the saving of one way, or of the headline's."""
        return next(row for row in self.rows if row.way == (way or self.headline))


class FunnelRow(CardRecord):
    """How many prompts and answers came in, and what was kept and dropped."""

    prompts: int = 0
    answers: int = 0
    kept_train: int = 0
    kept_validation: int = 0
    kept_heldout: int = 0
    dropped: dict[str, int] = {}


class Funnel(FunnelRow):
    """The funnel in all, and by task."""

    tasks: dict[str, FunnelRow] = {}


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


class Scorecard(CardRecord):
    """The content of scorecard.json; every number, or null with a reason in `reasons`."""

    name: str = ""
    models: dict[Model, ModelFacts] = {}
    tasks: dict[str, MetricRow] = {}
    overall: MetricRow | None = None
    agreement: dict[str, MetricRow] = {}
    lengths: dict[str, AnswerLengths] = {}
    contamination: Contamination | None = None
    suites: dict[str, SuiteResult] = {}
    external: HarnessResult | None = None
    judge: JudgeResult | None = None
    failures: Failures = Failures()
    cost: Costs = Costs()
    economics: Economics | None = None
    corpus: CorpusFacts = CorpusFacts()
    funnel: Funnel = Funnel()
    training: TrainingSummary = TrainingSummary()
    environment: Environment = Environment()
    reasons: dict[str, str] = {}

    @field_validator("contamination", "external", "judge", "economics", mode="before")
    @classmethod
    def _absent(cls, part: Any) -> Any:
        """Read the empty object of earlier versions as what it meant."""
        return part or None

    @property
    def confidence(self) -> float:
        """Return the confidence of the intervals."""
        return self.environment.settings.confidence
