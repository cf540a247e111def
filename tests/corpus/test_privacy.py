"""Private text: what is masked, what stays, that documentation keeps its words, hostile text."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.corpus.privacy import mask, mask_document
from distill.corpus.python_docs import read_python_docs
from distill.errors import Exit
from distill.pipeline import STAGES
from distill.records import Document
from distill.storage.files import read_records
from tests.corpus.test_corpus import documents, make, text, write_rows
from tests.support.errors import stops

CORPUS, PROMPTS = STAGES[:2]
KEYS = [
    "sk-proj-" + "aB3" * 14,
    "sk-ant-api03-" + "xY9" * 12,
    "sk_live_" + "4eC39HqLyjWDarjtT1",
    "hf_" + "AbCdEfGhIj" * 3,
    "AKIA" + "IOSFODNN7ABCDEFG",
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "11ABCDE_" * 4,
    "AIza" + "Sy1234567" * 3 + "abcdefgh",
    "xoxb-" + "123456789012-abc",
    "glpat-" + "x1Y2z3" * 4,
    ".".join(["eyJhbGciOiJIUzI1NiJ9", "eyJzdWIiOiIxMjM0In0", "SflKxwRJSMeKKF2QT4"]),
]
PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\n"
    + "\n".join(["MIIEpAIBAAKCAQEA1c7" * 3] * 5 + ["QyyLA=="])
    + "\n-----END RSA PRIVATE KEY-----"
)
PRIVATE = [
    *((key, "key") for key in KEYS),
    (PEM, "key"),
    (PEM.replace("\n", "\\n"), "key"),
    (PEM.rsplit("\n", 2)[0], "key"),  # its end is cut off
    ("ada.lovelace+notes@analytical-engine.co.uk", "email"),
    ("4111 1111 1111 1111", "card"),
    ("5500-0000-0000-0004", "card"),
    ("378282246310005", "card"),
    ("DE89 3704 0044 0532 0130 00", "iban"),
    ("GB82WEST12345698765432", "iban"),
    ("+49 30 901820", "phone"),
    ("+44 (0)20 7946 0958", "phone"),
    ("+1-212-736-5000", "phone"),
    ("(212) 736-5000", "phone"),
    ("212-736-5000", "phone"),
    ("Tel.: 030 901820", "phone"),
    ("https://ada:en9ine!x@analytical.io/notes", "password"),
]
PLAIN = yaml.safe_load(Path("tests/fixtures/not_private.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("private", "kind"), PRIVATE, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("around", ["{}", "before {} after", "({})", '"{}",', "line\n{}\nline"])
def test_private_text_is_masked_and_counted(private, kind, around):
    masked, counts = mask(around.format(private))
    assert dict(counts) == {kind: 1} and f"[{kind.upper()}]" in masked
    assert private not in masked and masked.startswith(around[: around.index("{")])
    assert mask(masked) == (masked, {})


@pytest.mark.parametrize("plain", PLAIN)
def test_examples_numbers_and_code_stay(plain):
    assert mask(plain) == (plain, {})


def test_the_documentation_of_python_keeps_every_word():
    rows = read_python_docs()
    assert len(rows) > 500
    assert [row["name"] for row in rows if mask(row["text"])[1]] == []


def test_values_answers_and_turns_are_masked_and_the_user_s_id_stays():
    turns = [{"role": "user", "content": "I am ada@lovelace.org"}]
    meta: dict[str, Any] = {"id": "ada@lovelace.org", "who": "bob@lovelace.org", "n": 3}
    meta["recorded_answer"] = [{"text": "Write to ann@museum.fr.", "reasoning": KEYS[3]}]
    document = Document.make("I am ada@lovelace.org", "x", {**meta, "messages": turns})
    plain = Document.make("nothing here", "x", {"id": "1"})
    (masked, counts), (same, none) = mask_document(document), mask_document(plain)
    assert masked.text == "I am [EMAIL]" and masked.id != document.id
    assert masked.meta["messages"][0] == {"role": "user", "content": "I am [EMAIL]"}
    assert (masked.meta["id"], masked.meta["who"]) == ("ada@lovelace.org", "[EMAIL]")
    assert masked.recorded_answers == [{"text": "Write to [EMAIL].", "reasoning": "[KEY]"}]
    assert dict(counts) == {"email": 3, "key": 1} and list(masked.meta) == list(document.meta)
    assert same is plain and not none


def private_rows(folder: Path) -> None:
    rows = [{"text": text(n)} for n in range(20)]
    rows[3] = {"text": text(3) + " ask ada@lovelace.org or bob@lovelace.org"}
    rows[5] = {"text": text(5) + " the key " + KEYS[0], "note": "+49 30 901820"}
    write_rows(folder, rows)


def test_the_corpus_is_masked_before_prompts_and_says_so(tmp_path, capsys):
    private_rows(tmp_path)
    run = make(tmp_path)
    run.perform(CORPUS)
    kept = "".join(document.model_dump_json() for document in documents(run))
    assert len(documents(run)) == 20 and "lovelace" not in kept and KEYS[0] not in kept
    assert run.manifest()["corpus"]["private_text"] == {
        "policy": "mask", "documents": 2, "kinds": {"email": 2, "key": 1, "phone": 1},
    }  # fmt: skip
    assert "private text masked in 2 rows: 2 email, 1 key, 1 phone" in capsys.readouterr().err


def test_the_policy_may_drop_or_keep(tmp_path):
    private_rows(tmp_path)
    run = make(tmp_path, private_text="drop")
    run.perform(CORPUS)
    noted = run.manifest()["corpus"]
    assert (noted["documents"], noted["bad"], noted["repeats"]) == (18, 0, 0)
    rejects = run.path("rejects.jsonl").read_text()
    assert "holds private text: 2 email" in rejects and "lovelace" not in rejects
    kept = make(tmp_path / "b", path=tmp_path / "in", private_text="keep")
    kept.perform(CORPUS)
    whole = read_records(kept.path("documents.jsonl"), Document)
    assert any("ada@lovelace.org" in document.text for document in whole)
    assert kept.manifest()["corpus"]["private_text"] == {"policy": "keep"}


def test_a_corpus_of_private_text_alone_cannot_be_dropped(tmp_path):
    write_rows(tmp_path, [{"text": f"{text(n)} me{n}@lovelace.org"} for n in range(5)])
    with stops(Exit.INPUT, "every document holds private text"):
        make(tmp_path, private_text="drop").perform(CORPUS)
