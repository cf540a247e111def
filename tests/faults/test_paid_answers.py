"""The promises about paid answers, in short; the long forms are the scripts of this folder."""

import tempfile
from pathlib import Path

import pytest

from tests.faults import kill_batch, kill_buyer, server_errors


def test_faulty_replies_end_stored_or_labelled(tmp_path: Path) -> None:
    row = server_errors.trial(400, 0.2, 7, 32, tmp_path)
    assert server_errors.passed(row), row
    assert row["fault_kinds"] >= 20 and row["stop_end"] > 300


@pytest.mark.parametrize("status", server_errors.STOPPING)
def test_what_a_run_does_not_survive_stops_it_at_once(tmp_path: Path, status: int) -> None:
    row = server_errors.stopping_trial(status, tmp_path)
    assert server_errors.stopped_well(row), row


def test_kills_lose_nothing_and_every_doubt_is_listed() -> None:
    row = kill_buyer.random_kills(4, 120, 8, seed=3)
    assert row["kills"] == 4 and row["billed_again"] <= row["unknown"] <= 8 * 4 + row["runs"]
    assert not any(row[name] for name in row.keys() - kill_buyer.FIGURES), row


@pytest.mark.parametrize("form", kill_batch.KILLS)
def test_a_batch_of_200_killed_20_times_loses_and_pays_twice_nothing(form: str) -> None:
    """Half price: issue 13, done when."""
    with tempfile.TemporaryDirectory(dir=kill_buyer.MEMORY) as place:
        row = kill_batch.killed(Path(place), 200, form)
    assert row.pop("kills") == 20
    assert not any(row.values()), row


@pytest.mark.slow
def test_a_kill_at_every_call_that_changes_the_disk_loses_nothing() -> None:
    row = kill_buyer.every_call(3, 2, chained=False)
    assert row["kills"] > 70 and row["unknown"] >= row["billed_again"] > 0
    assert not any(row[name] for name in row.keys() - kill_buyer.FIGURES), row
