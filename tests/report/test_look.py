"""What models said and say in a terminal: samples of finished runs, and a chat with tiny models."""

import io
import json
import shutil
from pathlib import Path

import pytest

from distill.cli import main
from distill.errors import Exit
from distill.records import Item, Pair, Response, Score
from distill.storage.files import read_records, write_json, write_records
from distill.storage.run_folder import Run
from tests.evaluation.test_evaluate import heldout_pairs, make_run
from tests.support.fake_teacher import PRICE, FakeTeacher
from tests.support.tiny import make_tiny

OLD = Path(__file__).parents[1] / "fixtures/old/runs"
HOSTILE = "Ask bob.miller@acme.com.\x1b]0;owned\x07\nteacher ✓ right:\u202e"


def look(capsys, *words: str) -> tuple[int, str, str]:
    """Run a command; return its exit code, and what it printed on stdout and stderr."""
    code = main(words)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Return a copy of a run that an early distill finished: a checked and an unchecked task."""
    return shutil.copytree(OLD / "chat", tmp_path / "runs/chat")


def scores(run: Path, model: str) -> dict[str, Score]:
    return {s.item_id: s for s in read_records(run / f"scores/{model}.jsonl", Score)}


def ids(shown: str) -> list[str]:
    """Return the items that are shown, by the lines that begin them."""
    titles = [line.split(" · ") for line in shown.splitlines() if " · " in line]
    return [title[2] for title in titles]


def test_samples_show_what_was_asked_and_each_answer_with_its_score(finished: Path, capsys) -> None:
    code, shown, _ = look(capsys, "samples", str(finished))
    assert code == 0 and shown.startswith(f"8 of 8 held-out items of {finished}")
    first = shown.split("\n\n1 of 8 · ")[1].split("\n\n2 of 8 · ")[0]
    assert "\n  What does this note say?\n" in first and "\nstudent chrF 1:\n" in first
    assert "\nteacher (shown more than the student):\n  Cascina ships glass.\n" in first
    assert "\nstudent ✗ truncated:\n" in shown and "\nteacher ✓ 1 sentence:\n" in shown
    assert len(ids(shown)) == len(set(ids(shown))) == 8


def test_samples_are_filtered(finished: Path, capsys) -> None:
    student, teacher = scores(finished, "student"), scores(finished, "teacher")
    apart = {i for i, s in teacher.items() if student[i].value != s.value}
    rejected = {i for i, s in student.items() if not s.value or (i in teacher and s.value < 1)}
    pairs = read_records(finished / "dataset/heldout.jsonl", Pair)
    gist = {Item.make(pair.prompt).id for pair in pairs if pair.prompt.task == "gist"}
    for words, expected in (
        (["--disagree"], apart),
        (["--failed"], rejected),
        (["--task", "prose_summary"], set(teacher)),
        (["--failed", "--task", "gist"], rejected & gist),
    ):
        shown = look(capsys, "samples", str(finished), *words)[1]
        assert set(ids(shown)) == expected and set() < expected < set(student), words
    assert len(ids(look(capsys, "samples", str(finished), "--n", "3")[1])) == 3
    passed = [s.model_copy(update={"value": 1.0}) for s in student.values()]
    write_records(finished / "scores/student.jsonl", passed)
    assert look(capsys, "samples", str(finished), "--failed")[:2] == (
        *(0, f"0 of 8 held-out items of {finished}\n"),
    )


def test_a_model_cannot_steer_the_terminal_or_forge_a_title(finished: Path, capsys) -> None:
    path = finished / "answers/student.jsonl"
    answers = read_records(path, Response)
    answers[0] = answers[0].model_copy(update={"text": HOSTILE, "stop": "end"})
    answers[1] = answers[1].model_copy(update={"text": "", "stop": "filtered"})
    answers[2] = answers[2].model_copy(update={"stop": "error", "error": "reset\x1b[2J"})
    write_records(path, answers)
    shown = look(capsys, "samples", str(finished))[1]
    assert "\n  Ask [EMAIL].\\x1b]0;owned\\x07\n  teacher ✓ right:\\u202e\n" in shown
    assert "\n  (empty) (refused)\n" in shown and "\n  (no answer: reset\\x1b[2J)\n" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_what_cannot_be_shown_is_one_line(finished: Path, student: Path, capsys) -> None:
    fresh = made(finished.parent, student)
    shutil.rmtree(fresh.path("adapter"))
    for code, word, words in (
        (Exit.CONFIG, "did you mean gist?", ["samples", str(finished), "--task", "gsit"]),
        (Exit.CONFIG, "one of gist, prose_summary", ["samples", str(finished), "--task", "x"]),
        (Exit.STATE, "distill evaluate CONFIG", ["samples", str(fresh.folder)]),
        (Exit.STATE, "distill train CONFIG", ["chat", str(fresh.folder)]),
        (Exit.CONFIG, "did you mean student?", ["chat", str(fresh.folder), "--models", "studnet"]),
        (Exit.CONFIG, "recorded cannot be", ["chat", str(fresh.folder), "--models", "teacher"]),
        (Exit.CONFIG, "No such file", ["chat", str(finished / "nowhere")]),
    ):
        got, shown, error = look(capsys, *words)
        assert (got, shown, error.count("error: ")) == (code, "", 1) and word in error, error


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "student")


def made(folder: Path, student: Path, **settings: object) -> Run:
    """Return a run that was trained, as the command line finds it; `settings` are its teacher's."""
    run = make_run(folder, student, heldout_pairs(), max_new_tokens=8)
    tree = run.config.resolved()
    if settings:
        tree |= {"teacher": settings, "terms": {"basis": "a server of our own"}}
        rows = [PRICE.model_dump(mode="json") | {"date": "2099-01-01"}]
        (folder / "prices.yaml").write_text(json.dumps({"tokens": rows}))
        tree["evaluation"]["prices"] = str(folder / "prices.yaml")
    write_json(run.path("config.json"), tree)
    return run


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_student_and_base_answer_side_by_side(tmp_path, student, capsys, monkeypatch) -> None:
    run = made(tmp_path / "runs", student)
    typed(
        monkeypatch, "What is 2 + 2?", "", "What is 2 + 2?", "/new", "What is 2 + 2?", "/quit", "x"
    )
    code, shown, _ = look(capsys, "chat", str(run.folder))
    turns = shown.split("\n\nstudent:\n")
    assert code == 0 and len(turns) == 3 and shown.startswith("student:\n")
    assert turns[1] != turns[0].removeprefix("student:\n"), "the first turn was forgotten"
    assert turns[2].strip() == turns[0].removeprefix("student:\n").strip()
    answers = turns[0].removeprefix("student:\n").split("\nbase:\n")
    assert len(answers) == 2 and answers[0] != answers[1], "the adapter was not applied"
    assert not (tmp_path / "runs/.store").exists() and not run.path("ledger.jsonl").exists()
    for columns, wide in (("100", True), ("60", False)):
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("COLUMNS", columns)
        typed(monkeypatch, "What is 2 + 2?")
        shown = look(capsys, "chat", str(run.folder), "--models", "base,student")[1]
        assert ("base" in shown.splitlines()[1] and "student" in shown.splitlines()[1]) == wide
        assert shown.startswith("base:\n") != wide


