"""The corpus stage: counts, repeats, bad rows, the split by document, changed inputs."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.corpus import corpus
from distill.corpus.corpus import deduplicate, split
from distill.corpus.readers import Reject
from distill.errors import DistillError, Exit
from distill.pipeline import STAGES
from distill.records import Document, Prompt, Response
from distill.storage.files import read_records, sha256_file
from distill.storage.run_folder import Run
from tests.support.errors import stops
from tests.support.runs import make_run

STAGE = STAGES[0]


def make(folder: Path, **keys: Any) -> Run:
    return make_run(folder, corpus={"path": folder / "in", "max_bad_fraction": 0.5} | keys)


def write_rows(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> None:
    (folder / "in").mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "in" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def documents(run: Run) -> list[Document]:
    return read_records(run.path("documents.jsonl"), Document)


def text(n: int, words: int = 40) -> str:
    return " ".join(f"word{n * 1000 + k}" for k in range(words))


def test_everything_that_is_read_is_kept_or_accounted_for(tmp_path):
    good: list[Any] = [{"text": text(n)} for n in range(30)]
    near = text(3, 38) + " more words"
    write_rows(
        tmp_path, [*good, {"text": text(2)}, {"text": near}, {"text": None}, "{", {"text": "x"}]
    )
    run = make(tmp_path, near_duplicate_threshold=0.8)
    assert run.perform(STAGE)
    rejects = read_records(run.path("rejects.jsonl"), Reject)
    assert {(r.where, r.bad) for r in rejects} == {
        ("rows.jsonl:31", False),
        ("rows.jsonl:32", False),
        ("rows.jsonl:33", True),
        ("rows.jsonl:34", True),
        ("rows.jsonl:35", True),
    }
    note = run.manifest()["corpus"]
    assert (note["rows"], note["kept"], note["bad"], note["repeats"]) == (35, 30, 3, 2)
    assert note["kept"] == len(documents(run)) == sum(note["splits"].values())
    assert len(note["corpus_sha256"]) == 64 and note["python"]


def test_chunks_of_one_document_are_in_one_split(tmp_path):
    write_rows(tmp_path, [{"text": text(n, 60)} for n in range(40)])
    run = make(tmp_path, chunk={"max_chars": 200, "overlap_chars": 20}, split={"heldout": 10})
    run.perform(STAGE)
    splits: dict[str, set[str | None]] = {}
    for document in documents(run):
        assert len(document.text) <= 200 and document.meta["chunks"] > 1
        splits.setdefault(document.meta["parent"], set()).add(document.split)
    assert len(splits) == 40 and all(len(found) == 1 for found in splits.values())
    assert Counter(found.pop() for found in splits.values())["heldout"] == 10


def test_a_limit_takes_the_same_documents_whatever_their_order(tmp_path):
    rows = [{"text": text(n)} for n in range(50)]
    write_rows(tmp_path, rows)
    first = make(tmp_path, limit=20)
    first.perform(STAGE)
    (tmp_path / "other").mkdir()
    write_rows(tmp_path / "other", rows[::-1])
    second = make(tmp_path / "other", limit=20)
    second.perform(STAGE)
    assert len(documents(first)) == 20
    assert {d.id for d in documents(first)} == {d.id for d in documents(second)}


def test_too_many_bad_rows_stop_and_show_the_first(tmp_path):
    write_rows(tmp_path, [{"text": text(n)} for n in range(98)] + ["{", "{"])
    run = make(tmp_path, max_bad_fraction=0.01)
    with pytest.raises(DistillError) as caught:
        run.perform(STAGE)
    assert len(read_records(run.path("rejects.jsonl"), Reject)) == 2
    assert caught.value.code == Exit.INPUT
    assert "2 of 100 rows are bad" in str(caught.value) and "rows.jsonl:99" in str(caught.value)
    assert "max_bad_fraction to 0.02" in caught.value.fix
    run = make(tmp_path, max_bad_fraction=0.02)
    run.remake([STAGE])
    assert run.perform(STAGE)


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe", b"{}\n"])
def test_nothing_usable_stops(tmp_path, content):
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / "a.jsonl").write_bytes(content)
    with stops(Exit.INPUT) as caught:
        make(tmp_path, max_bad_fraction=1.0).perform(STAGE)
    assert "\n" not in str(caught.value)


def test_a_changed_input_is_named(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path, [{"text": text(n + 100 * ord(name[0]))} for n in range(9)], name)
    run = make(tmp_path)
    run.perform(STAGE)
    assert run.state(STAGE) == ("done", [])
    (tmp_path / "in" / "a.jsonl").unlink()
    write_rows(tmp_path, [{"text": text(7)}], "b.jsonl")
    write_rows(tmp_path, [{"text": text(8)}], "c.jsonl")
    state, changes = run.state(STAGE)
    assert state == "stale"
    assert sorted(changes) == ["added: c.jsonl", "changed: b.jsonl", "removed: a.jsonl"]
    with stops(Exit.STATE) as caught:
        run.perform(STAGE)
    assert "c.jsonl" in str(caught.value)


@pytest.mark.parametrize("key", ["path", "dataset"])
def test_a_saved_dataset_is_a_corpus(tmp_path, key):
    rows = [{"text": text(n)} for n in range(9)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    run = make(tmp_path, **({"path": None} | {key: str(tmp_path / "saved")}))
    run.perform(STAGE)
    assert [d.text for d in documents(run)] == [row["text"] for row in rows]
    assert any("arrow" in name for name in corpus.identity(run.config.corpus))


def test_documents_that_share_text_with_held_out_ones_are_left_out_and_those_stay(tmp_path):
    rows = [{"text": text(n)} for n in range(30)]
    write_rows(tmp_path, rows)
    run = make(tmp_path, split={"heldout": 0.2})
    run.perform(STAGE)
    held_out = {d.id: d for d in documents(run) if d.split == "heldout"}
    stolen = " ".join(next(iter(held_out.values())).text.split()[7:20])
    thieves = [{"text": f"{text(n, 20)}, {stolen.upper()}; and"} for n in range(30, 34)]
    write_rows(tmp_path, [*rows, *thieves])
    run.remake([STAGE])
    run.perform(STAGE)
    sharing = [d.split for d in documents(run) if stolen in d.text.casefold()]
    assert set(sharing) == {"heldout"} and held_out.keys() <= {d.id for d in documents(run)}
    rejects = read_records(run.path("rejects.jsonl"), Reject)
    assert len(rejects) == 5 - len(sharing) == run.manifest()["corpus"]["contaminated"] > 0
    assert all(f"which is held out: {stolen}" in r.reason and not r.bad for r in rejects)
    assert run.manifest()["corpus"]["repeats"] == 0


def test_a_corpus_of_one_text_in_many_dresses_says_so(tmp_path):
    write_rows(tmp_path, [{"text": f"{text(n, 30)} {text(99, 20)}"} for n in range(3)])
    run = make(tmp_path, split={"heldout": 1, "validation": 0})
    with stops(Exit.INPUT, "share text with held-out ones"):
        run.perform(STAGE)


def document(text: str, source: str = "a", **meta: str) -> Document:
    return Document.make(text, source, meta)


def test_a7_ids_are_unique_within_a_file():
    """Two files whose ids both begin at 1; one id with two contents stops."""
    rows = [document(f"{file} {n}", f"{file}:{n}", id=str(n)) for file in "ab" for n in (1, 2)]
    assert deduplicate([*rows, rows[0]], []) == rows
    with stops(Exit.INPUT, "a:1") as caught:
        deduplicate([*rows, document("y", "a:3", id="1")], [])
    assert caught.value.where == "a:3"


def test_a5_two_answers_to_one_prompt_are_two_samples(tmp_path):
    """A5, to the responses; a row that repeats prompt and answer is a repeat."""
    rows = [{"prompt": f"Name the number {text(n, 4)}.", "completion": f"{n}"} for n in range(20)]
    more = [rows[3] | {"completion": " three\n", "model": "other/one"}, rows[3], rows[4]]
    write_rows(tmp_path, [*rows, *more])
    teacher = {"kind": "recorded", "model": "some/one", "license": "CC0-1.0"}
    sections = {"path": tmp_path / "in", "split": {"validation": 0, "heldout": 0}}
    run = make_run(tmp_path, corpus=sections, teacher=teacher)
    for stage in (one for one in STAGES[:4] if one.applies(run.config)):
        assert run.perform(stage)
    assert run.manifest()["corpus"]["repeats"] == 2
    responses = read_records(run.path("responses.jsonl"), Response)
    third = {p.id for p in read_records(run.path("prompts.jsonl"), Prompt) if p.reference == "3"}
    found = [(r.text, r.model) for r in responses if r.prompt_id in third]
    assert found == [("3", "some/one"), (" three\n", "other/one")] and len(responses) == 21


def test_a5_thousands_of_answers_to_one_prompt_take_linear_time():
    rows = [document("q", f"a:{n}", recorded_answer=f"{n % 20_000}") for n in range(20_100)]
    rejects: list[Reject] = []
    (one,) = deduplicate(rows, rejects)
    assert [answer["text"] for answer in one.recorded_answers] == [str(n) for n in range(20_000)]
    assert len(rejects) == 100


def test_a10_rows_that_cannot_be_used_are_counted_and_do_not_end_the_run(tmp_path, capsys):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    rows: list[Any] = [{"messages": [{"role": "user", "content": text(n)}]} for n in range(20)]
    write_rows(tmp_path, [*rows, *({"messages": [*row["messages"], call]} for row in rows[:9])])
    run = make(tmp_path, max_bad_fraction=0.0)
    assert run.perform(STAGE)
    assert (run.manifest()["corpus"]["rows"], run.manifest()["corpus"]["bad"]) == (29, 0)
    said = " ".join(capsys.readouterr().err.split())
    assert "corpus: 20 rows as OpenAI messages: messages → conversation" in said
    assert "corpus: 9 rows are left out: the answer calls a tool, or rests on what a tool" in said


IDS = [f"{n:032x}" for n in range(2000)]


def test_sizes_of_the_split_are_counts_or_shares_of_all():
    counts = Counter(split(IDS, 0, 24, 66).values())
    assert counts == {"train": 1910, "validation": 24, "heldout": 66}
    shares = Counter(split(IDS, 0, 0.1, 0.3).values())
    assert abs(shares["validation"] / 2000 - 0.1) < 0.025
    assert abs(shares["heldout"] / 2000 - 0.3) < 0.035
    # a share gets a document at least
    assert set(split(IDS[:5], 0, 0.001, 0.001).values()) == {"train", "validation", "heldout"}
    assert set(split(IDS[:5], 0, 0, 0).values()) == {"train"}


@settings(deadline=None)
@given(st.integers(0, 9), st.permutations(range(40)), st.integers(20, 39))
def test_new_documents_move_no_old_one(seed, order, count):
    ids = [IDS[n] for n in order]
    before, after = split(ids[:count], seed, 0.2, 0.3), split(ids, seed, 0.2, 0.3)
    if {"validation", "heldout"} <= set(before.values()):
        moved = [i for i in ids[:count] if before[i] != after[i]]
        assert len(moved) <= 2  # only documents that stood in for an empty share may go back


@pytest.mark.parametrize(
    ("count", "validation", "heldout"),
    [(3, 1, 2), (10, 0, 11), (1, 0.1, 0.1), (2, 0.1, 0.1), (0, 0, 0), (100, 0.6, 0.5)],
)
def test_too_few_documents_to_split_stop(count, validation, heldout):
    with stops(Exit.INPUT, "to train"):
        split(IDS[:count], 0, validation, heldout)


def test_the_committed_files_and_their_hashes():
    data = Path("data")
    table = (data / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| (\S+) \|.* ([0-9a-f]{64}) \|$", table, re.MULTILINE))
    files = [path for path in data.rglob("*") if path.is_file() and path.name != "README.md"]
    assert {path.relative_to(data).as_posix(): sha256_file(path) for path in files} == stated


def test_a_corpus_in_another_language_says_so(tmp_path, capsys):
    """A11: once, and what it means for the tasks."""
    letters = "のにはをたがでてとしれさいあるいるもこなまかよけどつわりみ日本人年大国会中上東学生"
    rows = [{"text": "".join(random.Random(n).choices(letters, k=90))} for n in range(9)]
    write_rows(tmp_path, rows)
    make(tmp_path, near_duplicate_threshold=None).perform(STAGE)
    said = " ".join(capsys.readouterr().err.split())
    assert "most documents are in Japanese; the shipped tasks ask in English" in said
