"""What must not leave the machine: secrets, its paths, and addresses with credentials in them."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from distill.errors import DistillError, Exit
from distill.secret_patterns import find_secrets

HOMES = re.compile(r"(?:/home/|/Users/|[A-Z]:\\+Users\\+)[A-Za-z0-9._-]+[/\\]")
SECRET_NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
TEXT = {".json", ".jsonl", ".md", ".html", ".jinja", ".txt", ".yaml", ""}
SAMPLES = {"report.html"}  # shows texts of the corpus, which may speak of any home
ROWS = ".jsonl"  # holds such texts and nothing of the run's


def scan(folder: Path, private: tuple[str, ...] = (), allowed: Collection[str] = ()) -> None:
    """Stop (exit 9) at the first file that holds what must not be published, without echoing it.

    `private` are further texts that must not appear, such as the absolute path of the run.
    `allowed` are forms of secrets by name, and single ones by the beginning of their SHA-256
    (`publish.allow_secrets`).
    """
    paths = {f"{Path.home()}/", *private}
    exact = {text: "a path of this machine" for text in paths if len(text) > 4}
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= 8:
            exact[value] = f"the value of ${name}"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".gguf":
            continue  # its texts are the name, the tokenizer and the template, which stand beside
        if path.suffix in TEXT:
            text = path.read_text(encoding="utf-8", errors="replace")
        else:  # the header of a safetensors file
            with path.open("rb") as file:
                size = min(int.from_bytes(file.read(8), "little"), 1 << 26)
                text = file.read(size).decode("utf-8", "replace")
        places = paths if path.suffix == ROWS else ()  # which a text of the corpus may hold
        findings = [
            (what, text.find(value), "")
            for value, what in exact.items()
            if value in text and value not in places
        ]
        for secret in find_secrets(text, allowed):
            kind = "an address with credentials" if secret.name.startswith("addr") else "a secret"
            findings.append((f"{kind} ({secret.name}, {secret.mark})", secret.start, secret.way_on))
        sample = path.suffix == ROWS or path.name in SAMPLES
        if not sample and (home := HOMES.search(text)):
            findings.append(("somebody's home folder", home.start(), ""))
        for what, place, way_on in findings:
            where = f"{path.relative_to(folder)}:{1 + text[:place].count(chr(10))}"
            fix = f"remove it at its source{way_on}"
            raise DistillError(Exit.PUBLISH, where, f"holds {what}", fix)
