"""Keys, tokens and passwords that are known by their form (configs/tables/secret_patterns.yaml).

The list is ours, and not a library's: what it finds is masked in documents before prompts are made,
so a library's next version would change texts that are paid for already.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from distill import shipped_table

PLACEHOLDER = re.compile(r"(?:pass(?:word|wd)?|pwd|secret|token|key|x+|\*+|\W.*)$", re.I)


class Secret(NamedTuple):
    """A secret in a text: the name of its form, where it begins, and its SHA-256."""

    name: str
    start: int
    sha256: str

    @property
    def mark(self) -> str:
        """Return the beginning of its SHA-256, in a form that YAML takes for no number."""
        return f"sha256:{self.sha256[:12]}"

    @property
    def way_on(self) -> str:
        """Say how whoever knows that it is none goes on."""
        return f"; if it is none, publish.allow_secrets=[{self.mark}] lets it pass"


class Form(NamedTuple):
    """Signs, one of which must be in a text; a pattern whose last group, or all, is the secret."""

    name: str
    signs: tuple[str, ...]
    pattern: re.Pattern[str]
    check: Callable[[re.Match[str]], bool] = lambda match: True
    kind: str = "key"


def is_random(match: re.Match[str]) -> bool:
    """Tell a random body from words with hyphens or underscores and a number among them."""
    for part in re.split(r"[-_.~/+]", match[match.re.groups]):
        kinds = [any(map(test, part)) for test in (str.isdigit, str.islower, str.isupper)]
        if (len(part) >= 16 and kinds[0]) or (len(part) >= 8 and all(kinds)):
            return True
    return False


def is_password(match: re.Match[str]) -> bool:
    """Tell a password in an address from a placeholder, and from the user's name again."""
    return not (PLACEHOLDER.match(match[2]) or match[1] == match[2])


def read_forms() -> Iterator[Form]:
    """Yield the forms of the table that ships, in its order; no other table takes its place."""
    table = shipped_table("secret_patterns.yaml")
    for row in table["forms"]:
        pattern = row.get("pattern") or (
            f"<start>(?:{'|'.join(map(re.escape, row['signs']))}){row['body']}(?![A-Za-z0-9])"
        )
        for short, full in table["shorthands"].items():
            pattern = pattern.replace(short, full)
        form = Form(row["name"], tuple(row["signs"]), re.compile(pattern))
        if row.get("kind") == "password":
            form = form._replace(check=is_password, kind="password")
        yield form._replace(check=is_random) if row.get("random") else form


FORMS = tuple(read_forms())
NAMES = frozenset(form.name for form in FORMS)


SIGNS = [(sign, form) for form in FORMS for sign in form.signs]


def forms_in(text: str) -> list[Form]:
    """Return the forms that may match in a text, by their signs, in the order of the list."""
    return list(dict.fromkeys(form for sign, form in SIGNS if sign in text))


def find_secrets(text: str, allowed: Collection[str] = ()) -> Iterator[Secret]:
    """Yield every secret in a text, by form, except those allowed; two forms may find the same.

    Allowed are forms by their name, and secrets by 8 or more digits of their `sha256:`.
    """
    beginnings = tuple(one.removeprefix("sha256:") for one in allowed if len(one) >= 8)
    for form in forms_in(text):
        if form.name in allowed:
            continue
        for match in form.pattern.finditer(text):
            secret = match[form.pattern.groups].encode("utf-8", "surrogatepass")
            sha256 = hashlib.sha256(secret).hexdigest()
            if form.check(match) and not sha256.startswith(beginnings):
                yield Secret(form.name, match.start(form.pattern.groups), sha256)
