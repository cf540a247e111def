"""What `recipe: {mode: auto}` will search: a list of trials, fixed before the first, and what its
validation split can show. It is said, and refused, before anything is bought."""

import math
from collections.abc import Sequence
from itertools import compress, count

from distill.config.learning import Arm
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.evaluation.chooser import halves, ladder, smallest_difference
from distill.formatting import duration
from distill.models.arithmetic import answer_flops
from distill.planning.cost import teacher_cost
from distill.planning.estimate import START, RunEstimate
from distill.planning.machine import measure
from distill.planning.work import count_work
from distill.records import Record
from distill.storage.run_folder import Run

TOO_SMALL = 0.2  # a split that shows no smaller difference than this shows nothing


class Search(Record):
    """A search: losses, the epochs and trials of each rung, trainings at most; documents and power
    of its test; its estimated seconds."""

    losses: tuple[Arm, ...]
    rungs: tuple[tuple[int, int], ...]
    trials: int
    tested: int
    smallest_difference: float
    seconds: float | None

    def line(self) -> str:
        """Say what it can show."""
        test = f"its test, on {self.tested} validation documents that no rung reads"
        points = f"{100 * self.smallest_difference:.1f} points"
        return f"recipe: {test}, shows differences from {points} on"


def plan_search(
    config: Config, estimate: RunEstimate, origins: Sequence[str] | None = None
) -> Search | None:
    """Return the largest search within `recipe.hours`; None without one, or where nothing is read.

    `origins` are the documents of the validation prompts, as the run has them. Raises DistillError:
    exit 2 where no checker can judge or the hours are too few, 3 where the split is too small.
    """
    recipe, work = config.recipe, estimate.work
    if recipe.mode == "off" or (origins is None and work.pool is None):
        return None
    origins = work.checked if origins is None else origins
    if not origins:
        what = "no validation prompt has a checker, with the reference that it needs"
        fix = "name a task with a checker in prompts.tasks, or recipe.mode=off"
        raise DistillError(Exit.CONFIG, "recipe.mode", what, fix)
    total, first_N = len(set(origins)), halves(origins)
    tested = total - len(set(compress(origins, first_N)))
    if (smallest := smallest_difference(tested)) > TOO_SMALL:
        need = next(n for n in count(4) if smallest_difference(n // 2) <= TOO_SMALL)
        what = f"half of n = {len(origins)} validation prompts with a checker, of {total} documents"
        what += f", shows no difference below {100 * smallest:.0f} points"
        fix = f"take {need} documents or more, or recipe.mode=off"
        raise DistillError(Exit.INPUT, "corpus.split.validation", what, fix)
    answers = sum(first_N) * answer_flops(estimate.student, estimate.prompt, estimate.answer)
    dtype, default, seconds = config.student.dtype, config.train.num_train_epochs, 0.0
    epoch = estimate.machine.seconds(answers, dtype, "evaluate")
    epoch += estimate.machine.seconds(estimate.trained * estimate.step, dtype, "train")
    for losses, many in ((config.arms, 3), (config.arms, 2), (config.arms, 1), (("text",), 1)):
        rungs = ladder(len(losses), many)
        trials = sum(size for _, size in rungs) + 2 * recipe.seeds + 2
        epochs = sum(of * size for of, size in rungs) + 2 * default
        epochs += recipe.seeds * (max(default, rungs[-1][0]) + default)
        seconds = epochs * epoch + 2 * START * trials
        if recipe.hours is None or not seconds > 3600 * recipe.hours:
            facts = {"losses": losses, "rungs": rungs, "trials": trials, "tested": tested}
            facts |= {"smallest_difference": round(smallest, 4)}
            facts |= {"seconds": None if math.isnan(seconds) else round(seconds)}
            return Search.model_validate(facts)
    what = f"the smallest search takes about {duration(seconds)}"
    raise DistillError(Exit.CONFIG, "recipe.hours", what, "raise it, or recipe.mode=off")


def sealed_search(run: Run) -> Search | None:
    """Return the search whose trials have begun, as the manifest has it; None before the first."""
    begun = any(run.path("recipe").glob("*/*.jsonl"))
    return Search.model_validate(run.manifest()["recipe"]["search"]) if begun else None


def require_search(run: Run, buys: bool) -> None:
    """Stop where a search would show nothing, as `plan_search` says, or (exit 6) where the teacher,
    if it is still to be asked, would take more than `recipe` allows."""
    from distill.planning.plan import MOMENT, types_of  # which looks by this

    config, recipe = run.config, run.config.recipe
    if recipe.mode == "off" or (not buys and sealed_search(run)):
        return
    work = count_work(run)
    cost, train = teacher_cost(config, work), work.prompts["train"]
    plan_search(config, RunEstimate(config, work, cost, measure(types_of(config), MOMENT)))
    if cost is None or not (buys and cost.requests):
        return
    tokens = cost.stored_tokens + cost.input_tokens + cost.output_tokens_most
    dollars = None if cost.dollars is None else cost.paid + cost.paid_perhaps + cost.dollars
    for key, most, takes in (
        ("teacher_tokens", recipe.teacher_tokens, tokens),
        ("dollars", recipe.dollars, dollars),
    ):
        if most is None or takes is None or takes <= most:
            continue
        all_asked = work.all_prompts - work.unasked
        fit = max(0, int(float(most) / float(takes) * all_asked - all_asked + train))
        what = f"{most:g}, and the teacher's answers may take {takes:g}"
        what += "; that is below a first tranche, a quarter of the prompts" * (fit < train / 4)
        fix = f"raise it, or prompts.train={max(1, fit)}"
        raise DistillError(Exit.BUDGET, f"recipe.{key}", what, fix)
