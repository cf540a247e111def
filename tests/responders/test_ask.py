"""Asking through the store: opened once, locked only to ask; payments, plans."""

import stat
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.pipeline import STAGES
from distill.responders.ask import Ask
from distill.responders.canned import CannedResponder
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.responder import Raw, Request
from distill.responders.store import ResponseStore
from distill.storage import log
from distill.storage.files import folder_lock
from distill.storage.log import Log
from distill.storage.repair import repair
from distill.storage.run_folder import Run
from tests.generation.test_generate import Counting, Fussy
from tests.generation.test_generate import asks as plain
from tests.support.asking import answer_all
from tests.support.buying import always, asks, make_run, settings
from tests.support.errors import stops
from tests.support.fake_teacher import KEY, PRICE, FakeTeacher


def stored(folder: Path) -> int:
    with Log(folder, writable=False) as found:
        return sum(1 for _ in found.keys("response"))


def test_each_line_of_the_store_is_checked_once(tmp_path, monkeypatch):
    answer_all(Counting(), plain(5), tmp_path)
    checked, scan = [], log.scan

    def counted(*segment, **offset):
        return (checked.append(line) or line for line in scan(*segment, **offset))

    monkeypatch.setattr(log, "scan", counted)
    with Ask(Counting(), tmp_path) as ask:
        assert len(ask.responses(plain(5), "x")) == len(checked) == 5
        ask.responses(plain(8), "x")
        ask.responses(plain(9), "x")
        answer_all(CannedResponder({}, "another process"), plain(12, "other"), tmp_path)
        checked.clear()
        assert ask.responses(plain(9), "x") and not checked  # nothing is missing
        ask.responses(plain(12), "x")
        assert len(checked) == 12  # what the other has added, and not what was read or written here
        assert ask.responses(plain(12, "other"), "x")[0].text == "another process"
    assert stored(tmp_path) == 24


def test_the_lock_is_held_only_while_something_is_asked(tmp_path):
    class Watching(CannedResponder):
        def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
            with pytest.raises(DistillError, match="lock held"), folder_lock(tmp_path):
                pass
            yield from super().ask(requests)

    with folder_lock(tmp_path), Ask(Watching({}, "a"), tmp_path) as ask:
        with pytest.raises(DistillError, match="lock held"):
            ask.responses(plain(2), "x")
    with Ask(Watching({}, "a"), tmp_path) as ask:
        ask.responses(plain(2), "x")
        with folder_lock(tmp_path):
            ask.responses(plain(2), "x")


def test_a_store_that_cannot_be_written_is_read(tmp_path):
    answer_all(Counting(), plain(3), tmp_path)
    (tmp_path / ".lock").unlink()
    modes = {path: path.stat().st_mode for path in [*tmp_path.iterdir(), tmp_path]}
    for path in modes:
        path.chmod(path.stat().st_mode & ~stat.S_IWUSR & ~stat.S_IWGRP & ~stat.S_IWOTH)
    try:
        with Ask(Counting(), tmp_path) as ask:
            assert len(ask.responses(plain(3), "x")) == 3
        assert not (tmp_path / ".lock").exists()
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_store_that_was_repaired_meanwhile_is_read_anew(tmp_path):
    folder = tmp_path / "store"
    answer_all(Counting(), plain(3), folder)
    with Ask(Counting(), folder) as ask:
        ask.responses(plain(3), "x")
        repair(folder)
        assert len(ask.responses(plain(5), "x")) == 5
        assert isinstance(ask.responder, Counting) and ask.responder.asked == 2
    assert stored(folder) == 5


def test_requests_that_all_fail_are_exit_4(tmp_path, monkeypatch):
    with FakeTeacher(always(status=400, body=b"{}", billed=False)) as teacher:
        requests = asks(settings(teacher), 3)
        with Ask(EndpointResponder(settings(teacher)), tmp_path) as ask:
            with stops(Exit.TEACHER, "all 3 requests failed"):
                ask.responses(requests, "x")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, DistillError])
def test_what_was_paid_is_in_the_ledger_after_an_error_too(tmp_path, monkeypatch, error):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with FakeTeacher() as teacher:
        config = Config.model_validate_json(make_run(tmp_path, teacher, 4).read_text())
        run, folder = Run(config), tmp_path / "store"
        asked = settings(teacher)
        buyer = EndpointResponder(asked, PRICE, config.name)

        def main(run: Run) -> None:
            with Ask(buyer, folder, run) as ask:
                ask.responses(asks(asked, 4), "x")
                if error:
                    raise error(*(["a", "b", "c", "d"] if error is DistillError else []))

        with pytest.raises(error) if error else nullcontext():
            run.do(replace(STAGES[0], main=main))
        assert sum(entry.dollars or 0 for entry in run.ledger.entries()) == teacher.bill > 0
    assert sum(entry.attempts for entry in run.ledger.entries()) == 4


def test_new_plans_leave_out_what_unfinished_ones_bring(tmp_path: Path) -> None:
    with ResponseStore(tmp_path) as log:
        first = log.planned(Fussy(), plain(6))
        again = log.planned(Fussy(), plain(9))
        assert [plan.id for plan in again[:2]] == [plan.id for plan in first]
        asked = [request.key for plan in again for request in plan.requests]
        assert sorted(asked) == sorted(request.key for request in plain(9))
        assert set(log.keys("plan")) == {plan.id for plan in again}
