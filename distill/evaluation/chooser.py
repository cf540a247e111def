"""Which settings of the training a search keeps: successive halving, then one test.

Pure functions over what checkers passed; `simulate_recipe.py` holds them against a known truth. All
rungs read one half of the validation documents, on which the best of many trials looks better than
it is; the other half and new seeds decide once between it and the default. N items, S seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from distill.config.learning import Arm
from distill.evaluation import statistics
from distill.evaluation.statistics import Bounds, Certainty, Clusters, Estimate, Floats
from distill.records import digest

RATES, EPOCHS = (1e-4, 2e-4, 4e-4, 8e-4), (1, 3, 6)
ONE_SIDED = 0.8  # confidence of the bound that must be above 0
DISCORDANCE = 0.25  # share of the items that two students disagree on, before any was trained
Rungs = Sequence[tuple[int, int]]  # the epochs of each, and how many trials it has


class Trial(NamedTuple):
    """Settings of a training; of the default, loss and rate are None: those of the config."""

    loss: Arm | None
    rate: float | None
    epochs: float

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.loss}-{self.rate:g}-{self.epochs:g}" if self.loss else "default"


def ladder(losses: int, rungs: int = len(EPOCHS)) -> Rungs:
    """Return the rungs of so many losses at all rates, each with half the trials of the last."""
    return [(epochs, losses * len(RATES) >> n) for n, epochs in enumerate(EPOCHS[:rungs])]


def halves(documents: Sequence[str]) -> NDArray[np.bool_]:
    """Tell of each item whether the rungs read it: by its document, of which they read half."""
    order = sorted(set(documents), key=lambda name: digest(["recipe", name]))
    first = set(order[: (len(order) + 1) // 2])
    return np.array([name in first for name in documents])


def ranked(passes: Mapping[Trial, float]) -> list[Trial]:
    """Return trials, the best first; ties go to fewer epochs, to no signals, to the lower rate."""
    return sorted(
        passes, key=lambda t: (-passes[t], t.epochs, t.loss not in (None, "text"), t.rate or 0)
    )


def climb(
    default: Trial,
    losses: Sequence[Arm],
    rungs: Rungs,
    passes: Callable[[Trial, int], float | None],
) -> dict[Trial, float]:
    """Do the default, then rung after rung; return what `passes` says of each trial and its rung.

    A trial of which it says None diverged: it goes no further, and is not returned.
    """
    results = dict[Trial, float]()
    trials = [Trial(loss, rate, 0) for loss in losses for rate in RATES]
    for number, (epochs, many) in enumerate([(0, 0), *rungs]):
        rung = [trial._replace(epochs=epochs) for trial in trials[:many]] if number else [default]
        values = {trial: passes(trial, number) for trial in rung}
        sound = {trial: value for trial, value in values.items() if value is not None}
        trials, results = (ranked(sound) if number else trials), results | sound
    return results


def against_default(best_SN: Floats, default_SN: Floats, documents: Clusters) -> Estimate:
    """Estimate best - default over new seeds; best wins where the low end is above 0."""
    certainty, shares = Certainty(2 * ONE_SIDED - 1), Bounds(0.0, 1.0)
    difference = statistics.across_seeds(best_SN, default_SN, documents, certainty)
    if difference.value is None:  # nothing varies: all items agree, or too few are there
        means = (best_SN.mean(axis=0), default_SN.mean(axis=0))
        difference = statistics.estimate_difference(*means, documents, certainty, shares)
    return difference


def smallest_difference(documents: int) -> float:
    """Return the true difference that the test shows with POWER over so many documents of one item
    (Bloom 1995, Evaluation Review 19:547); seeds that differ make it larger."""
    quantiles = stats.t.ppf([ONE_SIDED, statistics.POWER], max(1, documents - 1))
    return min(1.0, float(quantiles.sum() * np.sqrt(DISCORDANCE / max(1, documents))))
