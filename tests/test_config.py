"""The config: what people write is read as they mean it, and every fault is one line with its place
(faults A1-A8)."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.tree import Config
from distill.config.values import Section
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from scripts.reference import description, reference

ROOT = Path(__file__).parent.parent
QUICKSTART = (ROOT / "configs/quickstart.yaml").read_text()
KEY = "sk-ant-0123456789abcdefghij"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))  # 10000 for the long form


def fault(tmp_path: Path, content: str | bytes = QUICKSTART, *overrides: str) -> str:
    """Return the message of the fault in a config, which must be one line with exit code 2."""
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DistillError) as caught:
        load_config(path, overrides)
    assert caught.value.code == Exit.CONFIG
    return str(caught.value)


def load(*overrides: str) -> Config:
    return load_config(ROOT / "configs/quickstart.yaml", overrides)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_experiment_loads(path):
    if "corpus" in (yaml.safe_load(path.read_text()) or ()):
        given = ["corpus.path=./texts"] if "path: null" in path.read_text() else []
        config = load_config(path, given)
        assert Config.model_validate(config.resolved()) == config


def sections(tree: type[Section], key: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield each section of a tree with its key, the tree's own first."""
    yield key, tree
    for name, field in tree.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind, f"{key}.{name}".strip("."))


def test_every_key_says_what_it_does():
    found = dict(sections(Config))
    assert {"", "train.lora", "signals.endpoint", "prompts.questions"} <= found.keys()
    for key, section in found.items():
        for name, field in section.model_fields.items():
            text = description(field)
            assert 10 < len(text) < 250 and text[-1] in ".)", f"{key}.{name}: {text}"
            assert "default" not in text, f"{key}.{name} repeats its default"


def test_the_reference_is_made_from_the_keys_as_they_are():
    path = ROOT / "configs/reference.yaml"
    assert path.read_text() == reference(), "run scripts/reference.py"
    for key, section in sections(Config):
        if not key.startswith(("signals.endpoint", "evaluation.judge")):  # which have a teacher's
            for name, field in section.model_fields.items():
                words = re.escape(description(field)[:40])
                pattern = rf"(?m)^[ #]*# {words}.*\n(?:[ #]*#.*\n)*?[ #]*{name}:"
                assert re.search(pattern, reference()), f"{key}.{name}"


def test_the_reference_is_an_experiment_of_defaults_and_a_few_examples():
    tree = load_config(ROOT / "configs/reference.yaml")
    examples = {
        "name": "reference",
        "corpus": {"path": tree.corpus.path},
        "prompts": {"tasks": tree.prompts.tasks},
        "teacher": {"model": tree.teacher.model},
        "student": {"model": tree.student.model},
    }
    assert tree == Config.model_validate(examples)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-4", "learning_rate", 1e-4),
        ("train.learning_rate=5E-5", "learning_rate", 5e-5),
        ("train.num_train_epochs=3", "num_train_epochs", 3.0),
        ("train.bf16=true", "bf16", True),
        ("train.max_length=1_024", "max_length", 1024),
        ("train.eval_steps=null", "eval_steps", None),
    ],
)
def test_values_are_read_as_meant(override, key, value):
    assert getattr(load(override).train, key) == value


def test_unknown_keys_name_the_line_and_the_nearest(tmp_path):
    text = QUICKSTART.replace("max_new_tokens", "max_new_token")
    line = 1 + text[: text.index("max_new_token")].count("\n")
    assert f"c.yaml:{line}: unknown key teacher.max_new_token (did you mean max_new_tokens?)" in (
        fault(tmp_path, text)
    )
    assert "did you mean learning_rate?" in fault(tmp_path, QUICKSTART, "train.lr=1e-4")
    assert "did you mean student?" in fault(tmp_path, QUICKSTART.replace("student:", "studnt:"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.bf16=no", "train.bf16"),
        ("train.bf16=on", "train.bf16"),
        ("train.packing=1", "train.packing"),
        ("seed=010", "seed"),
        ("seed='7'", "seed"),
        ("seed=true", "seed"),
        ("seed=1.5", "seed"),
        ("seed=1:30", "seed"),
        ("train.learning_rate=.nan", "train.learning_rate is not a finite number"),
        ("train.learning_rate=.inf", "train.learning_rate is not a finite number"),
        ("teacher.extra_body={min_p: .nan}", "teacher.extra_body.min_p is not a finite number"),
        ("train.learning_rate=true", "train.learning_rate"),
        ("template_date=yesterday", "template_date: invalid isoformat"),
        ("prompts.tasks=summary", "prompts.tasks: input should be a list"),
        ("corpus=null", "corpus"),
        (f"seed={'9' * 5000}", "limit (4300 digits)"),
        ("train.num_train_epochs=0", "(allowed: above 0"),
        ("train.tokens_per_step=-1", "(allowed: above 0"),
        ("teacher.temperature=9", "(allowed: at least 0, at most 2"),
        ("train.lora.r=0", "(allowed: at least 1, at most 1,024"),
        ("train.save_total_limit=1", "(allowed: at least 2"),
        ("train.learning_rate=9", "(allowed: above 0, at most 1"),
    ],
)
def test_wrong_values_name_the_key_and_its_range(tmp_path, override, says):
    assert says in fault(tmp_path, QUICKSTART, override)


