"""The chooser of recipes: its ladder, its ties, and a short form of its simulation."""

import numpy as np

from distill.evaluation.chooser import Trial, climb, halves, ladder, ranked, smallest_difference
from scripts.benchmarks.simulate_recipe import Design, simulate

DEFAULT = Trial(None, None, 2)


def test_each_rung_has_the_better_half_and_the_default_is_in_all():
    trials = []

    def passes(trial: Trial, rung: int) -> float | None:
        trials.append((trial, rung))
        return None if trial.rate == 8e-4 else 100 * (trial.rate or 0) + trial.epochs

    assert ladder(3) == [(1, 12), (3, 6), (6, 3)]
    results = climb(DEFAULT, ("text", "reverse_kl"), ladder(2), passes)
    assert trials[0] == (DEFAULT, 0) and len(trials) == 1 + 8 + 4 + 2
    assert {trial.rate for trial, rung in trials if rung == 2} == {2e-4, 4e-4}
    assert {trial.rate for trial, rung in trials if rung == 3} == {4e-4}
    assert len(results) == len(trials) - 2, "what diverged is no result"


def test_ties_go_to_fewer_epochs_and_then_to_no_signals():
    trials = [Trial("reverse_kl", 1e-4, 1), Trial("text", 4e-4, 1), DEFAULT, Trial("text", 1e-4, 3)]
    assert ranked(dict.fromkeys(trials, 7.0)) == [trials[1], trials[0], DEFAULT, trials[3]]


def test_no_document_is_read_by_rungs_and_test():
    documents = [f"{n % 30}" for n in range(100)]
    first_N = halves(documents)
    sides = [{d for d, mine in zip(documents, first_N, strict=True) if mine == s} for s in (0, 1)]
    assert not sides[0] & sides[1] and {len(side) for side in sides} == {15}
    assert np.array_equal(halves(documents[::-1])[::-1], first_N)


def test_the_smallest_difference_falls_with_the_root_of_the_documents():
    assert 0.058 < smallest_difference(210) < 0.06
    assert smallest_difference(0) == smallest_difference(1) == 1


def test_a_short_simulation_holds():
    row = simulate(Design(items=200, heldout=200), 60)
    assert row["lost"] < 1 < row["lost_by_default"] and row["optimism"] > 0
    assert simulate(Design(items=100, heldout=200, spread=0), 60)["default_stays"] >= 0.75
