"""Checks of an answer that need no judge: is it the JSON, the code, the number that was asked for?

Filters and scorers use them, so both mean the same. A check never raises, whatever the text: wrong,
empty, hostile or endless answers fail with a reason. One that runs the answer is refused unless the
person at the machine has allowed it (`distill.tasks.sandbox.programs`).
"""

import ast
import hashlib
import inspect
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import regex
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from distill.callables import PROVIDED
from distill.languages import PUNCTUATION, SENTENCE_END, SPACELESS
from distill.records import Prompt
from distill.tasks.json_schema import first_error, valid_schema
from distill.tasks.sandbox.programs import DEFAULT, Limits, program, read_tests, run_tests

MAX_CODE = 20_000  # characters of an answer; parsing a longer one may exhaust the stack
SECONDS = 2  # that reading or comparing an expression, or finding a pattern, may take
MAX_PATH = 500  # characters of a path that stands for a field; a longer one stands by its hash
MAX_MATH = 1_000  # characters at the end of an answer in which an expression is looked for
FENCE = re.compile(r"\A```[^\n`]*\n(.*?)\n?```\Z", re.DOTALL)
NUMBER = re.compile(r"(?:(?<![\w.)])[-\u2212])?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)
STATED = re.compile(r"####\s*([^\n]+)|\\boxed\{([^{}]*)\}")
CHOSEN = re.compile(r"(?:answer|choice|option)\W*+(?:is\W*+)?\b([A-Z])\b", re.IGNORECASE)
FieldType = Literal["string", "[string]", "any"]
FIELD_TYPES: dict[FieldType, dict[str, object]] = {
    "string": {"type": "string"},
    "[string]": {"type": "array", "items": {"type": "string"}},
    "any": {},
}


class CheckResult(NamedTuple):
    """Whether an answer passed (None: a failure of ours), what was read out of it, and why.

    A check that grades also gives a `value` from 0 to 1.
    """

    passed: bool | None
    answer: str | None
    reason: str
    value: float | None = None


def strip_fence(text: str) -> str:
    """Return the text without surrounding space and without one surrounding code fence."""
    text = text.strip()
    fenced = FENCE.match(text)
    return fenced[1].strip() if fenced else text


def _read_json(text: str) -> object:
    """Read JSON, perhaps in one code fence; raises ValueError or RecursionError for other text."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(strip_fence(text), parse_constant=refuse)


def check_json_object(prompt: Prompt, text: str, keys: dict[str, FieldType]) -> CheckResult:
    """Pass an object with exactly these keys, each of its type: string, [string] or any."""
    schema = {
        "type": "object",
        "required": [*keys],
        "properties": {key: FIELD_TYPES[kind] for key, kind in keys.items()},
        "additionalProperties": False,
    }
    return check_json_schema(prompt, text, schema)


def check_json_schema(
    prompt: Prompt, text: str, schema: Annotated[Any, AfterValidator(valid_schema)]
) -> CheckResult:
    """Pass JSON that conforms to a schema (see distill.tasks.json_schema for the keywords)."""
    try:
        value = _read_json(text)
        answer = json.dumps(value)
    except (ValueError, RecursionError):
        return CheckResult(False, None, "not JSON")
    try:
        error = first_error(schema, value)
    except RecursionError:
        return CheckResult(False, answer, "nested too deeply to be checked")
    except TimeoutError:
        return CheckResult(None, answer, "a pattern of the schema takes too long on this answer")
    return CheckResult(error is None, answer, error or "conforms to the schema")


def check_field_f1(
    prompt: Prompt, text: str, least: Annotated[float, Field(gt=0, le=1)] = 1.0
) -> CheckResult:
    """Grade a JSON object by F1 over the fields of the reference object; pass from `least` on.

    Fields are leaves with their paths; of texts case, punctuation and space do not count, of lists
    the order.
    """
    try:
        expected = _fields(_read_json(prompt.reference or ""))
    except (ValueError, RecursionError):
        return CheckResult(None, None, "the reference is no JSON object")
    try:
        fields = _fields(_read_json(text))
    except (ValueError, RecursionError):
        return CheckResult(False, None, "no JSON object", 0.0)
    score = 2 * (expected & fields).total() / max(1, expected.total() + fields.total())
    lacking = sorted({path for path, _ in expected - fields})
    reason = f"F1 {score:.2f}"
    if lacking:
        reason += f", wrong or missing: {', '.join(lacking[:5])}"[:120]
    return CheckResult(score >= least, strip_fence(text), reason, score)


def _fields(tree: object) -> Counter[tuple[str, object]]:
    """Count the leaves of a JSON object by path and value; raises ValueError for no object."""
    if not isinstance(tree, dict):
        raise ValueError("not an object")
    pending: list[tuple[str, object]] = [("", tree)]
    leaves = Counter[tuple[str, object]]()
    while pending:
        path, value = pending.pop()
        if len(path) > MAX_PATH:  # or deep paths of many leaves grow in their square
            path = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()
        if isinstance(value, dict):
            pending += [(f"{path}.{key}".lstrip("."), child) for key, child in value.items()]
        elif isinstance(value, list):
            path += "[]"
            pending += [(path, child) for child in value]
        else:
            plain = (normalise_answer(value) or value) if isinstance(value, str) else value
            leaves[path, (isinstance(value, bool), plain)] += 1
    return leaves


def check_python_code(prompt: Prompt, text: str) -> CheckResult:
    """Pass code that parses and uses the name that the prompt's reference ends in."""
    code = strip_fence(text)
    if not code or len(code) > MAX_CODE:
        return CheckResult(False, None, "no code" if not code else "code too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in the answer would be shown
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return CheckResult(False, code, "does not parse")
    used = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
    }
    name = (prompt.reference or "").rpartition(".")[2]
    if name and name not in used:
        return CheckResult(False, code, f"does not use {name}")
    return CheckResult(True, code, "parses and uses the name" if name else "parses")


def check_python_tests(
    prompt: Prompt,
    text: str,
    seconds: Annotated[float, Field(ge=1, le=100_000)] = DEFAULT.seconds,
    megabytes: Annotated[int, Field(ge=1, le=100_000)] = DEFAULT.megabytes,
) -> CheckResult:
    """Pass code that passes the tests of the prompt's reference, run in a sandbox."""
    tests = read_tests(prompt.reference or "")
    code = program(text, tests)
    if not code.strip() or len(code) > MAX_CODE + len(tests.setup):
        return CheckResult(False, None, "no code" if not code.strip() else "code too long")
    passed, reason = run_tests(code, tests, Limits(seconds, megabytes))
    return CheckResult(passed, code, reason)


def read_number(text: str) -> Decimal | None:
    """Return the number stated after `####` or in a box, else the last number in the text."""
    stated = [first or second for first, second in STATED.findall(text)]
    for part in [*stated[-1:], text]:
        numbers = list(NUMBER.finditer(part))
        if numbers:
            sign = "-" if numbers[-1][0][0] in "-\u2212" else ""
            try:
                return Decimal(sign + numbers[-1][1].replace(",", ""))
            except InvalidOperation:
                return None
    return None


def check_number(prompt: Prompt, text: str) -> CheckResult:
    """Pass an answer whose number equals the reference's."""
    number = read_number(text)
    if number is None:
        return CheckResult(False, None, "no number")
    return _compare(str(number), number == read_number(prompt.reference or ""), prompt)


def _compare(answer: str, equal: bool, prompt: Prompt) -> CheckResult:
    reason = "equals the reference" if equal else f"the reference is {prompt.reference!r:.80}"
    return CheckResult(equal, answer, reason)


def check_math(prompt: Prompt, text: str) -> CheckResult:
    """Pass an expression that equals the reference's however it is written (math-verify)."""
    from math_verify import parse, verify  # imports sympy, which few need

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it shows what models wrote

    def expressions(text: str) -> list[Any]:
        # a text without marks may be LaTeX as a whole
        return parse(text, parsing_timeout=SECONDS) or parse(f"${text}$", parsing_timeout=SECONDS)

    try:
        expected, answers = expressions(prompt.reference or ""), expressions(text[-MAX_MATH:])
        if not answers:
            return CheckResult(False, None, "no expression")
        equal = bool(verify(expected, answers, timeout_seconds=SECONDS))
        return _compare(str(answers[-1]), equal, prompt)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return CheckResult(None, None, f"math-verify failed: {type(error).__name__}")


def check_exact(prompt: Prompt, text: str) -> CheckResult:
    """Pass the reference itself, surrounding space apart."""
    return _compare(text.strip(), text.strip() == (prompt.reference or "").strip(), prompt)


def normalise_answer(text: str) -> str:
    """Return the words of a text, without case and punctuation; in a script without spaces each
    character is one."""
    text = text.casefold().translate(PUNCTUATION)
    if not text.isascii():
        text = SPACELESS.sub(r" \g<0> ", text)
    return " ".join(text.split())


def check_normalised(prompt: Prompt, text: str) -> CheckResult:
    """Pass the reference's words."""
    answer = normalise_answer(text)
    return _compare(answer, answer == normalise_answer(prompt.reference or ""), prompt)


def check_includes(prompt: Prompt, text: str) -> CheckResult:
    """Pass a text in which the reference's words stand, in order and without others between."""
    words = f" {normalise_answer(prompt.reference or '')} "
    return _compare(text.strip(), words in f" {normalise_answer(text)} ", prompt)


def check_choice(prompt: Prompt, text: str) -> CheckResult:
    """Pass the reference's letter: alone, as `answer: B`, or the first that stands by itself."""
    letters = CHOSEN.findall(text)[-1:]
    letters = letters or re.findall(r"(?:^|[\s(*])([A-Z])(?=[).:*\s]|$)", text)[:1]
    if not letters:
        return CheckResult(False, None, "no choice")
    letter = letters[0].upper()
    return _compare(letter, letter == (prompt.reference or "").strip().upper()[:1], prompt)


def check_regex(prompt: Prompt, text: str, pattern: str) -> CheckResult:
    """Pass a text with a match of the pattern, whose group, if any, equals the reference."""
    try:
        match = regex.search(pattern, text, timeout=SECONDS)
    except TimeoutError:
        return CheckResult(None, None, "the pattern takes too long on this answer")
    if match is None:
        return CheckResult(False, None, "the pattern is not found")
    if not match.groups() or prompt.reference is None:
        return CheckResult(True, match[0], "the pattern is found")
    answer = (match[1] or "").strip()
    return _compare(answer, answer == prompt.reference.strip(), prompt)


def count_sentences(text: str) -> int:
    """Count sentences: a full stop before a capital ends one, and so does a line."""
    return sum(1 for part in SENTENCE_END.split(text.strip()) if part and part.strip())


def check_max_sentences(prompt: Prompt, text: str, max: int = 1) -> CheckResult:
    """Pass a text of at least one and at most `max` sentences."""
    count = count_sentences(text)
    return CheckResult(1 <= count <= max, text.strip(), f"{count} sentence{'s' * (count != 1)}")


KINDS: dict[str, Callable[..., CheckResult]] = {
    name.removeprefix("check_"): function
    for name, function in globals().items()
    if name.startswith("check_")
}
NEEDS_REFERENCE = frozenset(
    {"field_f1", "python_tests", "number", "math", "exact", "normalised", "includes", "choice"}
)
GRADED = frozenset({"field_f1"})  # checks whose value may lie between 0 and 1
RUNS_CODE = frozenset({"python_tests"})


def validate(checker: Mapping[str, Any]) -> None:
    """Raise ValueError, with a message for the author of a task, where a check is not valid."""
    settings = {key: value for key, value in checker.items() if key != "kind"}
    kind = str(checker.get("kind"))
    mine = PROVIDED["checker"]
    if kind not in KINDS and kind not in mine:
        more = "a checker of your own is given to distill.run(..., checkers={name: function})"
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}; {more}")
    signature = inspect.signature(KINDS.get(kind) or mine[kind])
    try:
        signature.bind(None, "", **settings)
    except TypeError as error:
        raise ValueError(f"checker {kind}: {error}") from None
    for name, value in settings.items() if kind in KINDS else ():
        try:
            TypeAdapter(signature.parameters[name].annotation).validate_python(value, strict=True)
            if name == "pattern":
                regex.compile(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"checker {kind}: {name}: {message}") from None
        except regex.error as error:
            what = f"checker {kind}: {name}: not a regular expression: {error}"
            raise ValueError(what) from None


