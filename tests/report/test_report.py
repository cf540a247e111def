"""The report: scorecard, Markdown and page from hand-made results; escaped, self-contained, the same bytes twice."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.evaluation import results
from distill.evaluation.compare import compare_paths
from distill.evaluation.judge import Duel, examined, load_probes, row_of_duels
from distill.evaluation.measurements import Difference, DuelRow, Sample
from distill.evaluation.scorers import by_checker, measure_task, requests_of
from distill.evaluation.statistics import Certainty
from distill.formatting import plain_numbers
from distill.records import (
    AnswerLoss,
    Item,
    LedgerEntry,
    Message,
    Pair,
    Prompt,
    Response,
    Score,
    Usage,
)
from distill.report import render, report
from distill.report.plots import (
    Mark,
    quality_against_cost,
    running_mean,
    ticks,
    training_curve,
)
from distill.storage.files import read_json, write_json, write_records
from distill.storage.run_folder import Run, open_run

HOSTILE = "<script>alert('x')</script> & \"quotes\" | pipes\nand a new line"
LONG = "w" * 90 + HOSTILE
ROOT = Path(__file__).parent.parent.parent
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
    rows = {t: measure_task(t, items, answers, "correct", checkers[t]) for t in tasks}
    losses = {
        "base": [
            AnswerLoss(loss=20.0 + k % 5, tokens=20, hits=9 + k % 3) for k in range(len(items))
        ],
        "student": [
            AnswerLoss(loss=9.0 + k % 3, tokens=20, hits=12 + k % 4) for k in range(len(items))
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
            **results.results_of(rows, certainty).tree(),
            "agreement": results.agreement_rows(items, answers, losses, certainty),
            "lengths": {m: results.answer_lengths(list(a.values())) for m, a in answers.items()},
            "samples": list(results.samples(items, list(rows.values()), answers)),
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


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"adapter_step": 20}, "The checkpoint of step 20, the best on validation documents, was kept."),
        ({"adapter_step": 30}, "step 30, the last, was kept; that of step 20 had the lowest"),
        ({}, "The checkpoint of step 20, the best"),  # an earlier version wrote no adapter_step
    ],
)  # fmt: skip
def test_the_page_names_the_checkpoint_that_is_evaluated(
    tmp_path: Path, steps: dict[str, int], words: str
) -> None:
    run = make_run(tmp_path)
    training = read_json(run.path("training.json"))
    write_json(run.path("training.json"), {**training, **steps})
    assert words in pages(run)[0]


def test_every_null_of_tasks_and_costs_has_its_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"teacher": 5, "base": 5, "student": 5}, machine=None)
    report.main(run.config, run)
    card = read_json(run.path("scorecard.json"))
    missing = [
        path
        for part in ("tasks", "agreement", "cost")
        for path in nulls(card[part], part)
        if not path.endswith(("price", ".reason"))
        and not any(path.startswith(known) for known in card["reasons"])
    ]
    assert missing == []
    assert "undecided" in card["reasons"]["tasks.math_word_problem.gap_recovered"]


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
    again = open_run(moved)
    report.main(again.config, again)
    assert again.path("report.html") == moved / "report.html"
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
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9, 7, 5}
    assert "which of the two is better is undecided" in text or "not as good as the teacher" in text


def test_without_a_checker_the_answer_says_that_quality_is_not_known(tmp_path: Path) -> None:
    run = make_run(tmp_path, checked=False)
    report.main(run.config, run)
    card = read_json(run.path("scorecard.json"))
    assert card["overall"] is None
    assert "how good the student is, is not known" in run.path("scorecard.md").read_text()
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
        measure_task("math_word_problem", items, answers, "correct", {"kind": "number"}),
        Certainty(samples=200),
    )
    assert row.unscored == 1 and row.student == 1.0
    counted = row.if_missing_counts_against_student
    assert counted and counted.student == pytest.approx(29 / 30)
    assert counted.student_minus_teacher.mean == pytest.approx(-1 / 30)
    for item in items[:3]:
        answers["student"].pop(item.id, None)
    measured = measure_task("math_word_problem", items, answers, "correct", {"kind": "number"})
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
        measured = measure_task(
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
    point = (0.02, Mark("<b>", 50.0, 40.0, 60.0))
    drawn = quality_against_cost([point], 350, "dollars", "share", "{:g}")
    assert "<b>" not in drawn and "&lt;b&gt;" in drawn
    places = [float(x) for x in re.findall(r' c?x[12]?="([\d.]+)"', drawn)]
    assert all(0 <= x <= 350 for x in places)
    near = [(0.02 + k / 1000, Mark(name, 50.0, 40.0, 60.0)) for k, name in enumerate("abc")]
    names = quality_against_cost(near, 350, "dollars", "share", "{:g}")
    places = re.findall(r'class="name( end)?" x="([^"]+)" y="([^"]+)"', names)
    assert len(set(places)) == 3, "names that would overlap stand apart"
    assert training_curve([(1, 1.0)], [], None, 350) == ""
    assert "polyline" in training_curve([(1, 1.0), (2, 1.0)], [], None, 350), (
        "a flat loss still draws"
    )
    assert len(running_mean([(k, 1.0) for k in range(50)])) == 50


def judged(passed: bool) -> dict[str, Any]:
    """Return what evaluation.json holds of a judge: one that passed its probes, or one that obeys an answer."""
    probes, duels = load_probes(), [Duel(str(k), str(k), (), "aa", "ab", None) for k in range(24)]
    seen = {"null": 0.0, "injected": 0.0 if passed else 1.0, "copy": 0.5}
    verdict = Score(item_id="i", model="m", value=None, answer="A/B", reason="r")
    values = [seen[probe.kind] for probe in probes]
    probe = examined(probes, [verdict.model_copy(update={"value": v}) for v in values])
    outcomes = [verdict.model_copy(update={"value": 1.0 if k % 3 else 0.0}) for k in range(24)]
    row = row_of_duels(duels, outcomes, 24, Certainty(samples=500))
    if not passed:
        row = DuelRow(win_rate=Difference(mean=None, reason=f"{probe.reason} {HOSTILE}"))
    about = {"model": HOSTILE, "warnings": [f"one family {HOSTILE}"], "probe": probe}
    return {**about, "teacher": row, "base": row}


def found_leaks(run: Run, flagged: int) -> dict[str, Any]:
    told = read_json(run.path("evaluation.json"))
    rate = {"mean": flagged / 24, "low": 0.0, "high": 0.2}
    whole = {"tasks": told["tasks"], "overall": told["overall"]} if flagged else None
    return {
        "n": 24, "flagged": flagged, "unsearchable": 1, "rate": rate, "all_items": whole, "kinds": {},
        "examples": [{"phrase": HOSTILE}], "method": "A paraphrase or a translation is not found.",
    }  # fmt: skip


def everything(run: Run, passed: bool = True, flagged: int = 3) -> None:
    """Add to a made-up run what a full evaluation finds: suites, a judge, leaks, and another harness."""
    told = read_json(run.path("evaluation.json"))
    leaks = found_leaks(run, flagged)
    suite = {"tasks": told["tasks"], "overall": told["overall"], "description": HOSTILE}
    told["suites"] = {"forgetting": {**suite, "contamination": leaks}, LONG: suite}
    write_json(
        run.path("evaluation.json"),
        plain_numbers({**told, "judge": judged(passed), "contamination": leaks}),
    )
    tasks = {HOSTILE: {"n": 9, "metrics": {"acc": {"value": 0.5, "stderr": None}}}}
    kept = {"harness": "lm-eval 1", "adapter_sha256": HASH, "tasks": tasks}
    write_json(run.path("lm_eval.json"), kept)


def pages(run: Run) -> tuple[str, str]:
    """Make the report and return page and Markdown, hard spaces made plain."""
    report.main(run.config, run)
    texts = (run.path(name).read_text() for name in ("report.html", "scorecard.md"))
    page, text = (text.replace("\u00a0", " ") for text in texts)
    return page, text


def test_the_answer_comes_first_with_its_intervals(tmp_path: Path) -> None:
    page, text = pages(make_run(tmp_path))
    heads = [re.sub("<.*?>", "", h) for h in re.findall("<(?:h1|dt).*?>(.*?)</(?:h1|dt)>", page)]
    assert heads[1:5] == ["Quality", "Cost", "What it saves", "Compared"]
    for said in ("the same 24 held-out prompts from 24 documents", " points [",
                 "paid back after", " items reliably show a difference of "):  # fmt: skip
        assert said in page and said in text, said


def test_the_headings_are_in_order_and_every_picture_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    everything(run)
    page, _ = pages(run)
    levels = [int(level) for level in re.findall(r"<h([1-4])", page)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    pictures = re.findall(r"<[^>]*role=\"img\"[^>]*>", page)
    assert len(pictures) > 8 and all(re.search('aria-label="[^"]{9,}', p) for p in pictures)
    assert page.count("<table") == page.count("<tbody") and 'scope="row"' in page


def test_suites_judge_leaks_and_other_harnesses_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    everything(run)
    page, text = pages(run)
    for said in ("What it forgot", "What a judge prefers", "passed its", "67 % [46 %, 83 %]",
                 "which one the judge prefers is undecided: the interval includes 50 %", "one family", "What another harness found",
                 "3 of 24 items", "not found in the training data", "all items", "is not found"):  # fmt: skip
        assert said in page, said
    assert "passed its" in text and "67 % [46 %, 83 %]" in text
    card = read_json(run.path("scorecard.json"))
    assert (
        card["judge"]["probe"]["passed"]
        and card["suites"]
        and card["contamination"]["flagged"] == 3
    )


def test_a_judge_that_was_fooled_gives_no_win_rate(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    everything(run, passed=False, flagged=0)
    page, text = pages(run)
    assert "is not used, so no win rate is given: the judge let" in page and "is not used" in text
    assert "How often the student" not in page and "the student against | " not in text
    reasons = read_json(run.path("scorecard.json"))["reasons"]
    assert reasons["judge.teacher.win_rate"].startswith("the judge let")
    assert "None of the 24 items was found" in page and "0.0 % to 20.0 % would be" in page


def test_what_the_differences_allow_to_claim_stands_beside_them(tmp_path: Path) -> None:
    page, _ = pages(make_run(tmp_path))
    assert "McNemar p" in page and "could have shown" in page
    assert re.search(r"(undecided|not inferior|inferior) \(5 %\)", page)


def test_without_a_price_nothing_is_said_to_be_saved(tmp_path: Path) -> None:
    page, text = pages(make_run(tmp_path, machine=None))
    assert "what it saves is not known" in page and "is not known" in text
    assert "Not drawn" in page and ">$0" not in page


def test_a_loss_is_shown_as_a_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    dear = run.config.evaluation.model_copy(update={"teacher_price": "gpt-5.6-luna"})
    config = run.config.model_copy(update={"evaluation": dear})
    rows = [json.loads(line) for line in run.path("requests.jsonl").read_bytes().splitlines()]
    for row in rows:
        row["usage"]["student"]["seconds"] = 9000.0
    run.path("requests.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page, _ = pages(Run(config))
    assert "saves nothing: it costs $" in page and "never paid back" in page and "<b>−$" in page


def test_where_private_text_is_kept_no_sample_leaves_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    everything(run)
    assert "<pre>" in pages(run)[0] and read_json(run.path("scorecard.json"))["failures"]["worst"]
    corpus = run.config.corpus.model_copy(update={"private_text": "keep"})
    page, _ = pages(Run(run.config.model_copy(update={"corpus": corpus})))
    assert "<pre>" not in page and "Left out: the corpus is used as it is" in page
    card = read_json(run.path("scorecard.json"))
    assert card["failures"]["worst"] == [] and "keep" in card["failures"]["reason"]
    assert '"examples": [' not in json.dumps(card)
    assert "failures" not in card["tasks"]["math_word_problem"]


def test_failures_are_the_worst_samples_cut_short() -> None:
    def sample(task: str, rank: str, value: float, metric: str = "correct") -> Sample:
        tree = {
            "task": task, "rank": rank, "metric": metric, "messages": [{"content": "q" * 900}],
            "answers": {"student": "s", "teacher": "t"}, "scores": {"student": value},
            "reasons": {"student": "wrong"},
        }  # fmt: skip
        return Sample.model_validate(tree)

    rows = [sample("a", "worst", 31.0, "chrF"), sample("b", "worst", 0.0), sample("b", "best", 1.0)]
    found = results.failures(rows, "mask").worst
    assert [(row.task, row.reason) for row in found] == [
        ("b", "wrong"),
        ("a", "chrF 31 against the teacher"),
    ]
    assert len(found[0].asked) < 420 and found[0].asked.endswith("[…]")
    assert results.failures([sample("a", "worst", 1.0)], "mask").worst == ()


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_text_has_the_contrast_of_wcag_aa_in_both_schemes_and_on_paper() -> None:
    style = (ROOT / "distill/report/templates/report.html.j2").read_text()
    schemes = [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 3
    for colours in schemes:
        full = {
            k: c if len(c) == 7 else "#" + "".join(2 * x for x in c[1:]) for k, c in colours.items()
        }
        for ground in ("paper", "card", "wash"):
            for ink in ("ink", "soft", "faint", "student", "teacher", "base"):
                two = sorted((luminance(full[ink]), luminance(full[ground])))
                assert (two[1] + 0.05) / (two[0] + 0.05) >= 4.5, (ink, ground, colours)


def test_readme_and_docs_hold_what_the_scorecards_say() -> None:
    counts: dict[str, int] = {}
    for page in render.pages(ROOT):
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- scorecard: ") == text.count("<!-- end of scorecard -->")
        assert render.fill(text, ROOT) == text, f"{page.name}: run python eval/render.py"
        counts[page.name] = text.count("<!-- scorecard: ")
    assert counts["README.md"] == counts["evidence.md"] == 1 and counts["measured.md"] == 2


def test_a_readme_is_filled_from_any_scorecard(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    report.main(run.config, run)
    head = "<!-- scorecard: made-up/scorecard.json quality saves judge -->"
    text = f"before\n{head}\nold\n<!-- end of scorecard -->\nafter"
    once = render.fill(text, tmp_path)
    assert once.startswith(f"before\n{head}\n> |") and "\n> ## What it saves\n" in once
    assert "old" not in once and render.fill(once, tmp_path) == once
    for other in ("nothing.json quality", "made-up/scorecard.json poem"):
        with pytest.raises(DistillError):
            render.fill(text.replace("made-up/scorecard.json quality saves judge", other), tmp_path)


def plain_run(folder: Path) -> Run:
    run = make_run(folder)
    everything(run)
    return run


def poor_run(folder: Path) -> Run:
    """No checker, no price, hardly any training, a judge that was fooled."""
    run = make_run(folder, checked=False, machine=None, history=1)
    everything(run, passed=False, flagged=0)
    return run


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs a browser: apt-get install chromium"
)
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("made", [plain_run, poor_run])
def test_nothing_is_cut_off_in_a_real_browser(
    tmp_path: Path, width: int, made: Callable[[Path], Run]
) -> None:
    run = made(tmp_path)
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
