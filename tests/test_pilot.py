"""The plan of a paid teacher and its pilot, through the command: what is sent, what is kept, what the ranges hold."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from distill.bill import Bill, make_bill
from distill.cli import main, open_run
from distill.config import Config
from distill.errors import Exit
from distill.generation.budget import account
from distill.generation.responder import Request, Sampling
from distill.pilot import Question, spread
from distill.records import LedgerEntry, Message, digest
from distill.scope import Scope, scope
from distill.store import Log, read_records
from tests.buying import KEY, settings
from tests.fake_teacher import PRICE, FakeTeacher, Reply, question, usage_of
from tests.tiny import make_tiny

COUNT = 90


def drawn(payload: dict[str, Any], sides: int) -> int:
    """Draw a number below `sides` that the question fixes."""
    return int(digest(question(payload)), 16) % sides


def varied(number: int, payload: dict[str, Any]) -> Reply:
    """Answer at a length that the question fixes, from 1 to 60 tokens."""
    written = 1 + drawn(payload, 60)
    read = usage_of(payload).input_tokens
    usage = {"prompt_tokens": read, "completion_tokens": written}
    return Reply(answer={"usage": usage}, finish="length" if written > 50 else "stop")


def write_config(folder: Path, teacher: FakeTeacher, **changes: Any) -> Path:
    """Write a run of COUNT questions to a teacher, none of which is made yet; return its config."""
    os.environ["TEACHER_KEY"] = KEY
    rows = [{"prompt": f"q{i} please " + "more " * (i % 9)} for i in range(COUNT)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = [PRICE.model_dump(mode="json")]
    (folder / "prices.yaml").write_text(json.dumps({"tokens": table}))
    given = {"api_key_env": "TEACHER_KEY", "concurrency": 4, "max_new_tokens": 64, **changes}
    tree = {
        "name": "mine",
        "runs": str(folder / "runs"),
        "corpus": {"path": str(folder / "rows.jsonl"), "near_duplicate_threshold": None},
        "teacher": settings(teacher, **given).model_dump(mode="json", exclude_unset=True),
        "terms": {"basis": "our own fake teacher"},
        "evaluation": {"prices": str(folder / "prices.yaml")},
        "student": {"model": "smollm2-135m-instruct"},
    }
    (folder / "c.yaml").write_text(json.dumps(tree))
    return folder / "c.yaml"


def bill_of(place: Path) -> Bill:
    config = open_run(place).config
    return make_bill(config, scope(config))


def ledger_of(folder: Path) -> list[LedgerEntry]:
    return read_records(folder / "runs/mine/ledger.jsonl", LedgerEntry)


def paid(folder: Path) -> Decimal:
    return sum((entry.dollars or Decimal(0) for entry in ledger_of(folder)), Decimal(0))


def test_a_plan_sends_nothing_and_makes_nothing(tmp_path: Path, capsys: Any) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher, budget_dollars="0.1", requests_per_minute=60)
        assert main(["plan", str(place)]) == 0
        assert not teacher.payloads and not (tmp_path / "runs").exists()
        said = capsys.readouterr().out
        bill = bill_of(place)
        assert main(["generate", str(place)]) == Exit.STATE  # its prompts are not made
        assert main(["corpus", str(place)]) == main(["prompts", str(place)]) == 0
        capsys.readouterr()
        assert main(["generate", str(place), "teacher.budget_dollars=5", *UNPACED]) == 0
    assert bill.left.dollars and bill.most
    assert bill.left.dollars[0] <= teacher.bill <= bill.left.dollars[1] <= bill.most
    for words in (
        f"{COUNT} answers",
        "$3 a million tokens of input",
        "(2026-11-01, tests)",
        "limit $0.1: may not suffice",
        "at least 90 s by the limits a minute",
        "plan --pilot N",
        "retries are not counted",
    ):
        assert words in said, words


def test_a_large_corpus_has_its_bill_from_bytes_and_caps(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("distill.scope.LARGE", 100)
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher, n=2, temperature=1.0)
        unread = make_bill(*sized(place, "prompts.train=20", "prompts.questions={}"))
        plain = make_bill(*sized(place, "prompts.train=20"))
        omitted = make_bill(*sized(place, "prompts.train=20", "teacher.omit=[max_tokens]"))
    assert not teacher.payloads and omitted.most is None
    assert unread.left.dollars and plain.left.dollars and unread.most and plain.most
    assert 0 < plain.left.dollars[0] < plain.left.dollars[1] <= plain.most < unread.most
    assert plain.left.count.high >= 2 * 20 and plain.stored == 0


def sized(place: Path, *overrides: str) -> tuple[Config, Scope]:
    config = open_run(place, overrides).config
    return config, scope(config)


UNPACED = ("teacher.requests_per_minute=null",)


def test_a_pilot_narrows_the_range_and_no_answer_is_bought_twice(
    tmp_path: Path, capsys: Any
) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher)
        wide = bill_of(place)
        assert main(["plan", "--pilot", "20", str(place)]) == 0
        assert len(teacher.payloads) == 20 and paid(tmp_path) == teacher.bill
        shown = capsys.readouterr().out
        narrow = bill_of(place)
        assert (narrow.stored, narrow.left.count.low) == (20, COUNT - 20)
        assert main(["plan", str(place), "--pilot", "20"]) == 0 and len(teacher.payloads) == 20
        before = teacher.bill
        assert main(["generate", str(place)]) == 0
        assert len(teacher.payloads) == COUNT and set(teacher.bills.values()) == {1}
        assert paid(tmp_path) == teacher.bill
        assert bill_of(place).left.dollars == (0, 0)
    assert narrow.left.dollars and wide.left.dollars and narrow.paid.settled == before
    assert narrow.left.dollars[0] <= teacher.bill - before <= narrow.left.dollars[1]
    assert narrow.left.dollars[1] < wide.left.dollars[1] / 2
    assert "foretold at 95 % from 20 stored answers" in shown
    assert re.search(r"\d of 20 stored answers \(\d+%\) are cut off at their cap", shown)
    assert {e.stage for e in ledger_of(tmp_path)} == {"corpus", "prompts", "pilot", "generate"}
    assert main(["status", str(place)]) == 0 and "pilot" in capsys.readouterr().out


def test_terms_come_before_a_pilot(tmp_path: Path, capsys: Any) -> None:
    with FakeTeacher() as teacher:
        place = str(write_config(tmp_path, teacher))
        assert main(["plan", "--pilot", "5", place, "terms.basis=null"]) == Exit.TERMS
        assert not teacher.payloads and not (tmp_path / "runs").exists()
        other = ["teacher.kind=recorded", "teacher.base_url=null"]
        assert main(["plan", "--pilot", "5", place, *other]) == Exit.CONFIG
    assert "is not asked anything" in capsys.readouterr().err


def test_a_pilot_keeps_to_the_budget(tmp_path: Path) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher, budget_dollars="0.01", concurrency=1)
        assert main(["plan", "--pilot", "40", str(place)]) == Exit.BUDGET
    assert 0 < len(teacher.payloads) < 40 and teacher.bill <= Decimal("0.01")
    assert paid(tmp_path) == teacher.bill  # also of one that was stopped
    bill = bill_of(place)
    assert bill.stored == len(teacher.payloads) and bill.paid.settled == teacher.bill


def test_an_unknown_price_is_unknown_also_after_a_pilot(tmp_path: Path, capsys: Any) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher)
        (tmp_path / "prices.yaml").write_text("{}")
        assert main(["plan", "--pilot", "8", str(place)]) == 0
        said = capsys.readouterr().out
        assert main(["plan", str(place), "teacher.budget_dollars=1"]) == 0
    assert "cost unknown: the price table has no model fake-1" in said
    assert "$" not in said.split("on disk")[0] and paid(tmp_path) == 0
    assert "a run stops, since the cost is unknown (exit 6)" in capsys.readouterr().out


def test_a_server_that_states_its_cost_needs_no_price(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        reply = varied(number, payload)
        cost = reply.answer["usage"]["completion_tokens"] * 1e-4
        return Reply(answer={"usage": {**reply.answer["usage"], "cost": cost}})

    with FakeTeacher(script) as teacher:
        place = write_config(tmp_path, teacher)
        (tmp_path / "prices.yaml").write_text("{}")
        assert main(["plan", "--pilot", "12", str(place)]) == 0
        bill, before = bill_of(place), teacher.bill
        assert main(["generate", str(place)]) == 0
    assert bill.left.dollars and bill.price is None and bill.most is None
    assert bill.left.dollars[0] <= teacher.bill - before <= bill.left.dollars[1]


def test_failures_and_answers_without_a_count_are_told(tmp_path: Path, capsys: Any) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        broken = Reply(status=400, body=b'{"error": {"message": "no"}}')
        return [Reply(answer={"usage": None}), broken, Reply(status=500)][drawn(payload, 3)]

    with FakeTeacher(script) as teacher:
        place = write_config(tmp_path, teacher, max_retries=0)
        assert main(["plan", "--pilot", "30", str(place)]) == 0
    said, bill = capsys.readouterr().out, bill_of(place)
    assert bill.failed > 3 and bill.stored + bill.failed == 30
    assert f"{bill.failed} of those left were asked before and have no answer" in said
    assert "are failed" in said and "have estimated tokens" in said
    assert "and perhaps $" in said


def test_questions_that_the_teacher_writes_are_counted_and_tried(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        if "Write " not in question(payload):
            return varied(number, payload)
        name = question(payload).split()[1]
        asked = f"What does {name} say of the first thing?\nWhy would {name} matter to a reader?"
        return Reply(message={"content": asked})

    with FakeTeacher(script) as teacher:
        place = write_config(tmp_path, teacher, n=2, temperature=1.0)
        for i in range(12):
            (tmp_path / "texts").mkdir(exist_ok=True)
            (tmp_path / f"texts/{i}.txt").write_text(f"word{i} " * 30)
        tree = json.loads(place.read_text())
        tree["corpus"]["path"] = str(tmp_path / "texts")
        tree["corpus"]["split"] = {"validation": 2, "heldout": 2}
        tree["prompts"] = {"questions": {"kinds": ["factual", "explain"], "per_document": 4}}
        place.write_text(json.dumps(tree))
        wide = bill_of(place)
        assert wide.left.count.low == 24 and wide.left.count.high == 24 + 4 * (8 * 2 + 4)
        assert main(["plan", "--pilot", "12", str(place)]) == 0
        assert len(teacher.payloads) == 12
        asked = [question(payload) for payload in teacher.payloads]
        assert 0 < sum("Write " in text for text in asked) <= 6
        assert main(["plan", "--pilot", "24", str(place)]) == 0
        tried = len(teacher.payloads)  # new questions may stand before some that were asked
        assert 24 <= tried <= 30
        bill, before = bill_of(place), teacher.bill
        assert main(["generate", str(place)]) == 0
        assert sum(teacher.bills.values()) == len(teacher.payloads)
    assert bill.left.dollars and bill.most
    assert bill.left.dollars[0] <= teacher.bill - before <= bill.left.dollars[1] <= bill.most
    assert bill.left.count.low <= len(teacher.payloads) - tried <= bill.left.count.high


def test_a_pilot_of_a_local_teacher_measures_its_seconds(tmp_path: Path, capsys: Any) -> None:
    with FakeTeacher() as teacher:
        place = write_config(tmp_path, teacher)
    tree = json.loads(place.read_text())
    tree["teacher"] = {"model": str(make_tiny(tmp_path / "m")), "max_new_tokens": 8}
    place.write_text(json.dumps(tree))
    assert main(["plan", "--pilot", "10", str(place)]) == 0
    said = capsys.readouterr().out
    assert f"{COUNT - 10} answers, 10 stored" in said and "seconds" in said and "$" not in said
    assert "foretold at 95 % from 10 stored answers" in said
    assert main(["generate", str(place)]) == 0
    spent = {e.stage: e.output_tokens for e in ledger_of(tmp_path)}
    assert 0 < spent["pilot"] <= 80 < spent["generate"] <= 8 * (COUNT - 10)


def test_ctrl_c_in_a_pilot_keeps_what_was_asked(tmp_path: Path) -> None:
    with FakeTeacher(lambda number, payload: Reply(delay=0.3)) as teacher:
        place = write_config(tmp_path, teacher)
        command = [sys.executable, "-m", "distill", "plan", "--pilot", "40", str(place)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(teacher.payloads) < 6 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == Exit.INTERRUPTED
        first = len(teacher.payloads)
        assert first < 40 and paid(tmp_path) == teacher.bill
        teacher.script = lambda number, payload: Reply()
        assert main(["plan", "--pilot", "40", str(place)]) == 0
        assert len(teacher.payloads) == 40 and set(teacher.bills.values()) == {1}
        assert paid(tmp_path) == teacher.bill


def test_what_a_killed_pilot_spent_is_entered_once(tmp_path: Path) -> None:
    """A kill between the counting of what was spent and its entry in the ledger, at each point."""
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher)
        assert main(["plan", "--pilot", "10", str(place)]) == 0
        run = open_run(place)
        ledger, spent = run.path("ledger.jsonl"), run.path("stages/pilot.spent.jsonl")
        *others, entry = ledger.read_text().splitlines(keepends=True)
        spent.write_text(entry)  # killed before it was entered
        ledger.write_text("".join(others))
        assert main(["generate", str(place)]) == 0
        assert paid(tmp_path) == teacher.bill and not spent.exists()
    attempts = sum(entry.attempts for entry in ledger_of(tmp_path))
    with Log(open_run(place).config.store_folder() / "responses", writable=False) as log:
        assert attempts == account(log, PRICE).attempts == COUNT


def asked(task: str, number: int) -> Question:
    turn = Message(role="user", content=f"{task} {number}")
    return Question(task, Request.make("o", f"p{number}", (turn,), Sampling()))


@pytest.mark.parametrize(("count", "shares"), [(10, [7, 2, 1]), (3, [2, 1, 0]), (99, [70, 20, 10])])
def test_a_sample_is_spread_over_the_tasks_and_grows(count: int, shares: list[int]) -> None:
    all_ = [asked(t, i) for t, n in (("a", 70), ("b", 20), ("c", 10)) for i in range(n)]
    chosen = spread(all_, count)
    found = [sum(r.messages[0].content.startswith(t) for r in chosen) for t in "abc"]
    assert len(chosen) == count and all(abs(f - s) <= 1 for f, s in zip(found, shares, strict=True))
    assert chosen == spread(list(reversed(all_)), count) and len(spread(all_, 500)) == 100
    assert set(chosen) <= set(spread(all_, min(100, 10 * count))) and spread(all_, -1) == []
