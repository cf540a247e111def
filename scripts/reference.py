"""Make configs/reference.yaml: every key of an experiment with its meaning, its range and its
default, from the descriptions in distill/config: `python scripts/reference.py`.
"""

import textwrap
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from distill.config.renamed_keys import models_in
from distill.config.teachers import Teacher
from distill.config.tree import Config
from distill.config.yaml_file import limits

EXAMPLES = {  # of the keys that an experiment cannot do without
    "name": "reference",
    "corpus.path": "docs",
    "prompts.tasks": ["prose_summary"],
    "teacher.model": "Qwen/Qwen2.5-7B-Instruct",
    "student.model": "Qwen/Qwen2.5-1.5B-Instruct",
}
HEAD = """\
# Every key of an experiment: what it does, what it may be, and its default, which a key has that is
# left out. Where an example stands in its place, the comment says so.
# Made from distill/config by `python scripts/reference.py`.
"""
TYPES = {bool: "true, false", int: "whole number", float: "number", Decimal: "number"}
TYPES |= {str: "text", Path: "path", dict: "mapping"}


def reference() -> str:
    """Return configs/reference.yaml: an experiment with each key, its description and its range."""
    return HEAD + "\n".join(_described([Config], (), set())) + "\n"


def _described(
    kinds: Sequence[type[BaseModel]], path: tuple[str, ...], described: set[type]
) -> Iterator[str]:
    """Yield the lines of a section, of one with several kinds the keys of all kinds first.

    `described` are those whose keys stand in the file already.
    """
    described.update(kinds)
    indent, several = "  " * len(path), len(kinds) > 1
    common = [n for n in kinds[0].model_fields if all(n in kind.model_fields for kind in kinds)]
    rows = [(name, kinds[0].model_fields[name], "") for name in common]
    for kind in kinds:
        for name in (n for n in kind.model_fields if n not in {row[0] for row in rows}):
            owners = [k.model_fields["kind"].default for k in kinds if name in k.model_fields]
            rows.append((name, kind.model_fields[name], f"--- kind: {' or '.join(owners)}"))
    headings = ["", *(row[2] for row in rows)]
    for before, (name, field, heading) in zip(headings, rows, strict=False):
        key = ".".join((*path, name))
        if not path:
            yield ""
        if heading != before:
            yield f"{indent}# {heading}"
        lines = textwrap.wrap(description(field), 98 - len(indent), break_on_hyphens=False)
        yield from (f"{indent}# {line}" for line in lines)
        inner = models_in(field.annotation)
        if inner and field.default is not None:
            yield f"{indent}{name}:"
            yield from _described(inner, (*path, name), described)
            continue
        instead = "required" if field.is_required() else f"default {_yaml(field.default)}"
        note = f"; an example, {instead}" if key in EXAMPLES else ""
        value = EXAMPLES.get(key, None if field.is_required() else field.default)
        needed = "; required" if field.is_required() and not note else ""
        choices = _choices(field)
        if name == "kind" and several:
            choices = ", ".join(kind.model_fields[name].default for kind in kinds)
        yield f"{indent}{name}: {_yaml(value)}".ljust(40) + f"  # {choices}{note}{needed}"
        if inner and not described.issuperset(inner):  # a section that is off unless it is written
            lines = _described(inner, (*path, name), described)
            yield from (f"{indent}# {line.removeprefix(indent)}" for line in lines)


def description(field: FieldInfo) -> str:
    """Return what a key is for; a section without words of its own says it itself."""
    section = (models_in(field.annotation) or [BaseModel])[0]
    return field.description or (section.__doc__ or "").split("\n\n")[0]


def _yaml(value: Any) -> str:
    """Return a plain value as YAML on one line."""
    value = to_jsonable_python(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _choices(field: FieldInfo) -> str:
    """Return the allowed values of a key: its choices, else its type and range."""
    kinds = ", ".join(dict.fromkeys(_kinds(field.annotation)))
    allowed = limits(field)
    null = ", or null" if NoneType in get_args(field.annotation) else ""
    return kinds + (f" {allowed}" if allowed else "") + null


def _kinds(annotation: Any) -> Iterator[str]:
    """Yield the choices and types in an annotation as text, all but null."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from (_yaml(choice) for choice in inside)
    elif origin is tuple:
        yield f"list of {'/'.join(_kinds(inside[0]))}"
    elif (origin or annotation) in TYPES:
        yield TYPES[origin or annotation]
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        section = Teacher if issubclass(annotation, Teacher) else annotation
        yield f"the keys of {section.__name__.lower()}"
    else:  # of Annotated the type, of a union each
        for kind in inside[:1] if origin is Annotated else inside:
            yield from _kinds(kind)


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "configs" / "reference.yaml"
    path.write_text(reference(), encoding="utf-8")
