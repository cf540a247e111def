"""Publishing: a release of a tiny student, its card, what must stop it, its upload to a Hub."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from distill.config.learning import Recipe
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.models import loading
from distill.models.registry import folder_digest
from distill.publishing.publish import main
from distill.records import Message, Pair, Prompt, Response
from distill.storage.files import sha256_file, write_json
from distill.storage.run_folder import Run
from distill.training.adapters import write_merged
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import make_adapter, make_tiny

BASE = "acme/tiny-base"


@pytest.fixture(scope="module")
def base_files(tmp_path_factory) -> dict[str, bytes]:
    folder = make_tiny(tmp_path_factory.mktemp("base"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder that adapter and merged model are made in once."""
    return tmp_path_factory.mktemp("trained") / "student"


@pytest.fixture
def hub(base_files, tmp_path, monkeypatch):
    with fake_hub() as server:
        server.add(BASE, base_files)
        use_hub(monkeypatch, server, tmp_path / "hub-cache")
        yield server


def make_pair(number: int) -> Pair:
    turn = Message(role="user", content=f"question {number}")
    prompt = Prompt.make((turn,), f"d{number}", "chat")
    answer = Response(
        id=f"r{number}", request_key=f"k{number}", sample=0, prompt_id=prompt.id, model="teacher",
        text=f"answer {number} and a little more", stop="end",
    )  # fmt: skip
    return Pair(prompt=prompt, response=answer)


def make_scorecard(run: Run, student: dict[str, str | None] | None = None, **changes) -> None:
    row = {
        "metric": "chrF", "n": 20, "unscored": 0, "teacher": 0.9, "base": 0.1, "student": 0.7,
        "student_minus_teacher": {"mean": -0.2, "low": -0.3, "high": -0.1},
        "gap_recovered": {"value": 0.75, "low": 0.6, "high": 0.9},
    }  # fmt: skip
    hashes = {
        "adapter_sha256": sha256_file(run.path("adapter/adapter_model.safetensors")),
        "model_sha256": folder_digest(run.path("merged")),
    }
    card = {
        "name": "tiny",
        "models": {"student": {"name": BASE, **hashes, **(student or {})}},
        "tasks": {"chat": row},
        "cost": {"student": {"seconds_per_1k": 12.5, "dollars_per_1k": None}},
        "funnel": {"kept": 8, "dropped": {"empty": 1}},
        "training": {"examples": 8, "steps": 4, "tokens": 100},
        **changes,
    }
    write_json(run.path("scorecard.json"), card)


@pytest.fixture
def run(hub, trained, tmp_path) -> Run:
    tree = {
        "name": "tiny", "runs": tmp_path / "runs", "corpus": {"source": "python-docs"},
        "teacher": {"model": "qwen2.5-coder-0.5b-instruct"}, "student": {"model": BASE},
        "publish": {"license": "Apache-2.0"},
    }  # fmt: skip
    run = Run(Config.model_validate(tree))
    if not trained.exists():
        make_adapter(trained / "adapter", BASE, 0.02)
        write_merged(run.config.student, trained / "adapter", trained / "merged")
    shutil.copytree(trained, run.folder)
    run.path("report.html").write_text("<html>a report of /home/anybody/docs</html>")
    write_json(run.path("config.json"), run.config.resolved())
    make_scorecard(run)
    return run


def test_the_card_states_the_adapter_that_a_search_chose(run):
    lora = run.config.train.lora.model_copy(update={"alpha": 5.0})
    train = run.config.train.model_copy(update={"lora": lora})
    run.config = run.config.model_copy(update={"recipe": Recipe(mode="auto"), "train": train})
    write_json(run.path("recipe.json"), {"choice": {"loss": "text", "rate": 1e-4, "epochs": 3}})
    card = (main(run, override="a test") / "README.md").read_text()
    assert f"alpha {2.0 * lora.r}" in card and "alpha 5" not in card