BROKEN = {
    "utf-16": QUICKSTART.encode("utf-16"),
    "bom": b"\xef\xbb\xbf" + QUICKSTART.encode(),
    "latin-1": b"name: caf\xe9\n",
    "tab": b"a:\n\t- b\n",
    "empty": b"",
    "list": b"- a\n",
    "scalar": b"hello\n",
    "python object": b"a: !!python/object/apply:os.system [touch pwned]\n",
    "tag": b"seed: !!int '010'\n",
    "alias": b"a: &a [x]\nb: *a\n",
    "alias bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefghi"),
    "duplicate": b"name: a\nname: b\n",
    "nested": b"[" * 60_000,
    "number key": b"1: a\n",
    "list key": b"? [a]\n: b\n",
    "merge": b"<<: {a: 1}\n",
    "two documents": b"--- {a: 1}\n--- {b: 1}\n",
    "surrogate": b'name: "\\ud800"\n',
    "nul": b'name: "a\\0"\n',
    "many keys": b"".join(b"k%d: {a: [1, 2]}\n" % n for n in range(3500)),
    "60 KB of list": b"- a\n" * 15_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_stop_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    assert "\n" not in fault(tmp_path, BROKEN[name])
    assert time.process_time() - started < 2
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_a_huge_file_is_refused_in_little_time_and_memory(tmp_path):
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.write(b"a: b\n")
        file.truncate(100_000_000)
    script = (
        "import sys; from pathlib import Path; from distill.cli import main\n"
        f"code = main(['run', {str(path)!r}])\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')))\n"
        "sys.exit(code)"
    )
    started = time.monotonic()
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert time.monotonic() - started < 10  # the start of Python on a busy machine included
    assert int(result.stdout.split()[1]) < 300_000  # KiB


@pytest.mark.parametrize("path", ["/dev/zero", "/", "nowhere.yaml", "a\0b", "x" * 5000])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(DistillError) as caught:
        load_config(Path(path))
    assert caught.value.code == Exit.CONFIG


@pytest.mark.parametrize(
    ("content", "override"),
    [
        (QUICKSTART + f"\n{KEY}: 1\n", "seed=1"),
        (QUICKSTART + f"\n{KEY}: 1\n{KEY}: 2\n", "seed=1"),
        (QUICKSTART.replace("name: quickstart", f"name: {KEY}"), "seed=1"),
        (QUICKSTART, f"teacher.api_key={KEY}"),
        (QUICKSTART, f"{KEY}=1"),
        (QUICKSTART, KEY),
        (QUICKSTART, f"teacher.answers=[{KEY}"),
        (QUICKSTART, f"prompts.tasks=[{KEY}]"),
        (QUICKSTART, "teacher.api_key=hunter2-sk-ant"),
        (QUICKSTART, "corpus.dataset=https://user:sk-ant@host/x"),
        (QUICKSTART, "teacher.model=hf_ABCDEFGHIJKLMNOPQRsecret"),
    ],
)
def test_a_secret_is_never_echoed(tmp_path, content, override):
    said = fault(tmp_path, content, override)
    assert "sk-ant" not in said and "ABCDEFG" not in said


