"""The store: a compaction leaves out finished plans and nothing else."""

from pathlib import Path

import pytest

from distill.responders.store import ResponseStore, worth_keeping
from distill.storage.repair import compact
from tests.generation.test_generate import Fussy, asks
from tests.support.asking import answer_all


def test_a_compaction_between_a_kill_and_its_continuation_changes_no_answer(tmp_path: Path) -> None:
    whole = answer_all(Fussy(), asks(10), tmp_path / "whole")
    store = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        answer_all(Fussy(6), asks(10), store)
    with ResponseStore(store) as log:
        log.append((kind, "k", 1) for kind in ("intent", "outcome", "model", "new"))
    assert compact(store, worth_keeping)[0] == "12 records kept; 1 of kind plan left out"
    with ResponseStore(store, writable=False) as log:
        assert len(list(log.keys("plan"))) == len(log.unfinished(log.lacking(asks(10)))) == 2
    assert answer_all(Fussy(), asks(10), store) == whole
    assert compact(store, worth_keeping)[0].endswith("kept; 2 of kind plan left out")


def test_new_plans_leave_out_what_unfinished_ones_bring(tmp_path: Path) -> None:
    with ResponseStore(tmp_path) as log:
        first = log.planned(Fussy(), asks(6))
        again = log.planned(Fussy(), asks(9))
        assert [plan.id for plan in again[:2]] == [plan.id for plan in first]
        asked = [request.key for plan in again for request in plan.requests]
        assert sorted(asked) == sorted(request.key for request in asks(9))
        assert set(log.keys("plan")) == {plan.id for plan in again}