def test_a_release_holds_the_allow_list_and_loads_and_is_the_same_twice(run, tmp_path):
    (run.path("adapter") / "optimizer.pt").write_bytes(b"not for the public")
    make_scorecard(run, overall={"student_minus_base": {"mean": 0.2}})
    release = main(run, override="just in case")
    files = [path for path in release.rglob("*") if path.is_file()]
    hashes = {path.relative_to(release).as_posix(): sha256_file(path) for path in files}
    assert set(hashes) == {
        *("README.md", "LICENSE", "model.safetensors", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "scorecard.json"),
        *("report.html", "adapter/adapter_config.json", "adapter/base.json"),
        "adapter/adapter_model.safetensors",
    }
    assert "Apache License" in (release / "LICENSE").read_text()
    card = ModelCard.load(release / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == BASE and data["license"] == "apache-2.0"
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.7
    assert "| 75 % [60 %, 90 %] |" in card.text and "Qwen/Qwen2.5-Coder-0.5B" in card.text
    assert "Published although" not in card.text and "evaluation loaded these files" in card.text
    assert str(card) == (release / "README.md").read_text()
    moved = shutil.copytree(release, tmp_path / "elsewhere")
    assert loading.load_model(str(moved)).num_parameters() > 0
    assert loading.load_tokenizer(str(moved)).chat_template
    adapter = json.loads((release / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == BASE
    again = main(run)
    assert all(sha256_file(again / name) == digest for name, digest in hashes.items())


def refused(run: Run, repository: str | None = None, override: str | None = None) -> DistillError:
    with pytest.raises(DistillError) as caught:
        main(run, repository, override=override)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("part", ["adapter", "model"])
def test_scores_of_another_student_are_published_by_no_override(run, part):
    make_scorecard(run, {f"{part}_sha256": "0" * 64})
    error = refused(run, override="we know better")
    assert error.code == Exit.PUBLISH and f"evaluated was {part} 000" in error.what


def test_a_run_whose_adapter_was_evaluated_gets_a_merged_model_and_a_card_that_says_so(run):
    make_scorecard(run, {"model_sha256": None})
    shutil.rmtree(run.path("merged"))
    release = main(run)
    assert (release / "model.safetensors").is_file()
    assert (
        "the merged model, made of it, has not been evaluated"
        in (release / "README.md").read_text()
    )


WORSE = {"mean": -0.1, "low": -0.2, "high": 0.0}
LOSS = {"nats_per_token": {"student_minus_base": {"mean": 0.25}}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contamination": {"n": 66, "flagged": 3}}, "3 of 66 items stand in the training"),
        ({"overall": {"student_minus_base": WORSE}}, "worse than its base: −10.0 points"),
        ({"agreement": LOSS}, "+0.250 nats a token"),
    ],
)
def test_what_speaks_against_publishing_stops_it_or_stands_on_the_card(run, changes, said):
    make_scorecard(run, **changes)
    error = refused(run)
    assert error.code == Exit.PUBLISH and said in error.what and "--override" in error.fix
    assert not run.path("release").exists()
    release = main(run, override="a study of <b>failures</b>")
    card = (release / "README.md").read_text()
    assert said.partition(":")[0] in card and "a study of &lt;b&gt;failures" in card


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "adapter", "report.html"])
def test_links_are_refused(run, tmp_path, name):
    real = run.path(name).rename(tmp_path / "real")
    run.path(name).symlink_to(real)
    error = refused(run)
    assert error.code == Exit.PUBLISH and "is a link" in error.what
    assert not run.path("release").exists()


def changed(run: Run, **sections: Any) -> Run:
    """Return the run with other parts of its config."""
    return Run(Config.model_validate(run.config.resolved() | sections))


def test_what_names_no_license_or_base_or_whose_terms_forbid_it_is_refused(run, tmp_path):
    error = refused(changed(run, publish={}))
    assert error.code == Exit.TERMS and "publish.license" in error.fix
    error = refused(changed(run, student={"model": str(tmp_path)}))
    assert error.code == Exit.PUBLISH and "is a folder" in error.what
    teacher, terms = {"model": "openai/gpt-4o"}, {"basis": "license agreement 2026-03 with OpenAI"}
    error = refused(changed(run, teacher=teacher))
    assert error.code == Exit.TERMS and "3.3(e)" in error.what and "terms.basis" in error.fix
    card = ModelCard.load(main(changed(run, teacher=teacher, terms=terms)) / "README.md").text
    assert "stated basis: license agreement 2026-03 with OpenAI" in card


