"""A run's judge over HTTP: its verdicts are stored and paid once, and count only after its probes."""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config
from distill.evaluation.judge import load_probes
from distill.evaluation.judging import ask_judge, probe_lines, probed, read_judge
from distill.evaluation.statistics import Certainty
from distill.records import Item, Message, Prompt, Response
from distill.storage.run_folder import Run, Stage
from tests.support.fake_teacher import PRICE, FakeTeacher, Reply, question

GOOD = {probe.good for probe in load_probes()}
COUNT = 24


def fair(number: int, payload: dict[str, Any]) -> Reply:
    """Prefer a real answer to a probe, and of a run's answers the one that says "well"."""
    a, b = re.findall(r"ANSWER [AB] BEGINS\]\n(.*?)\n\[\w+ ANSWER", question(payload), re.S)
    better = [x in GOOD or "well" in x for x in (a, b)]
    choice = "TIE" if better[0] == better[1] else "A" if better[0] else "B"
    return Reply(message={"content": f"It says more.\nVERDICT: {choice}"})


def fooled(number: int, payload: dict[str, Any]) -> Reply:
    """Prefer the longer answer, as weak judges do."""
    a, b = re.findall(r"ANSWER [AB] BEGINS\]\n(.*?)\n\[\w+ ANSWER", question(payload), re.S)
    return Reply(message={"content": f"VERDICT: {'A' if len(a) > len(b) else 'B'}"})


def answer(item: Item, model: str, text: str) -> Response:
    return Response(
        id=f"{model}-{item.id}",
        request_key="k",
        sample=0,
        prompt_id=item.prompt.id,
        model=model,
        text=text,
        stop="end",
    )


@pytest.fixture
def items() -> list[Item]:
    turns = [(Message(role="user", content=f"question {n}"),) for n in range(COUNT)]
    return [Item.make(Prompt.make(turn, f"d{n}", "chat")) for n, turn in enumerate(turns)]


def answers(items: list[Item]) -> dict[str, dict[str, Response]]:
    """Let the student do well on half of the items, the teacher on three quarters, and base never."""
    share = {"student": COUNT // 2, "teacher": COUNT * 3 // 4, "base": 0}
    return {
        model: {
            item.id: answer(item, model, f"{model}: {'well' if n < right else 'badly'} {n}")
            for n, item in enumerate(items)
        }
        for model, right in share.items()
    }


def make_run(folder: Path, teacher: FakeTeacher) -> Run:
    row = {**PRICE.model_dump(mode="json"), "model": "judge-1", "date": str(date.today())}
    (folder / "prices.yaml").write_text(json.dumps({"tokens": [row]}))
    judge = {"kind": "endpoint", "model": "judge-1", "base_url": teacher.url}
    tree = {
        "name": "mine",
        "runs": folder / "runs",
        "corpus": {"path": "x"},
        "teacher": {"model": "m"},
        "student": {"model": "s"},
        "evaluation": {"judge": judge, "prices": folder / "prices.yaml"},
    }
    run = Run(Config.model_validate(tree))
    run.folder.mkdir(parents=True)
    return run


def ask(run: Run, items: list[Item]) -> None:
    """Ask the judge as the evaluate stage does."""
    work = Stage("evaluate", (), (), (), lambda c, r: ask_judge(c, r, items, answers(items)))
    run.remake([work])
    run.perform(work)


def test_a_fair_judge_is_paid_once_and_its_word_counts(tmp_path: Path, items: list[Item]) -> None:
    with FakeTeacher(fair) as teacher:
        run = make_run(tmp_path, teacher)
        ask(run, items)
        asked = len(teacher.payloads)
        probes = load_probes()
        copies = sum(probe.kind == "copy" for probe in probes)  # the same in both orders
        assert asked == 2 * (len(probes) + 2 * COUNT) - copies
        ask(run, items)
        assert len(teacher.payloads) == asked, "verdicts are in the store"
        entries = run.ledger.entries()
        assert sum(e.attempts for e in entries) == asked
        assert sum(e.dollars or 0 for e in entries) == teacher.bill
    found = read_judge(run.config, run, items, answers(items), Certainty(samples=200))
    assert found is not None and found.result.tree()["probe"]["passed"]
    row = found.result.tree()["teacher"]
    assert (row["wins"], row["ties"], row["losses"]) == (0, COUNT * 3 // 4, COUNT // 4)
    assert found.result.tree()["base"]["wins"] == COUNT // 2
    word = found.acceptance(lambda item: True)
    assert word is not None and sum(bool(v) for v in word.passed.values()) == COUNT * 3 // 4
    strict = found.acceptance(lambda item: False)
    assert strict is not None and not any(strict.passed.values())


def test_a_judge_that_failed_its_probes_says_nothing(tmp_path: Path, items: list[Item]) -> None:
    with FakeTeacher(fooled) as teacher:
        run = make_run(tmp_path, teacher)
        ask(run, items)
    found = read_judge(run.config, run, items, answers(items), Certainty(samples=200))
    assert found is not None and found.acceptance(lambda item: True) is None
    rate = found.result.tree()["teacher"]["win_rate"]
    assert rate["mean"] is None and "an empty phrase win" in rate["reason"]


def test_without_a_judge_nothing_is_said(tmp_path: Path, items: list[Item]) -> None:
    with FakeTeacher(fair) as teacher:
        run = make_run(tmp_path, teacher)
    evaluation = run.config.evaluation.model_copy(update={"judge": None})
    config = run.config.model_copy(update={"evaluation": evaluation})
    ask_judge(config, run, items, answers(items))
    assert read_judge(config, run, items, answers(items), Certainty()) is None
    assert not teacher.payloads and not run.path("answers").exists()


def test_a_judge_can_be_probed_before_a_run(tmp_path: Path) -> None:
    with FakeTeacher(fair) as teacher:
        run = make_run(tmp_path, teacher)
        assert probe_lines(probed(run.config))[-1] == "the judge may be used"
    with FakeTeacher(fooled) as teacher:
        (tmp_path / "other").mkdir()
        run = make_run(tmp_path / "other", teacher)
        assert "an empty phrase win" in probe_lines(probed(run.config))[-1]
