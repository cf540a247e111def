"""A run in money, from its files: whose price counts, what an earlier run had paid for."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from distill.config.tree import Config
from distill.economics.run_economics import UNSTATED, money_of
from distill.evaluation.measurements import MetricRow
from distill.evaluation.scorers import HeldOutRequest
from distill.records import LedgerEntry, Response, Timing, Usage
from distill.storage.files import write_records
from distill.storage.run_folder import Run

PRICES = """
machines:
  - {name: box, dollars_per_hour: "0.36", date: "%s", source: s}
tokens:
  - model: "own/*"
    dollars_per_million_input: 1
    dollars_per_million_output: 10
    date: "%s"
    source: s
  - model: giant
    dollars_per_million_input: 2
    dollars_per_million_output: 20
    date: "%s"
    source: s
  - model: old
    dollars_per_million_input: 2
    dollars_per_million_output: 20
    date: "2020-01-01"
    source: s
"""
OVERALL = {"student_minus_teacher": {"mean": -0.1, "low": -0.2, "high": 0.0}}


def accounts(run: Run, overall: dict[str, Any] | None) -> dict[str, Any]:
    cost, found = money_of(run, MetricRow.model_validate(overall) if overall else None)
    return {"cost": cost.tree(), "economics": found.tree()}


def make_run(folder: Path, teacher: dict[str, Any], **settings: Any) -> Run:
    """Make a run of twenty requests: 400 tokens in, 60 out; teacher 2 s, student 0.5 s."""
    from datetime import date

    prices = folder / "prices.yaml"
    prices.write_text(PRICES % ((date.today(),) * 3))
    config = Config.model_validate(
        {
            "name": "money",
            "runs": str(folder),
            "corpus": {"source": "python-docs"},
            "teacher": teacher,
            "student": {"model": "a/student"},
            "evaluation": {
                "machine": "box",
                "prices": str(prices),
                "bootstrap_samples": 500,
                **settings,
            },
        }
    )
    run = Run(config)
    usage = {
        m: Usage(input_tokens=400, output_tokens=60, seconds=s)
        for m, s in (("teacher", 2.0), ("base", 1.0), ("student", 0.5))
    }
    told: dict[str, Any] = {"usage": usage, "test": "valid_json", "when_served": True}
    rows = [
        HeldOutRequest(item=f"i{k}", cluster=f"d{k}", accepted=k < 16, **told) for k in range(20)
    ]
    write_records(run.path("requests.jsonl"), rows)
    answers = [
        Response(
            id=f"r{k}", request_key="k", sample=0, prompt_id="p", model="m", text="t", stop="end",
            usage=usage["teacher"],
        )
        for k in range(10)
    ]  # fmt: skip
    write_records(run.path("responses.jsonl"), answers)
    ledger = [
        LedgerEntry(stage="generate", started="t", seconds=0, output_tokens=600),
        LedgerEntry(stage="train", started="t", seconds=3600),
    ]
    write_records(run.path("ledger.jsonl"), ledger)
    timing = Timing(requests=8, output_tokens=480, seconds=16, read_tokens=4000, read_seconds=1)
    write_records(run.path("timings/student.jsonl"), [timing])
    return run


def test_a_local_teacher_is_paid_by_the_machine_that_idles_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"model": "a/teacher"})
    found = accounts(run, OVERALL)
    cost, said = found["cost"], found["economics"]
    assert (cost["teacher"]["dollars_per_1k"], cost["student"]["dollars_per_1k"]) == (0.4, 0.1)
    assert said["rows"][1]["dollars_per_1k"]["value"] == 0.22 and not said["teacher"]["hosted"]
    assert cost["distillation"]["dollars"] == 0.36 == said["distillation_dollars"]
    assert cost["distillation"]["reused"] == 0 and said["quality"]["mean"] == -0.1
    assert cost["student"]["one_at_a_time"]["dollars_per_1k"] == 0.4
    assert cost["student"]["per_million"]["seconds_input"] == 250
    assert "one_at_a_time" in cost["teacher"]["reasons"]


def test_another_s_list_price_is_hypothetical_and_so_is_the_distillation(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"model": "a/teacher"}, teacher_price="giant")
    found = accounts(run, OVERALL)
    cost, said = found["cost"], found["economics"]
    assert said["teacher"]["name"] == "giant" and said["teacher"]["hypothetical"]
    assert said["teacher"]["dollars_per_1k"] == 2.0 and cost["teacher"]["dollars_per_1k"] == 0.4
    # ten answers of 400 in and 60 out at $2 and $20 are $0.02, beside the hour of training
    assert said["teacher"]["answers_dollars"] == 0.02 and said["distillation_dollars"] == 0.38
    own = make_run(tmp_path, {"model": "own/teacher"}, teacher_price="own/teacher")
    write_records(own.path("ledger.jsonl"), own.ledger.entries()[1:])
    found = accounts(own, None)
    said = found["economics"]
    assert not said["teacher"]["hypothetical"] and said["teacher"]["dollars_per_1k"] == 1.0
    assert said["rows"][1]["dollars_per_1k"]["value"] == 0.7
    assert said["quality"]["mean"] is None and said["quality"]["reason"]
    assert found["cost"]["distillation"]["reused"] == 1.0, "the store had all answers already"


@pytest.mark.parametrize(
    ("name", "why"), [("nobody", "has no model nobody"), ("old", "older than")]
)
def test_a_price_that_is_missing_or_stale_is_unknown(tmp_path: Path, name: str, why: str) -> None:
    run = make_run(tmp_path, {"model": "a/teacher"}, teacher_price=name)
    said = accounts(run, OVERALL)["economics"]
    assert said["teacher"]["dollars_per_1k"] is None and said["share"]["value"] == 0.8
    for row in said["rows"]:
        assert row["dollars_per_1k"]["value"] is None and why in row["dollars_per_1k"]["reason"]


def test_an_endpoint_without_a_price_is_not_priced_by_our_machine(tmp_path: Path) -> None:
    teacher = {"kind": "endpoint", "model": "served", "base_url": "https://example.org/v1"}
    run = make_run(tmp_path, teacher)
    cost = accounts(run, OVERALL)["cost"]["teacher"]
    assert cost["dollars_per_1k"] is None and "no model served" in cost["reasons"]["dollars_per_1k"]


def test_recorded_answers_have_the_cost_that_is_stated(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"kind": "recorded", "model": "a/teacher"})
    found = accounts(run, OVERALL)
    assert found["cost"]["distillation"]["reasons"] == {"dollars": UNSTATED}
    assert found["economics"]["rows"][0]["break_even"]["days"]["reason"] == UNSTATED
    free = make_run(tmp_path, {"kind": "recorded", "model": "a/teacher", "dollars": Decimal(0)})
    assert accounts(free, OVERALL)["economics"]["distillation_dollars"] == 0.36
