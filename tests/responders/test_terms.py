"""The terms book: what it says of real teachers; unknown is never allowed, and a run stops."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.config.teachers import Teacher
from distill.config.tree import Config
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.responders.terms import (
    TermsBook,
    TermsText,
    Verdict,
    judge_teacher,
    load_terms,
    require_terms,
)
from distill.storage.files import read_json
from distill.storage.log import Log
from distill.storage.run_folder import Run
from tests.support.errors import stops
from tests.support.tiny import make_tiny

ROOT = Path(__file__).parent.parent.parent
OWN = 'terms.basis="our own model"'


KNOWN = {
    ("no", "OpenAI"): "gpt-4o-mini openai/gpt-5.6-terra o3",
    ("yes", "Apache"): "openai/gpt-oss-120b google/gemma-4-27b-it Qwen/Qwen2.5-7B-Instruct"
    " Qwen/Qwen3-32B HuggingFaceTB/SmolLM3-3B mistralai/Mistral-Small-3.2-24B-Instruct-2506",
    ("no", "Anthropic"): "anthropic/claude-sonnet-5.5",
    ("no", "Gemini"): "google/gemini-3-pro",
    ("no", "xAI"): "x-ai/grok-4",
    ("no", "Llama 2"): "meta-llama/Llama-2-70b-chat-hf",
    ("no", "Llama 2 and Llama 3"): "meta-llama/Meta-Llama-3-8B-Instruct",
    ("duties", "Llama 3.1"): "meta-llama/Llama-3.1-8B-Instruct"
    " deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    ("duties", "Llama 3.2"): "llama3.2:3b",
    ("duties", "Llama 3.3"): "meta-llama/Llama-3.3-70B-Instruct somebody/Llama-3.3-70B-abliterated"
    " deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    ("duties", "Llama 4"): "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    ("yes", "MIT"): "deepseek-ai/DeepSeek-R1 microsoft/phi-4",
    ("duties", "Gemma"): "google/gemma-3-27b-it google/gemma-2b-it",
    ("duties", "Qwen License"): "Qwen/Qwen2.5-72B-Instruct",
    ("no", "Qwen Research"): "Qwen/Qwen2.5-3B-Instruct Qwen/Qwen2.5-Coder-3B-Instruct",
    ("no", "Tongyi"): "Qwen/Qwen2-72B-Instruct",
    ("no", "EXAONE"): "LGAI-EXAONE/EXAONE-4.0-32B",
    ("no", "Mistral Research"): "mistralai/Mistral-Large-Instruct-2411",
}


@pytest.mark.parametrize(("expected", "models"), KNOWN.items(), ids=lambda v: str(v)[:40])
def test_the_shipped_table_knows_them(expected: tuple[str, str], models: str) -> None:
    word, title = expected
    for model in models.split():
        verdict = load_terms().verdict(model)
        assert (verdict.word, verdict.allowed) == (word, word != "no"), model
        assert verdict.texts[0].title.startswith(title), model
        assert bool(verdict.obligations()) == (word == "duties") or word == "no"


@pytest.mark.parametrize("model", ["", "someone/else", "my-qwen3-8b", "me/Qwen3-8B", "qwen", "gpt"])
def test_what_is_not_in_the_table_is_unknown(model: str) -> None:
    verdict = load_terms().verdict(model)
    assert verdict.word == "unknown" and not verdict.allowed
    assert load_terms().verdict(model, basis="our own").allowed


def test_every_row_says_where_and_when_it_was_read() -> None:
    rows = load_terms().rows
    assert len(rows) > 15 and len({row.title for row in rows}) == len(rows)
    for row in rows:
        assert row.url.startswith("https://") and row.clause and row.teachers + row.hosts
        assert date(2026, 1, 1) <= row.read <= date.today()


@pytest.mark.parametrize(
    ("model", "hosts", "license", "word"),
    [
        ("Qwen/Qwen3-8B", "127.0.0.1", None, "yes"),
        ("Qwen/Qwen3-8B", "api.openai.com", None, "no"),
        ("Qwen/Qwen3-8B", "api.somebody.example", None, "unknown"),
        ("deepseek-v4-pro", "api.deepseek.com", None, "yes"),
        ("deepseek-v4-pro", "api.deepseek.com gpu.example.org", None, "unknown"),
        ("unheard-of", "localhost", None, "unknown"),
        ("gpt-4o", "10.0.0.3", None, "no"),
        ("acme/own", "", "Apache-2.0", "yes"),
        ("acme/own", "", "llama3.3", "duties"),
        ("acme/own", "", "proprietary", "unknown"),
    ],
)
def test_a_provider_s_terms_add_to_the_model_s_or_its_license_s(
    model: str, hosts: str, license: str | None, word: str
) -> None:
    assert load_terms().verdict(model, license, hosts.split()).word == word


def row(**changes: Any) -> dict[str, Any]:
    return {
        "title": "t", "teachers": ["*"], "may_train": "yes", "clause": "c", "url": "https://a",
        "version": "", "read": "2026-01-01", **changes,
    }  # fmt: skip


def test_the_first_row_counts_and_duties_are_named() -> None:
    book = TermsBook((TermsText(**row(teachers=["a*"], may_train="no")), TermsText(**row())))
    assert [book.verdict(name).word for name in ("Abc", "b")] == ["no", "yes"]
    for wrong in ({"may_train": "duties"}, {"outputs": {"name": "X"}}):
        with pytest.raises(ValueError, match="may_train is duties exactly where"):
            TermsText(**row(**wrong))


@pytest.mark.parametrize(
    "text",
    ["- {title: t}", "a: 1", "- 1", "", "- &a {}", "- {title: t, may_train: no, nonsense: 1}", "["],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "terms.yaml").write_text(text)
    with stops(Exit.CONFIG) as caught:
        load_terms(tmp_path / "terms.yaml")
    assert "terms.yaml" in caught.value.where


def config(*overrides: str) -> Config:
    return load_config(ROOT / "configs/quickstart.yaml", overrides)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_may_run(path: Path) -> None:
    if "\ncorpus:" in path.read_text():  # others are tables
        assert require_terms(load_config(path).teacher).allowed


def stated(ask: Callable[[Teacher, str | None], Verdict], *overrides: str) -> Verdict:
    tree = config(*overrides)
    return ask(tree.teacher, tree.terms.basis)


def refused(*overrides: str) -> str:
    with stops(Exit.TERMS) as caught:
        stated(require_terms, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_stop_says_what_to_state() -> None:
    assert "3.3(e)" in refused("teacher.model=openai/gpt-4o")
    assert "does not know model someone/else" in refused("teacher.model=someone/else")
    assert "terms.basis" in refused("teacher.model=someone/else")
    assert OWN in refused("teacher.model=./models/mine")
    recorded = "teacher={kind: recorded, model: somebody}"
    assert "teacher.license=" in refused(recorded)


@pytest.mark.parametrize("name", ["Qwen3-8B", "smollm2-135m-instruct", "llama-3.3-70b"])
def test_a_folder_s_name_proves_nothing(name: str) -> None:
    assert "a folder does not say" in refused(f"teacher.model=./{name}")
    verdict = stated(require_terms, f"teacher.model=./{name}", OWN)
    assert verdict.basis == "our own model"
    assert bool(verdict.obligations()) == ("llama" in name)  # though it may bind


def test_an_endpoint_is_judged_by_its_host_and_stated_answers_by_their_license() -> None:
    assert stated(judge_teacher, "teacher={kind: canned, answers: a.jsonl}").word == "yes"
    verdict = stated(judge_teacher, "teacher={kind: recorded, model: somebody, license: CC0-1.0}")
    assert verdict.allowed and verdict.basis and "CC0-1.0" in verdict.basis
    asked = "teacher={kind: endpoint, model: Qwen/Qwen3-8B, base_url: 'https://api.openai.com/v1'}"
    assert "forbidden by OpenAI" in refused(asked)
    local = asked.replace("https://api.openai.com", "http://127.0.0.1:8000")
    assert stated(require_terms, local).word == "yes"


def test_a_run_stops_before_its_first_stage_and_plan_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = str(ROOT / "configs/quickstart.yaml")
    assert main(["run", place, "teacher.model=openai/gpt-4o"]) == Exit.TERMS
    assert capsys.readouterr().err.startswith("error: teacher openai/gpt-4o: forbidden by OpenAI")
    assert not list(tmp_path.iterdir())
    corpus = ["corpus.limit=20", "prompts.train=4", "prompts.validation=1", "prompts.heldout=1"]
    llama = ["teacher={kind: recorded, model: meta-llama/Llama-3.3-70B-Instruct}", *corpus]
    assert main(["plan", place, *llama, "corpus.split={validation: 2, heldout: 2}"]) == 0
    said = capsys.readouterr().out
    assert "yes, with duties" in said and "its name begins with Llama" in said
    unknown = ["teacher={kind: recorded, model: x}", *corpus]
    words = [*unknown, "corpus.split={validation: 2, heldout: 2}"]
    assert main(["plan", place, *words]) == Exit.TERMS
    assert "exit 10 until terms.basis is stated" in capsys.readouterr().out


def test_generation_stops_before_anything_is_asked_and_notes_the_basis(tmp_path: Path) -> None:
    from distill.generation import generate

    folder = make_tiny(tmp_path / "m", hidden=16)
    tree = config().resolved() | {"runs": str(tmp_path / "runs"), "teacher": {"model": str(folder)}}
    run = Run(Config.model_validate(tree))
    with pytest.raises(DistillError) as caught:  # before it would miss documents.jsonl
        generate.main(run)
    assert caught.value.code == Exit.TERMS and not run.folder.exists()
    assert not (tmp_path / "runs/.store").exists()
    for name in ("documents.jsonl", "prompts.jsonl"):
        run.path(name).parent.mkdir(parents=True, exist_ok=True)
        run.path(name).write_text("")
    run.config = Config.model_validate(tree | {"terms": {"basis": "random weights"}})
    generate.main(run)
    noted = read_json(run.path("manifest.json"))["terms"]
    assert noted["basis"] == "random weights" and noted["verdict"] == "unknown"
    assert len(noted["table_sha256"]) == 64
    with Log(run.config.store_folder() / "responses", writable=False) as log:
        assert not list(log.keys("response"))