def needs_reference(kind: str) -> bool:
    """Tell whether a check is done only where there is a reference to compare with."""
    mine = PROVIDED["checker"].get(kind)
    return kind in NEEDS_REFERENCE or getattr(mine, "needs_reference", False)


def _check_by_function(kind: str, prompt: Prompt, text: str, **settings: Any) -> CheckResult:
    """Check by a function of the user's: True, False, a grade from 0 to 1, or a CheckResult."""
    try:
        outcome = PROVIDED["checker"][kind](prompt, text, **settings)
    except Exception as error:  # it may raise anything, and that says nothing of the answer
        return CheckResult(None, None, f"checker {kind} raised {type(error).__name__}: {error}")
    if isinstance(outcome, CheckResult):
        return outcome
    if not isinstance(outcome, bool | int | float) or not 0 <= outcome <= 1:
        return CheckResult(None, None, f"checker {kind} returned {outcome!r:.80}, and no grade")
    passed = outcome == 1
    grade = None if isinstance(outcome, bool) else float(outcome)
    return CheckResult(passed, text.strip(), "passes" if passed else "does not pass", grade)


def check(checker: Mapping[str, Any], prompt: Prompt, text: str) -> CheckResult:
    """Check an answer; `checker` is a task's, as `validate` accepts it."""
    kind = checker["kind"]
    if needs_reference(kind) and not (prompt.reference or "").strip():
        return CheckResult(False, None, "no reference to compare with")
    settings = {key: value for key, value in checker.items() if key != "kind"}
    result = (KINDS.get(kind) or partial(_check_by_function, kind))(prompt, text, **settings)
    if result.answer is None:
        return result
    # a lone surrogate (an escape in JSON) cannot be stored
    clean = result.answer.encode("utf-8", "replace").decode("utf-8")
    return result._replace(answer=clean)
