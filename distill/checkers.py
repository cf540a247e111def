"""Checks of an answer that need no judge: is it the JSON, the code, the number that was asked for?

Used by the filters (before training) and by the scorers (in evaluation), so both mean the same. A check never raises,
whatever the text: wrong, empty, hostile or endless answers fail with a reason.
"""

import ast
import inspect
import json
import re
import string
import warnings
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple, NoReturn

from distill.records import Prompt

MAX_CODE = (
    20_000  # characters; a longer answer is no short example, and parsing it may exhaust the stack
)
FENCE = re.compile(r"\A```[^\n`]*\n(.*?)\n?```\Z", re.DOTALL)
NUMBER = re.compile(r"(?:(?<![\w.)])[-\u2212])?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)
STATED = re.compile(r"####\s*([^\n]+)|\\boxed\{([^{}]*)\}")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z])|\n+")
CHOSEN = re.compile(r"(?:answer|choice|option)\W*(?:is|:)?\W*\b([A-Z])\b", re.IGNORECASE)
FIELD_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "[string]": lambda value: (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ),
    "any": lambda value: True,
}


class Verdict(NamedTuple):
    """Whether an answer passed, what was read out of it, and why it did not pass."""

    passed: bool
    answer: str | None
    reason: str


def strip_fence(text: str) -> str:
    """Return the text without surrounding space and without one surrounding code fence."""
    text = text.strip()
    found = FENCE.match(text)
    return found[1].strip() if found else text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _json_object(prompt: Prompt, text: str, keys: Mapping[str, str]) -> Verdict:
    """Pass an object with exactly these keys, each of its type: string, [string] or any."""
    try:
        value = json.loads(strip_fence(text), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return Verdict(False, None, "not JSON")
    if not isinstance(value, dict):
        return Verdict(False, None, "not a JSON object")
    if value.keys() != set(keys):
        missing, extra = sorted(set(keys) - value.keys()), sorted(value.keys() - set(keys))
        return Verdict(False, None, f"wrong keys: missing {missing}, extra {extra[:5]}")
    wrong = [key for key, kind in keys.items() if not FIELD_TYPES[kind](value[key])]
    answer = json.dumps(value)
    return Verdict(not wrong, answer, f"wrong type: {wrong}" if wrong else "valid JSON")


def _python_code(prompt: Prompt, text: str) -> Verdict:
    """Pass code that parses and uses the name that the prompt's reference ends in."""
    code = strip_fence(text)
    if not code or len(code) > MAX_CODE:
        return Verdict(False, None, "no code" if not code else "code too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in the answer is no matter of ours
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Verdict(False, code, "does not parse")
    used = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
    }
    name = (prompt.reference or "").rpartition(".")[2]
    if name and name not in used:
        return Verdict(False, code, f"does not use {name}")
    return Verdict(True, code, "parses and uses the name" if name else "parses")


def read_number(text: str) -> Decimal | None:
    """Return the number stated after `####` or in a box, else the last number in the text."""
    stated = [first or second for first, second in STATED.findall(text)]
    for place in [*reversed(stated[-1:]), text]:
        found = list(NUMBER.finditer(place))
        if found:
            return _decimal(found[-1])
    return None


def _decimal(found: re.Match[str]) -> Decimal | None:
    sign = "-" if found[0][0] in "-\u2212" else ""
    try:
        return Decimal(sign + found[1].replace(",", ""))
    except InvalidOperation:
        return None


def _number(prompt: Prompt, text: str) -> Verdict:
    """Pass an answer whose number equals the reference's."""
    wanted, found = read_number(prompt.reference or ""), read_number(text)
    if found is None:
        return Verdict(False, None, "no number")
    return _compared(str(found), found == wanted, prompt)


def _compared(answer: str, equal: bool, prompt: Prompt) -> Verdict:
    reason = "equals the reference" if equal else f"the reference is {prompt.reference!r:.80}"
    return Verdict(equal, answer, reason)


def _exact(prompt: Prompt, text: str) -> Verdict:
    """Pass the reference itself, surrounding space apart."""
    return _compared(text.strip(), text.strip() == (prompt.reference or "").strip(), prompt)


def normalised(text: str) -> str:
    """Return the words of a text: case, punctuation and space do not count."""
    return " ".join(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())


def _normalised(prompt: Prompt, text: str) -> Verdict:
    """Pass the reference's words."""
    answer = normalised(text)
    return _compared(answer, answer == normalised(prompt.reference or ""), prompt)


def _choice(prompt: Prompt, text: str) -> Verdict:
    """Pass the reference's letter: alone, as `answer: B`, or the first one that stands by itself."""
    found = CHOSEN.findall(text)[-1:] or re.findall(r"(?:^|[\s(*])([A-Z])(?=[).:*\s]|$)", text)[:1]
    if not found:
        return Verdict(False, None, "no choice")
    letter = found[0].upper()
    return _compared(letter, letter == (prompt.reference or "").strip().upper()[:1], prompt)


def _regex(prompt: Prompt, text: str, pattern: str) -> Verdict:
    """Pass a text in which the pattern is found; where it has a group, that must equal the reference."""
    found = re.search(pattern, text)
    if found is None:
        return Verdict(False, None, "the pattern is not found")
    if not found.groups() or prompt.reference is None:
        return Verdict(True, found[0], "the pattern is found")
    answer = (found[1] or "").strip()
    return _compared(answer, answer == prompt.reference.strip(), prompt)


def count_sentences(text: str) -> int:
    """Count sentences: a full stop before a capital ends one, and so does a line."""
    return sum(1 for part in SENTENCE_END.split(text.strip()) if part and part.strip())


def _max_sentences(prompt: Prompt, text: str, max: int = 1) -> Verdict:
    """Pass a text of at least one and at most `max` sentences."""
    count = count_sentences(text)
    return Verdict(1 <= count <= max, text.strip(), f"{count} sentence{'s' * (count != 1)}")


KINDS: dict[str, Callable[..., Verdict]] = {
    "json_object": _json_object,
    "python_code": _python_code,
    "number": _number,
    "exact": _exact,
    "normalised": _normalised,
    "choice": _choice,
    "regex": _regex,
    "max_sentences": _max_sentences,
}
NEEDS_REFERENCE = frozenset({"number", "exact", "normalised", "choice"})


def validate(checker: Mapping[str, Any]) -> None:
    """Raise ValueError, in words for the author of a task, where `checker` is not a check that we have."""
    settings = {key: value for key, value in checker.items() if key != "kind"}
    kind = checker.get("kind")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    try:
        inspect.signature(KINDS[kind]).bind(None, "", **settings)
    except TypeError as error:
        raise ValueError(f"checker {kind}: {error}") from None
    keys = settings.get("keys", {})
    if not isinstance(keys, dict) or not set(map(str, keys.values())) <= FIELD_TYPES.keys():
        raise ValueError(f"keys maps each key to one of {', '.join(FIELD_TYPES)}")
    if not isinstance(settings.get("max", 1), int):
        raise ValueError("max must be a whole number")
    try:
        re.compile(settings.get("pattern", ""))
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern is not a regular expression: {error}") from None


def check(checker: Mapping[str, Any], prompt: Prompt, text: str) -> Verdict:
    """Check an answer; `checker` is a task's, as `validate` accepts it."""
    kind = checker["kind"]
    if kind in NEEDS_REFERENCE and not (prompt.reference or "").strip():
        return Verdict(False, None, "no reference to compare with")
    settings = {key: value for key, value in checker.items() if key != "kind"}
    verdict = KINDS[kind](prompt, text, **settings)
    if verdict.answer is None:
        return verdict
    # a lone surrogate (an escape in JSON) cannot be stored
    clean = verdict.answer.encode("utf-8", "replace").decode("utf-8")
    return verdict._replace(answer=clean)
