"""The report: scorecard, Markdown and page from hand-made results; escaped, self-contained, the same bytes twice."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.evaluation import report, results, words
from distill.evaluation.acceptance import by_checker, requests_of
from distill.evaluation.answer import answer, kept
from distill.evaluation.compare import compare_paths
from distill.evaluation.plots import (
    Point,
    quality_against_cost,
    running_mean,
    ticks,
    training_curve,
)
from distill.evaluation.statistics import Certainty
from distill.evaluation.words import plain_numbers
from distill.records import Item, LedgerEntry, Message, Pair, Prompt, Reading, Response, Usage
from distill.run import Run
from distill.store import read_json, write_json, write_records

HOSTILE = "<script>alert('x')</script> & \"quotes\" | pipes\nand a new line"
ROOT = Path(__file__).parent.parent
HASH = "ab" * 32


def answered(item: Item, model: str, text: str, seconds: float) -> Response:
    usage = Usage(input_tokens=50, output_tokens=20, seconds=seconds)
    return Response(
        id=f"{model}-{item.id}", request_key="k", sample=0, prompt_id=item.prompt.id, model=model,
        text=text, stop="end", usage=usage,
    )  # fmt: skip


def make_items(count: int = 24, checked: bool = True) -> list[Item]:
    prompts = [
        Prompt.make(
            (Message(role="user", content=f"{k} + 1? {HOSTILE}"),),
            f"doc{k}",
            "math_word_problem" if checked and k % 2 else "chat",
            reference=str(k + 1),
        )
        for k in range(count)
    ]
    return [Item.make(prompt) for prompt in prompts]


def evaluation(items: list[Item], right: dict[str, int], run: Run) -> dict[str, Any]:
    """Return evaluation.json: of each model the first `right` answers are right, the others hostile and wrong.

    Writes requests.jsonl too.
    """
    taken = {"teacher": 2.0, "base": 0.5, "student": 0.4}
    answers = {
        m: {
            i.id: answered(i, m, f"#### {i.reference}" if k < right[m] else HOSTILE, taken[m])
            for k, i in enumerate(items)
        }
        for m in taken
    }
    checkers = {"math_word_problem": {"kind": "number"}, "chat": None}
    tasks = dict.fromkeys(item.task for item in items)
    rows = {t: results.measure_task(t, items, answers, "correct", checkers[t]) for t in tasks}
    losses = {
        "base": [Reading(loss=20.0 + k % 5, tokens=20, hits=9 + k % 3) for k in range(len(items))],
        "student": [
            Reading(loss=9.0 + k % 3, tokens=20, hits=12 + k % 4) for k in range(len(items))
        ],
    }
    certainty = Certainty(samples=500)
    asked = {"items": 24, "documents": 24, "max_new_tokens": 20}
    asked |= {"teacher_temperature": 0.0, "teacher_sees_more": False}
    tests = [by_checker(rows[t], c) for t, c in checkers.items() if c and t in rows]
    write_records(run.path("requests.jsonl"), requests_of(items, answers, tests))
    model = {
        "name": HOSTILE,
        "hub_id": None,
        "revision": None,
        "sha256": HASH,
        "template_hash": "t",
    }
    return plain_numbers(
        {
            "models": {
                "teacher": model,
                "base": model,
                "student": {**model, "adapter_sha256": HASH},
            },
            **results.compared(items, answers, rows, losses, certainty),
            "settings": {**certainty._asdict(), **asked},
            "corpus": {"corpus_sha256": HASH, "python": "3.11.9", "documents": 9},
            "environment": {"distill": "0", "libraries": {"torch": "2"}, "processor": "p"},
        }
    )


def make_run(
    folder: Path,
    right: dict[str, int] | None = None,
    checked: bool = True,
    machine: str | None = "cpu-2-core",
    history: int = 30,
) -> Run:
    config = Config.model_validate(
        {
            "name": "made-up",
            "runs": str(folder),
            "corpus": {"source": "python-docs"},
            "teacher": {"model": "some/teacher"},
            "student": {"model": "some/student"},
            "evaluation": {"machine": machine},
        }
    )
    run, items = Run(config), make_items(checked=checked)
    found = evaluation(items, right or {"teacher": 22, "base": 3, "student": 19}, run)
    write_json(run.path("evaluation.json"), found)
    steps = [{"step": s, "loss": 2 / (1 + s)} for s in range(history)]
    training = {"history": steps, "validation": steps[::10], "best_step": 20, "steps": history}
    write_json(run.path("training.json"), training)
    kept = {"kept_train": 80, "kept_validation": 5, "kept_heldout": 24}
    funnel = {"prompts": 120, "answers": 120, **kept, "dropped": {HOSTILE: 11}, "tasks": {}}
    write_json(run.path("funnel.json"), funnel)
    write_json(run.path("config.json"), config.resolved())
    ledger = [LedgerEntry(stage=s, started="t", seconds=60) for s in ("generate", "train")]
    write_records(run.path("ledger.jsonl"), ledger)
    return run


def test_the_scorecard_has_what_is_promised(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    report.main(run.config, run)
    card = read_json(run.path("scorecard.json"))
    for model in ("teacher", "base", "student"):
        assert card["models"][model]["sha256"] == HASH and card["models"][model]["template_hash"]
    row = card["tasks"]["math_word_problem"]
    assert row["metric"] == "correct" and row["n"] == 12 and row["unscored"] == 0
    assert row["teacher"] == pytest.approx(11 / 12, abs=1e-5)
    for difference in ("student_minus_teacher", "student_minus_base"):
        found = row[difference]
        assert found["low"] < found["mean"] < found["high"]
    gap = row["gap_recovered"]
    assert gap["low"] < gap["value"] < gap["high"]
    likeness = card["agreement"]
    assert likeness["chrf"]["teacher"] is None and likeness["nats_per_token"]["teacher"] is None
    assert likeness["nats_per_token"]["student_minus_base"]["high"] < 0
    for model in ("teacher", "student"):
        assert (
            card["cost"][model]["seconds_per_1k"] > 0 and card["cost"][model]["dollars_per_1k"] > 0
        )
    assert card["cost"]["distillation"]["seconds"] == 120
    assert card["corpus"]["python"] == "3.11.9" and card["training"]["validation_loss_best"]


def nulls(tree: Any, path: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [p for k, v in tree.items() for p in nulls(v, f"{path}.{k}" if path else k)]
    return [path] if tree is None else []


def test_every_null_of_tasks_and_costs_has_its_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"teacher": 5, "base": 5, "student": 5}, machine=None)
    report.main(run.config, run)
    card = read_json(run.path("scorecard.json"))
    missing = [
        path
        for part in ("tasks", "agreement", "cost")
        for path in nulls(card[part], part)
        if not path.endswith("price")
        and not any(path.startswith(known) for known in card["reasons"])
    ]
    assert missing == []
    assert "do not differ" in card["reasons"]["tasks.math_word_problem.gap_recovered"]


def test_the_same_inputs_give_the_same_bytes_and_the_script_remakes_them(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    report.main(run.config, run)
    names = ("scorecard.json", "scorecard.md", "report.html")
    first = {name: run.path(name).read_bytes() for name in names}
    with run.path("ledger.jsonl").open(
        "a"
    ) as ledger:  # a report that was made before costs nothing
        ledger.write(LedgerEntry(stage="report", started="t", seconds=9).to_line() + "\n")
    moved = tmp_path / "elsewhere" / "made-up"
    shutil.copytree(run.folder, moved)
    for name in names:
        (moved / name).unlink()
    assert report.remake(moved) == moved / "report.html"
    assert {name: (moved / name).read_bytes() for name in names} == first


class Tags(HTMLParser):
    """Collects the tags of a page and what they would load, and checks that they close."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "br", "link", "img") and not self.get_starttag_text().endswith("/>"):  # pyright: ignore
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("checked", [True, False])
def test_the_page_is_self_contained_and_escapes_everything(tmp_path: Path, checked: bool) -> None:
    run = make_run(tmp_path, checked=checked)
    report.main(run.config, run)
    page = run.path("report.html").read_text(encoding="utf-8")
    seen = Tags()
    seen.feed(page)
    assert seen.open == [] and "script" not in seen.tags and "svg" in seen.tags
    assert seen.loads == [] and "url(" not in page and "@import" not in page
    assert "alert(&#39;x&#39;)" in page and "<script>" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "viewport" in page
    for rank in ("best", "typical", "worst"):
        assert f"<h3>{rank}<" in page


