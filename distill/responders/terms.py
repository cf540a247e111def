"""The terms book: may a teacher's answers train another model, and what does a student then owe?

What configs/terms.yaml does not know is not allowed, until the config states what allows it.
"""

import ipaddress
from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import model_validator

from distill.config.teachers import Teacher
from distill.config.yaml_file import find_config, read_table
from distill.errors import DistillError, Exit
from distill.models.registry import hub_id, is_folder, lookup
from distill.records import Record
from distill.storage.files import sha256_file

TABLE = Path("configs/terms.yaml")
WORDS = {"yes": "yes", "duties": "yes, with duties", "no": "no", "unknown": "not known"}
STATE = 'state what allows it: terms.basis="our own model", or "agreement YYYY-MM with ..."'


class Obligation(Record):
    """What a published student carries; `name` is how its name begins, `display` a line shown."""

    name: str | None = None
    display: str | None = None
    notice: str | None = None
    license: str | None = None
    agreement: bool = False

    def lines(self) -> list[str]:
        """Return each part of it as a sentence."""
        parts = [
            self.name and f"its name begins with {self.name}",
            self.display and f"its card displays: {self.display}",
            self.notice and f"a NOTICE file says: {self.notice}",
            self.license and f"its license is {self.license}",
            self.agreement and "a copy of the agreement goes with it (terms.agreement)",
        ]
        return [f"a published student: {part}" for part in parts if part]


class TermsText(Record):
    """A text that governs teachers, hosts or models of a license; patterns ignore case."""

    title: str
    teachers: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    own_models: bool = False  # the host serves its own models only, so that the host alone decides
    may_train: Literal["yes", "duties", "no"]
    clause: str
    outputs: Obligation = Obligation()
    weights: Obligation = Obligation()
    url: str
    version: str
    read: date

    @model_validator(mode="after")
    def _duties_are_named(self) -> "TermsText":
        if self.may_train != "no" and (self.may_train == "duties") != bool(self.outputs.lines()):
            raise ValueError("may_train is duties exactly where outputs names them")
        return self

    def line(self) -> str:
        """Return what the text says of training on outputs, and where and when that was read."""
        version = f", {self.version}" if self.version else ""
        return f"{self.title}{version}: {self.clause} ({self.url}, read {self.read})"


class Verdict(Record):
    """What the book says of one teacher: the texts, what it does not know, and the stated basis."""

    teacher: str
    texts: tuple[TermsText, ...] = ()
    unknown: tuple[str, ...] = ()
    basis: str | None = None

    @property
    def word(self) -> Literal["yes", "duties", "no", "unknown"]:
        """Return the strictest of what the texts say; unknown counts unless one forbids."""
        words = {text.may_train for text in self.texts}
        if "no" in words:
            return "no"
        return "unknown" if self.unknown else "duties" if "duties" in words else "yes"

    @property
    def allowed(self) -> bool:
        """Tell whether a run may train on the answers."""
        return self.basis is not None or self.word in ("yes", "duties")

    def obligations(self) -> list[str]:
        """Return what a student owes that learned from the answers, a sentence each."""
        return [line for text in self.texts for line in text.outputs.lines()]

    def lines(self) -> list[str]:
        """Return the verdict, the texts, the obligations and the basis."""
        head = f"may the answers of {self.teacher} train another model? {WORDS[self.word]}"
        basis = [f"stated basis: {self.basis}"] if self.basis else []
        return [head, *(text.line() for text in self.texts), *self.obligations(), *basis]

    def facts(self) -> dict[str, object]:
        """Return the verdict for the manifest."""
        return {
            "teacher": self.teacher,
            "verdict": self.word,
            "basis": self.basis,
            "texts": [text.line() for text in self.texts],
            "duties": self.obligations(),
            "unknown": list(self.unknown),
            "table_sha256": sha256_file(find_config(TABLE)),
        }


class TermsBook(NamedTuple):
    """The rows of the table in their order; the first that fits counts."""

    rows: tuple[TermsText, ...]

    def _first(self, field: str, name: str) -> TermsText | None:
        for row in self.rows if name else ():
            if any(fnmatchcase(name.lower(), p.lower()) for p in getattr(row, field)):
                return row
        return None

    def of_model(self, name: str, license: str | None = None) -> TermsText | None:
        """Return the text of a model by its Hub id or served name, else by its license; or None."""
        return self._first("teachers", name) or self._first("licenses", license or "")

    def verdict(
        self,
        model: str,
        license: str | None = None,
        hosts: Sequence[str] = (),
        basis: str | None = None,
    ) -> Verdict:
        """Judge a teacher by its model and its public hosts; hosts of one's own add no terms."""
        by_host = {host: self._first("hosts", host) for host in hosts if is_public(host)}
        by_model = self.of_model(model, license)
        decided = bool(by_host) and all(row and row.own_models for row in by_host.values())
        unknown = [] if by_model or decided else [f"model {model}"]
        unknown += [f"host {host}" for host, row in by_host.items() if row is None]
        texts = dict.fromkeys(row for row in (by_model, *by_host.values()) if row)
        return Verdict(teacher=model, texts=tuple(texts), unknown=tuple(unknown), basis=basis)


def is_public(host: str) -> bool:
    """Tell whether a host is somebody's service: no private address, no name without a dot."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_global
    except ValueError:
        return "." in host and not host.lower().endswith((".local", ".internal", ".localhost"))


def load_terms(path: Path | None = None) -> TermsBook:
    """Read the table: the user's, else the one that ships; raises DistillError (exit 2)."""
    fix = "see the first lines of configs/terms.yaml for the form"
    return TermsBook(read_table(find_config(path or TABLE), tuple[TermsText, ...], fix))


def judge_teacher(teacher: Teacher, basis: str | None = None) -> Verdict:
    """Judge a teacher, with the `basis` that the user states; canned answers have no terms."""
    if not teacher.under_terms:
        return Verdict(teacher="canned answers")
    if not teacher.answers_anything and basis is None and teacher.license:
        basis = f"the answers' license as stated: {teacher.license}"
    info = lookup(teacher.model) if teacher.model else None
    name = hub_id(teacher.model) or Path(teacher.model).name or "unknown"
    hosts = [urlsplit(url).hostname or "" for url in teacher.base_urls]
    verdict = load_terms().verdict(name, info.license if info else None, hosts, basis)
    if is_folder(teacher.model) and not info:  # its name proves nothing, though it may forbid
        return verdict.model_copy(update={"unknown": ("a folder",)})
    return verdict


def require_terms(teacher: Teacher, basis: str | None = None) -> Verdict:
    """Return the verdict on a teacher; raises DistillError (exit 10) where it is no."""
    verdict = judge_teacher(teacher, basis)
    what, fix = f"{TABLE} does not know {' and '.join(verdict.unknown)}", f"{STATE}, or add a row"
    if verdict.allowed:
        return verdict
    if verdict.word == "no":
        forbidden = next(text for text in verdict.texts if text.may_train == "no")
        what, fix = f"forbidden by {forbidden.line()}", STATE
    elif is_folder(teacher.model):
        what, fix = "a folder does not say whether its answers may train another model", STATE
    elif not teacher.answers_anything:
        fix = "state the license of the answers: teacher.license=..., or terms.basis=..."
    raise DistillError(Exit.TERMS, f"teacher {teacher.model or teacher.kind}", what, fix)
