"""Keys under their old names: read everywhere, told once, and no reason to do a finished stage
again."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.config import yaml_file
from distill.config.renamed_keys import RENAMED, fields_in, first_names, present_path
from distill.config.teachers import TEACHERS, LocalTeacher
from distill.config.tree import Config
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.evaluation import suites
from distill.models import registry
from distill.models.registry import ModelInfo
from distill.responders.terms import TermsText, load_terms
from distill.storage.files import read_json, write_json
from distill.storage.run_folder import Run, Stage, differences

OLD = """name: r
corpus: {path: texts}
teacher:
  model: ./t
  slots: 4
  licence: mit
signals:
  endpoint:
    {kind: endpoint, model: m, base_url: "http://localhost:1/v1", first_wait: 2, slots: null,
     extra_body: {slots: 3, licence: theirs}}
student: {model: ./s}
evaluation:
  slots: 5
  judge: {model: ./j, licence: mit}
publish: {licence: Apache-2.0}
"""
NEW = (
    OLD.replace("slots: null,", "")
    .replace("slots: ", "concurrency: ")
    .replace("licence", "license")
)
NEW = NEW.replace("first_wait", "initial_backoff")
NEW = NEW.replace("{concurrency: 3, license: theirs}", "{slots: 3, licence: theirs}")


@pytest.fixture(autouse=True)
def untold() -> None:
    yaml_file._tell_once.cache_clear()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_config_is_read_under_old_names_and_each_is_told_once(tmp_path, capsys):
    path = write(tmp_path / "old.yaml", OLD)
    config = load_config(path)
    assert config == load_config(write(tmp_path / "new.yaml", NEW)) == load_config(path)
    assert config.signals.endpoint
    assert config.signals.endpoint.extra_body == {"slots": 3, "licence": "theirs"}
    told = capsys.readouterr().err.splitlines()
    assert told[0] == (
        f"{path}:5: teacher.slots is now called concurrency; the old name still works"
    )
    assert len(told) == 7 and f"{path}:15: publish.licence is now called license" in told[-1]


def test_an_error_in_a_value_under_an_old_name_has_its_line(tmp_path):
    path = write(tmp_path / "old.yaml", OLD.replace("slots: 4", "slots: 0"))
    with pytest.raises(DistillError, match=r"old\.yaml:5: teacher\.concurrency"):
        load_config(path)


@pytest.mark.parametrize("text", [OLD, NEW], ids=["old", "new"])
@pytest.mark.parametrize("name", ["slots", "max_batch_size", "concurrency"])
def test_an_override_wins_under_either_name(tmp_path, capsys, text, name):
    path = write(tmp_path / "c.yaml", text)
    config = load_config(path, [f"teacher.{name}=8", f"evaluation={{{name}: 9}}"])
    assert isinstance(config.teacher, LocalTeacher)
    assert (config.teacher.concurrency, config.evaluation.concurrency) == (8, 9)
    told = f"command line: teacher.{name} is now called concurrency" in capsys.readouterr().err
    assert told == (name != "concurrency")


def test_a_run_s_own_config_is_read_in_silence(tmp_path, capsys):
    new = load_config(write(tmp_path / "new.yaml", NEW))
    tree = json.loads(json.dumps(new.resolved()))
    tree["teacher"]["slots"] = tree["teacher"].pop("concurrency")
    tree["publish"]["licence"] = tree["publish"].pop("license")
    write_json(tmp_path / "config.json", tree)
    assert load_config(tmp_path / "config.json") == new
    assert capsys.readouterr().err == ""


def test_a_key_under_both_names_is_refused_with_the_new_one(tmp_path):
    both = OLD.replace("  slots: 4", "  slots: 4\n  concurrency: 4")
    with pytest.raises(DistillError) as caught:
        load_config(write(tmp_path / "both.yaml", both))
    assert caught.value.code == Exit.CONFIG
    assert "unknown key teacher.slots (did you mean concurrency?)" in str(caught.value)


def test_the_table_holds_names_that_are_gone_and_their_new_ones():
    forms = (Config, suites.SuiteFile, tuple[TermsText, ...], dict[str, ModelInfo])
    for old, new in RENAMED.items():
        assert all(old not in kind.model_fields for kind in TEACHERS) and new != old
    assert present_path(("signals", "endpoint", "first_wait"), Config)[-1] == "initial_backoff"
    assert present_path(("teacher", "extra_body", "slots"), Config)[-1] == "slots"
    assert present_path(("signals", "samples"), Config)[-1] == "samples", "which is another thing"
    assert present_path(("evaluation", "samples"), Config)[-1] == "bootstrap_samples"
    assert all("licence" not in fields_in(form) for form in forms)


def test_a_suite_under_its_old_name_is_the_same_suite(tmp_path, capsys):
    row = {"prompt": "1 + 1?", "reference": "2"}
    (tmp_path / "sums.jsonl").write_text(json.dumps(row) + "\n")
    text = (
        "description: sums\nsource: made here\nlicence: none\ntasks:\n"
        "  - task:\n      name: sums\n      metric: correct\n"
        "      student: {user: '{{ prompt }}'}\n"
        "      checker: {kind: number}\n    data: {path: sums.jsonl}\n"
    )
    path = write(tmp_path / "sums.yaml", text)
    old = suites.load_suite(str(path))
    assert f"{path}:3: licence is now called license" in capsys.readouterr().err
    write(path, text.replace("licence", "license"))
    assert suites.load_suite(str(path)) == old and old.facts["license"] == "none"
    write(path, text.replace("licence: none", "license: mit"))
    assert suites.load_suite(str(path)).facts["sha256"] != old.facts["sha256"]


def test_a_suite_s_hash_is_that_of_the_text_with_its_first_names():
    text = "license: none\ntasks:\n  - license: x\nlicense_of: y\n# license: z\n"
    assert first_names(text.encode()) == text.replace("license: none", "licence: none").encode()


def test_terms_and_models_of_one_s_own_are_read_under_old_names(tmp_path, monkeypatch, capsys):
    terms = Path("configs/terms.yaml").read_text()
    assert "licenses:" in terms and "license: gemma" in terms
    old = terms.replace("licenses:", "licences:").replace("license: ", "licence: ")
    assert load_terms(write(tmp_path / "terms.yaml", old)).rows == load_terms().rows
    assert "is now called licenses" in capsys.readouterr().err
    before = registry.table()
    (tmp_path / "configs").mkdir()
    text = Path("configs/models.yaml").read_text().replace("  license: ", "  licence: ")
    write(tmp_path / "configs/models.yaml", text)
    monkeypatch.chdir(tmp_path)
    assert registry.table.__wrapped__() == before
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(before) and told[0].startswith("configs/models.yaml:9: ")


def finished(folder: Path, stage: Stage, **changes: Any) -> Run:
    """Return a run whose `stage` is done; `changes` replace keys of its marker's fingerprint."""
    config = Config.model_validate(
        {
            "name": "r",
            "runs": folder,
            "corpus": {"path": "texts"},
            "teacher": {"model": "./t", "engine": "distill", "concurrency": 4, "license": "mit"},
            "student": {"model": "./s"},
        }
    )
    run = Run(config)
    with run.lock():
        run.perform(stage)
    marker = read_json(run.path(stage.marker))
    for key, value in changes.items():
        name = key.replace("__", ".")
        marker["fingerprint"].pop(name, None) if value is ... else marker["fingerprint"].update(
            {name: value}
        )
    write_json(run.path(stage.marker), marker)
    return run