def test_a_student_of_llama_is_named_so(run):
    teacher = {"model": "meta-llama/Llama-3.3-70B-Instruct"}
    error = refused(changed(run, teacher=teacher))
    assert error.code == Exit.TERMS and "must begin with Llama" in error.what
    assert "1.b.i" in error.what and "publish.model_name=Llama-tiny" in error.fix
    publish = {"model_name": "Llama-tiny", "license": "Apache-2.0"}
    run = changed(run, teacher=teacher, publish=publish)
    assert "--push" in refused(run, "me/student").fix
    card = ModelCard.load(main(run) / "README.md")
    assert "# Llama-tiny" in card.text and "its name begins with Llama" in card.text


def test_a_student_of_gemma_passes_the_terms_on(run, tmp_path):
    teacher, publish = {"model": "google/gemma-3-27b-it"}, {"license": "gemma"}
    error = refused(changed(run, teacher=teacher))
    assert error.code == Exit.TERMS and "gemma is required by" in error.what
    assert "terms.agreement" in refused(changed(run, teacher=teacher, publish=publish)).where
    (tmp_path / "terms.txt").write_text("the agreement")
    (tmp_path / "link").symlink_to(tmp_path / "terms.txt")
    for name, plain in (("none", False), ("link", False), ("terms.txt", True)):
        terms = {"agreement": str(tmp_path / name)}
        other = changed(run, teacher=teacher, publish=publish, terms=terms)
        assert plain or "a copy of the agreement" in refused(other).what
    release = main(other)
    assert (release / "AGREEMENT.txt").read_text() == "the agreement"
    assert "Gemma is provided under" in (release / "NOTICE").read_text()
    assert ModelCard.load(release / "README.md").data.to_dict()["license"] == "gemma"


def test_a_secret_stops_the_release_and_the_last_one_stays_until_it_is_allowed(run):
    release = main(run)
    before = sha256_file(release / "README.md")
    run.path("report.html").write_text("token sk-" + "a" * 30)
    error = refused(run)
    assert error.code == Exit.PUBLISH and "publish.allow_secrets" in error.fix
    assert sha256_file(release / "README.md") == before
    main(changed(run, publish={"license": "Apache-2.0", "allow_secrets": ["sk-key"]}))
    assert "sk-" in run.path("release/report.html").read_text()


def test_a_release_is_pushed_and_the_snippets_of_its_card_run(run, hub, monkeypatch, capsys):
    script, release = Path("scripts/publish.py").absolute(), run.path("release")
    words = [str(script), str(run.folder), "--push", "me/student"]
    monkeypatch.setattr(sys, "argv", words)  # HF_TOKEN and HF_ENDPOINT are in the environment
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert hub.repositories["me/student"].private
    assert "published privately" in capsys.readouterr().err
    files = [path for path in release.rglob("*") if path.is_file()]
    sent = hub.repositories["me/student"].files
    assert sorted(sent) == sorted(path.relative_to(release).as_posix() for path in files)
    assert sent["model.safetensors"] == (release / "model.safetensors").read_bytes()
    card = ModelCard.load(release / "README.md").text
    merged, adapted = re.findall(r"```python\n(.*?)```", card, re.S)
    one: dict[str, Any] = {}
    other: dict[str, Any] = {}
    exec(merged.replace("max_new_tokens=200", "max_new_tokens=3"), one)  # noqa: S102
    exec(adapted, other)  # noqa: S102
    ids = one["inputs"]["input_ids"]
    with torch.inference_mode():
        apart = one["model"](ids).logits - other["model"](ids).logits
    assert apart.abs().max() < 1e-4
    assert any("/me/student/resolve/" in line for line in hub.requests)
