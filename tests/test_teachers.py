"""Kinds of teachers: each with its own keys, read from old configs too, and the keys of what is
asked of them."""

import json
import sys
from typing import Any

import pytest

from distill.config.renamed_keys import fields_in
from distill.config.teachers import EndpointTeacher, LocalTeacher
from distill.config.tree import Config
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.pipeline import STAGES, perform
from distill.records import Message
from distill.responders import engines
from distill.responders.responder import Request, Sampling, Scoring, origin_of
from distill.storage.run_folder import flatten, open_run

OLD_KEYS: dict[str, Any] = {  # of every kind, as finished runs hold them
    **{"revision": None, "dtype": "auto", "max_batch_size": None, "slots": None, "license": None},
    **{"dollars": None, "answers": None, "base_url": None, "allow_insecure": False, "api": "chat"},
    **{"api_key_env": None, "max_tokens_field": "max_tokens", "omit": [], "extra_body": {}},
    **{"strict_model": False, "budget_dollars": None, "concurrency": 16, "total_timeout": 600.0},
    **{"requests_per_minute": None, "max_retries": 6, "max_body_bytes": 16_000_000},
}
OWN: dict[str, dict[str, Any]] = {
    "local": {"model": "m/m", "dtype": "float32"},
    "endpoint": {"model": "m:1", "base_url": ["https://a.example/v1", "https://b.example/v1"]},
    "canned": {"answers": "answers.jsonl"},
    "recorded": {"dollars": "3.50"},
    "python": {"responder": "mine"},
}


def read(tmp_path, teacher: dict[str, Any], *overrides: str) -> Config:
    tree = {"name": "t", "corpus": {"path": "x"}, "student": {"model": "s"}, "teacher": teacher}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    return load_config(tmp_path / "config.json", overrides)


@pytest.mark.parametrize("kind", OWN)
def test_a_resolved_config_with_the_keys_of_all_kinds_is_read(tmp_path, kind):
    plain = read(tmp_path, {"kind": kind, **OWN[kind]})
    assert read(tmp_path, {"kind": kind, **OLD_KEYS, **OWN[kind]}) == plain
    assert Config.model_validate_json(json.dumps(plain.resolved())) == plain
    own = type(plain.teacher).model_fields.keys()
    assert plain.resolved()["teacher"].keys() == own


def test_a_teacher_without_a_kind_is_local(tmp_path):
    assert isinstance(read(tmp_path, {"model": "m"}).teacher, LocalTeacher)
    other = read(tmp_path, {"model": "m"}, "teacher.kind=recorded").teacher
    assert other.kind == "recorded"


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"model": "m", "max_retries": 8}, "teacher.max_retries: is a key of kind endpoint"),
        ({"model": "m", "base_url": "https://a.example"}, "base_url: is a key of kind endpoint"),
        ({"kind": "recorded", "dtype": "float32"}, "teacher.dtype: is a key of kind local"),
        ({"kind": "canned"}, "teacher.answers is missing"),
        ({"kind": "endpoint", "model": "m"}, "teacher.base_url is missing"),
        ({"kind": "elsewhere"}, "teacher.kind: any .*'local', 'endpoint', 'canned'"),
        ({"kind": ["local"]}, "teacher.kind: any of the expected"),
        ({"model": "m", "tempreature": 1}, r"unknown key teacher.tempreature.*temperature\?"),
        ({"model": "m", "max_new_tokens": 0}, "teacher.max_new_tokens: .*above 0"),
        ({"model": "m", "n": 2}, "teacher: n above 1"),
    ],
)
def test_what_is_wrong_with_a_teacher_is_one_line_with_its_key(tmp_path, teacher, words):
    with pytest.raises(DistillError, match=words) as stopped:
        read(tmp_path, teacher)
    assert stopped.value.code == Exit.CONFIG


def test_the_keys_of_stages_are_keys_of_the_config():
    for stage in STAGES:
        for key in stage.keys:
            annotation: Any = Config
            for name in key.split("."):
                fields = fields_in(annotation)
                assert name in fields, f"{stage.name} reads {key}, which there is not"
                annotation = fields[name].annotation


def test_the_keys_of_requests_are_those_of_every_store():
    turns = (Message(role="system", content="s"), Message(role="user", content="ü\n"))
    drawn = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=64)
    keys = (
        Request.make("origin", "p", turns, drawn, 1).key,
        Request.make("origin", "q", turns[1:], Sampling()).key,
        Scoring.of("origin", (1, 2, 3)).key,
    )
    server = {"model": "m:1", "base_url": ["https://a.example/v1/", "https://b.example/v1"]}
    shaping = {"extra_body": {"top_k": 3}, "omit": ["temperature"], "revision": "r1"}
    assert (*keys, origin_of(EndpointTeacher.model_validate({**server, **shaping}))) == (
        "54de2bf0c124cc63e810e892ca5a5016",
        "e7e2cb84cd202eeaa6f53b8263893a62",
        "d2222f7931a947b2b7277e8c7582dd87",
        "9fd0d9fbf7d11487bf217625b742a9fb",
    )


def test_an_engine_is_chosen_once_for_a_run(tmp_path, monkeypatch):
    tree = {"name": "r", "runs": f"{tmp_path}", "corpus": {"path": "x"}, "student": {"model": "s"}}
    tree |= {"teacher": {"model": "m"}, "evaluation": {"engine": "auto", "judge": {"model": "j"}}}
    (tmp_path / "c.yaml").write_text(json.dumps(tree))

    def chosen(*overrides: str) -> list[object]:
        run = open_run(tmp_path / "c.yaml", overrides)
        perform(run, ())
        values = flatten(json.loads(run.path("config.json").read_bytes()))
        return [values[f"{key}.engine"] for key in ("teacher", "evaluation", "evaluation.judge")]

    ours, theirs = ["distill"] * 3, ["vllm"] * 3
    assert chosen() == ours, "no GPU is here"
    monkeypatch.setattr(engines, "gpu_facts", lambda: {"gpu": "H200"})
    vllm = f"engines.vllm.command={sys.executable} serve"
    assert chosen(vllm) == ours, "it stays"
    assert chosen(vllm, "name=other") == theirs
    assert chosen(vllm, "name=other", "teacher.engine=distill") == ["distill", "vllm", "vllm"]
    monkeypatch.undo()
    assert chosen("name=other") == ["distill", "vllm", "vllm"], "on another machine too"
    older = open_run(tmp_path / "c.yaml").config.resolved()
    del older["teacher"]["engine"]
    (tmp_path / "r/config.json").write_text(json.dumps(older))
    assert open_run(tmp_path / "r").config.auto_engines == []
