"""H2: a model in a folder is its weights and the files beside them, in every fingerprint and key.

What an earlier distill made knew the weights alone: it is accepted on them, under its old keys.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.models import registry
from distill.models.chat_template import template_hash
from distill.models.devices import pick_dtype
from distill.pipeline import STAGES
from distill.records import digest
from distill.responders.local import local_model
from distill.responders.local.local_model import LocalResponder
from distill.storage.files import read_json, write_json
from distill.storage.log import Log
from distill.storage.run_folder import Run
from distill.training import train
from distill.training.soft_labels import capture
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import make_tiny
from tests.support.training import killed_at, make_soft_run
from tests.support.training import make_run as make_training

PARTS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "additional_chat_templates/tool_use.jinja",
    "modeling_own.py",
]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "m")


def touch(path: Path) -> None:
    """Change a file, or make it, so that what reads it still can."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json" and path.exists():
        tree = json.loads(path.read_bytes())
        path.write_text(json.dumps({**tree, "changes": tree.get("changes", 0) + 1}))
    elif path.suffix == ".json":
        path.write_text("{}")
    else:
        path.write_text((path.read_text() if path.exists() else "") + "\n")


@contextmanager
def earlier() -> Iterator[None]:
    """Let the block know a model in a folder as commit 07339c8 did: by its weights alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "parts", lambda reference: {})
        patch.setattr(registry, "folder_facts", lambda role, reference: {})
        patch.setattr(local_model, "folder_facts", lambda role, reference: {})
        yield


@pytest.mark.parametrize("name", PARTS)
def test_each_file_of_a_folder_counts_by_its_name(name: str, tiny: Path) -> None:
    touch(tiny / name)
    before, weights = registry.parts(str(tiny)), registry.identity(str(tiny))
    touch(tiny / name)
    after = registry.parts(str(tiny))
    assert [n for n in after if after[n] != before[n]] == [name]
    assert registry.identity(str(tiny)) == weights
    assert registry.folder_facts("judge", str(tiny))[f"judge file {name}"] == after[name]


def test_a_pinned_model_keeps_its_identity_and_its_key(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry.parts("smollm2-135m-instruct") == {} == registry.folder_facts("teacher", "a/b")
    with fake_hub() as hub:
        sha = hub.add("acme/tiny", {path.name: path.read_bytes() for path in tiny.iterdir()})
        use_hub(monkeypatch, hub, tmp_path, token=None)
        responder = LocalResponder.load("acme/tiny", revision=sha)
        base = registry.record_base(tmp_path, "acme/tiny", sha)
    facts = {"weights": sha, "dtype": str(pick_dtype())}
    template = template_hash(responder.tokenizer, responder.date)
    assert responder.origin == digest({**facts, "template": template})
    assert responder.old_origin is None
    assert base.keys() == {"name", "hub_id", "revision", "identity"}


def test_a_file_of_the_folder_is_in_the_key(tiny: Path) -> None:
    with earlier():
        old = LocalResponder.load(str(tiny))
    before = LocalResponder.load(str(tiny))
    assert (old.old_origin, before.old_origin) == (None, old.origin) and before.origin != old.origin
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        touch(tiny / name)
        after = LocalResponder.load(str(tiny))
        assert after.origin != before.origin and after.old_origin == old.origin
        before = after


ROLES = {
    "generate": ["teacher"],
    "signals": ["reader", "student"],
    "train": ["student"],
    "refine": ["reader", "student"],
    "evaluate": ["teacher", "student", "judge"],
}


@pytest.mark.parametrize("stage", ROLES)
def test_a_stage_s_fingerprint_holds_the_models_that_it_reads(stage: str, tmp_path: Path) -> None:
    folders = {r: make_tiny(tmp_path / r) for r in ("teacher", "student", "reader", "judge")}
    tree = {
        "name": "r",
        "runs": tmp_path,
        "corpus": {"source": "python-docs"},
        "teacher": {"model": str(folders["teacher"])},
        "student": {"model": str(folders["student"])},
        "signals": {"model": str(folders["reader"])},
        "train": {"loss": {"ce": 0.5, "forward_kl": 0.5}},
        "evaluation": {"judge": {"model": str(folders["judge"])}},
    }
    run = Run(Config.model_validate(tree))
    (chosen,) = (s for s in STAGES if s.name == stage)
    for role, folder in folders.items():
        before = run.fingerprint(chosen)
        touch(folder / "tokenizer.json")
        after = run.fingerprint(chosen)
        called = "teacher" if role == "reader" else role
        wanted = [f"{called} file tokenizer.json"] if role in ROLES[stage] else []
        assert [key for key in after if after[key] != before.get(key)] == wanted, role


def test_a_live_teacher_and_a_server_s_tokenizer_count_too(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "m")
    tree = {
        "name": "r",
        "runs": tmp_path,
        "corpus": {"source": "python-docs"},
        "teacher": {"model": str(folder)},
        "student": {"model": "a/b"},
        "train": {"loss": {"ce": 0.5, "forward_kl": 0.5, "teacher": "live"}},
    }
    served = {"kind": "endpoint", "model": "m", "base_url": "http://127.0.0.1:1/v1"}
    signals = {"endpoint": served, "tokenizer": str(folder)}
    for stage, changes, role in (
        ("train", {}, "teacher"),
        ("signals", {"signals": signals, "train": {"loss": {"forward_kl": 1}}}, "tokenizer"),
    ):
        run = Run(Config.model_validate({**tree, **changes}))
        (chosen,) = (s for s in STAGES if s.name == stage)
        assert f"{role} file tokenizer.json" in run.fingerprint(chosen)


def write_config(folder: Path) -> str:
    """Write a whole run of local models, small enough for a test."""
    rows = [{"prompt": f"What is {n} and {n}?"} for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = {"validation": 4, "heldout": 12}
    tree = {
        "name": "mine",
        "runs": str(folder / "runs"),
        "corpus": {
            **{"path": str(folder / "rows.jsonl"), "format": "prompts", "split": split},
            "near_duplicate_threshold": None,
        },
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "max_new_tokens": 6},
        "terms": {"basis": "a model of our own"},
        "filters": dict.fromkeys(("truncated", "empty", "repetition"), False),
        "student": {"model": str(folder / "student"), "dtype": "float32"},
        "train": {"max_steps": 2, "bf16": False, "lora": {"r": 4, "alpha": 8}},
        "evaluation": {"machine": "cpu-2-core", "samples": 200},
    }
    (folder / "c.yaml").write_text(json.dumps(tree))
    return str(folder / "c.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that an earlier distill finished, its store, models and config."""
    folder = tmp_path_factory.mktemp("finished")
    make_tiny(folder / "teacher", "qwen2", seed=1)
    make_tiny(folder / "student")
    with earlier():
        assert main(["run", write_config(folder)]) == 0
    return folder


