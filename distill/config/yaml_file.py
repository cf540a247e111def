"""Read the YAML that users write, strictly, and overrides like `train.learning_rate=2e-4`.

`1e-4` is a number; `on`, `no` and `010` are texts; a key stands once; aliases, tags and merges are
refused, so that no file builds an object or grows. Errors are one line with file, line and key.
"""

import difflib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from yaml.events import AliasEvent

from distill import SHIPPED
from distill.config.renamed_keys import (
    MOVED,
    RENAMED,
    KeyPath,
    fields_in,
    forget_other_kinds,
    rename_keys,
)
from distill.config.teachers import TEACHERS
from distill.config.tree import Config
from distill.config.values import NAME
from distill.errors import DistillError, Exit
from distill.secret_patterns import Secret, find_secrets

MAX_BYTES = 64_000  # no person writes a larger file; this much is read in half a second
MAX_DEPTH = 20
Places = dict[KeyPath, str]  # where each key of the tree was set, as FILE:LINE; () is the file

LOGIN = re.compile(r"://(?!@)[^/\s:@]*+(?::[^/\s:@]++)?@")
SECRET_KEY = re.compile(r"(?:api_?key|token|secret|password|authorization)$", re.I)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
OTHER_NAMES = RENAMED | {  # the names of some of our keys in other tools
    **{"lr": "learning_rate", "epochs": "num_train_epochs", "rank": "r"},
    **{"max_seq_length": "max_length", "max_tokens": "max_new_tokens"},
    **dict.fromkeys(("batch_size", "per_device_train_batch_size"), "tokens_per_step"),
}
SCALARS = {  # what a plain value is, by its pattern and first letters; all else is a text
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|false", "tf"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|nan)",
        "-+0123456789.",
    ),
}
BY_NAME = "name an environment variable instead"