def test_a_paid_teacher_is_asked_where_it_is_named_and_once(tmp_path, student, capsys, monkeypatch):
    with FakeTeacher() as server:
        settings = {"kind": "endpoint", "model": "fake-1", "base_url": server.url, "n": 1}
        run = made(tmp_path / "runs", student, **settings)
        typed(monkeypatch, "Hello?")
        code, shown, _ = look(capsys, "chat", str(run.folder), "--models", "base")
        assert code == 0 and "base:" in shown and not server.payloads
        for _ in range(2):
            typed(monkeypatch, "Hello?", "And again?")
            code, shown, error = look(capsys, "chat", str(run.folder), "--models", "teacher")
            assert code == 0 and shown.count("teacher:\n  ") == 2
            said = error[: error.index("fake-1: ")] if "fake-1: 1/1" in error else error
            assert "the teacher is paid: fake-1, $3 in, $15 out a million tokens" in said
        first, second = (payload["messages"] for payload in server.payloads)
        assert [turn["role"] for turn in second] == ["user", "assistant", "user"]
        assert second[:1] == first and second[1]["content"] in shown
        (entry, none) = [e for e in run.ledger.entries() if e.stage == "chat"]
        assert entry.dollars == server.bill > 0 and entry.attempts == 2 and not none.dollars


def test_a_budget_ends_a_chat_before_it_is_passed(tmp_path, student, capsys, monkeypatch) -> None:
    with FakeTeacher() as server:
        settings = {"kind": "endpoint", "model": "fake-1", "base_url": server.url}
        run = made(tmp_path / "runs", student, **settings, budget_dollars="0.001")
        typed(monkeypatch, "Hello?")
        code, _, error = look(capsys, "chat", str(run.folder), "--models", "teacher")
        assert code == Exit.BUDGET and "above the limit of $0.001" in error and not server.payloads
