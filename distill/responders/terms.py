"""The terms book: may a teacher's answers train another model, and what does a published student then owe?

Read strictly: what configs/terms.yaml does not know is not allowed, until the config states what allows it. It holds
facts about texts that were read, each with its link and day, and is no legal advice. Imports no torch.
"""

import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError, model_validator

from distill.config import Teacher
from distill.config_file import find_config, read_yaml
from distill.errors import DistillError, Exit
from distill.models.registry import hub_id, is_folder, lookup
from distill.records import Record

TABLE = Path("configs/terms.yaml")
SAID = {"yes": "yes", "duties": "yes, with duties", "no": "no", "unknown": "not known"}
STATE = 'state what allows it: terms.basis="license agreement YYYY-MM with ..."'
OWN = 'say what allows it: terms.basis="our own model", or the license and where it came from'


class Duties(Record):
    """What a published student carries: the beginning of its name, a line shown, a notice, a license, the agreement."""

    name: str | None = None
    display: str | None = None
    notice: str | None = None
    license: str | None = None
    agreement: bool = False

    def lines(self) -> list[str]:
        """Say each duty in words."""
        said = [
            self.name and f"its name begins with {self.name}",
            self.display and f"its card displays: {self.display}",
            self.notice and f"a NOTICE file says: {self.notice}",
            self.license and f"its license is {self.license}",
            self.agreement and "a copy of the agreement goes with it (terms.agreement)",
        ]
        return [f"a published student: {line}" for line in said if line]


class Terms(Record):
    """A text that governs teachers, hosts or models of a license; patterns are compared without case."""

    title: str
    teachers: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    own_models: bool = False  # the host serves its own models only, so that the host alone decides
    may_train: Literal["yes", "duties", "no"]
    clause: str
    outputs: Duties = Duties()
    weights: Duties = Duties()
    url: str
    version: str
    read: date

    @model_validator(mode="after")
    def _duties_are_named(self) -> "Terms":
        if self.may_train != "no" and (self.may_train == "duties") != bool(self.outputs.lines()):
            raise ValueError("may_train is duties exactly where outputs names them")
        return self

    def line(self) -> str:
        """Say what the text says of training on outputs, and where and when that was read."""
        version = f", {self.version}" if self.version else ""
        return f"{self.title}{version}: {self.clause} ({self.url}, read {self.read})"


class Verdict(Record):
    """What the book says of one teacher: the texts that govern it, what it does not know, and the stated basis."""

    teacher: str
    texts: tuple[Terms, ...] = ()
    unknown: tuple[str, ...] = ()
    basis: str | None = None

    @property
    def word(self) -> Literal["yes", "duties", "no", "unknown"]:
        """Return the strictest of what the texts say; what is not known is unknown unless a text forbids."""
        said = {text.may_train for text in self.texts}
        if "no" in said:
            return "no"
        return "unknown" if self.unknown else "duties" if "duties" in said else "yes"

    @property
    def allowed(self) -> bool:
        """Tell whether a run may train on the answers."""
        return self.basis is not None or self.word in ("yes", "duties")

    def duties(self) -> list[Duties]:
        """Return what a student owes that learned from the answers."""
        return [text.outputs for text in self.texts if text.outputs.lines()]

    def lines(self) -> list[str]:
        """Say the verdict, the texts, the duties and the basis."""
        head = f"may the answers of {self.teacher} train another model? {SAID[self.word]}"
        basis = [f"stated basis: {self.basis}"] if self.basis else []
        owed = [line for duties in self.duties() for line in duties.lines()]
        return [head, *(text.line() for text in self.texts), *owed, *basis]

    def facts(self) -> dict[str, Any]:
        """Return the verdict for the manifest."""
        return {
            "teacher": self.teacher,
            "verdict": self.word,
            "basis": self.basis,
            "texts": [text.line() for text in self.texts],
            "duties": [line for duties in self.duties() for line in duties.lines()],
            "unknown": list(self.unknown),
            "table_sha256": hashlib.sha256(find_config(TABLE).read_bytes()).hexdigest(),
        }