def test_the_markdown_is_a_table_that_hostile_names_cannot_break(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    report.main(run.config, run)
    text = run.path("scorecard.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9, 8, 7, 5}
    assert report.table(("a", "b"), [(HOSTILE, "1")]).count("\n") == 2
    assert "cannot tell the two apart" in text or "not as good as the teacher" in text


def test_without_a_checker_the_answer_says_that_quality_is_not_known(tmp_path: Path) -> None:
    run = make_run(tmp_path, checked=False)
    report.main(run.config, run)
    card = read_json(run.path("scorecard.json"))
    assert card["overall"] is None and kept(card) is None
    assert "is not known" in answer(card)["Quality"]
    assert "is not known: no task has a checker" in run.path("report.html").read_text()


def test_a_teacher_that_passes_nothing_leaves_nothing_to_keep(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"teacher": 0, "base": 0, "student": 3})
    report.main(run.config, run)
    assert "None of the teacher’s answers pass" in run.path("report.html").read_text()


def test_missing_answers_are_shown_both_ways_and_too_many_stop(tmp_path: Path) -> None:
    items = make_items(60)[1::2]
    answers = {
        m: {i.id: answered(i, m, f"#### {i.reference}", 1.0) for i in items}
        for m in ("teacher", "base", "student")
    }
    del answers["student"][items[0].id]
    row = results.row_of(
        results.measure_task("math_word_problem", items, answers, "correct", {"kind": "number"}),
        Certainty(samples=200),
    )
    assert row["unscored"] == 1 and row["student"] == 1.0
    counted = row["if_missing_counts_against_student"]
    assert counted["student"] == pytest.approx(29 / 30)
    assert counted["student_minus_teacher"]["mean"] == pytest.approx(-1 / 30)
    for item in items[:3]:
        answers["student"].pop(item.id, None)
    measured = results.measure_task(
        "math_word_problem", items, answers, "correct", {"kind": "number"}
    )
    with pytest.raises(DistillError) as caught:
        results.row_of(measured, Certainty(samples=200))
    assert caught.value.code == Exit.EVALUATION


def test_comparing_runs_and_answer_files(tmp_path: Path) -> None:
    items, sides = make_items(60), []
    for name, right in (("a", 50), ("b", 20)):
        folder = tmp_path / name
        given = [
            answered(i, name, f"#### {i.reference}" if k < right else "no", 1.0)
            for k, i in enumerate(items)
        ]
        pairs = [Pair(prompt=i.prompt, response=r) for i, r in zip(items, given, strict=True)]
        write_records(folder / "dataset/heldout.jsonl", pairs)
        write_json(folder / "config.json", {})
        write_records(folder / "answers.jsonl", given)
        checked = [i for i in items if i.task == "math_word_problem"]
        by_item = {i.id: r for i, r in zip(items, given, strict=True)}
        measured = results.measure_task(
            "math_word_problem", checked, {name: by_item}, "correct", {"kind": "number"}
        )
        write_records(folder / "scores/student.jsonl", measured.scores[name])
        sides.append(folder)
    a, b = sides
    text = compare_paths([a], [b])
    assert "0.833" in text and "0.333" in text and "+0.500" in text
    assert compare_paths([a / "answers.jsonl"], [b]).count("+0.500") == 1
    seeds = compare_paths([a, a, b], [b, b])
    assert "0.667" in seeds and "+0.333" in seeds, "seeds are averaged item by item"
    with pytest.raises(DistillError) as caught:
        compare_paths([tmp_path / "nowhere"], [b])
    assert caught.value.code == Exit.INPUT


def test_plots_stay_in_their_frame_and_have_round_ticks() -> None:
    assert ticks(0, 100, 4) == [0, 25, 50, 75, 100]
    assert ticks(0.0, 0.05, 5) == [0, 0.01, 0.02, 0.03, 0.04, 0.05]
    point = Point("<b>", 0.02, 50.0, 40.0, 60.0)
    drawn = quality_against_cost([point], 350, "dollars", "share", "{:g}")
    assert "<b>" not in drawn and "&lt;b&gt;" in drawn
    places = [float(x) for x in re.findall(r' c?x[12]?="([\d.]+)"', drawn)]
    assert all(0 <= x <= 350 for x in places)
    assert training_curve([(1, 1.0)], [], None, 350) == ""
    assert "polyline" in training_curve([(1, 1.0), (2, 1.0)], [], None, 350), (
        "a flat loss still draws"
    )
    assert len(running_mean([(k, 1.0) for k in range(50)])) == 50


def test_words_claim_only_what_the_interval_supports() -> None:
    def said(low: float, high: float) -> str:
        return words.verdict({"low": low, "high": high}, "better", "worse", "open")

    assert [said(0.1, 0.2), said(-0.2, -0.1), said(-0.1, 0.1), said(0.0, 0.1)] == [
        "better", "worse", "open", "open",
    ]  # fmt: skip
    assert "not known" in words.verdict({"low": None, "reason": "few"}, "b", "w", "o")
    assert words.money(None) == words.share(None) == words.UNKNOWN
    assert words.money(0.00861) == "$0.0086" and words.duration(7300).startswith("2.0")
    assert json.dumps(plain_numbers({"a": [True, 1 / 3]})) == '{"a": [true, 0.333333]}'


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs a browser: apt-get install chromium"
)
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_cut_off_in_a_real_browser(tmp_path: Path, width: int) -> None:
    run = make_run(tmp_path)
    report.main(run.config, run)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe id="f" src="{run.path("report.html").as_uri()}" '
        f'style="width:{width}px;height:900px;border:0"></iframe><script>onload = () => {{'
        "const d = document.getElementById('f').contentDocument.documentElement;"
        "document.title = d.scrollWidth + ' of ' + d.clientWidth;}</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    size = f"--window-size={width + 100},1000"
    command = ["chromium", *flags, size, "--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>(\d+) of (\d+)</title>", shown)
    assert found and int(found[1]) <= int(found[2]) <= width, found and found[0]
