"""The filters: each reason, their order, rejection sampling, and the funnel that adds up."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distill.config.tree import Filters
from distill.errors import DistillError, Exit
from distill.evaluation.scorecard import Funnel
from distill.generation import filters
from distill.generation.filters import same_as
from distill.pipeline import STAGES
from distill.records import Document, Message, Pair, Prompt, Response, Split, Stop, Usage
from distill.report.tables import funnel_steps
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.run_folder import Run
from distill.training.inner_run import training_prompts
from tests.support.runs import make_run

JSON = json.dumps({"name": "f", "purpose": "p", "parameters": [], "returns": None})


def prompt(task: str = "chat", reference: str | None = None, text: str = "q") -> Prompt:
    return Prompt.make((Message(role="user", content=text),), "d", task, reference=reference)


def response(text: str, stop: Stop = "end", tokens: int = 5, sample: int = 0) -> Response:
    key = f"{text}"
    return Response(
        id=Response.make_id(key, sample),
        request_key=key,
        sample=sample,
        prompt_id="",
        model="m",
        text=text,
        stop=stop,
        usage=Usage(output_tokens=tokens),
    )


def reason(text: str, of: Prompt | None = None, stop: Stop = "end", **settings: Any) -> str | None:
    """Return the first reason that the filters give."""
    found = filters.active_filters(Filters(**settings))
    return next((why for f in found if (why := f(of or prompt(), response(text, stop)))), None)


CIRCLE = "The value is returned. " * 6


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *((text, "empty") for text in ("", "  \n", "```\n```", "```json\n\n```")),
        ("I'm sorry, but I can't assist with that request.", "refusal"),
        (CIRCLE, "repetition"),
        ("a b c d e f " * 20, "repetition"),
        ("-" * 200 + "\ntitle", None),  # a ruler
        ("\n".join(f"print(table[{i}])  # row {i}" for i in range(20)), None),
    ],
)
def test_the_text_alone_may_be_the_reason(text, why):
    assert reason(text) == why
    settings: dict[str, Any] = {why: False} if why else {}
    assert reason(text, **settings) is None


LABELS = ("neutral", "neutral", "positive", "neutral", "negative", "positive")
BOTTLES = "\n".join(
    f"{n} green bottles, hanging on the wall,\nand if one green bottle should accidentally fall,"
    for n in range(10, 0, -1)
)


@pytest.mark.parametrize(
    "text",
    [
        ", ".join(["neutral"] * 5),
        ", ".join(["neutral"] * 40),
        ", ".join(LABELS[n * n % 6] for n in range(80)),
        " + ".join(["1"] * 12) + " = 12",
        "12 = " + " + ".join(["1"] * 12),
        "\n".join(["0 0 0 0 0 0 1 0"] * 3 + ["0 0 0 1 0 0 0 0"] * 2),
        "```python\n" + "x = layer(norm(x))\n" * 12 + "```",
        json.dumps([{"label": "neutral", "score": 0.5, "source": "a"}] * 30),
        "Row, row, row your boat\nGently down the stream\n" * 3,
        "Baby shark, doo doo doo doo doo doo\n" * 3 + "Baby shark!",
        BOTTLES,
        "\n".join(f"| {n} | yes | no | yes |" for n in range(30)),
        "Ha" + "ha" * 20 + "!",
        "我是我\uff0c你是你。" * 3,
    ],
)
def test_what_repeats_for_a_reason_stays(text):
    """A12: sums, labels, matrices, code, JSON, songs and tables are no loops."""
    assert reason(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{n}. Check the logs for errors.\n" for n in range(1, 13)),
        "- Use a hash map here.\n" * 8,
        "It works like this. " + "First the file is opened and then it is read. " * 5 + "Done.",
        "the " * 80,
        "这个函数返回一个值。" * 8,
        "ฟังก์ชันคืนค่า " * 8,
        "الدالة تعيد قيمة واحدة. " * 8,
        "```python\n" + "print('again and again and again')\n" * 50,
    ],
)
def test_a_loop_is_dropped(text):
    """A12, A11: a turn of some words, again and again, in any script."""
    assert reason(text) == "repetition"


REFUSALS = json.loads(Path("tests/fixtures/refusals.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", REFUSALS)
def test_refusals_are_known_in_ten_languages(language):
    """A11: of ten or more refusals and helpful answers that look like one, each is told apart."""
    for text in REFUSALS[language]["refusals"]:
        assert reason(text) == "refusal", text
    for text in REFUSALS[language]["helpful"]:
        assert reason(text) is None, text


def test_another_table_of_refusals_makes_the_stage_stale(tmp_path, monkeypatch):
    run = with_answers(tmp_path, {"train": ["a"] * 3, "heldout": ["b", "c"]})
    (stage,) = (stage for stage in STAGES if stage.name == "filter")
    run.do(stage)
    marker = read_json(run.path(stage.marker))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/refusals.yaml").write_text("[]")
    assert run.state(stage) == ("stale", ["changed: table configs/refusals.yaml"])
    del marker["fingerprint"]["table configs/refusals.yaml"]  # as an earlier distill left it
    write_json(run.path(stage.marker), marker)
    assert run.state(stage) == ("done", [])
    assert filters.identity(Filters(refusal=False), "drop") == {}


def test_the_order_of_reasons_and_the_length():
    assert reason("", stop="length") == "truncated" and reason("", stop="error") == "failed"
    assert reason("x", stop="length", truncated=False) is None
    assert reason("five tokens, they say", max_answer_tokens=4) == "too long"
    assert reason("five tokens, they say", max_answer_tokens=5) is None


def test_formats_and_checkers():
    assert reason(JSON, prompt("api_json")) is None
    assert reason("```json\n" + JSON + "\n```", prompt("api_json")) is None
    assert reason("Here: " + JSON, prompt("api_json")) == "wrong format"
    assert reason("Here: " + JSON, prompt("api_json"), wrong_format=False) is None
    number = prompt("math_word_problem", reference="42")
    assert reason("so it is #### 42", number) is None
    assert reason("so it is #### 41", number) == "failed checker"
    for word in ("keep", False):  # as it was written once
        assert reason("so it is #### 41", number, failed_checker=word) is None
    assert reason("so it is 41", prompt("math_word_problem")) is None, "no reference, no verdict"
    assert reason("anything", prompt("a-task-without-a-file")) is None


def test_of_several_samples_all_that_pass_and_differ_stay():
    number = prompt("math_word_problem", reference="42")
    texts = ["it is 42", "it is 41", " it is 42", "6 * 7 = 42"]
    pairs = [Pair(prompt=number, response=response(t, sample=i)) for i, t in enumerate(texts)]
    dropped: list[filters.Dropped] = []
    kept = filters.sift(pairs, "train", filters.active_filters(Filters()), dropped)
    assert [pair.response.text for pair in kept] == ["it is 42", "6 * 7 = 42"]
    assert [row.reason for row in dropped] == ["failed checker", "same answer again"]


SAME = [
    ("The answer is **42**.", "the answer is 42"),
    ("**so *it* is** _so_", "So it is so"),
    ("Yes!", "yes"),
    ("a  b\nc\u00a0d", "A b c d"),
    ("\uff14\uff12 cafe\u0301s", "42 CAFÉS"),
    ("It costs $5.", "it costs $5"),
    ("答案是四十二\u3002", "答案是四十二"),
    ("```python\nx = 1\n```", "```\nx = 1  \n```"),
]
OTHER = [
    *(("3+4", "3-4"), ("2*3*4", "234"), ("2 * 3 * 4", "2 3 4"), ("10²", "102"), ("1½", "112")),
    *(("5!", "5"), ("n!", "n"), ("1, 2, ...", "1, 2"), ("3.5", "35"), ("He left?", "He left.")),
    *(("5 mW", "5 MW"), ("H2O", "h2o"), ("$x$ is it", "$X$ is it"), ("x = 1", "X = 1")),
    *(("`x`", "`X`"), ("print(x)", "print(X)"), ("ls -A", "ls -a"), ("x_i", "xi")),
    *(("__init__", "init"), ("```\nx\n```", "```\nX\n```")),
    ("if a:\n    b()\n    c()", "if a:\n    b()\nc()"),
    ("def f():\n    return 1", "def f():\n  return 1"),
]


@pytest.mark.parametrize(("texts", "same"), [(SAME, True), (OTHER, False)])
def test_answers_are_the_same_but_for_what_says_nothing(texts, same):
    wrong = [pair for pair in texts if (same_as(pair[0]) == same_as(pair[1])) != same]
    assert not wrong


def test_a_wrong_answer_stays_marked_and_takes_no_right_one_s_place():
    number = prompt("math_word_problem", reference="42")
    texts = ["it is 41", "It is **41**.", "6 * 7 = 42", "42", "so 40", "it is 42", "6 * 7 = 42."]
    pairs = [Pair(prompt=number, response=response(t, sample=i)) for i, t in enumerate(texts)]

    def sifted(split: Split, settings: Filters, **options: Any) -> tuple[dict, dict]:
        dropped: list[filters.Dropped] = []
        active = filters.active_filters(settings)
        rows = filters.sift(pairs, split, active, dropped, **options)
        marks = {pair.response.text: pair.only_signals for pair in rows}
        assert len(marks) == len(rows) == len(pairs) - len(dropped)
        return marks, {row.text: row.reason for row in dropped}

    again, more = "same answer again", "more than answers_per_prompt"
    right = dict.fromkeys(("6 * 7 = 42", "42", "it is 42"), False)
    soft = sifted("train", Filters(), soft=True)
    assert soft == (
        right | {"it is 41": True, "so 40": True},
        {"It is **41**.": again, "6 * 7 = 42.": again},
    )
    marks, reasons = sifted("train", Filters(), soft=True, most=4)
    assert marks == right | {"it is 41": True} and reasons["so 40"] == more
    marks, reasons = sifted("train", Filters(), most=2)
    assert [*marks] == ["6 * 7 = 42", "42"] and reasons["it is 42"] == more
    assert reasons["it is 41"] == reasons["so 40"] == "failed checker"
    marks, reasons = sifted("train", Filters(max_answer_tokens=4), soft=True)
    assert not marks and set(reasons.values()) == {"too long"}, "of other reasons each still counts"
    assert sifted("validation", Filters(failed_checker="keep"))[0]["it is 41"] is False


def test_the_stage_marks_in_the_train_split_alone_and_no_prompt_is_lost(tmp_path):
    answers: dict[Split, list[str]] = {
        "train": ["41", "42", ""],
        "validation": ["40", "42"],
        "heldout": ["39"],
    }
    run = with_answers(tmp_path, answers, "math_word_problem", "42")
    filters.main(run)
    plain, asked = run.path("dataset/train.jsonl").read_text(), training_prompts(run)
    assert "only_signals" not in plain + run.path("funnel.json").read_text()
    changes = {"filters": Filters(failed_checker="signals_only")}
    run.config = run.config.model_copy(update=changes)
    filters.main(run)
    pairs = read_records(run.path("dataset/train.jsonl"), Pair)
    assert [(p.response.text, p.only_signals) for p in pairs] == [("42", False), ("41", True)]
    assert run.path("dataset/train.jsonl").read_text().startswith(plain)
    assert training_prompts(run) == asked and len(asked) == 3, "a round asks each of them once"
    dropped = read_records(run.path("dropped.jsonl"), filters.Dropped)
    reasons = [(row.split, row.reason) for row in dropped]
    assert reasons == [("train", "empty"), ("validation", "failed checker")]
    funnel = Funnel.model_validate(read_json(run.path("funnel.json")))
    assert (funnel.kept_train, funnel.only_signals, funnel.kept_heldout) == (2, 1, 1)
    assert ("of them soft labels alone", 1, "kept") in funnel_steps(funnel)


def with_answers(
    folder: Path,
    answers: dict[Split, list[str]],
    task: str = "chat",
    reference: str | None = None,
) -> Run:
    """Return a run whose inputs hold the answers of each split."""
    run = make_run(folder)
    documents, prompts, responses = [], [], []
    for split, texts in answers.items():
        for place, text in enumerate(texts):
            document = Document.make(f"{split} {place}", "x", split=split)
            question = (Message(role="user", content=f"{split}?" if reference else "q"),)
            asked = Prompt.make(question, document.id, task, reference=reference)
            documents.append(document)
            prompts.append(asked)
            responses.append(response(text).model_copy(update={"prompt_id": asked.id}))
    write_records(run.path("documents.jsonl"), documents)
    write_records(run.path("prompts.jsonl"), prompts[:1])
    write_records(run.path("questions.jsonl"), prompts[1:])
    write_records(run.path("responses.jsonl"), responses)
    return run


def test_the_stage_keeps_reasons_and_counts(tmp_path, capsys):
    answers: dict[Split, list[str]] = {
        "train": ["a", "", "b"],
        "validation": ["", "c"],
        "heldout": ["", "I cannot help."],
    }
    run = with_answers(tmp_path, answers)
    filters.main(run)
    sizes = {
        split: len(read_records(run.path(f"dataset/{split}.jsonl"), Pair)) for split in answers
    }
    assert sizes == {"train": 2, "validation": 1, "heldout": 2}, "held-out is never filtered"
    dropped = read_records(run.path("dropped.jsonl"), filters.Dropped)
    assert Counter((d.split, d.reason) for d in dropped) == {
        ("train", "empty"): 1,
        ("validation", "empty"): 1,
    }
    funnel = read_json(run.path("funnel.json"))
    assert funnel["answers"] == sum(sizes.values()) + sum(funnel["dropped"].values())
    assert funnel["prompts"] == 7 and funnel["kept_train"] == 2
    said = capsys.readouterr().err
    assert "filter: 7 answers; 2 kept for train; 1 kept for validation; 2 kept" in said


def test_no_row_left_names_the_biggest_reason(tmp_path):
    run = with_answers(tmp_path, {"train": ["", "", "I cannot help."], "heldout": ["x"]})
    with pytest.raises(DistillError, match="no row is left: 2 of 4 were empty") as caught:
        filters.main(run)
    assert caught.value.code == Exit.INPUT
    assert run.path("dropped.jsonl").exists() and run.path("funnel.json").exists()


def test_reasoning_is_trained_on_where_that_is_asked():
    plain = Pair(prompt=prompt(), response=response("a"))
    thought = plain.response.model_copy(update={"reasoning": "hm", "text": "b"})
    pairs = [plain, Pair(prompt=prompt(), response=thought)]
    for keep, texts in ((False, ["a", "b"]), (True, ["a", "<think>\nhm\n</think>\n\nb"])):
        assert [p.response.text for p in filters.sift(pairs, "train", [], [], keep)] == texts


def test_what_holds_a_held_out_prompt_is_not_trained_on(tmp_path):
    question = "In which year did the town on the river get its second bridge, and who paid for it?"
    answers: dict[Split, list[str]] = {
        "train": ["fine", f"You ask: {question.upper()} In 1907."],
        "heldout": ["x"],
    }
    run = with_answers(tmp_path, answers)
    prompts = read_records(run.path("questions.jsonl"), Prompt)
    asked = prompts[-1].model_copy(update={"messages": (Message(role="user", content=question),)})
    write_records(run.path("questions.jsonl"), [*prompts[:-1], asked])
    filters.main(run)
    (dropped,) = read_records(run.path("dropped.jsonl"), filters.Dropped)
    assert dropped.reason == "holds a held-out item" and "1907" in dropped.text
    assert len(read_records(run.path("dataset/heldout.jsonl"), Pair)) == 1