def _problem(what: str, place: yaml.Event | yaml.Node) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=place.start_mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without surprising conversions, aliases, tags and deep nesting."""

    depth = 0
    yaml_implicit_resolvers = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, AliasEvent):
            raise _problem("aliases are not allowed", event)
        if getattr(event, "tag", None) is not None:
            raise _problem("tags (!...) are not allowed", event)
        if self.depth == MAX_DEPTH:
            raise _problem("nested too deeply", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = True) -> dict[Any, Any]:
        """Build a mapping; refuse a key that is repeated or is not a text."""
        result = dict[Any, Any]()
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _problem(f"a key must be a text, not {str(key)[:40]}", key_node)
            if key in result:
                raise _problem(f"key {key[:60]!r} stands twice", key_node)
            result[key] = self.construct_object(value_node, deep=True)
        return result


for _kind, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )


def parse_yaml(text: str, where: object) -> tuple[Any, Places]:
    """Parse one YAML document, or raise DistillError (exit 2); return it and its keys' places."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = loader.construct_document(node) if node else None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of numbers of 5,000 digits too
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        what = "not readable here" if secret_in(what) else what  # a secret is not repeated
        place = f"{where}:{mark.line + 1}" if mark else where
        raise DistillError(Exit.CONFIG, place, what, "write plain YAML") from None
    places: Places = {(): str(where)}

    def enter(node: yaml.Node | None, path: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                inner = (*path, str(key.value))
                places[inner] = f"{where}:{key.start_mark.line + 1}"
                enter(child, inner)

    enter(node, ())
    return value, places


def place_in(places: Places, path: KeyPath) -> str:
    """Return where a key was set, else the nearest section around it."""
    return next(places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in places)


def read_text(path: Path) -> str:
    """Read a small UTF-8 file that the user named; raises DistillError (exit 2) otherwise."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ValueError("is not a file")
        if size > MAX_BYTES:
            raise ValueError(f"is larger than {MAX_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("begins with a byte order mark")
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise DistillError(Exit.CONFIG, path, what, "name a YAML file, in UTF-8") from None
    return text


def read_yaml(path: Path, form: object) -> Any:
    """Read a YAML file whose keys, under old names too, are those of `form`, an annotation."""
    tree, places = parse_yaml(read_text(path), path)
    use_present_names(tree, form, places)
    return tree


Table = TypeVar("Table")


def read_table(path: Path, form: type[Table], fix: str) -> Table:
    """Read a table of rows; raises DistillError (exit 2) with the first value that is wrong."""
    try:
        return TypeAdapter(form).validate_python(read_yaml(path, form))
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{path}: {'.'.join(map(str, first['loc']))}"
        raise DistillError(Exit.CONFIG, where, first["msg"], fix) from None


def use_present_names(tree: object, form: object, places: Places, tell: bool = True) -> None:
    """Give the keys of a tree their present names; name the old ones to the user on stderr."""
    for old, new in rename_keys(tree, form):
        place = places[(new,) if old in MOVED else (*old[:-1], new)] = place_in(places, old)
        if tell:
            _tell_once(f"{place}: {'.'.join(old)} is now called {new}; the old name still works")


@cache
def _tell_once(line: str) -> None:
    print(line if line.isprintable() else ascii(line), file=sys.stderr)


def _explain(error: ValidationError, places: Places) -> DistillError:
    """Turn pydantic's errors into one line: the first, but an unknown key before a missing one."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    unknown, path, field = first["type"] == "extra_forbidden", KeyPath(), None
    fields = names = fields_in(Config)
    for n, part in enumerate(first["loc"], 1):  # keys, and pydantic's names of kinds and choices
        if part in fields or (unknown and n == len(first["loc"])):
            path, names, field = (*path, str(part)), fields, fields.get(str(part))
            fields = fields_in(field.annotation) if field else {}
        elif not fields:
            break
    key, fix = ".".join(path), "correct the value"
    if unknown and field:
        owners = [
            str(k.model_fields["kind"].default) for k in TEACHERS if path[-1] in k.model_fields
        ]
        what, fix = f"{key}: is a key of kind {' or '.join(owners)}", "this is of another kind"
    elif unknown:
        usual, what = OTHER_NAMES.get(path[-1]), f"unknown key {key[:80]}"
        near = [usual] if usual in names else difflib.get_close_matches(path[-1], names, 1, 0.5)
        fix = f"did you mean {near[0]}?" if near else "valid: " + ", ".join(names)
    elif first["type"] == "missing":
        what, fix = f"{key} is missing", "add it"
    elif first["type"] == "union_tag_invalid":
        what, fix = f"{key}.kind: {first['msg'].partition(' match ')[2]}", "correct the kind"
    else:
        message = first["msg"].removeprefix("Value error, ").replace("valid array", "list: [a, b]")
        silent = isinstance(first["input"], dict) or "api_key_env" in path  # perhaps a key
        value = "" if silent else f", not {str(first['input'])[:60]!r}"
        what = (f"{key}: {message[:1].lower() + message[1:]}" if key else message) + value
        if field and (allowed := limits(field)):
            fix = f"allowed: {allowed}"
    return DistillError(Exit.CONFIG, place_in(places, path), what, fix)


def limits(field: FieldInfo) -> str:
    """Return the range in a field's annotation as text, also inside `Annotated[...] | None`."""
    inside = [m for kind in get_args(field.annotation) for m in getattr(kind, "__metadata__", ())]
    inside = [limit for m in inside for limit in getattr(m, "metadata", [m])]
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return ", ".join(
        f"{words[name]} {getattr(limit, name):,}"
        for limit in (*field.metadata, *inside)
        for name in words
        if hasattr(limit, name)
    )


def secret_in(text: str, allowed: Collection[str] = ()) -> Secret | None:
    """Return the first secret in a text of the user's; an address's login is always one."""
    if login := LOGIN.search(text):
        return Secret("address-login", login.start(), "")
    return next(find_secrets(text, allowed), None)


def check_values(
    value: object, places: Places, path: KeyPath = (), allowed: Collection[str] = ()
) -> None:
    """Refuse a secret that is not `allowed`, a control character, a number that is not finite."""
    what, fix = "", "correct the value"
    if isinstance(value, dict):
        for name, child in value.items():
            if secret_in(name):
                where = place_in(places, path)
                raise DistillError(Exit.CONFIG, where, "a key of the file is a secret", BY_NAME)
            check_values(child, places, (*path, name), allowed)
    elif isinstance(value, list):
        for child in value:
            check_values(child, places, path, allowed)
    elif isinstance(value, str):
        if value and path and SECRET_KEY.search(path[-1]):
            what, fix = "holds a secret", BY_NAME
        elif secret := secret_in(value, allowed):
            what = f"holds a secret ({secret.name})"
            fix = BY_NAME + (secret.way_on if secret.sha256 else "")
        elif CONTROL.search(value):
            what = "holds a control character"
    elif isinstance(value, float) and not math.isfinite(value):
        what = "is not a finite number"
    if what:
        raise DistillError(Exit.CONFIG, place_in(places, path), f"{'.'.join(path)} {what}", fix)


def apply_override(tree: dict[str, Any], override: str) -> Places:
    """Set `a.b=value` in `tree`, return the keys set; a mapping changes only what it names."""
    name, equals, text = override.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path) or secret_in(name):
        place = "an override" if secret_in(override) else override
        raise DistillError(Exit.CONFIG, place, "is not KEY=VALUE", "write key.name=value")
    value, inside = parse_yaml(text, f"override {name.strip()}")
    changed = [path[:n] for n in range(1, len(path))] + [(*path, *inner) for inner in inside]
    places = dict.fromkeys(changed, "command line")
    for part in reversed(path):
        value = {part: value}
    use_present_names(value, Config, places)
    _merge(tree, value)
    return places


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def find_config(path: Path) -> Path:
    """Return `path`, or the file of that name among those that ship (`configs/NAME`)."""
    if path.is_absolute() or os.path.lexists(path) or ".." in path.parts:
        return path
    return next((root / path for root in SHIPPED if os.path.isfile(root / path)), path)


