"""JSON Schema (draft 2020-12) for answers, as pydantic's `model_json_schema` writes it.

The jsonschema package validates. A schema is checked when its task is loaded: an unknown keyword is
an error, and `$ref` stays inside the document. An answer is checked in bounded time. `format` and
`content...` are not checked, which is the draft's default: state a `pattern` for what must hold.
"""

import difflib
import graphlib
import json
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import unquote

import regex
from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend
from referencing import Registry

Validator: TypeAlias = Any  # jsonschema's, which has no types
SECONDS = 1.0  # processor time that all patterns may take on one answer
MAX_REFERENCES = 64  # one inside another; each takes about ten of Python's thousand frames
MAX_TEXT = 120  # characters of a message; jsonschema quotes the value, which may be the answer
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
# keywords that hold a schema, a list of schemas, or schemas by name
ONE = {"items", "contains", "additionalProperties", "propertyNames", "not", "if", "then", "else"}
LISTED = {"allOf", "anyOf", "oneOf", "prefixItems"}
NAMED = {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
SAME_VALUE = {"not", "if", "then", "else", "allOf", "anyOf", "oneOf", "dependentSchemas"}
AT_ROOT = {"$schema", "$id"}  # further down they would change what keywords and `$ref` mean
DESCRIBING = {
    *("$comment", "title", "description", "default", "examples", "deprecated", "readOnly"),
    *("writeOnly", "contentEncoding", "contentMediaType", "contentSchema"),
    "discriminator",  # OpenAPI's; pydantic writes it beside the `oneOf` that it describes
}
# $dynamicRef may leave the document; jsonschema gives the other two no limit of time
UNSUPPORTED = {"$dynamicRef", "unevaluatedItems", "unevaluatedProperties"}
KEYWORDS = {
    *Draft202012Validator.VALIDATORS.keys() - UNSUPPORTED,
    *(ONE | LISTED | NAMED | DESCRIBING | {"minContains", "maxContains"}),
}


def valid_schema(schema: object) -> object:
    """Return a schema; raises ValueError, with the place, where it is none or not supported."""
    try:
        # YAML also has dates, keys that are numbers, and nodes that contain themselves
        plain = json.loads(json.dumps(schema, allow_nan=False))
        if not isinstance(schema, dict) or plain != schema:
            raise ValueError("an object whose keys are strings is needed")
        Draft202012Validator.check_schema(schema)
        nodes = list(_subschemas(schema))
    except SchemaError as error:
        what = f"{error.instance!r:.60} is not among {', '.join(TYPES)}"  # jsonschema says less
        what = what if list(error.path)[-1:] == ["type"] else error.message[:MAX_TEXT]
        raise ValueError(f"{error.json_path.replace('$', 'schema', 1)}: {what}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"schema is not valid: {error}") from None
    except RecursionError:
        raise ValueError("schema is nested too deeply") from None
    # which schemas apply to the same value as a schema: a cycle of these would never end
    applied: dict[str, set[str]] = {pointer: set() for pointer, _, _ in nodes}
    for pointer, node, parent in nodes:
        if parent is not None:
            applied[parent].add(pointer)
        if not isinstance(node, dict):
            continue  # true or false
        where = _place(pointer)
        for keyword in node:
            if keyword not in KEYWORDS and (pointer or keyword not in AT_ROOT):
                near = difflib.get_close_matches(keyword, KEYWORDS, n=1)
                hint = f"did you mean {near[0]}?" if near else "known: "
                hint += "" if near else ", ".join(sorted(KEYWORDS))
                hint = "only at the root" if keyword in AT_ROOT else hint
                raise ValueError(f"{where}: {keyword[:40]} is not supported ({hint})")
        for pattern in (*node.get("patternProperties", ()), node.get("pattern", "")):
            try:
                regex.compile(pattern)
            except regex.error as error:
                what = f"{pattern!r:.60} is not a regular expression: {error}"
                raise ValueError(f"{where}: {what}") from None
        if "$ref" in node:
            target = unquote(node["$ref"])
            if not target.startswith("#") or target[1:] not in applied:
                what = f"$ref {node['$ref'][:60]} does not point to a schema in this document"
                raise ValueError(f"{where}: {what} (write #/$defs/NAME)")
            applied[pointer].add(target[1:])
    try:
        graphlib.TopologicalSorter(applied).prepare()
    except graphlib.CycleError as error:
        cycle = " and ".join(sorted(map(_place, set(error.args[1]))))
        raise ValueError(f"{cycle}: refers to itself for the same value, without end") from None
    return schema


def _place(pointer: str) -> str:
    return f"schema{pointer.replace('/', '.')}"[:MAX_TEXT]


def _subschemas(
    schema: Any, pointer: str = "", parent: str | None = None
) -> Iterator[tuple[str, Any, str | None]]:
    """Yield each schema, its JSON pointer, and its parent's where both apply to one value."""
    yield pointer, schema, parent
    for keyword, value in schema.items() if isinstance(schema, dict) else ():
        children: dict[str, Any] = {}
        if keyword in ONE:
            children[""] = value
        elif keyword in LISTED:
            children = {f"/{index}": child for index, child in enumerate(value)}
        elif keyword in NAMED:
            escaped = {name: name.replace("~", "~0").replace("/", "~1") for name in value}
            children = {f"/{escaped[name]}": child for name, child in value.items()}
        for end, child in children.items():
            owner = pointer if keyword in SAME_VALUE else None
            yield from _subschemas(child, f"{pointer}/{keyword}{end}", owner)


@dataclass
class _Effort:
    """The time and the results of checking one answer, so far."""

    seconds: float = 0.0
    references: int = 0  # that are open now
    # by `$ref` and value: the first error's fields, or None. Without it, alternatives (`anyOf`)
    # that refer to the same schema would double the work at every level of the answer
    results: dict[tuple[str, int], dict[str, Any] | None] = field(default_factory=dict)


_effort: ContextVar[_Effort] = ContextVar("_effort")


def check_ref(
    validator: Validator, ref: str, value: object, schema: object
) -> Iterator[ValidationError]:
    """`$ref`: each schema checks each value once."""
    effort, key = _effort.get(), (ref, id(value))
    if key in effort.results:
        if (fields := effort.results[key]) is not None:
            yield ValidationError(**fields)
        return
    if effort.references == MAX_REFERENCES:
        raise RecursionError
    effort.references += 1
    error = next(Draft202012Validator.VALIDATORS["$ref"](validator, ref, value, schema), None)
    effort.references -= 1
    if error is None:
        effort.results[key] = None
        return
    effort.results[key] = {
        **{"message": error.message, "path": list(error.relative_path)},
        **{"validator": error.validator, "validator_value": error.validator_value},
    }
    yield error


def _matches(pattern: str, text: str) -> bool:
    effort, started = _effort.get(), time.thread_time()
    try:
        timeout = max(0.001, SECONDS - effort.seconds)
        return regex.search(pattern, text, timeout=timeout) is not None
    finally:
        effort.seconds += time.thread_time() - started


def check_pattern(
    validator: Validator, pattern: str, value: object, schema: object
) -> Iterator[ValidationError]:
    """`pattern`, in bounded time."""
    if isinstance(value, str) and not _matches(pattern, value):
        yield ValidationError(f"{value[:40]!r} does not match {pattern!r}")


def check_pattern_properties(
    validator: Validator, rules: Mapping[str, object], value: object, schema: object
) -> Iterator[ValidationError]:
    """`patternProperties`, in bounded time."""
    for name, child in value.items() if isinstance(value, dict) else ():
        for pattern, rule in rules.items():
            if _matches(pattern, name):
                yield from validator.descend(child, rule, path=name)


def check_additional_properties(
    validator: Validator, rule: object, value: object, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """`additionalProperties` in the answer's order; jsonschema's differs between processes."""
    patterns = schema.get("patternProperties", {})
    for name, child in value.items() if isinstance(value, dict) else ():
        if name in schema.get("properties", {}) or any(_matches(p, name) for p in patterns):
            continue
        if rule is False:
            yield ValidationError(f"has an extra field {name[:40]!r}")
        else:
            yield from validator.descend(child, rule, path=name)


def check_unique_items(
    validator: Validator, unique: bool, value: object, schema: object
) -> Iterator[ValidationError]:
    """`uniqueItems` by hash; jsonschema compares each object with each."""
    if unique and isinstance(value, list) and len(set(map(_hashable, value))) < len(value):
        yield ValidationError("has equal items")


def _hashable(value: object) -> object:
    """Return a key that equal JSON values share: 1 and 1.0 do, 1 and true do not."""
    if isinstance(value, dict):
        return frozenset((name, _hashable(child)) for name, child in value.items())
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return value, isinstance(value, bool)


_Validator = extend(
    Draft202012Validator,
    {
        "$ref": check_ref,
        "pattern": check_pattern,
        "patternProperties": check_pattern_properties,
        "additionalProperties": check_additional_properties,
        "uniqueItems": check_unique_items,
    },
)


def first_error(schema: Mapping[str, object], value: object) -> str | None:
    """Return a message with the place where `value` first differs from a valid `schema`, or None.

    Raises RecursionError where the value is nested too deeply, TimeoutError where a pattern takes
    too long.
    """
    root = {keyword: rule for keyword, rule in schema.items() if keyword not in AT_ROOT}
    token = _effort.set(_Effort())
    try:
        # a registry that fetches nothing; jsonschema's own would
        error = next(_Validator(root, registry=Registry()).iter_errors(value), None)
    except OverflowError:
        return "holds a number that is too large for multipleOf"
    finally:
        _effort.reset(token)
    if error is None:
        return None
    # of alternatives, the error of the one that comes nearest, where one does: it fails furthest
    # inside the value, and not because another kind of value was wanted
    other_kind = ("const", "enum", "type")
    nearest = best_match([error], lambda one: (-len(one.path), one.validator in other_kind))
    what = nearest.message
    if len(what) > MAX_TEXT:
        what = f"breaks {nearest.validator} {nearest.validator_value!r:.60}"
    return f"{nearest.json_path[:MAX_TEXT]}: {what}"
