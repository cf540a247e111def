"""The plan of a paid teacher and its pilot: what is sent, what is stored, what it costs."""

import json
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from distill.cli import main
from distill.config.teachers import EndpointTeacher, RecordedTeacher
from distill.errors import Exit
from distill.planning.cost import TeacherCost, teacher_cost
from distill.planning.work import count_work
from distill.records import LedgerEntry, digest
from distill.storage.files import read_records
from distill.storage.run_folder import open_run
from tests.support.buying import settings
from tests.support.fake_teacher import KEY, PRICE, FakeTeacher, Reply, question, usage_of
from tests.support.tiny import make_tiny

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


def cost_of(place: Path, *overrides: str, large: int = 10**9) -> TeacherCost:
    run = open_run(place, overrides)
    found = teacher_cost(run.config, count_work(run, large))
    assert found
    return found


def ledger_of(folder: Path) -> list[LedgerEntry]:
    return read_records(folder / "runs/mine/ledger.jsonl", LedgerEntry)


def paid(folder: Path) -> Decimal:
    return sum((entry.dollars or Decimal(0) for entry in ledger_of(folder)), Decimal(0))


def test_a_plan_sends_nothing_and_makes_nothing(tmp_path: Path, capsys: Any) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher, budget_dollars="0.08")
        assert main(["plan", str(place)]) == 0
        assert not teacher.payloads and not (tmp_path / "runs").exists()
        text = capsys.readouterr().out
        cost = cost_of(place)
        assert main(["generate", str(place)]) == Exit.STATE  # its prompts are not made
        assert main(["corpus", str(place)]) == main(["prompts", str(place)]) == 0
        assert main(["generate", str(place), "teacher.budget_dollars=5"]) == 0
    assert cost.dollars and cost.dollars_most and cost.seconds is None
    assert cost.dollars / 2 < teacher.bill < 2 * cost.dollars and teacher.bill < cost.dollars_most
    assert f"{COUNT} answers" in text and "plan --pilot N" in text and "retries apart" in text
    assert "$3 in, $15 out a million tokens (2026-11-01, tests)" in text


def test_a_plan_holds_the_limit_against_what_can_be_billed_and_knows_batches(
    tmp_path: Path,
) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher)
    words = {"9": "suffices", "0.08": "is expected to suffice", "0.01": "does not"}
    for limit, word in words.items():
        cost = cost_of(place, f"teacher.budget_dollars={limit}")
        assert f"limit ${limit}, beyond which nothing is asked: {word}" in cost.notes[-1]
    assert cost_of(place, "teacher.omit=[max_tokens]").dollars_most is None
    full, unlisted = cost_of(place), cost_of(place, "teacher.batch=true")
    assert full.notes[-1] == "no limit: teacher.budget_dollars is not set"
    assert "asked by batch, no known discount: answers within a day" in unlisted.notes
    row = PRICE.model_dump(mode="json") | {"batch_discount": "0.5"}
    (tmp_path / "prices.yaml").write_text(json.dumps({"tokens": [row]}))
    half = cost_of(place, "teacher.batch=true")
    assert full.dollars and half.dollars == full.dollars / 2
    assert "asked by batch, 50% less: answers within a day" in half.notes


def test_prompts_that_are_not_read_are_priced_by_their_number_and_size(tmp_path: Path) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher, n=2, temperature=1.0)
        plain = cost_of(place, "prompts.train=20", large=100)
        more = cost_of(place, "prompts.train=20", "prompts.questions={}", large=100)
    assert not teacher.payloads and plain.requests >= 40 and plain.stored == 0
    assert plain.dollars and plain.dollars_most and more.dollars_most
    assert 0 < plain.dollars < plain.dollars_most < more.dollars_most


def test_a_pilot_is_what_is_expected_of_the_others_and_no_answer_is_bought_twice(
    tmp_path: Path, capsys: Any
) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher, requests_per_minute=6000)
        before = cost_of(place)
        assert main(["plan", "--pilot", "20", str(place)]) == 0
        assert len(teacher.payloads) == 20 and paid(tmp_path) == teacher.bill
        told = capsys.readouterr().out
        cost = cost_of(place)
        assert (cost.stored, cost.requests) == (20, COUNT - 20) and cost.paid == teacher.bill
        assert main(["plan", str(place), "--pilot", "20"]) == 0 and len(teacher.payloads) == 20
        billed = teacher.bill
        assert main(["generate", str(place)]) == 0
        assert len(teacher.payloads) == COUNT and set(teacher.bills.values()) == {1}
        assert paid(tmp_path) == teacher.bill
        assert cost_of(place).dollars == 0 and cost_of(place).seconds == 0
    assert cost.dollars and before.dollars and cost.seconds and cost.seconds >= 0.6
    assert cost.dollars * Decimal("0.7") < teacher.bill - billed < cost.dollars * Decimal("1.4")
    assert re.search(r"expected from 20 stored answers, which stopped so: 1\d end, \d length", told)
    assert {e.stage for e in ledger_of(tmp_path)} == {"corpus", "prompts", "pilot", "generate"}
    assert main(["status", str(place)]) == 0 and "pilot" in capsys.readouterr().out


