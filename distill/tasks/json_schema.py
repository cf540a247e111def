"""JSON Schema (draft 2020-12) for answers, as pydantic's `model_json_schema` writes it.

The jsonschema package validates. A schema is checked when its task is loaded: an unknown keyword is
an error, and `$ref` stays inside the document. An answer is checked in bounded time. `format` and
`content...` are not checked, which is the draft's default: state a `pattern` for what must hold.
"""

import difflib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import regex
from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend
from jsonschema_specifications import REGISTRY
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

Validator: TypeAlias = Any  # jsonschema's, which has no types
Errors: TypeAlias = Iterator[ValidationError]
Schema: TypeAlias = Mapping[str, Any]
VALIDATOR: Validator = Draft202012Validator
SECONDS = 1.0  # processor time that all patterns may take on one answer
MAX_TEXT = 120  # characters of a message; jsonschema quotes the value, which may be the answer
AT_ROOT = {"$schema", "$id"}  # further down they would change what keywords and `$ref` mean
# The draft's keywords, but for those that may leave the document, or take unlimited time
DRAFT = "https://json-schema.org/draft/2020-12"
VOCABULARIES = ("core", "applicator", "validation", "meta-data", "format-annotation", "content")
_contents: list[Any] = [REGISTRY.contents(f"{DRAFT}/meta/{name}") for name in VOCABULARIES]
KEYWORDS = {keyword for vocabulary in _contents for keyword in vocabulary["properties"]}
KEYWORDS -= {*AT_ROOT, "$anchor", "$dynamicAnchor", "$dynamicRef", "$vocabulary"}
KEYWORDS |= {"definitions", "discriminator"}  # OpenAPI's; pydantic writes it beside its `oneOf`
STRICT = {  # the draft's own schema of schemas, at each level without unknown keywords
    "$id": "urn:distill:schema",
    "$schema": f"{DRAFT}/schema",
    "$dynamicAnchor": "meta",
    "$ref": f"{DRAFT}/schema",
    "propertyNames": {"enum": sorted(KEYWORDS)},
}
ENDLESS = ValidationError("refers to itself for the same value")
SAMPLES = (None, True, 0, "", [], {})  # one value of each type