NAMED = [("name", n) for n in ("../x", "a/b", ".", "-x", "a\u0301", "x" * 300, "", "a b")]
NAMED += [
    (key, name)
    for name in ("../x", "/a/../b", "a/b/c", "./../x", "x" * 300, "a//b", "a b")
    for key in ("student.model", "publish.model_name")
]


@pytest.mark.parametrize(("key", "name"), NAMED)
def test_a_name_cannot_leave_its_place(tmp_path, key, name):
    fault(tmp_path, QUICKSTART, f"{key}='{name}'")


def test_a_mapping_override_changes_only_what_it_names():
    train = load("train={lora: {r: 4}, packing: false}").train
    assert (train.lora.r, train.lora.alpha, train.packing) == (4, 64, False)
    assert train.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.loss={ce: 0}"], "train.loss: gives every part the weight 0"),
        (["train.loss.forward_kl=-1"], "allowed: at least 0"),
        (["train.loss={jsd: 1, beta: 1}"], "allowed: above 0, below 1"),
        (["train.loss={forward_kl: 1, temperature: 2}"], "add it to signals.temperatures"),
        (
            ["train.loss={forward_kl: 1}", "teacher={kind: recorded}"],
            "a local model in signals.model",
        ),
        (["signals.p=1"], "allowed: above 0, below 1"),
        (["signals.k=0"], "allowed: at least 1"),
        (["filters.failed_checker=signals_only"], "signals_only needs soft labels, and train.loss"),
        (["filters.failed_checker=maybe"], "'drop', 'signals_only' or 'keep', not 'maybe'"),
    ],
)
def test_soft_labels_that_cannot_be_are_refused(overrides, says):
    with pytest.raises(DistillError) as fault:
        load_config(ROOT / "configs/gsm8k.yaml", overrides)
    assert says in str(fault.value) and fault.value.code == Exit.CONFIG


@pytest.mark.parametrize(("written", "word"), [("true", "drop"), ("false", "keep")])
def test_what_becomes_of_wrong_answers_was_a_switch(written, word):
    config = load(f"filters.failed_checker={written}")
    assert config.resolved()["filters"]["failed_checker"] == word


def test_distributions_are_the_teacher_s_or_those_of_a_model_of_one_s_own_choice():
    path, loss = ROOT / "configs/gsm8k.yaml", "train.loss={forward_kl: 1}"
    assert load_config(path, [loss]).soft_teacher().model == "qwen2.5-coder-1.5b-instruct"
    other = load_config(path, [loss, "teacher.kind=recorded", "signals.model=./x"]).soft_teacher()
    assert (other.kind, other.model) == ("local", "./x")
    tree = load_config(path, [loss, "train.loss.temperature=2", "signals.temperatures=[2.0]"])
    assert tree.train.loss.soft == {"forward_kl": 1.0} and not load_config(path).train.loss.soft


def test_an_override_is_named_where_it_is_wrong(tmp_path):
    assert fault(tmp_path, QUICKSTART, "train.learning_rate=x").startswith("command line: train.le")
    assert "override train.lora:1" in fault(tmp_path, QUICKSTART, "train.lora={")
    assert fault(tmp_path, QUICKSTART, "teacher.kind=canned").startswith("command line: teacher.an")
    assert "KEY=VALUE" in fault(tmp_path, QUICKSTART, "train.lora")


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
NAMES = st.sampled_from(sorted({*Config.model_fields, "lora", "r", "path", "model", "kind"}))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(), inner),
    max_leaves=12,
)


@st.composite
def damaged(draw) -> bytes:
    """Draw the quickstart with a piece cut out and another put in."""
    text = QUICKSTART.encode()
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, min(len(text), start + 60)))
    return (
        text[:start] + draw(st.binary(max_size=12) | st.text(max_size=12).map(encoded)) + text[end:]
    )


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@given(
    st.one_of(
        damaged(),
        st.binary(max_size=200),
        st.dictionaries(NAMES, TREES).map(
            lambda tree: encoded(str(yaml.safe_dump(tree, allow_unicode=True)))
        ),
    )
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_anything_loads_or_is_one_line(tmp_path_factory, content):
    path, started = tmp_path_factory.getbasetemp() / "fuzz.yaml", time.process_time()
    path.write_bytes(content)
    try:
        load_config(path)
    except DistillError as error:
        assert error.code == Exit.CONFIG  # noqa: PT017
    assert time.process_time() - started < 2