def test_terms_come_before_a_pilot(tmp_path: Path, capsys: Any) -> None:
    with FakeTeacher() as teacher:
        place = str(write_config(tmp_path, teacher))
        assert main(["plan", "--pilot", "5", place, "terms.basis=null"]) == Exit.TERMS
        assert not teacher.payloads and not (tmp_path / "runs").exists()
        own = json.loads(Path(place).read_text())["teacher"].keys() & EndpointTeacher.model_fields
        none = [f"teacher.{key}=null" for key in own - RecordedTeacher.model_fields.keys()]
        other = ["teacher.kind=recorded", *none]
        assert main(["plan", "--pilot", "5", place, *other]) == Exit.CONFIG
    assert "is not asked anything" in capsys.readouterr().err


def test_a_pilot_keeps_to_the_budget(tmp_path: Path) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher, budget_dollars="0.01", concurrency=1)
        assert main(["plan", "--pilot", "40", str(place)]) == Exit.BUDGET
    assert 0 < len(teacher.payloads) < 40 and teacher.bill <= Decimal("0.01")
    assert paid(tmp_path) == teacher.bill  # also of one that was stopped
    cost = cost_of(place)
    assert cost.stored == len(teacher.payloads) and cost.paid == teacher.bill


def test_an_unknown_price_is_unknown_also_after_a_pilot(tmp_path: Path, capsys: Any) -> None:
    with FakeTeacher(varied) as teacher:
        place = write_config(tmp_path, teacher)
        (tmp_path / "prices.yaml").write_text("{}")
        assert main(["plan", "--pilot", "8", str(place)]) == 0
        said = capsys.readouterr().out
        assert main(["plan", str(place), "teacher.budget_dollars=1"]) == Exit.BUDGET
    assert "cost unknown: the price table has no model fake-1" in said
    assert "$" not in said and paid(tmp_path) == 0
    assert "with the limit of $1 a run stops (exit 6)" in capsys.readouterr().out


def test_a_server_that_states_its_cost_needs_no_price(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        reply = varied(number, payload)
        cost = reply.answer["usage"]["completion_tokens"] * 1e-4
        return Reply(answer={"usage": {**reply.answer["usage"], "cost": cost}})

    with FakeTeacher(script) as teacher:
        place = write_config(tmp_path, teacher)
        (tmp_path / "prices.yaml").write_text("{}")
        assert main(["plan", "--pilot", "12", str(place)]) == 0
        cost, before = cost_of(place), teacher.bill
        assert main(["generate", str(place)]) == 0
    assert cost.dollars and cost.dollars_most is None
    assert cost.dollars / 2 < teacher.bill - before < 2 * cost.dollars


def test_failures_and_answers_without_a_count_are_told(tmp_path: Path, capsys: Any) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        broken = [Reply(finish="moon"), Reply(status=500)]
        return [Reply(answer={"usage": None}), *broken][drawn(payload, 3)]

    with FakeTeacher(script) as teacher:
        place = write_config(tmp_path, teacher, max_retries=0)
        assert main(["plan", "--pilot", "30", str(place)]) == 0
    told, cost = capsys.readouterr().out, cost_of(place)
    assert 0 < cost.stored < 30 and cost.requests == COUNT - cost.stored and cost.paid_perhaps > 0
    assert "which stopped so: " in told and "and perhaps $" in told


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
        assert cost_of(place).requests == 24 + 4 * (8 * 2 + 4)
        assert main(["plan", "--pilot", "12", str(place)]) == 0
        assert len(teacher.payloads) == 12
        asked = [question(payload) for payload in teacher.payloads]
        assert 0 < sum("Write " in text for text in asked) <= 6
        assert main(["plan", "--pilot", "24", str(place)]) == 0
        tried = len(teacher.payloads)  # new questions may stand before some that were asked
        assert 24 <= tried <= 30
        cost, before = cost_of(place), teacher.bill
        assert main(["generate", str(place)]) == 0
        assert sum(teacher.bills.values()) == len(teacher.payloads)
    assert cost.dollars and cost.dollars_most
    assert cost.dollars / 2 < teacher.bill - before < 2 * cost.dollars
    assert teacher.bill - before < cost.dollars_most
    assert cost.requests / 2 < len(teacher.payloads) - tried < 2 * cost.requests


def test_a_pilot_of_a_local_teacher_measures_its_answers(tmp_path: Path, capsys: Any) -> None:
    with FakeTeacher() as teacher:
        place = write_config(tmp_path, teacher)
    tree = json.loads(place.read_text())
    tree["teacher"] = {"model": str(make_tiny(tmp_path / "m")), "max_new_tokens": 8}
    place.write_text(json.dumps(tree))
    assert main(["plan", "--pilot", "10", str(place)]) == 0
    said = capsys.readouterr().out
    assert f"{COUNT - 10} answers, 10 stored" in said and "$" not in said
    assert "expected from 10 stored answers" in said
    assert main(["generate", str(place)]) == 0
    spent = {e.stage: e.output_tokens for e in ledger_of(tmp_path)}
    assert 0 < spent["pilot"] <= 80 < spent["generate"] <= 8 * (COUNT - 10)
