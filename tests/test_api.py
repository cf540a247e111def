"""`distill.run`: the example of docs/python.md, and what other processes do with its run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import distill
from distill.callables import find, provided, source_hash
from distill.errors import DistillError, Exit
from distill.evaluation.scorers import compares_with_answer
from distill.records import Message, Prompt
from distill.tasks.checkers import check, validate
from distill.verify import verify
from tests.support.tiny import make_tiny

DOC = (Path(__file__).parent.parent / "docs/python.md").read_text()
OVERRIDES = ["train.max_steps=2", "train.bf16=false", "evaluation.max_new_tokens=8"]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's folder after its program has run, with a tiny student in place of the real
    one."""
    folder = tmp_path_factory.mktemp("python")
    make_tiny(folder / "student")
    config, task = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)
    (folder / "lengths.yaml").write_text(config.replace("smollm2-135m-instruct", "./student"))
    (folder / "metres.yaml").write_text(task)
    (program,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    program = program.replace('["train.max_steps=4"]', repr(OVERRIDES))
    (folder / "example.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "runs/lengths" in done.stdout
    return folder


def again(folder: Path, change: str = "", to: str = "") -> str:
    """Run the example's program again, changed, and return what it printed."""
    text = (folder / "example.py").read_text()
    assert change in text
    (folder / "other.py").write_text(text.replace(change, to))
    done = subprocess.run(
        [sys.executable, "other.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def command(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "distill", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_example_runs_and_asks_nothing_again(example: Path) -> None:
    answers = (example / "runs/lengths/responses.jsonl").read_text()
    assert '"0.07 m"' in answers
    assert (example / "runs/lengths/scores/teacher.jsonl").read_text().count('"value":1.0') == 8
    assert "done before, reused" in again(example) and "Error" not in again(example)


@pytest.mark.slow
def test_another_body_of_the_same_name_is_stale(example: Path) -> None:
    said = again(example, "match[2] == unit", "match[2].lower() == unit")
    assert "stage filter was made with other settings: changed: checker units" in said
    said = again(example, "> 2 else", "> 3 else")
    assert "stage filter was made with other settings: changed: filter brief" in said
    said = again(example, "{centimetres / 100} m", "{centimetres / 100:.2f} m")
    assert "stage generate was made with other settings: changed: responder converter" in said


def test_a_process_without_the_functions_stops_by_name(example: Path) -> None:
    other = command(example, "run", "runs/lengths")
    assert other.returncode == Exit.CONFIG
    assert re.search(r"error: (filter brief|checker units|responder converter): ", other.stderr)
    assert command(example, "status", "runs/lengths").returncode == 0
    assert command(example, "report", "runs/lengths").returncode == 0


def test_verify_says_what_it_could_not_make_again(example: Path) -> None:
    checks = [c for c in verify(example / "runs/lengths") if c.state != "same"]
    assert {c.state for c in checks} == {"skipped"}, checks
    assert any("checker units is a function" in c.where for c in checks)


def test_a_checker_says_what_it_needs_and_never_fails_an_answer_by_raising() -> None:
    prompt = Prompt(
        id="p",
        messages=(Message(role="user", content="?"),),
        document_id="d",
        task="t",
        reference=None,
    )

    def grade(prompt: Prompt, text: str, most: int = 4) -> float:
        return len(text) / most

    grade.needs_reference = False  # type: ignore[attr-defined]
    with provided({"grade": grade}, (), {}):
        validate({"kind": "grade", "most": 4})
        assert check({"kind": "grade"}, prompt, "ab")[:2] == (False, "ab")
        assert check({"kind": "grade"}, prompt, "ab").value == 0.5
        assert check({"kind": "grade"}, prompt, "abcd").passed is True
        assert check({"kind": "grade"}, prompt, "abcde").passed is None  # no grade
        assert check({"kind": "grade", "most": 0}, prompt, "a").passed is None  # raises
        assert not compares_with_answer({"kind": "grade"})
        with pytest.raises(ValueError, match="checker grade"):
            validate({"kind": "grade", "least": 4})
    with pytest.raises(ValueError, match=r"distill\.run"):
        validate({"kind": "grade"})


def test_a_function_is_known_by_its_source_or_its_version() -> None:
    def first(prompt: Prompt, text: str) -> bool:
        return True

    def second(prompt: Prompt, text: str) -> bool:
        return False

    with provided({"a": first, "b": second, "c": len}, (), {}):
        assert source_hash("checker", "a") != source_hash("checker", "b")
        with pytest.raises(DistillError, match=r"c\.version"):
            source_hash("checker", "c")
        first.version = second.version = 3  # type: ignore[attr-defined]
        assert source_hash("checker", "a") == source_hash("checker", "b")
    with pytest.raises(DistillError, match="checkers="):
        find("checker", "a")
    with (
        pytest.raises(DistillError, match="define each with def"),
        provided({}, [lambda p, r: None], {}),
    ):
        pass


def test_a_filter_may_be_an_object_that_is_called(tmp_path: Path) -> None:
    class Brief:
        def __call__(self, prompt: Prompt, response: object) -> str | None:
            return None

    with pytest.raises(DistillError) as caught:  # the config is missing, and nothing else
        distill.run(tmp_path / "no.yaml", filters=[Brief()])
    assert caught.value.code == Exit.CONFIG and "no.yaml" in caught.value.where
