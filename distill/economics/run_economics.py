"""A run in money, from its files: what its requests cost each model, what the distillation cost, what it saves.

Reads `requests.jsonl`, `timings/`, the ledger and the price table; asks nothing. So another price, volume or utilisation
needs a new report and nothing else. The price table is kept in `prices.json` as it was on the day of the report, so
that the same report can be made again on another day.
"""

from collections.abc import Sequence
from decimal import Decimal

from distill.config import Config
from distill.economics.costs import Tariff, distillation_cost, request_cost
from distill.economics.savings import Assumptions, economics
from distill.evaluation.measurements import MODELS, Difference, MetricRow
from distill.evaluation.scorecard import Costs, DistillationCost, Economics, TeacherPrice
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.statistics import Certainty
from distill.records import LedgerEntry, Response, Timing, Usage
from distill.responders.prices import PriceBook, load_prices
from distill.storage.files import read_json, read_records, write_json
from distill.storage.run_folder import Run

PRICES = "prices.json"
UNSTATED = "what the recorded answers cost is not stated (teacher.dollars)"
NOT_MEASURED = "the student's difference to the teacher is not known: no task has a checker"


def money_of(config: Config, run: Run, overall: MetricRow | None) -> tuple[Costs, Economics]:
    """Return the scorecard's `cost` and `economics`; `overall` is the result of all checks together."""
    settings = config.evaluation
    requests = read_records(run.path("requests.jsonl"), HeldOutRequest)
    book = kept_prices(config, run)
    own, student = teacher_tariff(config, book), machine_tariff(config, book)
    costs = {
        model: request_cost(
            [asked.usage[model] for asked in requests if model in asked.usage],
            own if model == "teacher" else student,
            timing_of(run, model),
        )
        for model in MODELS
    }
    answers = answers_of(run)
    spent = distillation(config, run.ledger.entries(), book, answers)
    compared = compared_with(config, book, answers)
    assumed = Assumptions(
        teacher=compared_tariff(config, book),
        student=student,
        distillation=added(spent.dollars, compared.answers_dollars),
        why_no_distillation=spent.reasons.get("dollars", ""),
        requests_per_month=settings.requests_per_month,
    )
    certainty = Certainty(settings.confidence, settings.bootstrap_samples, config.seed)
    quality = Difference(mean=None, reason=NOT_MEASURED)
    if overall:
        counts = {"n": overall.n, "documents": overall.documents}
        quality = overall.student_minus_teacher.model_copy(update=counts)
    found = economics(requests, assumed, certainty, compared, quality)
    return Costs(**costs, distillation=spent), found


def kept_prices(config: Config, run: Run) -> PriceBook:
    """Return the run's price book: the table of the day on which its report was first made."""
    path = run.path(PRICES)
    if not path.exists():
        write_json(path, load_prices(config.evaluation.prices).model_dump(mode="json"))
    return PriceBook.model_validate(read_json(path))


def answers_of(run: Run) -> list[Usage]:
    """Return what each answer of the teacher took, those of earlier runs included."""
    path = run.path("responses.jsonl")
    return [r.usage for r in read_records(path, Response)] if path.exists() else []


def added(dollars: Decimal | None, more: Decimal | None) -> Decimal | None:
    """Return the sum, unknown where the first is unknown."""
    return None if dollars is None else dollars + (more or 0)


def machine_tariff(config: Config, book: PriceBook) -> Tariff:
    """Return what local models are paid by: the hours of evaluation.machine, idle ones included."""
    settings = config.evaluation
    used = Decimal(repr(settings.utilisation))
    return Tariff(book.machine(settings.machine), used, book.why_no_machine(settings.machine))


def teacher_tariff(config: Config, book: PriceBook) -> Tariff:
    """Return what the teacher's answers cost: its list price where it has one, a machine's hours where it is local."""
    hosted = book.teacher(config.teacher.model)
    if hosted is not None:
        return Tariff(hosted)
    if config.teacher.paid:
        return Tariff(None, why=book.why_no_teacher(config.teacher.model))
    return machine_tariff(config, book)


def compared_tariff(config: Config, book: PriceBook) -> Tariff:
    """Return the price that the student is compared with: that of evaluation.teacher_price, else the teacher's own."""
    named = config.evaluation.teacher_price
    if named is None:
        return teacher_tariff(config, book)
    return Tariff(book.teacher(named), why=book.why_no_teacher(named))


def compared_with(config: Config, book: PriceBook, answers: Sequence[Usage]) -> TeacherPrice:
    """Say whose price the student is compared with; hypothetical where the answers were not that model's.

    There the distillation is hypothetical as well: to what it cost comes what the answers cost at that price.
    """
    named, compared = config.evaluation.teacher_price, compared_tariff(config, book)
    hypothetical = named is not None and compared.price != teacher_tariff(config, book).price
    prices = [compared.of(usage) or Decimal(0) for usage in answers] if compared.price else []
    return TeacherPrice(
        name=named or config.teacher.model or "teacher",
        hypothetical=hypothetical,
        answers_dollars=sum(prices, Decimal(0)) if hypothetical and prices else None,
    )


def distillation(
    config: Config, ledger: Sequence[LedgerEntry], book: PriceBook, answers: Sequence[Usage]
) -> DistillationCost:
    """Return what making and measuring the student cost, and how much of the teacher's work was paid for before."""
    settings = config.evaluation
    return distillation_cost(
        ledger,
        book.machine(settings.machine),
        book.why_no_machine(settings.machine),
        sum(usage.output_tokens for usage in answers),
        UNSTATED if config.teacher.cost_unstated else "",
    )


def timing_of(run: Run, model: str) -> Timing | None:
    """Return what was timed of a model, if anything was."""
    path = run.path(f"timings/{model}.jsonl")
    return next(iter(read_records(path, Timing)), None) if path.exists() else None
