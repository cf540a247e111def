"""Renamed keys: published under another name, they stay readable under it.

Whoever reads what users or earlier versions wrote (configs and overrides; task, suite, price, terms
and model files; markers of finished runs) gives its keys their present names here, by one table.
"""

import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from distill.config.teachers import TEACHERS

# The last part of a key; it is an old name only where the section has the new one and not the old.
RENAMED = {
    **dict.fromkeys(("slots", "max_batch_size"), "concurrency"),
    "licence": "license",
    "licences": "licenses",
    "first_wait": "initial_backoff",
    "max_straight_failures": "max_consecutive_failures",
    "samples": "bootstrap_samples",
}
FORMER_DEFAULTS = {"max_consecutive_failures": 100}  # in the resolved configs of older runs
# What a switch was before it had more than two values
SWITCHES = {"filters.failed_checker": {True: "drop", False: "keep"}}
BEFORE = {"engine": "distill"}  # what runs are made with that are older than the key
KeyPath = tuple[str, ...]
RESPONDERS: tuple[KeyPath, ...] = (("teacher",), ("evaluation", "judge"), ("signals", "endpoint"))
# What moved to the top of a config; a judge's and a reader's never did anything
MOVED: dict[KeyPath, str] = {(*section, "reasoning"): "reasoning" for section in RESPONDERS}


def models_in(annotation: object) -> list[type[BaseModel]]:
    """Return the classes whose keys a value may have: of a union all, of a list its elements'."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def fields_in(annotation: object) -> dict[str, FieldInfo]:
    """Return the keys that a value of this annotation may have; the first of several kinds wins."""
    models = reversed(models_in(annotation))
    return {name: field for model in models for name, field in model.model_fields.items()}


def present_path(path: Sequence[str], annotation: object) -> KeyPath:
    """Return the path of a key under its present names; unknown parts stay as they are."""
    if (moved := MOVED.get(tuple(path))) and moved in fields_in(annotation):
        return (moved,)
    names: list[str] = []
    for name in path:
        fields = fields_in(annotation)
        name = _present_name(name, fields)
        names.append(name)
        annotation = fields[name].annotation if name in fields else None
    return tuple(names)


def _present_name(name: str, fields: dict[str, FieldInfo]) -> str:
    new = RENAMED.get(name, name)
    return new if new in fields and name not in fields else name


def present_value(key: str, value: object) -> object:
    """Return the present word for what a key held when it was a switch."""
    return SWITCHES.get(key, {}).get(value, value) if isinstance(value, bool) else value


def rename_keys(tree: object, annotation: object, path: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    """Give the keys of a tree their present names; return each old path and its new name.

    A key under both names is left alone: whoever validates the tree refuses it.
    """
    if isinstance(tree, list):
        return [pair for child in tree for pair in rename_keys(child, annotation, path)]
    if not isinstance(tree, dict):
        return []
    if get_origin(annotation) is dict:  # the names are the user's, the keys of the values are ours
        inner, children = get_args(annotation)[1], tree.items()
        return [
            pair for name, child in children for pair in rename_keys(child, inner, (*path, name))
        ]
    fields, renamed = fields_in(annotation), list[tuple[KeyPath, str]]()
    teacher = tree.get("teacher") if "reasoning" in fields and not path else None
    if isinstance(teacher, dict) and "reasoning" in teacher and "reasoning" not in tree:
        tree["reasoning"] = teacher.pop("reasoning")
        renamed.append((("teacher", "reasoning"), "reasoning"))
    for old in list(tree):
        new = _present_name(old, fields)
        if new != old and new not in tree:
            tree[new] = tree.pop(old)
            renamed.append(((*path, old), new))
    for name, child in tree.items():
        if name in fields:
            renamed += rename_keys(child, fields[name].annotation, (*path, name))
    return renamed


def forget_other_kinds(tree: dict[str, Any]) -> None:
    """Drop what resolved configs once said of other kinds' keys: that they have their defaults."""
    for section in RESPONDERS:
        responder: Any = tree
        for name in section:
            responder = responder.get(name) if isinstance(responder, dict) else None
        if not isinstance(responder, dict):
            continue
        kind = responder.get("kind", "local")
        # how many at once stood there under two names, of which one did nothing
        for old in {"slots", "max_batch_size"} & responder.keys():
            if kind == "local" and responder.get("concurrency") in (None, 16):
                responder["concurrency"] = responder.pop(old)
            elif kind != "local" and responder[old] is None:
                del responder[old]
        if kind != "local" and responder.get("concurrency", 0) is None:
            del responder["concurrency"]
        fields = next(
            (k.model_fields for k in TEACHERS if k.model_fields["kind"].default == kind), {}
        )
        for key, value in list(responder.items()) if fields else ():
            name = RENAMED.get(str(key), str(key))
            others = [k.model_fields[name] for k in TEACHERS if name in k.model_fields]
            idle = [None, FORMER_DEFAULTS.get(name)]
            idle += [to_jsonable_python(o.default) for o in others if not o.is_required()]
            foreign = others and name not in fields
            if (foreign and value in idle) or (key, value) == ("reasoning", "drop"):
                del responder[key]


def first_names(text: bytes) -> bytes:
    """Return a YAML text under the first names of its outermost keys: a hash over it is what it was
    before they were renamed."""
    for old, new in RENAMED.items():
        text = re.sub(rf"(?m)^{new}(?=\s*:)".encode(), old.encode(), text)
    return text
