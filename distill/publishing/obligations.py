"""What a release owes to the terms of its teacher and base: name, license, lines shown, notices.

The terms book (`distill.responders.terms`) says what is owed; this puts it into the release, or
says why it cannot be published (exit 10) with the clause.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distill.config.teachers import Teacher
from distill.config.yaml_file import find_config
from distill.errors import DistillError, Exit
from distill.models.registry import hub_id, lookup
from distill.records import Record
from distill.responders.terms import Obligation, TermsText, Verdict, load_terms, require_terms


class Owed(Record):
    """What one text asks of the release."""

    text: TermsText
    duties: Obligation


def obligations(
    teacher: Teacher, student: str, basis: str | None
) -> tuple[Verdict, tuple[Owed, ...]]:
    """Return the verdict on the teacher, and all that its student owes to teacher and base.

    Raises DistillError (exit 10) if training was not allowed.
    """
    verdict = require_terms(teacher, basis)
    owed = [Owed(text=text, duties=text.outputs) for text in verdict.texts]
    info, name = lookup(student), hub_id(student)
    base = load_terms().of_model(name, info.license if info else None) if name else None
    if base:
        owed += [Owed(text=base, duties=base.outputs), Owed(text=base, duties=base.weights)]
    demands = (one for one in owed if one.duties.lines())
    return verdict, tuple(dict.fromkeys(demands))


def check_names(owed: Sequence[Owed], names: Sequence[str]) -> None:
    """Stop (exit 10) at a name of the release that does not begin as a text asks."""
    for one in owed:
        for name in (full.split("/")[-1] for full in names):
            if one.duties.name and not name.startswith(one.duties.name):
                what = f"must begin with {one.duties.name}: {one.text.line()}"
                fix = f"publish.model_name={one.duties.name}-{name}, and the same for --push"
                raise DistillError(Exit.TERMS, f"the name {name}", what, fix)


def base_of(model: str) -> str:
    """Return the Hub id of a student's base; raises DistillError (exit 9) where it has none."""
    base = hub_id(model)
    if base is None:
        where = f"student.model {Path(model).name}"
        what = "is a folder, and a published model names its base by Hub id"
        raise DistillError(Exit.PUBLISH, where, what, "train on a Hub id or a name of models.yaml")
    return base


class ReleaseLicense(NamedTuple):
    """The release's license, who named it, and what stands in its file LICENSE."""

    name: str
    stated: bool  # by the publisher
    owed: bool  # to the terms of teacher or base
    text: str


def license_of(model: str, stated: str | None, owed: Sequence[Owed]) -> ReleaseLicense:
    """Return the license that is owed, else the one that is stated, else that of the base.

    Raises DistillError (exit 10) where it is not known, or another is stated than is owed.
    """
    info = lookup(model)
    name = stated or (info.license if info else None)
    if name is None:
        what = "its license is not in configs/models.yaml"
        fix = "read it on the model's page, then state publish.license=SPDX-ID"
        raise DistillError(Exit.TERMS, f"student.model {model}", what, fix)
    shipped = find_config(Path("configs/licenses") / f"{name.lower()}.txt")
    text = f"{name}\n\nThe license of the base model: https://huggingface.co/{base_of(model)}\n"
    text = shipped.read_text(encoding="utf-8") if shipped.is_file() else text
    asking = next((one for one in owed if one.duties.license), None)
    if asking is None:
        return ReleaseLicense(name, bool(stated), False, text)
    license, line = asking.duties.license or "", asking.text.line()
    if stated and stated.lower() != license.lower():
        what = f"is {stated}, but {license} is required by {line}"
        raise DistillError(Exit.TERMS, "publish.license", what, f"publish.license={license}")
    if license != name:
        text += f"\n\nThe model is distributed under {license}: {line}\n"
    return ReleaseLicense(license, bool(stated), True, text)


def agreement_of(owed: Sequence[Owed], agreement: Path | None) -> Path | None:
    """Return the file of the agreement that goes with the release, None where none is owed.

    Raises DistillError (exit 10) where it is owed and missing.
    """
    asking = next((one for one in owed if one.duties.agreement), None)
    if asking is None:
        return None
    if agreement is None or agreement.is_symlink() or not agreement.is_file():
        what = f"a copy of the agreement goes with the model: {asking.text.line()}"
        raise DistillError(Exit.TERMS, "terms.agreement", what, "save the text and name the file")
    return agreement


def write_notices(owed: Sequence[Owed], agreement: Path | None, folder: Path) -> None:
    """Write NOTICE, and AGREEMENT.txt from the file `agreement` (exit 10 where it is missing)."""
    notices = list(dict.fromkeys(one.duties.notice for one in owed if one.duties.notice))
    if notices:
        (folder / "NOTICE").write_text("\n".join(notices) + "\n", encoding="utf-8")
    if path := agreement_of(owed, agreement):
        shutil.copyfile(path, folder / "AGREEMENT.txt")
