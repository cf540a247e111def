"""What evaluation.json holds: results by task, agreement, suites, contamination, judge, samples.

Every figure is a number, or None with its reason beside it. Files of earlier versions are read too:
what they lack has a default, and unknown keys are ignored. Only fields that were set are written
(`CardRecord.tree`), so a field that does not apply to a row is not in its JSON.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, field_validator

from distill.evaluation.statistics import Conclusion, Discordant, Estimate, Noninferiority, conclude
from distill.formatting import plain_numbers
from distill.records import Record

Model = Literal["teacher", "base", "student"]
Rival = Literal["teacher", "base"]
MODELS: tuple[Model, ...] = ("teacher", "base", "student")
RIVALS: tuple[Rival, ...] = ("teacher", "base")
TRIES = "tries"  # the student with several tries, among the models of scores and usages
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


class Difference(Estimate):
    """A paired difference with its interval and, of shares that pass, what it allows to claim."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True, serialize_by_alias=True)

    value: float | None = Field(default=None, alias="mean")
    clusters: int = Field(default=0, validation_alias=AliasChoices("clusters", "documents"))
    smallest_visible: float | None = None
    reasons: dict[str, str] = {}
    mcnemar: Discordant | None = None
    non_inferiority: Claim | None = None

    @classmethod
    def of(cls, estimate: Estimate) -> Self:
        """Return an estimate as the scorecard holds it."""
        return cls.model_validate(dict(estimate))

    def conclude(self, documents: int | None = None, n: int | None = None) -> Conclusion:
        """Decide the difference; an old scorecard has its items and documents beside it."""
        p = self.mcnemar.p if self.mcnemar else None
        documents, n = documents or self.clusters or None, n or self.n or None
        return conclude(*self.ends, documents, p, n, self.reason)


class CountedAgainst(CardRecord):
    """The result in which every missing score counts against the student."""

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
    gap_recovered: Estimate = Estimate(value=None)
    reasons: dict[str, str] = {}
    failures: dict[str, dict[str, int]] = {}
    if_missing_counts_against_student: CountedAgainst | None = None

    def mean(self, model: Model) -> float | None:
        """Return a model's mean score."""
        return getattr(self, model)

    def against(self, rival: Rival) -> Difference:
        """Return the student minus a rival."""
        return self.student_minus_teacher if rival == "teacher" else self.student_minus_base

    def conclude(self, rival: Rival) -> Conclusion:
        """Decide whether the student is better than a rival."""
        return self.against(rival).conclude(self.documents, self.n)


class AnswerLengths(CardRecord):
    """How long a model's answers are, and the shares that were cut off or empty."""

    n: int = 0
    tokens: float | None = None
    truncated: float | None = None
    empty: float | None = None


class Results(CardRecord):
    """What the models made of some items: by task, and of all checks together."""

    tasks: dict[str, MetricRow] = {}
    overall: MetricRow | None = None
    lengths: dict[str, AnswerLengths] = {}
    contamination: "Contamination | None" = None


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
    passed: bool = False
    reason: str | None = None

    def kinds(self) -> dict[str, ProbeRow]:
        """Return the rows by the kind of probe."""
        return {"null": self.null, "injected": self.injected, "copy": self.duplicate}


class DuelRow(CardRecord):
    """How often the student's answer wins against a rival's, a tie counted half."""

    n: int | None = None
    documents: int | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    unparsed: int | None = None
    flip_rate: float | None = None
    win_rate: Difference = Difference()
    length_matched: "DuelRow | None" = None


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


class TriesRow(CardRecord):
    """What a choice among tries scores, and how it is made, or the reason why there is none."""

    way: str = ""
    reason: str | None = None
    metric: str = ""
    n: int = 0
    student: Estimate = Estimate()  # with its greedy answer
    choice: Estimate = Estimate()
    choice_minus_student: Difference = Difference()
    any_right: Estimate = Estimate()  # of the tries (pass@n): no choice does better


class TriesResult(CardRecord):
    """What the student makes of `n` tries at a request."""

    n: int
    temperature: float
    tasks: dict[str, TriesRow] = {}
    overall: TriesRow | None = None


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
    files: dict[str, str] = {}  # of a folder, beside the weights, by hash
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
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None
    settings: Settings = Settings()  # in scorecard.json; evaluation.json has them beside


class RecipeResult(CardRecord):
    """What a search for settings of the training chose, against its default, and what it took."""

    chosen: str
    trials: int
    tokens: int
    seconds: float
    openings: int  # for how many trainings of this run these held-out items were opened
    validation: Difference  # of the trial in the rungs, which look better than they are
    heldout: Difference
    optimism: float | None = None  # validation minus held-out


class Comparison(Results):
    """What evaluation.json and scorecard.json both hold."""

    models: dict[Model, ModelFacts] = {}
    agreement: dict[str, MetricRow] = {}
    suites: dict[str, SuiteResult] = {}
    judge: JudgeResult | None = None
    tries: Annotated[TriesResult | None, Field(exclude_if=lambda it: it is None)] = None
    recipe: Annotated[RecipeResult | None, Field(exclude_if=lambda it: it is None)] = None
    corpus: CorpusFacts = CorpusFacts()
    environment: Environment = Environment()

    @field_validator(
        *("contamination", "judge", "external", "economics"), mode="before", check_fields=False
    )
    @classmethod
    def _absent(cls, part: object) -> object:
        """Read the empty object of earlier versions as absence."""
        return part or None


class EvaluationResult(Comparison):
    """The content of evaluation.json."""

    samples: tuple[Sample, ...] = ()
    settings: Settings
