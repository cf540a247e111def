"""The comparison of soft labels with text alone, whole on tiny models: it goes on where it was, and
adds up."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest

from distill.cli import main
from distill.storage.files import read_json, sha256_file
from tests.evaluation.test_suites import make_suite
from tests.publishing.test_publish import BASE
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import make_tiny
from tests.test_verify import write_config

SCRIPT = Path(__file__).parent.parent.parent / "scripts/benchmarks/compare_soft_labels.py"


def load():
    spec = importlib.util.spec_from_file_location("compare_soft_labels", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_student_is_trained_once_on_the_same_answers_and_measured_on_the_same_items(tmp_path):
    files = {p.name: p.read_bytes() for p in make_tiny(tmp_path / "base").iterdir()}
    with fake_hub() as hub, pytest.MonkeyPatch.context() as patch, contextlib.chdir(tmp_path):
        patch.syspath_prepend(SCRIPT.parent)
        script = load()
        hub.add(BASE, files)
        use_hub(patch, hub, tmp_path / "hub")
        config = write_config(tmp_path, make_suite(tmp_path / "suite"))
        more = f"signals: {{model: {BASE}, dtype: float32}}\nterms: {{basis: a test of ours}}\n"
        config.write_text(config.read_text() + more)
        soft = "train.loss={ce: 0.5, forward_kl: 0.5}"
        for verb in ("corpus", "prompts", "generate", "filter", "signals"):
            assert main([verb, str(config), soft]) == 0
        words = ["runs/tiny", "on_policy={rounds: 1, prompts: 4, max_new_tokens: 8}"]
        flags = ["--seeds", "2", "--rates", "1e-3", "2e-3", "--examples", "6", "--json", "out.json"]
        patch.setattr(sys, "argv", ["compare", *words, *flags])
        script.main()
        first = read_json(tmp_path / "out.json")
        weights = {p: sha256_file(p) for p in Path("runs").rglob("adapter_model.safetensors")}
        patch.setattr(script.train, "main", None)
        patch.setattr(script.on_policy, "main", None)
        patch.setattr(script, "Ask", None)
        script.main()
        assert read_json(tmp_path / "out.json") == first
        assert weights == {p: sha256_file(p) for p in weights}
    found = first["found"]
    assert found["teacher"]["right"]["mean"] == 1 and found["teacher"]["right"]["n"] == 8
    assert found["soft"]["seeds"] == found["text"]["seeds"] == 2
    assert found["soft, then on-policy"]["seeds"] == 1
    both = found["soft"]["nats"]["mean"] - found["text"]["nats"]["mean"]
    assert found["soft - text"]["nats"]["mean"] == pytest.approx(both)
    kl = {kind: found[kind]["kl"]["mean"] for kind in ("base", "text", "soft")}
    assert (
        abs(kl["base"]) < 2e-4 < min(kl["soft"], kl["text"])
    )  # the base is the teacher, but for sixteenths of a nat
    assert first["teacher_tokens"]["answers"] == 6
    steps = first["trainings"]
    assert steps.keys() == {p.relative_to("runs").parts[0] for p in weights if "tiny-" in str(p)}
    assert len(steps) == 7 and all(len(rows) == 1 for rows in steps.values())
    for row in (row for rows in steps.values() for row in rows):
        assert 0 < row["best_step"] == row["adapter_step"] <= row["steps"]
    names = {p.parent.parent.name for p in weights}
    assert {"tiny-text-0.001-0", "tiny-text-0.002-0", "tiny-soft-0.002-1", "refined"} <= names
