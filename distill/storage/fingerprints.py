"""Fingerprints of stages: what a result depends on, as a flat mapping, and how two of them differ in words."""

import re
from typing import Any

from pydantic_core import to_jsonable_python

from distill.config import Config
from distill.renamed_keys import fields_in, present_path

SHOWN = 6  # differences, or names of files, in a message
HASH = re.compile(r"[0-9a-f]{32,64}")
# A file beside the weights of a model in a folder, after what the model does there
MODEL_FILE = re.compile(r"(base|judge|student|teacher|tokenizer|weights) file .+")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for key, child in tree.items()
        for k, v in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name every key that differs: settings with both values, hashed inputs as lists of names.

    Old names of keys are read as the present ones. A setting that one side lacks, because it came
    later or belongs to another kind of teacher, counts as its default there.
    """
    old = {".".join(present_path(key.split("."), Config)): value for key, value in old.items()}
    settings, files = [], dict[str, list[str]]()
    for key in sorted(old.keys() | new.keys()):
        before, after = _setting(old, key), _setting(new, key)
        if before == after or (before in (None, "") and after in (None, "")):
            continue
        if HASH.fullmatch(str(after if before is None else before)):
            how = "added" if before is None else "removed" if after is None else "changed"
            files.setdefault(how, []).append(key.removeprefix("file ").removeprefix("input "))
        else:
            settings.append(f"{key} was {_short(before)}, is {_short(after)}")
    for how, names in files.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        settings.append(f"{how}: {', '.join(names[:SHOWN])}{more}")
    return settings


def _setting(fingerprint: dict[str, Any], key: str) -> Any:
    """Return a key's value in a fingerprint, else a setting's default, else None."""
    if key in fingerprint:
        return fingerprint[key]
    annotation, names = Config, key.split(".")
    for depth, name in enumerate(names, 1):
        field = fields_in(annotation).get(name)
        if field is None or (field.is_required() and depth == len(names)):
            return None
        if depth == len(names):
            return to_jsonable_python(field.default)
        # a section that may be null has defaults only where the fingerprint has other keys of it
        section = ".".join(names[:depth])
        off = section in fingerprint or field.default is None
        if off and not any(other.startswith(f"{section}.") for other in fingerprint):
            return None
        annotation = field.annotation
    return None


def unnamed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return what `new` says of models in folders of which `old` names no file.

    An earlier distill knew such a model by its weights alone, or, the student and the judge, by its
    name.
    """
    ours, theirs = (
        {match[1] for key in facts if (match := MODEL_FILE.fullmatch(key))} for facts in (new, old)
    )
    roles = ours - theirs
    return {k: v for k, v in new.items() if k not in old and k.split(" file ")[0] in roles}


def _short(value: Any) -> str:
    text = "unset" if value is None else " ".join(str(value).split())
    return text if len(text) <= 40 else text[:39] + "…"
