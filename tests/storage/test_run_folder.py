"""The run's folder: stages that are done, left or stale, what a redo sets aside, the ledger."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.storage import ledger
from distill.storage.run_folder import Run, Stage

TREE = {
    "name": "r",
    "corpus": {"path": "texts", "split": {"heldout": 0.1}},
    "teacher": {"kind": "recorded", "model": "t", "dollars": "0.10"},
    "student": {"model": "s"},
}


def make(folder: Path, **changes: Any) -> Run:
    """Return a run in `folder`; `changes` replace keys of the tree."""
    return Run(Config.model_validate({**TREE, "runs": folder, **changes}))


def write(name: str, text: str = "made") -> Callable[[Run], None]:
    """Return the work of a stage that writes one file."""

    def main(run: Run) -> None:
        run.path(name).write_text(f"{text} {run.config.seed}")

    return main


FIRST = Stage("first", ("corpus", "seed"), (), ("a.txt",), write("a.txt"))
SECOND = Stage("second", ("teacher",), ("a.txt",), ("b.txt",), write("b.txt"))


def perform(run: Run, *stages: Stage, redo: tuple[Stage, ...] = ()) -> list[bool]:
    """Do stages as the command does: under the lock, all checked first."""
    with run.lock():
        for stage in stages:
            if stage not in redo:
                run.checked_state(stage)
        run.remake(redo)
        return [run.perform(stage) for stage in stages]


def refused(run: Run, *stages: Stage) -> str:
    """Return the message of the exit 5 with which the stages are refused."""
    with pytest.raises(DistillError) as caught:
        perform(run, *stages)
    assert caught.value.code == Exit.STATE and "\n" not in str(caught.value)
    return str(caught.value)


def test_done_work_is_not_done_twice(tmp_path):
    assert perform(make(tmp_path), FIRST, SECOND) == [True, True]
    assert perform(make(tmp_path), FIRST, SECOND) == [False, False]
    assert [entry.stage for entry in make(tmp_path).ledger.entries()] == ["first", "second"]


def test_a_changed_setting_is_named_with_the_redo_that_remakes_it(tmp_path):
    perform(make(tmp_path), FIRST, SECOND)
    message = refused(make(tmp_path, seed=1), FIRST, SECOND)
    assert message.endswith(
        "r: stage first was made with other settings: seed was 0, is 1 "
        "(--redo first remakes it and what follows, or choose a new name=)"
    )
    teacher = {**TREE["teacher"], "dollars": "0.20"}
    assert "teacher.dollars was 0.10, is 0.20" in refused(make(tmp_path, teacher=teacher), SECOND)
    assert (tmp_path / "r" / "a.txt").read_text() == "made 0"


def test_redo_moves_all_of_a_stage_and_continues_after_a_kill(tmp_path, monkeypatch):
    outputs = ("checkpoints", "adapter", "training.json")

    def main(run: Run) -> None:
        for name in outputs[:2]:
            run.path(name).mkdir()
            (run.path(name) / "x").write_text(name)
        run.path("training.json").write_text("{}")

    stage, run = Stage("train", ("seed",), (), outputs, main), make(tmp_path)
    perform(run, stage)
    real, moves = Path.rename, []

    def rename(path: Path, target: Path) -> None:
        if len(moves) == 1:
            raise KeyboardInterrupt
        moves.append(real(path, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename)
        run.remake([stage])
    assert run.path(stage.marker).exists()  # so the old adapter is not taken for the new run's
    assert perform(make(tmp_path, seed=1), stage, redo=(stage,)) == [True]
    old = {str(p.relative_to(run.path(".old"))) for p in run.path(".old").rglob("*") if p.is_file()}
    assert {"train-1/checkpoints/x", "train-2/adapter/x", "train-2/training.json"} < old


def test_an_input_that_is_missing_is_no_change_but_another_one_is(tmp_path):
    run = make(tmp_path)
    perform(run, FIRST, SECOND)
    run.path("a.txt").unlink()
    assert run.state(FIRST)[0] == "unfinished" and run.state(SECOND)[0] == "done"
    assert perform(run, FIRST, SECOND) == [True, False]
    run.path("a.txt").write_text("edited")
    assert "changed: a.txt (--redo second" in refused(run, FIRST, SECOND)


def test_changed_input_files_are_listed(tmp_path):
    hashes = {f"input {n:02}.md": f"{n:064x}" for n in range(20)}
    stage = Stage("first", (), (), ("a.txt",), write("a.txt"), lambda _: hashes)
    perform(make(tmp_path), stage)
    later = {**hashes, "input new.md": "f" * 64, "input 03.md": "e" * 64}
    for n in range(10, 18):
        del later[f"input {n}.md"]
    changed = Stage("first", (), (), ("a.txt",), write("a.txt"), lambda _: later)
    message = refused(make(tmp_path), changed)
    assert "added: new.md" in message and "changed: 03.md" in message
    assert "removed: 10.md, 11.md, 12.md, 13.md, 14.md, 15.md, and 2 more" in message


def test_what_was_recorded_when_an_old_run_was_accepted_is_held_against_it(tmp_path):
    run, hashes = make(tmp_path), ["a" * 64, "b" * 64]
    names = ({}, *({"student file a.json": sha256} for sha256 in hashes))
    old, same, other = (replace(FIRST, identity=lambda config, n=n: n) for n in names)
    perform(run, old)
    assert run.state(same)[0] == run.state(other)[0] == "done", "no file was known"
    run.note("accepted", {"first": names[1]})
    assert run.state(same)[0] == "done"
    assert run.state(other) == ("stale", ["changed: student file a.json"])


def interrupted(run: Run) -> None:
    raise KeyboardInterrupt


def test_an_unfinished_stage_continues_and_asks_only_if_it_has_made_something(tmp_path):
    stopped = Stage("first", ("seed",), (), ("a.txt", "parts"), interrupted)
    with pytest.raises(KeyboardInterrupt):
        perform(make(tmp_path), stopped)
    run = make(tmp_path, seed=1)
    run.path("parts").mkdir()
    assert make(tmp_path).state(stopped)[0] == "unfinished" and run.state(stopped)[0] == "fresh"
    (run.path("parts") / "1").write_text("")
    assert run.state(stopped) == ("stale", ["seed was 0, is 1"])


@pytest.mark.parametrize("text", ["", "[]", '{"finished": true}', '{"fingerprint": 1}'])
def test_a_damaged_marker_is_one_line_and_redo_remakes_it(tmp_path, text):
    run = make(tmp_path)
    perform(run, FIRST)
    run.path(FIRST.marker).write_text(text)
    assert "first.json: is damaged" in refused(run, FIRST)
    assert perform(run, FIRST, redo=(FIRST,)) == [True]


# --- the ledger


def test_spending_is_summed_and_failures_are_entered(tmp_path):
    def main(run: Run) -> None:
        run.ledger.spend(3, 4, dollars=Decimal("0.1"), price="row")
        run.ledger.spend(output_tokens=1, dollars=Decimal("0.2"))
        raise DistillError(Exit.TEACHER, "t", "x", "y")

    run = make(tmp_path)
    with pytest.raises(DistillError):
        perform(run, Stage("first", (), (), ("a.txt",), main))
    perform(run, FIRST)
    failed, made = run.ledger.entries()
    assert (failed.input_tokens, failed.output_tokens, failed.dollars) == (3, 5, Decimal("0.3"))
    assert (failed.note, failed.price, made.note, made.dollars) == ("failed", "row", "", None)


def test_a_torn_ledger_is_read_and_continued(tmp_path):
    perform(make(tmp_path), FIRST)
    path = make(tmp_path).path("ledger.jsonl")
    path.write_bytes(path.read_bytes() + path.read_bytes()[:20])
    assert len(make(tmp_path).ledger.entries()) == 1
    perform(make(tmp_path), SECOND)
    assert [entry.stage for entry in make(tmp_path).ledger.entries()] == ["first", "second"]


def test_the_seconds_of_a_killed_stage_are_in_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "HEARTBEAT", 0.05)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:

        def main(run: Run) -> None:
            run.ledger.spend(5, 7, dollars=Decimal("0.3"), price="row")
            run.ledger.spend(1, 1, dollars=Decimal("0.1"))
            os.write(writer, b"x")
            signal.pause()

        try:
            perform(make(tmp_path), Stage("first", (), (), ("a.txt",), main))
        finally:
            os._exit(1)
    os.read(reader, 1)
    run = make(tmp_path)
    stage = Stage("first", (), (), ("a.txt",), write("a.txt"))
    begun = run.path(stage.marker).stat().st_mtime
    while run.path(stage.marker).stat().st_mtime < begun + 0.3:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    (run.folder / f".a.txt.{pid}.tmp").write_text("half")
    assert run.state(stage)[0] == "unfinished"
    assert perform(run, stage) == [True]  # the dead process's lock is free
    killed, made = run.ledger.entries()
    assert (killed.input_tokens, killed.output_tokens) == (6, 8)
    assert (killed.dollars, killed.price, made.input_tokens) == (Decimal("0.4"), "row", 0)
    assert killed.note == "killed" and 0.25 < killed.seconds < 5 and made.note == ""
    assert not list(run.folder.glob(".*.tmp"))
