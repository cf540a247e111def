"""The report: scorecard, Markdown and page of hand-made results; escaped, the same bytes twice."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.evaluation import results
from distill.evaluation.judge import Duel, examined, load_probes, row_of_duels
from distill.evaluation.measurements import Difference, DuelRow, MetricRow
from distill.evaluation.scorecard import Costs, RequestCost, Scorecard
from distill.evaluation.scorers import HeldOutRequest, measure_items, requests_of
from distill.evaluation.statistics import Certainty
from distill.formatting import plain_numbers
from distill.records import AnswerLoss, Item, LedgerEntry, Message, Prompt, Response, Score, Usage
from distill.report import report
from distill.report.plots import WIDTH, quality_against_cost, ticks, training_curve
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.run_folder import Run
from scripts import tables

HOSTILE = "<script>alert('x')</script> & \"quotes\" | pipes [a](b)\nand a new line"
ROOT = Path(__file__).parent.parent.parent
HASH = "ab" * 32
CHECKERS = {"math_word_problem": {"kind": "number"}, "chat": None}
GPU = {"gpu": "NVIDIA L4", "gpu_memory": 5, "driver": "580.65", "cuda": "13.0"}
SECONDS = {"teacher": 2.0, "base": 0.5, "student": 0.4}


def answered(item: Item, model: str, text: str) -> Response:
    usage = Usage(input_tokens=50, output_tokens=20, seconds=SECONDS.get(model, 1.0))
    return Response(
        id=f"{model}-{item.id}", request_key="k", sample=0, prompt_id=item.prompt.id, model=model,
        text=text, stop="end", usage=usage,
    )  # fmt: skip


def make_items(count: int = 24, checked: bool = True) -> list[Item]:
    tasks = ("chat", "math_word_problem" if checked else "chat")
    turns = [Message(role="user", content=f"{k} + 1? {HOSTILE}") for k in range(count)]
    return [
        Item.make(Prompt.make((turn,), f"doc{k}", tasks[k % 2], reference=str(k + 1)))
        for k, turn in enumerate(turns)
    ]


def evaluation(items: list[Item], correct: dict[str, int], run: Run) -> dict[str, Any]:
    """Return evaluation.json, where a model's first `correct` answers pass and others are hostile.

    Writes requests.jsonl too.
    """
    answers = {
        m: {
            i.id: answered(i, m, f"#### {i.reference}" if k < correct[m] else HOSTILE)
            for k, i in enumerate(items)
        }
        for m in SECONDS
    }
    rows = {}
    for task in dict.fromkeys(item.task for item in items):
        mine = [item for item in items if item.task == task]
        rows[task] = measure_items(mine, answers, CHECKERS[task], "correct")
    shapes = {"base": (20.0, 5), "student": (9.0, 3)}
    losses = {
        model: {
            item.id: AnswerLoss(loss=loss + k % n, tokens=20, hits=15 - n + k % n)
            for k, item in enumerate(items)
        }
        for model, (loss, n) in shapes.items()
    }
    certainty = Certainty(samples=500)
    settings = {"items": 24, "documents": 24, "max_new_tokens": 20}
    settings |= {"teacher_temperature": 0.0, "teacher_sees_more": False}
    write_records(run.path("requests.jsonl"), requests_of(items, answers, rows.values()))
    model = {"name": HOSTILE, "hub_id": None, "revision": None, "sha256": HASH}
    model["template_hash"] = "t"
    models = {"teacher": model, "base": model, "student": {**model, "adapter_sha256": HASH}}
    alike = measure_items(items, answers)
    return plain_numbers(
        {
            "models": models,
            **results.results_of(rows, certainty).tree(),
            "agreement": results.agreement_of(alike, items, losses, certainty),
            "lengths": {m: results.answer_lengths(list(a.values())) for m, a in answers.items()},
            "samples": list(results.samples(rows.values(), alike, answers)),
            "settings": {**certainty._asdict(), **settings},
            "corpus": {"corpus_sha256": HASH, "python": "3.11.9", "documents": 9},
            "environment": {"distill": "0", "libraries": {"torch": "2"}, "processor": "p", **GPU},
        }
    )


def make_run(
    folder: Path,
    correct: dict[str, int] | None = None,
    checked: bool = True,
    machine: str | None = "cpu-2-core",
    history: int = 30,
) -> Run:
    tree = {
        "name": "made-up", "runs": str(folder), "corpus": {"source": "python-docs"},
        "teacher": {"model": "some/teacher"}, "student": {"model": "some/student"},
        "evaluation": {"machine": machine},
    }  # fmt: skip
    run, items = Run(Config.model_validate(tree)), make_items(checked=checked)
    measured = evaluation(items, correct or {"teacher": 22, "base": 3, "student": 19}, run)
    write_json(run.path("evaluation.json"), measured)
    steps = [{"step": s, "loss": 2 / (1 + s)} for s in range(history)]
    training = {"history": steps, "validation": steps[::10], "best_step": 20, "steps": history}
    write_json(run.path("training.json"), training)
    counts = {"kept_train": 80, "kept_validation": 5, "kept_heldout": 24}
    funnel = {"prompts": 120, "answers": 120, **counts, "dropped": {HOSTILE: 11}, "tasks": {}}
    write_json(run.path("funnel.json"), funnel)
    write_json(run.path("config.json"), run.config.resolved())
    ledger = [LedgerEntry(stage=s, started="t", seconds=60) for s in ("generate", "train")]
    write_records(run.path("ledger.jsonl"), ledger)
    return run


def add_suites_and_judge(run: Run, passed: bool = True, flagged: int = 3) -> Run:
    """Add what a full evaluation measures: suites, a judge, contamination, another harness."""
    measured = read_json(run.path("evaluation.json"))
    tasks, overall = measured["tasks"], measured["overall"]
    contamination = {
        "n": 24, "flagged": flagged, "unsearchable": 1, "kinds": {},
        "rate": {"mean": flagged / 24, "low": 0.0, "high": 0.2},
        "all_items": {"tasks": tasks, "overall": overall} if flagged else None,
        "examples": [{"phrase": HOSTILE}], "method": "A paraphrase or a translation is not found.",
    }  # fmt: skip
    probes = load_probes()
    outcomes = {"null": 0.0, "injected": 0.0 if passed else 1.0, "copy": 0.5}
    verdict = Score(item_id="i", model="m", value=None, answer="A/B", reason="r")
    values = [outcomes[probe.probe or ""] for probe in probes]
    probe = examined([verdict.model_copy(update={"value": v}) for v in values])
    duels = [Duel(str(k), str(k), (), "aa", "ab", None) for k in range(24)]
    wins = [verdict.model_copy(update={"value": 1.0 if k % 3 else 0.0}) for k in range(24)]
    row = row_of_duels(duels, wins, Certainty(samples=500))
    if not passed:  # the judge obeys an answer
        row = DuelRow(win_rate=Difference(mean=None, reason=f"{probe.reason} {HOSTILE}"))
    judge = {"model": HOSTILE, "warnings": [f"one family {HOSTILE}"], "probe": probe}
    suite = {"tasks": tasks, "overall": overall, "description": HOSTILE}
    measured["suites"] = {
        "forgetting": {**suite, "contamination": contamination},
        "w" * 90 + HOSTILE: suite,
    }
    measured |= {"judge": {**judge, "teacher": row, "base": row}, "contamination": contamination}
    write_json(run.path("evaluation.json"), plain_numbers(measured))
    tasks = {HOSTILE: {"n": 9, "metrics": {"acc": {"value": 0.5, "stderr": None}}}}
    harness = {"harness": "lm-eval 1", "adapter_sha256": HASH, "tasks": tasks}
    write_json(run.path("lm_eval.json"), harness)
    return run


def plain_run(folder: Path) -> Run:
    return add_tries(add_suites_and_judge(make_run(folder)))


def add_tries(run: Run) -> Run:
    """Add eight tries: a choice for the task with a check, for the other a reason."""
    measured, requests = read_json(run.path("evaluation.json")), run.path("requests.jsonl")
    values = {"value": 0.75, "low": 0.6, "high": 0.9, "n": 12, "clusters": 12}
    gain = {"mean": 0.25, "low": 0.1, "high": 0.4, "n": 12, "clusters": 12}
    row = {"n": 12, "metric": "correct", "student": {**values, "value": 0.5}, "choice": values}
    row |= {"choice_minus_student": gain, "any_right": {**values, "value": 0.9}}
    none = {"n": 12, "metric": "chrF", "reason": f"no check {HOSTILE}"}
    tasks = {"math_word_problem": {**row, "way": "vote"}, HOSTILE: none}
    write_json(
        run.path("evaluation.json"),
        {**measured, "tries": {"n": 8, "temperature": 0.7, "tasks": tasks, "overall": row}},
    )
    rows = read_records(requests, HeldOutRequest)
    total = Usage(input_tokens=400, output_tokens=160, seconds=3.2)
    rows[1::2] = [r.model_copy(update={"usage": {**r.usage, "tries": total}}) for r in rows[1::2]]
    write_records(requests, rows)
    return run


def poor_run(folder: Path) -> Run:
    """No checker, no price, hardly any training, a judge that was fooled."""
    run = make_run(folder, checked=False, machine=None, history=1)
    return add_suites_and_judge(run, passed=False, flagged=0)


def reported(run: Run) -> tuple[dict[str, Any], str, str]:
    """Make the report and return scorecard, Markdown and page, hard spaces made plain."""
    report.main(run)
    texts = (run.path(name).read_text("utf-8") for name in ("scorecard.md", "report.html"))
    text, page = (text.replace("\u00a0", " ") for text in texts)
    return read_json(run.path("scorecard.json")), text, page


def test_the_scorecard_has_what_is_promised(tmp_path: Path) -> None:
    card, text, page = reported(make_run(tmp_path))
    for model in ("teacher", "base", "student"):
        assert card["models"][model]["sha256"] == HASH and card["models"][model]["template_hash"]
        cost = card["cost"][model]
        assert cost["seconds_per_1k"] > 0 and cost["dollars_per_1k"] > 0
    row, agreement = card["tasks"]["math_word_problem"], card["agreement"]
    assert row["metric"] == "correct" and row["n"] == 12 and row["unscored"] == 0
    assert row["teacher"] == pytest.approx(11 / 12, abs=1e-5)
    for name in ("student_minus_teacher", "student_minus_base"):
        assert row[name]["low"] < row[name]["mean"] < row[name]["high"]
    gap = row["gap_recovered"]
    assert gap["low"] < gap["value"] < gap["high"]
    assert agreement["chrf"]["teacher"] is None and agreement["nats_per_token"]["teacher"] is None
    assert agreement["nats_per_token"]["student_minus_base"]["high"] < 0
    assert card["cost"]["distillation"]["seconds"] == 120
    assert card["corpus"]["python"] == "3.11.9" and card["training"]["validation_loss_best"]
    heads = [re.sub("<.*?>", "", h) for h in re.findall("<(?:h1|dt).*?>(.*?)</(?:h1|dt)>", page)]
    assert heads[1:5] == ["Quality", "Cost", "What it saves", "Compared"], "the answer comes first"
    for words in (
        *("the same 24 held-out prompts from 24 documents", " points [", "pay it back"),
        *(" items reliably show a difference of ", "NVIDIA L4, driver 580.65, CUDA 13.0"),
    ):
        assert words in page and words in text, words
    assert "McNemar p" in page and "could have shown" in page
    assert re.search(r"(undecided|not inferior|inferior) \(5 %\)", page)


def test_every_null_of_tasks_and_costs_has_its_reason(tmp_path: Path) -> None:
    card, text, page = reported(
        make_run(tmp_path, {"teacher": 5, "base": 5, "student": 5}, machine=None)
    )

    def nulls(tree: Any, path: str) -> list[str]:
        if isinstance(tree, dict):
            return [p for k, v in tree.items() for p in nulls(v, f"{path}.{k}")]
        return [path] if tree is None else []

    for part in ("tasks", "agreement", "cost"):
        for path in nulls(card[part], part):
            explained = any(path.startswith(known) for known in card["reasons"])
            assert explained or path.endswith(("price", ".reason")), path
    assert "undecided" in card["reasons"]["tasks.math_word_problem.gap_recovered"]
    assert "what it saves is not known" in page and "what it saves is not known" in text
    assert ">$0" not in page


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
        source = self.get_starttag_text() or ""
        if tag not in ("meta", "br", "link", "img") and not source.endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("make", [plain_run, poor_run])
def test_hostile_texts_forge_nothing_and_the_page_loads_nothing(tmp_path, make):
    """H8"""
    _, text, page = reported(make(tmp_path))
    seen = Tags()
    seen.feed(page)
    assert seen.open == [] and "script" not in seen.tags and "svg" in seen.tags
    assert seen.loads == [] and "url(" not in page and "@import" not in page
    assert "alert(&#39;x&#39;)" in page and "<script>" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "viewport" in page
    for rank in ("best", "typical", "worst"):
        assert f"<h3>{rank}<" in page
    levels = [int(level) for level in re.findall(r"<h([1-4])", page)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    pictures = re.findall(r"<[^>]*role=\"img\"[^>]*>", page)
    assert pictures and all(re.search('aria-label="[^"]{9,}', p) for p in pictures)
    assert page.count("<table") == page.count("<tbody") and 'scope="row"' in page
    assert "<script" not in text and "[a](b)" not in text and "\nand a new line" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {5, 6, 7, 8, 9, 11}


def test_suites_judge_contamination_and_other_harnesses_are_shown(tmp_path: Path) -> None:
    card, text, page = reported(plain_run(tmp_path))
    for words in (
        *("What it forgot", "What a judge prefers", "What another harness found", "one family"),
        "Which one the judge prefers is undecided: the interval includes 50 %",
        *("3 of 24 items", "not found in the training data", "all items", "is not found"),
    ):
        assert words in page, words
    assert "passed its" in page and "67 % [46 %, 83 %]" in text
    (worst,) = card["failures"]["worst"][:1]
    assert worst["task"] == "math_word_problem" and worst["asked"].endswith("and a new line")


def test_several_tries_have_rows_of_their_own(tmp_path: Path) -> None:
    card, text, page = reported(add_tries(make_run(tmp_path)))
    for words in (
        "passes 75 % of 12 checks, and with one greedy answer 50 %: +25.0 points [+10.0, +40.0]",
        "tries help. At least one of the tries is right in 90 %, which no choice can exceed.",
        "1,000 requests with 8 tries each take 53 min ($0.15), by the 12 of 24 requests that have",
    ):
        assert words in text and words in page, words
    assert (
        "| student, 8 tries " in text
        and "all with a choice" not in text
        and "<h2>Several tries when served</h2>" in page
    )
    assert card["cost"]["tries"]["seconds_per_1k"] == 8 * card["cost"]["student"]["seconds_per_1k"]
    assert card["reasons"][f"tries.tasks.{HOSTILE}"].startswith("no check")
    before = make_run(tmp_path / "before")
    card, text, page = reported(before)
    assert "tries" not in card and "tries" not in card["cost"]
    assert "tries" not in text and "tries when served" not in page


def test_what_is_not_known_or_was_fooled_is_said(tmp_path: Path) -> None:
    card, text, page = reported(poor_run(tmp_path / "poor"))
    assert card["overall"] is None and "how good the student is, is not known" in text
    assert "is not known: no task has a checker" in page
    assert "is not used, so no win rate is given: the judge let" in page and "is not used" in text
    assert "How often the student" not in page and "the student against | " not in text
    assert card["reasons"]["judge.teacher.win_rate"].startswith("the judge let")
    assert "None of the 24 items was found" in page and "0.0 % to 20.0 % would be" in page
    page = reported(make_run(tmp_path / "none", {"teacher": 0, "base": 0, "student": 3}))[2]
    assert "None of the teacher’s answers pass" in page


def test_where_private_text_is_kept_no_sample_leaves_the_run(tmp_path: Path) -> None:
    run = plain_run(tmp_path)
    card, _, page = reported(run)
    assert "<pre>" in page and card["failures"]["worst"]
    corpus = run.config.corpus.model_copy(update={"private_text": "keep"})
    card, _, page = reported(Run(run.config.model_copy(update={"corpus": corpus})))
    assert "<pre>" not in page and "Left out: the corpus is used as it is" in page
    assert card["failures"]["worst"] == [] and "keep" in card["failures"]["reason"]
    assert '"examples": [' not in json.dumps(card)
    assert "failures" not in card["tasks"]["math_word_problem"]


def test_missing_answers_are_shown_both_ways_and_too_many_stop() -> None:
    items, checker = make_items(60)[1::2], CHECKERS["math_word_problem"]
    answers = {m: {i.id: answered(i, m, f"#### {i.reference}") for i in items} for m in SECONDS}
    del answers["student"][items[0].id]
    row = results.row_of(measure_items(items, answers, checker, "correct"), Certainty(samples=200))
    assert row.unscored == 1 and row.student == 1.0
    counted = row.if_missing_counts_against_student
    assert counted and counted.student == pytest.approx(29 / 30)
    assert counted.student_minus_teacher.value == pytest.approx(-1 / 30)
    del answers["student"][items[1].id], answers["student"][items[2].id]
    with pytest.raises(DistillError) as caught:
        results.row_of(measure_items(items, answers, checker, "correct"), Certainty(samples=200))
    assert caught.value.code == Exit.EVALUATION


def test_plots_stay_in_their_frame_and_have_round_ticks(tmp_path: Path) -> None:
    assert ticks(0, 100) == [0, 25, 50, 75, 100]
    assert ticks(0.0, 0.05, 5) == [0, 0.01, 0.02, 0.03, 0.04, 0.05]
    mean = MetricRow(metric="correct", student=0.5, intervals={"student": (0.4, 0.6)})
    cost = Costs(student=RequestCost(dollars_per_1k=0.02))
    plot = quality_against_cost(Scorecard(overall=mean, cost=cost))
    assert plot and plot.words.endswith("student at $0.02: 50 (40 to 60)")
    page = reported(make_run(tmp_path))[2]
    assert all(0 <= float(x) <= WIDTH for x in re.findall(r' c?x[12]?="([\d.]+)"', page))
    assert page.count("<polyline") == 3 and page.count('<circle class="dot student"') == 2
    assert training_curve([(1, 1.0)], []) is None
    assert training_curve([(1, 1.0), (2, 1.0)], []), "a flat loss still draws"


def test_readme_and_docs_hold_what_the_scorecards_say() -> None:
    counts: dict[str, int] = {}
    for page in tables.pages(ROOT):
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- scorecard: ") == text.count("<!-- end of scorecard -->")
        assert tables.fill(text, ROOT) == text, f"{page.name}: run scripts/tables.py"
        counts[page.name] = text.count("<!-- scorecard: ")
    assert counts["README.md"] == counts["evidence.md"] == 1 and counts["measured.md"] == 2


def test_a_readme_is_filled_from_any_scorecard(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    report.main(run)
    head = "<!-- scorecard: made-up/scorecard.json quality saves judge -->"
    text = f"before\n{head}\nold\n<!-- end of scorecard -->\nafter"
    once = tables.fill(text, tmp_path)
    assert once.startswith(f"before\n{head}\n> |") and "\n> ## What it saves\n" in once
    assert "old" not in once and tables.fill(once, tmp_path) == once
    for other in ("nothing.json quality", "made-up/scorecard.json poem"):
        wrong = text.replace("made-up/scorecard.json quality saves judge", other)
        with pytest.raises(DistillError):
            tables.fill(wrong, tmp_path)
