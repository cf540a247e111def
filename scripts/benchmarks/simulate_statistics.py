"""Check the intervals and the tests by simulation, where the truth is known: false alarms and
coverage.

    python scripts/benchmarks/simulate_statistics.py --runs 1000 --json statistics.json

Two models that are equally good answer the same items (A/A). An honest 95 % interval misses zero in
3 to 7 of 100 such runs, and holds the true difference in 93 to 97. The same with one model better
by a known amount, with items of one document alike, with documents of different sizes, with yes/no
scores and with continuous ones.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from distill.evaluation.statistics import (
    Bounds,
    Certainty,
    Floats,
    across_seeds,
    estimate_difference,
    mcnemar,
)

SHARE = Bounds(0.0, 1.0)
ALARMS, COVERAGE = (0.03, 0.07), (0.93, 0.97)


class Design(NamedTuple):
    """An evaluation to simulate: documents, items of each, how alike they are, and what the scores
    are."""

    documents: int
    sizes: tuple[int, ...]  # of the documents, in turn
    alike: float  # the share of the variance that items of a document have in common
    binary: bool
    better: float = 0.0  # by how many standard deviations a is better on average

    @property
    def name(self) -> str:
        """Describe the design in a few words."""
        sizes = f"{self.sizes[0]}" if len(set(self.sizes)) == 1 else "1 to 9"
        kind = "yes/no" if self.binary else "continuous"
        shift = f", a better by {self.better:g}" if self.better else ""
        return f"{self.documents} documents x {sizes}, alike {self.alike:g}, {kind}{shift}"


DESIGNS = (
    Design(66, (1,), 0.0, True),
    Design(22, (3,), 0.5, True),
    Design(60, (1, 2, 3, 9), 0.5, True),
    Design(200, (2,), 0.3, True),
    Design(12, (4,), 0.5, False),
    Design(66, (1,), 0.0, False),
    Design(60, (1, 2, 3, 9), 0.5, False),
    Design(66, (1,), 0.0, True, 0.5),
    Design(60, (1, 2, 3, 9), 0.5, True, 0.5),
    Design(60, (1, 2, 3, 9), 0.5, False, 0.5),
)


def simulate(design: Design, runs: int, seed: int = 0, samples: int = 2000) -> dict[str, Any]:
    """Return how often the interval held the true difference, missed zero, and how often the test
    was below 5 %."""
    draw = np.random.default_rng([seed, *map(ord, design.name)])
    held, alarms, tested = 0, 0, 0
    clusters = members(design)
    for run in range(runs):
        a_N, b_N = scores(design, clusters, draw)
        certainty = Certainty(samples=samples, seed=run)
        found = estimate_difference(a_N, b_N, clusters, certainty, SHARE if design.binary else None)
        held += not found.excludes(truth(design))
        alarms += found.excludes(0)
        if design.binary:
            p = mcnemar(a_N, b_N, clusters).p
            tested += p is not None and p < 0.05
    row = {"design": design.name, "runs": runs, "coverage": held / runs}
    shown = {"mcnemar_below_5": tested / runs} if design.binary else {}
    name = "power" if design.better else "false_alarms"
    return {**row, name: alarms / runs, **shown}


def members(design: Design) -> Sequence[int]:
    """Return the document of every item."""
    sizes = np.resize(design.sizes, design.documents)
    return np.repeat(np.arange(design.documents), sizes).tolist()


def scores(
    design: Design, clusters: Sequence[int], draw: np.random.Generator
) -> tuple[Floats, Floats]:
    """Draw both models' scores; a document is easy or hard for both, and each model has its own
    luck with it."""
    n, groups = len(clusters), design.documents
    document_N = draw.normal(size=groups)[clusters]

    def model(shift: float) -> Floats:
        own_N = draw.normal(size=groups)[clusters] * math.sqrt(design.alike)
        luck_N = draw.normal(size=n) * math.sqrt(1 - design.alike)
        return (document_N + own_N + luck_N) / math.sqrt(2) + shift

    a_N, b_N = model(design.better), model(0.0)
    return ((a_N > 0).astype(float), (b_N > 0).astype(float)) if design.binary else (a_N, b_N)


def truth(design: Design) -> float:
    """Return the true difference of the means."""
    return float(stats.norm.cdf(design.better) - 0.5) if design.binary else design.better


def simulate_seeds(runs: int, seeds: int, n: int = 100, seed: int = 0) -> dict[str, Any]:
    """Return the coverage where each side was trained with several seeds, none better on average
    than another."""
    draw, held = np.random.default_rng([seed, seeds, n]), 0
    for _ in range(runs):
        item_N = draw.normal(size=n)
        sides = [
            item_N
            + draw.normal(size=(seeds, 1)) * 0.1  # a seed that is lucky everywhere
            + draw.normal(size=(1, n)) * 0.5  # what the method does to an item
            + draw.normal(size=(seeds, n)) * 0.5
            for _ in range(2)
        ]
        held += not across_seeds(sides[0], sides[1], range(n)).excludes(0)
    return {"design": f"{seeds} seeds a side, {n} items", "runs": runs, "coverage": held / runs}


def passed(row: dict[str, Any]) -> bool:
    """Tell whether a row is within the bounds; the seeds' interval is an upper bound and may cover
    more."""
    slack = 3 * math.sqrt(0.05 * 0.95 / row["runs"]) if row["runs"] < 1000 else 0.0
    most = 1.0 if "seeds" in row["design"] else COVERAGE[1] + slack
    alarms = row.get("false_alarms")
    calm = alarms is None or ALARMS[0] - slack <= alarms <= ALARMS[1] + slack
    tested = row.get("mcnemar_below_5", 0) <= ALARMS[1] + slack or "power" in row
    return COVERAGE[0] - slack <= row["coverage"] <= most and calm and tested


def main() -> None:
    """Simulate all designs, print the table, and exit with 1 where one is out of bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [simulate(design, given.runs, given.seed) for design in DESIGNS]
    rows += [simulate_seeds(given.runs, seeds, seed=given.seed) for seeds in (3, 5)]
    print(f"{'design':58}{'coverage':>10}{'alarms':>9}{'power':>8}{'p < .05':>9}")
    for row in rows:
        cells = [row.get(k) for k in ("coverage", "false_alarms", "power", "mcnemar_below_5")]
        shown = [f"{100 * cell:.1f} %" if cell is not None else "" for cell in cells]
        mark = "" if passed(row) else "  out of bounds"
        print(f"{row['design']:58}{shown[0]:>10}{shown[1]:>9}{shown[2]:>8}{shown[3]:>9}{mark}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(not all(map(passed, rows)))


if __name__ == "__main__":
    main()