def valid_schema(schema: object) -> object:
    """Return a schema; raises ValueError, with the place, where it is none or not supported."""
    try:
        # YAML also has dates, keys that are numbers, and nodes that contain themselves
        plain = json.loads(json.dumps(schema, allow_nan=False))
        if not isinstance(schema, dict) or plain != schema:
            raise ValueError("an object whose keys are strings is needed")
    except (TypeError, ValueError) as error:
        raise ValueError(f"schema is not valid: {error}") from None
    except RecursionError:
        raise ValueError("schema is nested too deeply") from None
    root = {keyword: rule for keyword, rule in schema.items() if keyword not in AT_ROOT}
    pending = ["#"]  # references whose targets are to be checked, in the order of the document
    formats = FormatChecker(())
    formats.checks("regex", regex.error)(lambda text: bool(regex.compile(text)))
    formats.checks("uri-reference")(lambda text: pending.append(text) is None)
    strict = VALIDATOR(STRICT, registry=REGISTRY, format_checker=formats)
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(root))
    checked = set[str]()
    for reference in pending:  # which grows
        if reference in checked:
            continue
        checked.add(reference)
        place = "schema" if reference == "#" else f"schema, $ref {reference[:60]}"
        try:
            error = next(strict.iter_errors(resolver.lookup(reference).contents), None)
            if error is None:  # whatever the value, does checking it end?
                for sample in SAMPLES:
                    next(_Check(root).validator.descend(sample, {"$ref": reference}), None)
                continue
        except Unresolvable:
            what = "does not point to a schema in this document (write #/$defs/NAME)"
            raise ValueError(f"{place} {what}") from None
        except RecursionError:
            what = "is nested too deeply, or refers to itself for the same value, without end"
            raise ValueError(f"{place} {what}") from None
        where, what = f"{place}{error.json_path[1:]}"[:MAX_TEXT], f"{error.message:.{MAX_TEXT}}"
        error = error.context[0] if error.context else error
        if error.validator == "enum" and isinstance(error.instance, str):  # a keyword, or a type
            names = list[str](error.validator_value)
            near = difflib.get_close_matches(error.instance, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
            what = f"{error.instance[:40]} is not supported ({hint})"
        elif error.validator == "format":
            what = f"{error.instance!r:.60} is not a regular expression: {error.cause}"
        raise ValueError(f"{where}: {what}")
    return schema


class _Check:
    """The check of one answer: jsonschema's, in bounded time.

    `results` holds, by `$ref` and value, the first error, or None. Without it, alternatives
    (`anyOf`) that refer to the same schema would double the work at every level of the answer.
    """

    def __init__(self, root: Schema) -> None:
        self.seconds = 0.0  # that patterns have taken
        self.results: dict[tuple[str, int], ValidationError | None] = {}
        keywords = {
            "$ref": self.ref,
            "pattern": self.pattern,
            "patternProperties": self.pattern_properties,
            "additionalProperties": self.additional_properties,
            "uniqueItems": self.unique_items,
        }
        # a registry that fetches nothing; jsonschema's own would
        self.validator: Validator = extend(VALIDATOR, keywords)(root, registry=Registry())

    def ref(self, validator: Validator, ref: str, value: object, schema: Schema) -> Errors:
        key = (ref, id(value))
        if key not in self.results:
            self.results[key] = ENDLESS  # until it is checked
            errors = VALIDATOR.VALIDATORS["$ref"](validator, ref, value, schema)
            self.results[key] = next(errors, None)
        if (error := self.results[key]) is ENDLESS:
            raise RecursionError
        if error:  # a copy: what holds it adds to its path
            yield ValidationError.create_from(error)

    def matches(self, pattern: str, text: str) -> bool:
        started = time.thread_time()
        try:
            timeout = max(0.001, SECONDS - self.seconds)
            return regex.search(pattern, text, timeout=timeout) is not None
        finally:
            self.seconds += time.thread_time() - started

    def pattern(self, validator: Validator, pattern: str, value: object, schema: Schema) -> Errors:
        if isinstance(value, str) and not self.matches(pattern, value):
            yield ValidationError(f"{value[:40]!r} does not match {pattern!r}")

    def pattern_properties(
        self, validator: Validator, rules: Schema, value: object, schema: Schema
    ) -> Errors:
        for name, child in value.items() if isinstance(value, dict) else ():
            for pattern, rule in rules.items():
                if self.matches(pattern, name):
                    yield from validator.descend(child, rule, path=name)

    def additional_properties(
        self, validator: Validator, rule: object, value: object, schema: Schema
    ) -> Errors:
        # in the answer's order; jsonschema's differs between processes
        patterns = schema.get("patternProperties", {})
        for name, child in value.items() if isinstance(value, dict) else ():
            if name in schema.get("properties", {}) or any(self.matches(p, name) for p in patterns):
                continue
            if rule is False:
                yield ValidationError(f"has an extra field {name[:40]!r}")
            else:
                yield from validator.descend(child, rule, path=name)

    def unique_items(
        self, validator: Validator, unique: bool, value: object, schema: Schema
    ) -> Errors:
        # by hash; jsonschema compares each object with each
        def hashable(value: object) -> object:  # 1 and 1.0 are equal, 1 and true are not
            if isinstance(value, dict):
                return frozenset((name, hashable(child)) for name, child in value.items())
            if isinstance(value, list):
                return tuple(map(hashable, value))
            return value, isinstance(value, bool)

        if unique and isinstance(value, list) and len(set(map(hashable, value))) < len(value):
            yield ValidationError("has equal items")


def first_error(schema: Schema, value: object) -> str | None:
    """Return a message with the place where `value` first differs from a valid `schema`, or None.

    Raises RecursionError where the value is nested too deeply, TimeoutError where a pattern takes
    too long.
    """
    root = {keyword: rule for keyword, rule in schema.items() if keyword not in AT_ROOT}
    try:
        error = next(_Check(root).validator.iter_errors(value), None)
    except OverflowError:
        return "holds a number that is too large for multipleOf"
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
