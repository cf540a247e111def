"""Files of other people are tried in a child with limits: one line, exit 7, within seconds."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DistillError, Exit
from distill.training import trial
from distill.training.trial import ModelTrial, try_model
from tests.support.tiny import make_tiny


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def template(content: str) -> Callable[[Path], object]:
    return text("chat_template.jinja", content)


def config(**changes: Any) -> Callable[[Path], object]:
    """Return a change of config.json's keys."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps({**tree, **changes}))

    return change


def tokens(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_bytes())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tree["added_tokens"] += [
        {"id": 300 + n, "content": f"<extra {n}>", "special": True, **flags} for n in range(200_000)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tree))


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE: dict[str, Callable[[Path], object]] = {
    "H3 a template without end": template(LOOP),
    "H3 a template without end after three turns": template(
        "{% if messages|length > 2 %}" + LOOP + "{% endif %}{{ messages[-1].content }}"
    ),
    "H3 a string of 1 GB": template("{{ ('x' * 10**9)[:3] }}{{ 'y' * 10**9 }}"),
    "H3 1 GB of output": template("{% for i in range(1000) %}{{ 'x' * 10**6 }}{% endfor %}"),
    "H3 a text that doubles": template(
        "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a * 2 %}{% endfor %}"
    ),
    "H3 a power without end": template("{{ (9 ** (9 ** 9)) % 2 }}"),
    "H3 200,000 more tokens": tokens,
    "H3 10^9 layers": config(num_hidden_layers=10**9, layer_types=None),
    "H3 10^12 wide": config(hidden_size=10**12),
    "H4 0 heads": config(num_attention_heads=0),
    "H4 0 heads of keys": config(num_key_value_heads=0),
    "H4 -1 layers": config(num_hidden_layers=-1),
    "H4 sizes as text": config(hidden_size="32"),
    "H4 a size as a list": config(intermediate_size=[64]),
    "H4 an unknown architecture": config(model_type="nowhere", architectures=["Nowhere"]),
    "H4 no architecture": config(model_type=None),
    "H4 an activation that nobody has": config(hidden_act="nope"),
    "H4 a context of 0": config(max_position_embeddings=0),
    "H4 nested 10^5 deep": text("config.json", DEEP),
    "H4 a tokenizer nested 10^5 deep": text("tokenizer.json", DEEP),
    "H4 tokenizer settings nested 10^5 deep": text("tokenizer_config.json", DEEP),
    "H4 heads that do not divide": config(num_attention_heads=5),
    "H4 a type of rotation that nobody has": config(rope_parameters={"rope_type": "nowhere"}),
    "H4 an empty config": text("config.json", "{}"),
    "H4 a list for a config": text("config.json", "[1]"),
    "H4 a list for tokenizer settings": text("tokenizer_config.json", "[]"),
    "H4 a tokenizer of nothing": text("tokenizer.json", "{}"),
    "H4 a template that is none": template("{% for"),
    "H4 weight_map a list": text("model.safetensors.index.json", '{"weight_map": ["a"]}'),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "m")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 1)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))


def student(folder: Path, targets: str | tuple[str, ...] = "all-linear") -> list[str]:
    return try_model(ModelTrial(str(folder), targets=targets))


def refused(folder: Path, targets: str | tuple[str, ...] = "all-linear") -> str:
    with pytest.raises(DistillError) as caught:
        student(folder, targets)
    assert caught.value.code == Exit.TRAINING and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_within_seconds(
    what: str, tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    HOSTILE[what](folder)
    started = time.monotonic()
    refused(folder)
    assert time.monotonic() - started < 40  # of a busy machine; 5 s of the processor are the limit


def test_a_sound_model_is_tried_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H3: a success is kept by the files' hashes; a change, or other targets, are tried again."""
    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    trials, try_it = list[ModelTrial](), trial._in_child
    monkeypatch.setattr(trial, "_in_child", lambda *own: (trials.append(own[0]), try_it(*own))[1])
    for _ in range(2):
        assert student(folder) == []
    assert len(trials) == 1
    student(folder, ("q_proj",))
    config(rope_theta=5000.0)(folder)
    student(folder)
    assert len(trials) == 3
    monkeypatch.setenv("DISTILL_CACHE", str(folder / "config.json" / "x"))  # cannot be written
    student(folder)
    assert len(trials) == 4


@pytest.mark.parametrize(
    "targets", ["(", "nothing_here", ("q_proj", "nope_proj"), "(a|a)*$", "a{9999999}"]
)
def test_targets_that_match_nothing(targets: str | tuple[str, ...], tiny: Path) -> None:
    """H4, H26: `target_modules` are tried on the model before anything is asked."""
    assert "target_modules" in refused(tiny, targets)
