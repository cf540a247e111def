"""The published data set: its rows and card, who reads it back, what must stop it, its upload."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from distill.cli import main as distill
from distill.config.tree import Config
from distill.corpus import corpus, prompts
from distill.errors import DistillError, Exit
from distill.generation import filters, generate
from distill.publishing.dataset import main
from distill.reasoning import join_thought
from distill.records import Document, Pair, Prompt
from distill.storage.files import read_json, read_records, write_json, write_records
from distill.storage.run_folder import Run
from distill.training.soft_labels import capture
from distill.training.soft_labels.cache import SignalCache, SignalKey
from distill.training.soft_labels.labels import read_pairs
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import make_tiny
from tests.support.training import make_soft_run

PRIVATE = "Write to ann.smith@acme-mail.org, please."
NUMBERS = ("seven", "ochre", "a glacier", "the mill", "tar", "an atlas", "salt", "Boston")
LATER = "Two spaces at the end,  \n\nand a tab:\t1 < 2 & 'ü' \u2028 {} \U0001f600\n"
TURNS = [
    *({"role": "system", "content": "Be brief."}, {"role": "user", "content": "And 2 + 2?"}),
    *({"role": "assistant", "content": "4"}, {"role": "user", "content": "Half of it?"}),
]


def question_rows(**columns: Any) -> list[dict[str, Any]]:
    """Rows that are prompts with answers: long and short, with thoughts, of several turns."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"What do you know of {what}, case {n}?", "answer": f"{what}: {LATER}{n}"}
        for n in range(5)
        for what in NUMBERS
    ]
    rows[3]["reasoning"], rows[4]["model"] = "Well,\nwhat do I know?", "acme/other-teacher"
    rows[5]["answer"], rows[6]["reference"] = "I'm sorry, but I cannot help with that.", "ref"
    last = {"role": "assistant", "content": "Half of it is 2."}
    rows.append({"messages": [*TURNS, last]})
    rows[8]["model"] = "acme/first"  # and a second answer to the same
    rows.append({**rows[8], "answer": "seven is a number", "model": "acme/second"})
    return [{**row, **columns} for row in rows]


def stages(run: Run) -> Run:
    """Do all that makes a dataset."""
    write_json(run.path("config.json"), run.config.resolved())
    for stage in (corpus, prompts, generate, filters):
        stage.main(run)
    return run


def recorded(folder: Path, name: str, corpus: Path, **changes: Any) -> Run:
    tree: dict[str, Any] = {
        "name": name, "runs": folder / "runs", "store": folder / name,
        "corpus": {"path": corpus, "split": {"validation": 0.2, "heldout": 0.2}},
        "teacher": {"kind": "recorded", "model": "acme/teacher", "license": "CC-BY-4.0"},
        "student": {"model": str(make_tiny(folder / "student"))},
    }  # fmt: skip
    return Run(Config.model_validate({**tree, **changes}))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made_of(folder: Path, rows: list[dict[str, Any]], name: str = "first", **changes: Any) -> Run:
    return stages(recorded(folder, name, write_rows(folder / f"{name}.jsonl", rows), **changes))


@pytest.fixture
def run(tmp_path) -> Run:
    return made_of(tmp_path, question_rows())


def rows_of(folder: Path, part: str = "kept", split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / part / f"{split}.jsonl").open(encoding="utf-8")]


def splits_of(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.path("dataset").iterdir()}


def refused(run: Run, code: Exit, repository: str | None = None) -> DistillError:
    with pytest.raises(DistillError) as caught:
        main(run, repository)
    assert caught.value.code == code and "\n" not in str(caught.value)
    assert not run.path("release-dataset").exists()
    return caught.value


def test_recorded_answers_are_read_back_to_the_same_bytes(run, tmp_path):
    folder = main(run, heldout=True)
    again = stages(recorded(tmp_path, "again", folder / "raw"))
    assert len(splits_of(run)) == 3 and splits_of(again) == splits_of(run)
    assert any(row["dropped"] == "refusal" for row in rows_of(folder, "raw")), "of the first split"