@pytest.fixture
def old(finished: Path) -> Iterator[Path]:
    """The finished run as it was, in its place; what a test changes is put back."""
    kept = finished.with_name("kept")
    shutil.copytree(finished, kept)
    yield finished
    shutil.rmtree(finished)
    kept.rename(finished)


def stored(folder: Path) -> int:
    """Count the answers in the store."""
    with Log(folder / "runs/.store/responses", writable=False) as log:
        return len(list(log.keys("response")))


def test_a_finished_run_that_knows_the_weights_alone_is_accepted(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, scorecard = stored(old), (old / "runs/mine/scorecard.json").read_bytes()
    manifest = read_json(old / "runs/mine/stages/generate.json")
    assert not [key for key in manifest["fingerprint"] if " file " in key]
    assert main(["run", str(old / "c.yaml")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.endswith(": done")] == []
    assert stored(old) == count
    assert (old / "runs/mine/scorecard.json").read_bytes() == scorecard
    assert main(["verify", str(old / "runs/mine")]) == 0


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_finished_run_is_not_accepted_on_other_weights(
    role: str, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny(old / "other", "qwen2" if role == "teacher" else "llama", seed=7)
    shutil.copy(old / "other/model.safetensors", old / role / "model.safetensors")
    assert main(["run", str(old / "c.yaml")]) == Exit.STATE
    assert f"changed: {role} (" in capsys.readouterr().err


def test_answers_under_an_old_key_are_found_until_a_file_changes(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of teacher and base; the student's key is the hash of its merged model, the same again."""
    count = stored(old)
    assert main(["run", str(old / "c.yaml"), "name=again"]) == 0
    assert stored(old) == count, "something was asked again"
    told = capsys.readouterr().err
    assert told.count("weights alone") == 2  # of the teacher and the base
    for name in ("responses.jsonl", "answers/student.jsonl", "answers/base.jsonl"):
        one, other = (old / f"runs/{run}/{name}" for run in ("mine", "again"))
        assert one.read_bytes() == other.read_bytes()
    assert main(["generate", str(old / "c.yaml"), "name=again", "--redo"]) == 0
    assert "weights alone" not in capsys.readouterr().err and stored(old) == count
    touch(old / "teacher/config.json")
    assert main(["generate", str(old / "c.yaml"), "name=again", "--redo"]) == 0
    assert stored(old) == count + 40, "stale answers were taken"


def begun(folder: Path, **settings: Any) -> Run:
    """Return a training that was killed after its second checkpoint."""
    run = make_training(folder, save_steps=1, **settings)
    (stage,) = (s for s in STAGES if s.name == "train")
    write_json(run.path(stage.marker), {"fingerprint": run.fingerprint(stage), "finished": False})
    with killed_at(4):
        train.main(run)
    return run


def state_of(run: Run) -> tuple[str, list[str]]:
    (stage,) = (s for s in STAGES if s.name == "train")
    return run.state(stage)


def test_a_student_that_changed_within_a_training_is_named(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        before = (tmp_path / "model" / name).read_bytes()
        touch(tmp_path / "model" / name)
        # left to the training, which --allow-inexact lets pass
        assert state_of(run) == ("unfinished", [])
        with pytest.raises(DistillError, match=f"changed: base file {name}") as caught:
            train.main(run)
        assert caught.value.code == Exit.TRAINING
        if name != "generation_config.json":
            (tmp_path / "model" / name).write_bytes(before)
    train.main(run, allow_inexact=True)
    assert "base file generation_config.json" in str(read_json(run.path("training.json"))["notes"])


def test_a_training_that_an_earlier_distill_began_goes_on(tmp_path: Path) -> None:
    with earlier():
        run = begun(tmp_path)
    assert state_of(run) == ("unfinished", [])
    train.main(run)
    assert read_json(run.path("training.json"))["notes"] == []


def test_an_adapter_knows_the_files_of_its_base(tiny: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with earlier():
        registry.record_base(adapter, str(tiny))
    registry.check_base(adapter, str(tiny))  # which knows the weights alone
    registry.record_base(adapter, str(tiny))
    registry.check_base(adapter, str(tiny))
    touch(tiny / "config.json")
    with pytest.raises(DistillError) as caught:
        registry.check_base(adapter, str(tiny))
    assert caught.value.code == Exit.TRAINING and "changed: config.json" in caught.value.what


def test_signals_under_an_old_name_are_found_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_soft_run(tmp_path)
    with earlier():
        capture.main(run)
    made = read_json(run.path("signals.json"))
    fill, read = capture.fill, []
    monkeypatch.setattr(capture, "fill", lambda *given: (read.append(1), fill(*given)))
    for _ in range(2):
        capture.main(run)
    assert read == [] and read_json(run.path("signals.json")) == made
    assert capsys.readouterr().err.count("weights alone") == 1
    train.main(run)  # which holds signals.json against the config
    touch(tmp_path / "teacher/config.json")
    capture.main(run)
    assert read == [1] and read_json(run.path("signals.json"))["cache"] != made["cache"]
