"""Renamed keys: published under another name, they stay readable under it.

Whoever reads what users or earlier versions wrote (configs and overrides; task, suite, price, terms
and model files; markers of finished runs) gives its keys their present names here, by one table.
"""

import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

# The last part of a key; it is an old name only where the section has the new one and not the old.
RENAMED = {
    "slots": "max_batch_size",
    "licence": "license",
    "licences": "licenses",
    "first_wait": "initial_backoff",
    "max_straight_failures": "max_consecutive_failures",
    "samples": "bootstrap_samples",
}
KeyPath = tuple[str, ...]
# What moved to the top of a config; a judge's and a reader's never did anything
MOVED: dict[KeyPath, str] = {
    ("teacher", "reasoning"): "reasoning",
    ("evaluation", "judge", "reasoning"): "reasoning",
    ("signals", "endpoint", "reasoning"): "reasoning",
}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the classes whose keys a value may have: of a union all, of a list its elements'."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def fields_in(annotation: Any) -> dict[str, FieldInfo]:
    """Return the keys that a value of this annotation may have; the first of several kinds wins."""
    models = reversed(models_in(annotation))
    return {name: field for model in models for name, field in model.model_fields.items()}


def present_path(path: Sequence[str], annotation: Any) -> KeyPath:
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


def rename_keys(tree: Any, annotation: Any, path: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    """Give the keys of a tree their present names, in place; return each old path and its new name.

    A key that stands there under both names is left alone: whoever validates the tree refuses it.
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
    teacher = tree.get("teacher")
    if not path and "reasoning" in fields and isinstance(teacher, dict) and "reasoning" in teacher:
        if "reasoning" not in tree:
            tree["reasoning"] = teacher.pop("reasoning")
            renamed.append((("teacher", "reasoning"), "reasoning"))
        if not teacher:  # of an override, whose only key it was
            del tree["teacher"]
    for old in list(tree):
        new = _present_name(old, fields)
        if new != old and new not in tree:
            tree[new] = tree.pop(old)
            renamed.append(((*path, old), new))
    for name, child in tree.items():
        if name in fields:
            renamed += rename_keys(child, fields[name].annotation, (*path, name))
    return renamed


def _present_name(name: str, fields: dict[str, FieldInfo]) -> str:
    new = RENAMED.get(name, name)
    return new if new in fields and name not in fields else name


def first_names(text: bytes) -> bytes:
    """Return a YAML text with the first names of its outermost keys.

    A hash over it is what it was before the keys were renamed, in our files and in users': to take
    the new name over changes nothing that was measured.
    """
    for old, new in RENAMED.items():
        text = re.sub(rf"(?m)^{new}(?=\s*:)".encode(), old.encode(), text)
    return text