class TermsBook:
    """The rows of the table in their order; the first that fits counts."""

    def __init__(self, rows: Iterable[Terms]) -> None:
        self.rows = tuple(rows)

    def of_model(self, name: str, license: str | None = None) -> Terms | None:
        """Return the text that governs a model by its Hub id or served name, else by its license; or None."""
        found = self._first("teachers", name)
        return found or (self._first("licenses", license) if license else None)

    def of_host(self, host: str) -> Terms | None:
        """Return the terms of a provider by its host, or None."""
        return self._first("hosts", host)

    def judge(
        self,
        model: str,
        license: str | None = None,
        hosts: Sequence[str] = (),
        basis: str | None = None,
    ) -> Verdict:
        """Judge a teacher by its model and by the public hosts that serve it; hosts of one's own add no terms."""
        by_host = {host: self.of_host(host) for host in hosts if is_public(host)}
        by_model = self.of_model(model, license)
        decided = bool(by_host) and all(row and row.own_models for row in by_host.values())
        unknown = [f"host {host}" for host, row in by_host.items() if row is None]
        if by_model is None and not decided:
            unknown.insert(0, f"model {model}")
        texts = [row for row in (by_model, *by_host.values()) if row]
        return Verdict(
            teacher=model, texts=tuple(dict.fromkeys(texts)), unknown=tuple(unknown), basis=basis
        )

    def _first(self, field: str, name: str) -> Terms | None:
        """Return the first row with a pattern that fits."""
        return next(
            (
                row
                for row in self.rows
                if any(fnmatchcase(name.lower(), p.lower()) for p in getattr(row, field))
            ),
            None,
        )


def is_public(host: str) -> bool:
    """Tell whether a host is somebody's service: not loopback, not a private address, not a name without a dot."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_global
    except ValueError:
        return "." in host and not host.lower().endswith((".local", ".internal", ".localhost"))


def load_terms(path: Path | None = None) -> TermsBook:
    """Read the table: the user's, else the one that ships; raises DistillError (exit 2) where a row is wrong."""
    path, form = find_config(path or TABLE), tuple[Terms, ...]
    try:
        rows = TypeAdapter(form).validate_python(read_yaml(path, form))
    except ValidationError as error:
        fault = error.errors()[0]
        where = f"{path}: {'.'.join(map(str, fault['loc']))}"
        fix = "see the first lines of configs/terms.yaml for the form"
        raise DistillError(Exit.CONFIG, where, fault["msg"], fix) from None
    return TermsBook(rows)


def judge_teacher(teacher: Teacher, basis: str | None = None) -> Verdict:
    """Judge a teacher, with the `basis` that the user states; canned answers have none, and recorded ones come under their stated license."""
    if not teacher.under_terms:
        return Verdict(teacher="canned answers")
    if not teacher.answers_anything and basis is None and teacher.license:
        basis = f"the answers' license as stated: {teacher.license}"
    info = lookup(teacher.model) if teacher.model else None
    name = hub_id(teacher.model) or Path(teacher.model).name or "unknown"
    hosts = [urlsplit(url).hostname or "" for url in teacher.base_urls]
    verdict = load_terms().judge(name, info.license if info else None, hosts, basis)
    if is_folder(teacher.model) and not info:  # its name proves nothing, though it may forbid
        return verdict.model_copy(update={"unknown": ("a folder",)})
    return verdict


def require_terms(teacher: Teacher, basis: str | None = None) -> Verdict:
    """Return the verdict on a teacher; raises DistillError (exit 10) where its answers may not train."""
    verdict = judge_teacher(teacher, basis)
    if verdict.allowed:
        return verdict
    where = f"teacher {teacher.model or teacher.kind}"
    forbidden = next((text for text in verdict.texts if text.may_train == "no"), None)
    if forbidden:
        raise DistillError(Exit.TERMS, where, f"forbidden by {forbidden.line()}", STATE)
    if is_folder(teacher.model):
        what = "a folder does not say whether its answers may train another model"
        raise DistillError(Exit.TERMS, where, what, OWN)
    what = f"{TABLE} does not know {' and '.join(verdict.unknown)}"
    fix = "state the license of the answers: teacher.license=..., or terms.basis=..."
    raise DistillError(
        Exit.TERMS, where, what, f"{STATE}, or add a row" if teacher.answers_anything else fix
    )
