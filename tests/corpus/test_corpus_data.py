"""The committed inputs are those that data/README.md names, byte for byte, and the shipped configs read them."""

import re
from pathlib import Path

from distill.config_file import load_config
from distill.corpus import corpus
from distill.corpus.readers import Reject
from distill.storage.files import sha256_file

DATA = Path("data")


def test_the_files_and_their_hashes() -> None:
    table = (DATA / "README.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"^\| (\S+) \|.* ([0-9a-f]{64}) \|$", table, re.MULTILINE))
    files = [path for path in DATA.rglob("*") if path.is_file() and path.name != "README.md"]
    assert {path.relative_to(DATA).as_posix(): sha256_file(path) for path in files} == named


def test_the_problems_are_read_with_their_numbers() -> None:
    override = "corpus.path=data/gsm8k/sample.jsonl"
    rejects: list[Reject] = []
    found = corpus.interpret_rows(
        load_config(Path("configs/gsm8k.yaml"), [override]).corpus, rejects
    )
    assert len(found) == 160 and not rejects
    assert found[0].meta["reference"] == "72" and found[0].meta["recorded_answer"].endswith("72")
