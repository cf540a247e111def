"""The amount of work: counted where the corpus can be read, by bytes and caps where not."""

import json
from pathlib import Path

import pytest

from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.planning.work import BYTES_A_TOKEN, TEMPLATE, count_work
from distill.storage.run_folder import Run
from tests.support.tiny import make_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def texts(tmp_path) -> Path:
    """Return a folder of a few texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    words = [f"w{n}" for n in range(3000)]
    for n in range(40):
        paragraph = " ".join(words[n * 70 : n * 70 + 70])
        (folder / f"{n}.txt").write_text(f"Chapter {n}. {paragraph}.\n")
    return folder


def shipped(name: str, *overrides: str) -> Run:
    return Run(load_config(ROOT / f"configs/{name}.yaml", overrides))


def of_folder(texts: Path, *overrides: str) -> Run:
    return shipped("folder", f"corpus.path={texts}", *overrides)


def test_the_quickstart_s_counts_are_exact_and_leave_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    work = count_work(shipped("quickstart"))
    assert work.prompts == {"train": 60, "validation": 6, "heldout": 30}
    assert work.documents >= 96 and work.all_prompts == 96 and not list(tmp_path.iterdir())


def test_tokens_are_counted_by_the_models_own_tokenizers(texts, tmp_path):
    model = make_tiny(tmp_path / "m")  # whose tokenizer has bytes for tokens
    work = count_work(of_folder(texts, f"teacher.model={model}", "student.model=some/model"))
    assert work.teacher.tokens == pytest.approx(work.teacher.bytes + TEMPLATE)
    assert work.student.tokens == pytest.approx(work.student.bytes / BYTES_A_TOKEN + TEMPLATE)


def test_a_large_corpus_is_counted_by_its_bytes(texts):
    run = of_folder(texts, "corpus.chunk={max_chars: 400, overlap_chars: 20}")
    read, unread = count_work(run), count_work(run, 1000)
    assert read.texts and not unread.texts
    assert read.documents / 2 < unread.documents < 2 * read.documents
    assert read.prompts["train"] / 2 < unread.prompts["train"] < 2 * read.prompts["train"]
    capped = count_work(of_folder(texts, "prompts.train=2"), 1000)
    assert capped.prompts["train"] == 2


def test_questions_that_the_teacher_writes_are_no_part_of_the_caps(texts):
    read = count_work(of_folder(texts, "prompts.train=2", "prompts.questions={per_document: 3}"))
    assert read.texts
    train = sum(document.split == "train" for document in read.texts[0])
    assert read.prompts["train"] == 2 + 3 * train


def test_answers_that_the_corpus_brings_have_their_own_length(tmp_path):
    turns = [(("user", f"Why {n}?"), ("assistant", "because " * 100)) for n in range(20)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["corpus.near_duplicate_threshold=null", "prompts.tasks=[]", "teacher.kind=recorded"]
    work = count_work(of_folder(tmp_path / "rows.jsonl", *words))
    assert work.answer_tokens == pytest.approx(100, rel=0.1)


def test_a_dataset_of_the_hub_is_counted_by_its_caps_alone():
    work = count_work(shipped("gsm8k"))
    assert work.prompts == {"train": 500, "validation": 400, "heldout": 1300} and not work.texts
    with pytest.raises(DistillError) as caught:
        count_work(shipped("gsm8k", "prompts.train=null"))
    assert caught.value.code == Exit.INPUT and "corpus.limit" in str(caught.value)
