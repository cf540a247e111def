"""JSON Schema, the part of it that an answer of a model needs (json-schema.org, draft 2020-12).

A keyword that is not known here is refused when the schema is read, never passed over in silence.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distill.records import canonical

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    ),
}
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda value, limit: value >= limit),
    "maximum": ("number", lambda value, limit: value <= limit),
    "exclusiveMinimum": ("number", lambda value, limit: value > limit),
    "exclusiveMaximum": ("number", lambda value, limit: value < limit),
    "minLength": ("string", lambda value, limit: len(value) >= limit),
    "maxLength": ("string", lambda value, limit: len(value) <= limit),
    "pattern": ("string", lambda value, limit: re.search(limit, value) is not None),
    "minItems": ("array", lambda value, limit: len(value) >= limit),
    "maxItems": ("array", lambda value, limit: len(value) <= limit),
}
TOLD = frozenset({"$schema", "title", "description"})
KNOWN = TOLD | LIMITS.keys() | {
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items")
}  # fmt: skip


def validate_schema(schema: Any, where: str = "schema") -> None:
    """Raise ValueError where `schema` is none, or uses a keyword that is not known here."""
    if not isinstance(schema, dict):
        raise ValueError(f"{where} is not an object")
    if unknown := sorted(map(str, schema.keys() - KNOWN)):
        raise ValueError(
            f"{where}: {unknown[0]} is not supported; known are {', '.join(sorted(KNOWN))}"
        )
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in TYPES:
            raise ValueError(f"{where}.type: one of {', '.join(TYPES)}, not {kind!r}")
    if not isinstance(schema.get("enum", []), list) or not isinstance(
        schema.get("required", []), list
    ):
        raise ValueError(f"{where}: enum and required are lists")
    for keyword, (kind, _) in LIMITS.items():
        _validate_limit(
            schema.get(keyword), kind if keyword == "pattern" else "number", f"{where}.{keyword}"
        )
    for name, child in _children(schema, where):
        validate_schema(child, name)


def _validate_limit(limit: Any, kind: str, where: str) -> None:
    if limit is not None and not TYPES[kind](limit):
        raise ValueError(f"{where} is not a {kind}")
    if kind == "string" and limit is not None:
        try:
            re.compile(limit)
        except re.error as error:
            raise ValueError(f"{where} is not a regular expression: {error}") from None


def _children(schema: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise ValueError(f"{where}.properties is not an object")
    yield from ((f"{where}.properties.{name}", child) for name, child in properties.items())
    if "items" in schema:
        yield f"{where}.items", schema["items"]
    if not isinstance(more := schema.get("additionalProperties", True), bool):
        yield f"{where}.additionalProperties", more


def fault(schema: Mapping[str, Any], value: Any, where: str = "$") -> str | None:
    """Say where `value` first differs from a valid `schema`, or None where it conforms."""
    kinds = schema.get("type", list(TYPES))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not any(TYPES[kind](value) for kind in kinds):
        return f"{where} is no {' or '.join(kinds)}"
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if allowed is not None and not any(canonical(value) == canonical(one) for one in allowed):
        return f"{where} is none of the allowed values"
    for keyword, (kind, holds) in LIMITS.items():
        if keyword in schema and TYPES[kind](value) and not holds(value, schema[keyword]):
            return f"{where} breaks {keyword} {schema[keyword]!r}"
    if isinstance(value, dict):
        return _object_fault(schema, value, where)
    if isinstance(value, list) and "items" in schema:
        found = (fault(schema["items"], child, f"{where}[{k}]") for k, child in enumerate(value))
        return next(filter(None, found), None)
    return None


def _object_fault(schema: Mapping[str, Any], value: dict[str, Any], where: str) -> str | None:
    if missing := [name for name in schema.get("required", []) if name not in value]:
        return f"{where} lacks {missing[0]}"
    properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, child in value.items():
        rule = properties.get(name, more)
        if rule is False:
            return f"{where} has an extra field {name[:40]}"
        found = fault(rule, child, f"{where}.{name[:40]}") if isinstance(rule, dict) else None
        if found:
            return found
    return None
