"""What a release owes to the terms of its teacher and of its base: name, license, lines shown, notices, agreements.

The terms book (`distill.responders.terms`) says what is owed; this puts it into the release, or says why it cannot be
published (exit 10) with the clause.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.models.registry import hub_id, lookup
from distill.records import Record
from distill.responders.terms import Duties, Terms, Verdict, load_terms, require_terms


class Owed(Record):
    """What one text asks of the release."""

    text: Terms
    duties: Duties


class Obligations(Record):
    """The verdict on the teacher, and all that its student owes to teacher and base."""

    verdict: Verdict
    owed: tuple[Owed, ...] = ()

    def displays(self) -> list[str]:
        """Return the lines that the card shows prominently."""
        return list(dict.fromkeys(o.duties.display for o in self.owed if o.duties.display))


def obligations(config: Config) -> Obligations:
    """Collect what the config's student owes; raises DistillError (exit 10) where training was not allowed."""
    verdict = require_terms(config.teacher, config.terms.basis)
    owed = [Owed(text=text, duties=text.outputs) for text in verdict.texts]
    info, name = lookup(config.student.model), hub_id(config.student.model)
    base = load_terms().of_model(name, info.license if info else None) if name else None
    if base:
        owed += [Owed(text=base, duties=base.outputs), Owed(text=base, duties=base.weights)]
    demands = (one for one in owed if one.duties.lines())
    return Obligations(verdict=verdict, owed=tuple(dict.fromkeys(demands)))


def check_names(owed: Sequence[Owed], names: Sequence[str]) -> None:
    """Stop (exit 10) at a name of the release that does not begin as a text asks."""
    for one in owed:
        for name in (full.split("/")[-1] for full in names):
            if one.duties.name and not name.startswith(one.duties.name):
                what = f"must begin with {one.duties.name}: {one.text.line()}"
                fix = f"publish.model_name={one.duties.name}-{name}, and the same for --push"
                raise DistillError(Exit.TERMS, f"the name {name}", what, fix)


def licensing(owed: Sequence[Owed]) -> Owed | None:
    """Return what names the release's license, or None where that of the base stays."""
    return next((one for one in owed if one.duties.license), None)


def owed_license(owed: Sequence[Owed], stated: str | None, own: str) -> str:
    """Return the release's license: the one that is owed, else its own; a stated one must be the same (exit 10)."""
    asking = licensing(owed)
    license = asking.duties.license if asking else None
    if asking is None or license is None:
        return own
    if stated and stated.lower() != license.lower():
        what = f"is {stated}, but {license} is asked for by {asking.text.line()}"
        raise DistillError(Exit.TERMS, "publish.license", what, f"publish.license={license}")
    return license


def write_notices(owed: Sequence[Owed], agreement: Path | None, folder: Path) -> None:
    """Write NOTICE, and AGREEMENT.txt from the file `agreement`; raises DistillError (exit 10) where that is missing."""
    notices = list(dict.fromkeys(one.duties.notice for one in owed if one.duties.notice))
    if notices:
        (folder / "NOTICE").write_text("\n".join(notices) + "\n", encoding="utf-8")
    asking = next((one for one in owed if one.duties.agreement), None)
    if asking is None:
        return
    if agreement is None or agreement.is_symlink() or not agreement.is_file():
        what = f"a copy of the agreement goes with the model: {asking.text.line()}"
        raise DistillError(Exit.TERMS, "terms.agreement", what, "save the text and name the file")
    shutil.copyfile(agreement, folder / "AGREEMENT.txt")
