"""A run in money, from its files: whose price counts, what an earlier run had paid for."""

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from distill.config.tree import Config
from distill.economics.run_economics import UNSTATED, money_of
from distill.evaluation.measurements import MetricRow
from distill.evaluation.scorers import HeldOutRequest
from distill.records import HEADLINE, LedgerEntry, Load, Response, Timing, Usage
from distill.storage.files import read_records, write_records
from distill.storage.run_folder import Run


def token_price(model: str, dollars: int, day: str) -> dict[str, Any]:
    rates = {"dollars_per_million_input": dollars, "dollars_per_million_output": 10 * dollars}
    return {"model": model, "date": day, "source": "s", **rates}


OVERALL = {"student_minus_teacher": {"mean": -0.1, "low": -0.2, "high": 0.0}}


def accounts(run: Run, overall: dict[str, Any] | None) -> dict[str, Any]:
    cost, found = money_of(run, MetricRow.model_validate(overall) if overall else None)
    return {"cost": cost.tree(), "economics": found.tree()}


def make_run(folder: Path, teacher: dict[str, Any], **settings: Any) -> Run:
    """Make a run of twenty requests: 400 tokens in, 60 out; teacher 2 s, student 0.5 s."""
    prices, today = folder / "prices.yaml", f"{date.today()}"
    box = {"name": "box", "dollars_per_hour": "0.36", "date": today, "source": "s"}
    rows = (("own/*", 1, today), ("giant", 2, today), ("old", 2, "2020-01-01"))
    table = {"machines": [box], "tokens": [token_price(*row) for row in rows]}
    prices.write_text(json.dumps(table))
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
    assert cost["student"]["per_million"]["dollars_input"] == 0.05  # 0.25 ms a token


def at_load(run: Run, teacher: int | None = HEADLINE, seconds: float = 4.0) -> None:
    """Time all three on 16 requests of 400 + 50 tokens; reading takes 0.5 ms a token."""
    usage = Usage(input_tokens=6400, output_tokens=800, seconds=3.2 + seconds)
    for model, level in (("teacher", teacher), ("base", HEADLINE), ("student", HEADLINE)):
        facts: dict[str, Any] = {"requests": 16, "repeats": 3, "range": (0.5, 2.0)}
        slow = usage.model_copy(update={"seconds": 2 * usage.seconds})
        loads = [Load(concurrency=c, usage=u, **facts) for c, u in ((1, slow), (level, usage)) if c]
        timing = Timing(read_tokens=1000, read_seconds=0.5, engine="e" * 3, loads=tuple(loads))
        write_records(run.path(f"timings/{model}.jsonl"), [timing])


def test_a_model_costs_what_its_tokens_take_at_the_load_of_all(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"model": "a/teacher"})
    at_load(run)
    cost = accounts(run, OVERALL)["cost"]
    # 400 tokens read in 0.2 s, and 60 written at 5 ms each, whatever the answers took in the run
    for model in ("teacher", "base", "student"):
        found = cost[model]
        assert found["seconds_per_1k"] == 500 and found["output_tokens_per_second"] == 120
        assert (found["engine"], found["concurrency"]) == ("eee", 8) and found["machine"]
        assert [load["concurrency"] for load in found["loads"]] == [1, 8]
        assert found["loads"][1]["range_per_1k"] == [250, 1000]
        alone = found["loads"][0]  # 0.2 s, and 60 tokens of (14.4 - 3.2) / 800 s
        assert alone["seconds_per_1k"] == 1040 and alone["requests"] == 16
    rows = read_records(run.path("requests.jsonl"), HeldOutRequest)
    write_records(run.path("requests.jsonl"), [rows[3].model_copy(update={"usage": {
        m: u.model_copy(update={"seconds": 0.0}) for m, u in rows[3].usage.items()
    }})])  # fmt: skip
    fewer = accounts(run, OVERALL)["cost"]
    for model in ("teacher", "base", "student"):
        assert fewer[model]["dollars_per_1k"] == cost[model]["dollars_per_1k"] > 0
    assert fewer["student"]["requests"] == 1 and "from the store, or of few items"


@pytest.mark.parametrize("teacher", [None, 5])
def test_without_one_load_for_all_there_is_none(tmp_path: Path, teacher: int | None) -> None:
    run = make_run(tmp_path, {"model": "a/teacher"})
    at_load(run, teacher)
    cost = accounts(run, OVERALL)["cost"]
    assert (cost["teacher"]["seconds_per_1k"], cost["student"]["seconds_per_1k"]) == (2000, 500)
    assert "concurrency" not in cost["student"], "each answer's own share of its batch"


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


@pytest.mark.parametrize("loaded", [False, True])
def test_tries_cost_all_their_answers_and_change_nothing_else(tmp_path: Path, loaded) -> None:
    run = make_run(tmp_path, {"model": "a/teacher"})
    if loaded:
        at_load(run)
    before = accounts(run, OVERALL)
    assert "tries" not in before["cost"]
    rows = read_records(run.path("requests.jsonl"), HeldOutRequest)
    total = Usage(input_tokens=8 * 400, output_tokens=8 * 60, seconds=8 * 0.5)
    tried = [r.model_copy(update={"usage": {**r.usage, "tries": total}}) for r in rows[:15]]
    write_records(run.path("requests.jsonl"), [*tried, *rows[15:]])
    after = accounts(run, OVERALL)
    tries, student = after["cost"].pop("tries"), after["cost"]["student"]
    assert after == before, "the headline is that of one greedy answer"
    assert tries["requests"] == 15 and tries["output_tokens"] == 480
    for key in ("seconds_per_1k", "dollars_per_1k"):
        assert tries[key] == pytest.approx(8 * student[key])
    assert tries.get("concurrency") == student.get("concurrency") == (HEADLINE if loaded else None)