def test_answers_about_documents_are_read_back_but_for_what_names_them(tmp_path):
    """What the reader cannot know: the documents, the tasks, and what the teacher saw of both."""
    (tmp_path / "notes").mkdir()
    for n, town in enumerate("Arvika Belmora Cascina Dunfell Eskilde Farsund Gavorrano".split()):
        text = f"# {town}\n\n{town} ships salt and {n} other goods, in boats of {n + 3} masts.\n"
        (tmp_path / f"notes/{town}.md").write_text(text)
    task = {
        "student": {"user": "What do you know of this? {{ document.text[:9] }}"},
        "teacher": {"system": "Be brief.", "user": "What does it say?\n\n{{ document.text }}"},
    }
    (tmp_path / "gist.yaml").write_text(json.dumps({"name": "gist", **task}))
    answers = write_rows(tmp_path / "answers.jsonl", [])
    run = recorded(
        tmp_path, "first", tmp_path / "notes", publish={"corpus_license": "CC0-1.0"},
        teacher={"kind": "canned", "answers": str(answers), "model": "acme/teacher"},
        prompts={"tasks": [str(tmp_path / "gist.yaml")]},
    )  # fmt: skip
    for stage in (corpus, prompts):
        stage.main(run)
    asked = read_records(run.path("prompts.jsonl"), Prompt)
    rows = [{"prompt": p.asked_of_teacher()[-1].content, "answer": f"{p.id}\n"} for p in asked]
    write_rows(answers, rows)
    folder = main(stages(run), heldout=True)
    assert rows_of(folder)[0]["teacher_prompt"][0] == {"role": "system", "content": "Be brief."}
    teacher = {"kind": "recorded", "model": "acme/teacher", "license": "CC0-1.0"}
    again = stages(recorded(tmp_path, "again", folder / "raw", teacher=teacher))

    def pairs(run: Run) -> dict[str, Pair]:
        files = run.path("dataset").iterdir()
        return {p.response.text: p for path in files for p in read_records(path, Pair)}

    before, after = pairs(run), pairs(again)
    assert len(before) == 7 and before.keys() == after.keys()
    differ = {"prompt": set[str](), "response": set[str]()}
    for text, pair in before.items():
        for part, names in differ.items():
            one, other = getattr(pair, part), getattr(after[text], part)
            names |= {n for n in type(one).model_fields if getattr(one, n) != getattr(other, n)}
    assert differ == {
        "prompt": {"id", "document_id", "task", "teacher_messages"},
        "response": {"id", "request_key", "prompt_id", "usage"},
    }


