"""A run in money, from its files: what requests and the distillation cost, and what is saved.

Reads `requests.jsonl`, `timings/`, the ledger and the price table, and asks nothing: another price,
volume or utilisation needs a new report and nothing else. The price table is kept in `prices.json`
as it was on the day of the report, so that the same report can be made again on another day.
"""

from distill.config.teachers import StatedCost
from distill.economics.costs import Tariff, distillation_cost, request_cost, usage_at
from distill.economics.savings import Assumptions, economics
from distill.evaluation.measurements import MODELS, TRIES, Difference, MetricRow
from distill.evaluation.scorecard import Costs, Economics, TeacherPrice
from distill.evaluation.scorers import HeldOutRequest
from distill.evaluation.statistics import Certainty
from distill.models.devices import find_gpu, gpus
from distill.records import HEADLINE, Load, Response, Timing, Usage
from distill.responders.prices import PriceBook, load_prices
from distill.storage.files import read_json, read_records, write_json
from distill.storage.run_folder import Run

PRICES = "prices.json"
UNSTATED = "what the recorded answers cost is not stated (teacher.dollars)"
NOT_MEASURED = "the student's difference to the teacher is not known: no task has a checker"


def ran_elsewhere(run: Run, machine: str | None) -> str:
    """Return why the price of a machine is not that of the run: another device was measured."""
    priced = next((row for row in gpus() if row.machine == machine), None)
    facts = run.made_with("evaluate").get("environment", {})
    name, memory = facts.get("gpu"), facts.get("gpu_memory", 0)
    of_cpu = bool(name) and (machine or "").startswith("cpu")
    same = priced and name and find_gpu(name, memory) == priced
    if not facts or not (priced or of_cpu) or same:
        return ""
    ran, what = name or facts.get("processor") or "a CPU", priced.match if priced else "a CPU"
    return f"evaluation.machine is {machine} ({what}), and this was measured on {ran}"


def trained_elsewhere(run: Run) -> str:
    """Return which stage computed on another device than the evaluation, whose price is known."""
    local = ("generate",) if run.config.teacher.runs_here else ()
    for stage in (*local, "select", "signals", "recipe", "train", "refine"):
        there, here = (run.made_with(s).get("environment") for s in (stage, "evaluate"))
        if there and here and there.get("gpu") != here.get("gpu"):
            gpus = [facts.get("gpu") or "a CPU" for facts in (there, here)]
            return f"the stage {stage} ran on {gpus[0]}, and the price is of {gpus[1]}"
    return ""


def timings_of(run: Run, gpu: str) -> tuple[dict[str, Timing], dict[str, Load]]:
    """Return how models were timed on the device that measured, and the one load of them all.

    No load where some were timed by an older distill, or with other numbers at once.
    """
    timings, loads = dict[str, Timing](), dict[str, Load]()
    for model in (*MODELS, TRIES):
        path = run.path(f"timings/{'student' if model == TRIES else model}.jsonl")
        for timing in read_records(path, Timing) if path.exists() else ():
            if timing.device == gpu:
                timings[model] = timing
                below = [load for load in timing.loads if load.concurrency <= HEADLINE]
                loads |= {model: below[-1]} if below else {}
    alike = len({load.concurrency for load in loads.values()}) == 1
    return timings, loads if alike and len(loads) == len(timings) else {}


def money_of(run: Run, overall: MetricRow | None) -> tuple[Costs, Economics]:
    """Return the scorecard's `cost` and `economics`; `overall` is the result of all checks."""
    settings, teacher, prices = run.config.evaluation, run.config.teacher, run.path(PRICES)
    if not prices.exists():
        write_json(prices, load_prices(settings.prices).model_dump(mode="json"))
    book = PriceBook.model_validate(read_json(prices))
    machine, why = book.machine(settings.machine), book.why_no_machine(settings.machine)
    if other := ran_elsewhere(run, settings.machine):
        machine, why = None, other
    student = actual = Tariff(machine, settings.utilisation, why)
    if listed := book.teacher(teacher.model):
        actual = Tariff(listed)
    elif teacher.paid:
        actual = Tariff(None, why=book.why_no_teacher(teacher.model))
    compared = actual
    if name := settings.teacher_price:  # another model's price
        compared = Tariff(book.teacher(name), why=book.why_no_teacher(name))
    facts = run.made_with("evaluate").get("environment", {})
    gpu = facts.get("gpu") or ""
    timings, loads = timings_of(run, gpu)

    def usage_of(model: str, usage: Usage) -> Usage:
        """Give an answer the seconds of its tokens at the load of all; in older runs it has its
        own, where the store does not hold it from another device."""
        if model in loads:
            return usage_at(loads[model], timings[model], usage)
        elsewhere = model == "teacher" and not teacher.runs_here
        if elsewhere or (usage.device == gpu and not loads):
            return usage
        return usage.model_copy(update={"seconds": 0.0})

    requests, costs = [], {}
    for request in read_records(run.path("requests.jsonl"), HeldOutRequest):
        usage = {model: usage_of(model, u) for model, u in request.usage.items()}
        requests.append(request.model_copy(update={"usage": usage}))
    for model in (*MODELS, TRIES):
        usages = [request.usage[model] for request in requests if model in request.usage]
        if model == TRIES and not usages:
            continue
        tariff = actual if model == "teacher" else student
        costs[model] = request_cost(usages, tariff, timings.get(model))
        if model in loads and not tariff.hosted:
            where: dict[str, object] = {"machine": gpu or facts.get("processor") or "a CPU"}
            where |= {"engine": timings[model].engine, "concurrency": loads[model].concurrency}
            costs[model] = costs[model].model_copy(update=where)
    path = run.path("responses.jsonl")  # every answer of the teacher, those of earlier runs too
    answers = [r.usage for r in read_records(path, Response)] if path.exists() else []
    other = trained_elsewhere(run)
    # Rounds on policy are left out, as in the scorecards before own answers were known
    taught = run.config.train.self_answers is not None
    spent = distillation_cost(
        [entry for entry in run.ledger.entries() if taught or entry.stage != "refine"],
        None if other else machine,
        other or why,
        sum(usage.output_tokens for usage in answers),
        UNSTATED if isinstance(teacher, StatedCost) and teacher.dollars is None else "",
    )
    # Against another model's price the distillation is hypothetical too: its answers cost that.
    hypothetical, bought = compared.price != actual.price, None
    if hypothetical and compared.price and answers:
        bought = sum(compared.of(usage) or 0.0 for usage in answers)
    assumed = Assumptions(
        teacher=compared,
        student=student,
        distillation=None if spent.dollars is None else float(spent.dollars) + (bought or 0),
        why_no_distillation=spent.reasons.get("dollars", ""),
        requests_per_month=settings.requests_per_month,
    )
    price = TeacherPrice(
        name=settings.teacher_price or teacher.model or "teacher",
        hypothetical=hypothetical,
        answers_dollars=bought,
    )
    quality = Difference(mean=None, reason=NOT_MEASURED)
    if overall:
        counts = {"n": overall.n, "clusters": overall.documents or 0}
        quality = overall.student_minus_teacher.model_copy(update=counts)
    certainty = Certainty(settings.confidence, settings.bootstrap_samples, run.config.seed)
    saved = economics(requests, assumed, certainty, price, quality)
    return Costs(**costs, distillation=spent), saved
