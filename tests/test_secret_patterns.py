"""The list of secrets: the usual formats are caught by mask, scan and config alike, and what only
looks like one passes (fixtures/secret_shapes.yaml)."""

import random
import re
import string
import time
from pathlib import Path

import pytest
import yaml

from distill.cli import main
from distill.config.yaml_file import check_values
from distill.corpus.privacy import mask
from distill.errors import DistillError, Exit
from distill.publishing.secret_scan import scan
from distill.secret_patterns import FORMS, NAMES, find_secrets

TABLE = yaml.safe_load((Path(__file__).parent / "fixtures/secret_shapes.yaml").read_text())
SHAPES, HARMLESS = TABLE["shapes"], TABLE["harmless"]
ALPHABETS = {
    "b": string.ascii_letters + string.digits,
    "h": "0123456789abcdef",
    "d": string.digits,
    "w": string.ascii_letters + string.digits + "-_",
    "u": string.ascii_uppercase + string.digits,
    "l": string.ascii_lowercase + string.digits,
    "s": string.ascii_letters + string.digits + "+/",
    "age": "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L",
}
AROUND = ["{}", "before {} after", '{{"a": "{}"}}', "({}),", "line\n{}\nline", "\\n{}\\n"]


def made(shape: str, seed: int) -> str:
    """Return a sample of a shape with random bodies."""
    chance = random.Random(f"{shape} {seed}")

    def body(found: re.Match[str]) -> str:
        kind, count = found[1], int(found[2])
        if kind == "g":
            return "-".join(
                "".join(chance.choices("0123456789abcdef", k=n)) for n in (8, 4, 4, 4, 12)
            )
        return "".join(chance.choices(ALPHABETS[kind], k=count))

    return re.sub(r"\{(\w+):(\d+)\}", body, shape)


def masked(text: str) -> bool:
    return bool({"key", "password"} & mask(text)[1].keys())


def scanned(text: str, folder: Path, *allowed: str) -> bool:
    (folder / "README.md").write_text(text)
    try:
        scan(folder, allowed=allowed)
    except DistillError as error:
        return error.code == Exit.PUBLISH
    return False


def refused(text: str, *allowed: str) -> bool:
    try:
        check_values({"a": text.replace("\n", " \n")}, {(): "c.yaml"}, allowed=allowed)
    except DistillError as error:
        return error.code == Exit.CONFIG and "secret" in error.what
    return False


def test_the_usual_formats_are_caught_by_all_three(tmp_path):
    """H7: one list for corpus, config and release."""
    missed = {
        (name, place.__name__)
        for name, shape in SHAPES.items()
        for seed in range(5)
        for text in [made(shape, seed)]
        for place, caught in (
            (masked, masked(text)),
            (scanned, scanned(text, tmp_path)),
            (refused, refused(text)),
        )
        if not caught
    }
    assert missed == set() and len(SHAPES) > 100 and len(HARMLESS) >= 40


@pytest.mark.parametrize("name", SHAPES)
def test_a_secret_is_found_wherever_it_stands(name):
    for around in AROUND:
        text = around.format(made(SHAPES[name], 7))
        assert {secret.name for secret in find_secrets(text)} & NAMES, around
        hidden, _ = mask(text)
        assert not [*find_secrets(hidden)], "a part of it is left"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_a_secret_passes(text, tmp_path):
    assert [*find_secrets(text)] == []
    assert not scanned(text, tmp_path) and not masked(text)
    assert not refused(text) or "://" in text  # a config's addresses have no login at all


def test_forms_known_from_the_beginning_are_masked_as_ever():
    """A key before the password that it may be; other keys, which were passwords only, as
    passwords."""
    old, new = made(SHAPES["GitHub"], 1), made(SHAPES["Shopify"], 1)
    assert mask(f"https://u:{old}@h.org/x")[0] == "https://u:[KEY]@h.org/x"
    assert mask(f"https://u:{new}@h.org/x")[0] == "https://[PASSWORD]@h.org/x"
    assert mask(f"{old} {new}") == ("[KEY] [KEY]", {"key": 2})


def test_each_can_be_allowed_by_name_or_by_its_digest(tmp_path):
    """H7: a false alarm has a way on."""
    text = f"a {made(SHAPES['GitLab'], 3)} b"
    (secret,) = find_secrets(text)
    mark = secret.sha256
    for allowed in (secret.name, mark[:8], f"sha256:{mark[:12]}", mark):
        assert not scanned(text, tmp_path, allowed) and not refused(text, allowed)
    for other in ("github-token", mark[:7], "sha256:", "", "f" * 12):
        assert scanned(text, tmp_path, other) and refused(text, other)
    with pytest.raises(DistillError) as caught:
        scan(tmp_path)
    assert f"publish.allow_secrets=[sha256:{mark[:12]}]" in caught.value.fix
    assert text[2:-2] not in str(caught.value)


CONFIG = """\
name: a
corpus: {path: sk-learn-experiments-of-2024}
teacher: {kind: recorded, model: somebody, license: CC0-1.0}
student: {model: smollm2-135m-instruct}
"""


def test_a_config_allows_what_it_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    key = made(SHAPES["Hugging Face"], 1)
    path.write_text(CONFIG.replace("sk-learn-experiments-of-2024", f"./{key}"))
    assert main(["corpus", str(path)]) == Exit.CONFIG
    line = capsys.readouterr().err
    (allow,) = re.findall(r"publish\.allow_secrets=\[sha256:\w{12}\]", line)
    assert key not in line
    assert main(["corpus", str(path), allow]) == Exit.INPUT  # the folder does not exist
    assert main(["corpus", str(path), "publish.allow_secrets=[huggingface-token]"]) == Exit.INPUT
    capsys.readouterr()
    path.write_text(CONFIG)  # whose path is none
    assert main(["corpus", str(path), "publish.allow_secrets=[huggingface-tokens]"]) == Exit.CONFIG
    assert "is no name of a secret's form" in capsys.readouterr().err


def test_other_keys_than_those_of_publish_are_no_overrides_of_publish(tmp_path, capsys):
    assert main(["publish", str(tmp_path), "train.learning_rate=1"]) == Exit.CONFIG
    assert "is no key of publish" in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_no_form_takes_time_in_the_square_of_a_text(form):
    for sign in form.signs:
        for piece in (*(f"{sign}{end}" for end in ("", "a", "1", " ", "A1-", "=")), "a1", "A", "="):
            text = sign + piece * (60_000 // len(piece))
            started = time.process_time()
            for match in form.pattern.finditer(text):
                form.check(match)
            assert time.process_time() - started < 2, piece
