"""The record's comparison: two equal sides show no difference, and a planted one is found, named
and told from a stated one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from scripts import record

OLD = Path(__file__).parent / "fixtures/old/runs"
RUNS = ("chat", "completions", "local", "soft")
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """Return a copy of the old runs; both sides have the same samples."""
    shutil.copytree(OLD, tmp_path / "new")
    for name in RUNS:
        (tmp_path / "new" / f"{name}.samples.json").write_text('{"a:1": [[1, 2], [0.0, 1.0]]}')
    return tmp_path / "new"


def compared(name: str, new: Path) -> dict[str, record.Row]:
    """Hold a run against the old one."""
    old = new.parent / "old"
    if not old.exists():
        old.mkdir()
        for run in RUNS:
            (old / run).symlink_to(OLD / run)
            (old / f"{run}.samples.json").write_text('{"a:1": [[1, 2], [0.0, 1.0]]}')
    return {row.what: row for row in record.Run(name, old / name, new / name).compare()}


def kinds(name: str, new: Path) -> set[tuple[str, str]]:
    """Return of each difference what was compared, and how it is explained."""
    rows = compared(name, new).values()
    return {(row.what, d.kind) for row in rows for d in row.differences}


def plant(path: Path, change: Change) -> None:
    """Change the first line of a file."""
    first, *others = path.read_text().splitlines(keepends=True)
    row = json.loads(first)
    change(row)
    path.write_text("".join([json.dumps(row) + "\n", *others]))


@pytest.mark.parametrize("name", RUNS)
def test_equal_sides_show_no_difference_in_many_values(new: Path, name: str) -> None:
    rows = compared(name, new)
    assert all(not row.differences for row in rows.values())
    empty = {what for what, row in rows.items() if not row.values}
    assert empty == (set() if name == "chat" else {"released weights"})


@pytest.mark.parametrize(
    ("name", "file", "change", "what"),
    [
        ("chat", "documents.jsonl", lambda row: row.update(text="other"), "documents"),
        ("chat", "questions.jsonl", lambda row: row.update(task="other"), "prompts"),
        ("chat", "responses.jsonl", lambda row: row.update(request_key="other"), "keys"),
        ("local", "responses.jsonl", lambda row: row.update(request_key="other"), "keys"),
        ("chat", "answers/base.jsonl", lambda row: row.update(request_key="other"), "keys"),
        (
            "chat",
            "dataset/train.jsonl",
            lambda row: row["response"].update(text="other"),
            "dataset",
        ),
        ("chat", "dropped.jsonl", lambda row: row.update(prompt_id="other"), "dataset"),
        ("chat", "answers/student.jsonl", lambda row: row.update(text="other"), "answers"),
        ("chat", "answers/readings/student.jsonl", lambda row: row.update(loss=1.0), "answers"),
        ("chat", "scores/student.jsonl", lambda row: row.update(value=0.5), "scores"),
        ("completions", "answers/judge/base.jsonl", lambda row: row.update(answer="A/A"), "scores"),
    ],
)
def test_a_planted_difference_is_unexplained(
    new: Path, name: str, file: str, change: Change, what: str
) -> None:
    plant(new / name / file, change)
    assert kinds(name, new) == {(what, "")}


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("soft/refined/adapter/adapter_model.safetensors", "adapter tensors"),
        ("chat/release/model.safetensors", "released weights"),
    ],
)
def test_one_changed_bit_of_a_tensor_is_unexplained(new: Path, file: str, what: str) -> None:
    content = bytearray((new / file).read_bytes())
    content[-1] ^= 1
    (new / file).write_bytes(content)
    assert kinds(file.split("/")[0], new) == {(what, "")}


def test_this_tree_makes_samples_of_a_dataset_whose_weights_are_the_answers(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD.parent, tmp_path / "side")
    side = record.Side("new", record.ROOT, folder)
    record.encode(side, {"soft": json.loads((OLD / "soft/config.json").read_text())})
    samples = json.loads((folder / "runs/soft.samples.json").read_text())
    rows = record.read_lines(OLD / "soft/dataset/train.jsonl")
    assert [name for name in samples if name.startswith("dataset/train")] == [
        f"dataset/train.jsonl:{number}" for number in range(1, len(rows) + 1)
    ]
    assert any(name.startswith("refined/round-1/dataset/train") for name in samples)
    for ids, weights in samples.values():
        assert len(ids) == len(weights) and 0 < sum(weights) < len(ids)


def test_a_split_that_moved_and_keys_of_models_in_folders_are_stated(new: Path) -> None:
    plant(new / "chat/documents.jsonl", lambda row: row.update(split=row["meta"].pop("split")))
    assert kinds("chat", new) == {("documents", "split")}
    for name in ("responses", "answers/teacher", "answers/base"):
        plant(new / f"soft/{name}.jsonl", lambda row: row.update(request_key="other", id="new"))
    assert kinds("soft", new) == {("keys", "folder")}
    plant(new / "local/answers/student.jsonl", lambda row: row.update(request_key="other"))
    assert kinds("local", new) == {("keys", "student")}


def test_words_are_free_and_numbers_of_a_report_are_no_words(new: Path) -> None:
    for file in ("scorecard.md", "release/README.md"):
        text = (new / "chat" / file).read_text()
        (new / "chat" / file).write_text(text.replace("answers", "replies").replace("3", "4"))
    plant(new / "chat/scores/base.jsonl", lambda row: row.update(reason="in other words"))
    assert kinds("chat", new) == {("reports", "wording"), ("scores", "wording")}
    listed = "\n".join(record.listing(list(compared("chat", new).values())))
    assert "replies" in listed and "UNEXPLAINED" not in listed


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "rounding"), ("bfloat16", "frequencies")])
def test_other_answers_are_stated_only_of_a_student_released_in_bfloat16(
    new: Path, dtype: str, kind: str
) -> None:
    plant(new / "chat/answers/student.jsonl", lambda row: row.update(text="other"))
    assert kinds("chat", new) == {("answers", "")}
    old = new.parent / "old/chat"
    old.unlink()
    shutil.copytree(OLD / "chat", old)
    for side in (old, new / "chat"):
        path = side / "release/model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
        models = json.loads((side / "answers/models.json").read_text())
        models["student"]["dtype"] = dtype
        (side / "answers/models.json").write_text(json.dumps(models))
    assert kinds("chat", new) == {("answers", kind)}
    plant(new / "chat/answers/base.jsonl", lambda row: row.update(text="other"))
    assert kinds("chat", new) == {("answers", kind), ("answers", "")}