def test_datasets_loads_it_a_trainer_finds_its_columns_and_the_card_says_what_it_is(run, tmp_path):
    card = DatasetCard.load(main(run) / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert [config["config_name"] for config in data["configs"]] == ["kept", "raw"]
    assert [file["split"] for file in data["configs"][0]["data_files"]] == ["train", "validation"]
    for words in (
        *("acme/teacher", "the answers' license as stated: CC-BY-4.0", "| dropped: refusal"),
        *("Held-out rows are not in it", "masked here: none", "task chat: 36"),
    ):
        assert words in card.text
    folder = main(run, heldout=True)
    loaded: Any = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    raw: Any = load_dataset(str(folder), "raw", cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == list(raw) == ["train", "validation", "test"]  # `kept` is the default
    assert sum(raw.num_rows.values()) == 42 and raw["test"].num_rows == loaded["test"].num_rows
    assert sum(loaded.num_rows.values()) == 42 - sum(map(bool, raw["train"]["dropped"]))
    assert loaded["train"].to_list() == rows_of(folder)
    for split in loaded.values():
        assert split.features == loaded["train"].features == raw["train"].features
        for row in split:
            turns = [*row["prompt"], *row["completion"]]
            assert turns == row["messages"] and {*turns[0]} == {"role", "content"}
            assert [turn["role"] for turn in turns[-2:]] == ["user", "assistant"]
    rows = {row["prompt"][-1]["content"]: row for split in raw.values() for row in split}
    of = {what: rows[f"What do you know of {what}, case 0?"] for what in NUMBERS}
    assert len(rows["Half of it?"]["messages"]) == 5 and of["salt"]["reference"] == "ref"
    assert of["the mill"]["reasoning"] == "Well,\nwhat do I know?"
    assert of["tar"]["model"] == "acme/other-teacher"
    one = of["Boston"]
    assert one["completion"][0]["content"] == f"Boston: {LATER}0" and one["task"] == "chat"
    assert one["license"] == "CC-BY-4.0" and one["usage"]["estimated"] and one["stop"] == "end"


def test_wrong_answers_kept_for_soft_labels_carry_their_mark_in_every_row(tmp_path):
    task = {"student": {"user": "{{ prompt }}"}, "metric": "right", "checker": {"kind": "number"}}
    (tmp_path / "sum.yaml").write_text(json.dumps(task))
    rows = [
        {"prompt": f"{what} {n} + 1?", "answer": f"#### {n + 1 + (n % 3 == 0)}", "reference": n + 1}
        for n in range(6)
        for what in NUMBERS
    ]
    model = str(make_tiny(tmp_path / "student"))
    changes = {
        "prompts": {"tasks": [str(tmp_path / "sum.yaml")]},
        "filters": {"failed_checker": "signals_only"},
        "train": {"loss": {"forward_kl": 1}},
        "signals": {"model": model},
        "terms": {"basis": "ours"},
    }
    run = made_of(tmp_path, rows, **changes)
    train = read_records(run.path("dataset/train.jsonl"), Pair)
    wrong = {f"{p.prompt.id}-{p.response.sample}" for p in train if p.only_signals}
    assert 5 < len(wrong) < len(train) / 2
    folder = main(run, heldout=True)
    for part in ("kept", "raw"):
        loaded: Any = load_dataset(str(folder), part, cache_dir=str(tmp_path / "cache"))
        assert {row["id"] for row in loaded["train"] if row["only_signals"]} == wrong
        assert not any(row["only_signals"] for s in ("validation", "test") for row in loaded[s])
    card = (folder / "README.md").read_text()
    assert "| `only_signals` |" in card and f"| of them soft labels alone | {len(wrong)} |" in card


def test_private_text_is_masked_and_a_secret_stops_it_but_a_home_in_an_answer_does_not(
    tmp_path, monkeypatch
):
    rows = question_rows()
    for row in rows[:20]:
        row["answer"] += PRIVATE
    rows[20]["answer"] = f"Look into {Path.home()}/notes and /home/somebody/x, word-of-honour."
    run = made_of(tmp_path, rows)
    # answers are the teacher's own: what the corpus masked, it may know from elsewhere
    responses = run.path("responses.jsonl")
    text = responses.read_text(encoding="utf-8")
    assert "[EMAIL]" in text
    responses.write_text(text.replace("[EMAIL]", "ann.smith@acme-mail.org"), "utf-8")
    folder = main(run, heldout=True)
    text = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.jsonl"))
    assert "ann.smith" not in text and text.count("[EMAIL]") > 20 and "/home/somebody" in text
    assert "masked here: 20 email" in (folder / "README.md").read_text()
    monkeypatch.setenv("OUR_API_KEY", "word-of-honour")
    with pytest.raises(DistillError, match=r"holds the value of \$OUR_API_KEY"):
        main(run, heldout=True)
    assert (folder / "README.md").is_file(), "the last one stays"


def with_config(run: Run, **sections: Any) -> Run:
    return Run(Config.model_validate({**run.config.resolved(), **sections}))


def test_what_may_not_be_published_stops_it(run, tmp_path):
    unknown, forbidden = (
        {"kind": "recorded", "model": model} for model in ("acme/teacher", "openai/gpt-4o")
    )
    keep = {**run.config.resolved()["corpus"], "private_text": "keep"}
    own = {"basis": "our own model"}
    for code, what, sections in (
        (Exit.TERMS, "configs/terms.yaml does not know", {"teacher": unknown}),
        (Exit.TERMS, "states no license", {"teacher": unknown, "terms": own}),
        (Exit.TERMS, "3.3(e)", {"teacher": forbidden}),
        (Exit.PUBLISH, "no answers are published", {"corpus": keep}),
    ):
        assert what in refused(with_config(run, **sections), code).what
    reserved = made_of(tmp_path, question_rows(license="All rights reserved"), "other")
    assert "All rights reserved" in refused(reserved, Exit.TERMS).what
    run.path("documents.jsonl").unlink()
    assert "is missing" in refused(run, Exit.STATE).what


def test_each_row_has_the_license_that_it_states(tmp_path):
    rows = question_rows()
    for n, row in enumerate(rows):
        row["license"] = ("MIT", "ODC-By 1.0", "unknown")[n % 3]
    folder = main(made_of(tmp_path, rows, publish={"corpus_license": "CC0-1.0"}))
    assert {row["license"] for row in rows_of(folder)} == {"MIT", "ODC-By 1.0", "CC0-1.0"}
    data = DatasetCard.load(folder / "README.md").data.to_dict()
    assert data["license"] == ["cc0-1.0", "mit", "other"] and data["license_name"] == "odc-by-1.0"


def test_a_second_upload_is_a_new_commit_and_held_out_rows_go_with_it(run, tmp_path, monkeypatch):
    with fake_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path / "hub-cache")
        words = ["publish", str(run.folder), "--dataset", "--push", "me/answers"]
        assert distill([*words, "--heldout"]) == 0
        repository = hub.repositories["datasets/me/answers"]
        assert repository.private and "me/answers" not in hub.repositories
        assert {"kept/test.jsonl", "raw/test.jsonl"} <= repository.files.keys()
        assert distill(words) == 0 and distill(words) == 0
        assert len(repository.commits) == 3  # the empty one, and two: the last changed nothing
        assert list(repository.tags.values()) == [sha for sha, _ in repository.commits[1:]]
        assert [*repository.tags] == ["v1", "v2"]
        folder = run.path("release-dataset")
        mine = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        assert repository.files == {name: path.read_bytes() for name, path in mine.items()}
        assert '"me/answers", "kept"' in repository.files["README.md"].decode()


def test_the_thought_of_a_student_s_own_answer_stands_in_reasoning_alone(run):
    pair = read_records(run.path("dataset/train.jsonl"), Pair)[0]
    answer = {"id": "own", "text": join_thought("so it is", "Hm."), "reasoning": "Hm."}
    own = {"response": pair.response.model_copy(update=answer), "origin": "student"}
    path = run.path("refined/self-1/dataset/train.jsonl")
    write_records(path, [pair, pair.model_copy(update=own)])
    row = rows_of(main(with_config(run, train={"self_answers": {}})))[-1]
    assert (row["origin"], row["reasoning"]) == ("student", "Hm.")
    assert row["completion"][0]["content"] == row["messages"][-1]["content"] == "so it is"


@pytest.mark.parametrize("words", [["--heldout"], ["--dataset", "--override", "x"]])
def test_options_that_do_not_go_together(run, words, capsys):
    assert distill(["publish", str(run.folder), *words]) == Exit.CONFIG
    assert "--heldout and --soft-labels need --dataset" in capsys.readouterr().err


def test_soft_labels_are_the_teacher_s_distributions_but_of_no_masked_row(tmp_path):
    run = make_soft_run(tmp_path, signals={"p": 0.9, "k": 8})
    run = with_config(run, publish={"corpus_license": "MIT"})
    capture.main(run)
    pairs, touched = read_pairs(run), read_pairs(run)[0]
    masked = touched.response.model_copy(update={"reasoning": PRIVATE})
    responses = [masked, *(pair.response for pair in pairs[1:])]
    known: dict[str, Any] = {"text": "x", "source": "x:1", "split": "train"}
    documents = [Document(id=pair.prompt.document_id, **known) for pair in pairs]
    write_records(run.path("documents.jsonl"), documents)
    write_records(run.path("prompts.jsonl"), [pair.prompt for pair in pairs])
    write_records(run.path("responses.jsonl"), responses)
    write_records(run.path("dropped.jsonl"), [])
    write_json(run.path("funnel.json"), {})
    folder = main(run, soft_labels=True)
    loaded: Any = load_dataset(str(folder), "soft_labels", cache_dir=str(tmp_path / "cache"))
    made = read_json(run.path("signals.json"))
    cache = SignalCache(run.config.store_folder(), made["cache"])
    labels = {row["id"]: row for row in loaded["train"]}
    names = {f"{p.prompt.id}-{p.response.sample}": made["rows"][p.response.id] for p in pairs}
    assert labels.keys() == names.keys() - {f"{touched.prompt.id}-{touched.response.sample}"}
    for name, row in labels.items():
        key = SignalKey(*names[name])
        signal = cache.read([key])[key.example]
        assert [len(ids) for ids in row["top_ids"]] == signal.counts_N.tolist()
        assert [*chain(*row["top_ids"])] == signal.ids_E.tolist()
        assert np.allclose([*chain(*row["top_logprobs"])], signal.logs(), atol=1e-4)
        assert np.allclose(row["tail_mass"], signal.tail_mass_N)
        assert len(row["token_ids"]) == key.length
    assert "found most probable" in (folder / "README.md").read_text()
    run.path("signals.json").unlink()
    with pytest.raises(DistillError, match=r"signals\.json: is missing"):
        main(run, soft_labels=True)