def made(run: Run) -> None:
    run.path("out").write_text("made")


STAGE = Stage("first", ("teacher", "prompts", "evaluation"), (), ("out",), made)


OLD_NAMES = {"teacher__concurrency": ..., "teacher__slots": 4, "teacher__license": ...}
OLD_NAMES |= {"evaluation__concurrency": ..., "evaluation__slots": None}
LATER = {f"teacher__{name}": ... for name in ("omit", "engine", "budget_dollars", "n")}
LATER |= {"evaluation__confidence": ..., "prompts__per_document": ...}


@pytest.mark.parametrize(
    ("names", "state"),
    [
        ({**OLD_NAMES, "teacher__licence": "mit"}, ("done", [])),
        ({**OLD_NAMES, "teacher__licence": "cc0"}, ("stale", ["teacher.license was cc0, is mit"])),
        (LATER, ("done", [])),
    ],
    ids=["old names", "another value under an old name", "a key that came later"],
)
def test_a_finished_stage_stays_done_where_only_names_differ(tmp_path, names, state):
    assert finished(tmp_path, STAGE, **names).state(STAGE) == state


def test_what_another_kind_of_teacher_left_at_its_default_is_no_difference():
    old = {"teacher.kind": "local", "teacher.answers": None, "teacher.max_retries": 6}
    assert differences({**old, "teacher.model": ""}, {"teacher.kind": "local"}) == []
    assert differences({**old, "teacher.max_retries": 8}, {"teacher.kind": "local"}) == [
        "teacher.max_retries was 8, is 6"
    ]


def test_what_was_a_switch_once_is_the_word_that_it_meant():
    key = "filters.failed_checker"
    for switch, word, other in ((True, "drop", "keep"), (False, "keep", "signals_only")):
        assert differences({key: switch}, {key: word}) == []
        assert differences({key: switch}, {key: other}) == [f"{key} was {word}, is {other}"]
    assert differences({}, {key: "drop", "filters.answers_per_prompt": None}) == []


def test_a_section_that_was_off_is_no_section_of_defaults():
    questions = {f"prompts.questions.{k}": v for k, v in {"per_document": 3}.items()}
    said = ["prompts.questions.per_document was unset, is 3"]
    assert differences({"prompts.questions": None}, questions) == said
    assert differences({}, questions) == said, "the whole section came later, and it is off"
    known = {"prompts.questions.max_new_tokens": 256}
    assert differences(known, {**known, **questions}) == [], "one key of it came later"
    judge = {"evaluation.judge.kind": "local", "evaluation.judge.model": "./j"}
    assert differences({"evaluation.judge": None}, judge)
    assert differences(judge, {**judge, "evaluation.judge.concurrency": None}) == []


@pytest.mark.parametrize("told", ["file", "command line"])
def test_the_teacher_s_reasoning_is_that_of_the_run(tmp_path, capsys, told):
    """B7: one policy at the top, still read under its old name."""
    plain = "name: r\ncorpus: {path: x}\nteacher:\n  model: ./t\nstudent: {model: ./s}\n"
    text = plain.replace("./t\n", "./t\n  reasoning: keep\n") if told == "file" else plain
    path = write(tmp_path / "old.yaml", text)
    config = load_config(path, [] if told == "file" else ["teacher.reasoning=keep"])
    assert config.reasoning == "keep" == load_config(path, ["reasoning=keep"]).reasoning
    assert "teacher.reasoning is now called reasoning" in capsys.readouterr().err
    old = {"evaluation.judge.reasoning": "drop", "evaluation.judge.model": "j"}
    assert not differences(old, {"evaluation.judge.model": "j"})