def load_config(
    path: Path,
    overrides: Iterable[str] = (),
    place: Mapping[str, str] | None = None,
    text: str | None = None,
) -> Config:
    """Read, override and check the experiment at `path`; raises DistillError (exit 2).

    `place` holds the `name` and `runs` of a folder that is opened; the file's are not read. `text`
    is what will stand in the file.
    """
    path = find_config(path)
    if text is None:
        text = read_text(path)
    elif len(text.encode()) > MAX_BYTES:
        what = f"a config of more than {MAX_BYTES:,} bytes is not read"
        raise DistillError(Exit.CONFIG, path, what, "shorten its lists")
    tree, places = parse_yaml(text, path)
    if not isinstance(tree, dict):
        what, fix = "holds no mapping of keys", "start from one of configs/*.yaml"
        raise DistillError(Exit.CONFIG, path, what, fix)
    use_present_names(tree, Config, places, tell=path.suffix != ".json")  # which a run resolved
    tree |= place or {}
    for override in overrides:
        places |= apply_override(tree, override)
    forget_other_kinds(tree)
    publish = tree.get("publish")
    allowed = publish.get("allow_secrets") if isinstance(publish, dict) else None
    names = [name for name in allowed if isinstance(name, str)] if isinstance(allowed, list) else []
    check_values(tree, places, allowed=names)
    try:  # through JSON, whose strict mode knows lists and paths, but makes no number of a text
        return Config.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise _explain(error, places) from None


def with_values(config: Config, values: Mapping[str, object]) -> Config:
    """Return a config with other values of some dotted keys."""
    tree = config.user_tree()
    for key, value in values.items():
        apply_override(tree, f"{key}={value}")
    return Config.model_validate_json(json.dumps(tree), strict=True)


def place_of(folder: Path) -> dict[str, str]:
    """Return the `name` and `runs` of a run's folder as a config may state them.

    A name that no run could have (`my run (copy)`) becomes its plain parts and its hash.
    """
    name, runs = folder.name, str(folder.parent)
    if not NAME.fullmatch(name) or secret_in(name):
        plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60]
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        name = f"{'run' if not plain or secret_in(plain) else plain}-{digest}"
    readable = runs.isprintable() and not secret_in(runs)
    return {"name": name, "runs": runs if readable else "runs"}
