"""Read the YAML that users write, strictly, and overrides like `train.learning_rate=2e-4`.

`1e-4` is a number; `on`, `no` and `010` are texts; a key stands once; aliases, tags and merges are
refused, so that no file can build an object or grow when it is read. Every error (unknown or
duplicate key, wrong type, value out of range, a secret) is a DistillError (exit 2) of one line with
file, line and key, before anything is loaded or asked.
"""

import difflib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.events import AliasEvent

from distill.config.renamed_keys import MOVED, RENAMED, KeyPath, fields_in, rename_keys
from distill.config.teachers import TEACHERS
from distill.config.tree import Config
from distill.config.values import NAME
from distill.errors import DistillError, Exit
from distill.secret_patterns import Secret, find_secrets, fingerprint

MAX_BYTES = 64_000  # no person writes a larger file; this much is read in half a second
MAX_DEPTH = 20
PLAIN = "write plain YAML"
KINDS = {kind.model_fields["kind"].default for kind in TEACHERS}
Places = dict[KeyPath, str]  # where each key of the tree was set, as FILE:LINE

LOGIN = re.compile(r"://(?!@)[^/\s:@]*+(?::[^/\s:@]++)?@")
SECRET_KEY = re.compile(r"(?:api_?key|token|secret|password|authorization)$", re.I)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
OTHER_TOOLS_NAMES = {  # the names of some of our keys in other tools
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "rank": "r",
    "batch_size": "tokens_per_step",
    "per_device_train_batch_size": "tokens_per_step",
    "max_seq_length": "max_length",
    "max_tokens": "max_new_tokens",
}
BY_NAME = "name an environment variable instead"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without surprising conversions, aliases, tags and deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event, problem = self.peek_event(), ""
        if isinstance(event, AliasEvent):
            problem = "aliases are not allowed"
        elif getattr(event, "tag", None) is not None:
            problem = "tags (!...) are not allowed"
        elif self.depth == MAX_DEPTH:
            problem = "nested too deeply"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag == "tag:yaml.org,2002:null"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|nan)",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """Build a mapping; refuse a key that is repeated or is not a text."""
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, problem = loader.construct_object(key_node, deep=True), ""
        if not isinstance(key, str):
            problem = f"a key must be a text, not {str(key)[:40]}"
        elif key in result:
            problem = f"key {key[:60]!r} stands twice"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: object) -> Any:
    """Parse one YAML document; raises DistillError (exit 2) with the line of the error."""
    return parse_with_places(text, where)[0]


def parse_with_places(text: str, where: object) -> tuple[Any, Places]:
    """Parse one YAML document; return it and the place of each of its keys."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = loader.construct_document(node) if node else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        what = "not readable here" if secret_in(what) else what  # a secret is not repeated
        place = f"{where}:{mark.line + 1}" if mark else where
        raise DistillError(Exit.CONFIG, place, what, PLAIN) from None
    except (ValueError, OverflowError):  # Python reads no number of 5,000 digits
        raise DistillError(Exit.CONFIG, where, "a number in it is too long", PLAIN) from None
    return value, _places(node, where)


def _places(node: yaml.Node | None, where: object, path: tuple[str, ...] = ()) -> Places:
    places: Places = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            places[inner] = f"{where}:{key.start_mark.line + 1}"
            places |= _places(value, where, inner)
    return places


def read_text(path: Path) -> str:
    """Read a small UTF-8 file that the user named; raises DistillError (exit 2) otherwise."""
    try:
        if path.exists() and not path.is_file():
            raise DistillError(Exit.CONFIG, path, "is not a file", "name a YAML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DistillError(Exit.CONFIG, path, reason, "check the path") from None
    if len(data) > MAX_BYTES:
        what = f"larger than {MAX_BYTES:,} bytes"
        raise DistillError(Exit.CONFIG, path, what, "this is no config; check the path")
    if data.startswith(b"\xef\xbb\xbf"):
        what, fix = "begins with a byte order mark", "save it as UTF-8 without"
        raise DistillError(Exit.CONFIG, path, what, fix)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at byte {error.start}"
        raise DistillError(Exit.CONFIG, path, what, "save the file as UTF-8") from None


def read_yaml(path: Path, form: Any) -> Any:
    """Read a YAML file whose keys, under old names too, are those of `form`, an annotation."""
    tree, places = parse_with_places(read_text(path), path)
    use_present_names(tree, form, path, places)
    return tree


Table = TypeVar("Table")


def read_table(path: Path, form: type[Table], fix: str) -> Table:
    """Read a table of rows; raises DistillError (exit 2) with the first value that is wrong."""
    return _rows(read_text(path), path, form, fix)


@lru_cache(maxsize=16)  # several stages ask for the same table
def _rows(text: str, path: Path, form: type[Table], fix: str) -> Table:
    tree, places = parse_with_places(text, path)
    use_present_names(tree, form, path, places)
    try:
        return TypeAdapter(form).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{path}: {'.'.join(map(str, first['loc']))}"
        raise DistillError(Exit.CONFIG, where, first["msg"], fix) from None


def use_present_names(
    tree: Any, form: Any, where: object, places: Places, tell: bool = True
) -> None:
    """Give the keys of a tree their present names; name the old ones to the user on stderr."""
    for old, new in rename_keys(tree, form):
        place = places.pop(old, str(where))
        places[(new,) if old in MOVED else (*old[:-1], new)] = place
        if tell:
            _tell_once(f"{place}: {'.'.join(old)} is now called {new}; the old name still works")


@cache
def _tell_once(line: str) -> None:
    print(line if line.isprintable() else ascii(line), file=sys.stderr)


def _fields(path: Sequence[str]) -> dict[str, FieldInfo]:
    """Return the keys of the section at a path; of several kinds, those of all."""
    fields = fields_in(Config)
    for name in path:
        fields = fields_in(fields[name].annotation) if name in fields else {}
    return fields


def _key_of(error: ErrorDetails) -> tuple[str, ...]:
    """Return the path of an error's key, without pydantic's names of kinds and choices."""
    path: list[str] = []
    key = "kind" if error["type"] == "unknown_kind" else error.get("ctx", {}).get("key")
    for part in (*error["loc"], key) if key else error["loc"]:
        fields = _fields(path)
        if part in fields or (error["type"] == "extra_forbidden" and part not in KINDS):
            path.append(str(part))
        elif not fields:  # behind a key stand the names of its choices, or a position
            break
    return tuple(path)


def _explain(error: ValidationError, file: str, places: Places) -> DistillError:
    """Turn pydantic's errors into one line: the first, but an unknown key before a missing one."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path = _key_of(first)
    where = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), file)
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        names = list(_fields(path[:-1]))
        usual = (OTHER_TOOLS_NAMES | RENAMED).get(path[-1])
        near = [usual] if usual in names else difflib.get_close_matches(path[-1], names, 1, 0.5)
        fix = f"did you mean {near[0]}?" if near else "valid: " + ", ".join(names)
        return DistillError(Exit.CONFIG, where, f"unknown key {key[:80]}", fix)
    if first["type"] == "missing":
        return DistillError(Exit.CONFIG, where, f"{key} is missing", "add it")
    message = first["msg"].removeprefix("Value error, ").replace("valid array", "list: [a, b]")
    value = "" if isinstance(first["input"], dict) else f", not {str(first['input'])[:60]!r}"
    what = f"{key}: {message[:1].lower() + message[1:]}" if key else message
    field = _fields(path[:-1]).get(path[-1]) if path else None
    allowed = limits(field) if field else ""
    fix = f"allowed: {allowed}" if allowed else "correct the value"
    return DistillError(Exit.CONFIG, where, what + value, fix)


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
    """Return the first secret in a text of the user's; the login of an address is one, whatever it
    is."""
    if login := LOGIN.search(text):
        return Secret("address-login", *login.span())
    return next(find_secrets(text, allowed), None)


def check_values(
    value: Any, file: str, places: Places, path: KeyPath = (), allowed: Collection[str] = ()
) -> None:
    """Refuse a secret (never echoed), a control character, and a number that is not finite.

    `allowed` are secrets that are none, as `publish.allow_secrets` names them.
    """
    where = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), file)
    key = ".".join(path)
    if isinstance(value, dict):
        for name, child in value.items():
            if secret_in(name):
                raise DistillError(Exit.CONFIG, where, "a key of the file is a secret", BY_NAME)
            check_values(child, file, places, (*path, name), allowed)
    elif isinstance(value, list):
        for child in value:
            check_values(child, file, places, path, allowed)
    elif isinstance(value, str):
        if value and path and SECRET_KEY.search(path[-1]):
            raise DistillError(Exit.CONFIG, where, f"{key} holds a secret", BY_NAME)
        if secret := secret_in(value, allowed):
            mark = f"sha256:{fingerprint(value[secret.start : secret.end])[:12]}"
            what = f"{key} holds a secret ({secret.name}, {mark})"
            way_on = f"{BY_NAME}; if it is none, publish.allow_secrets=[{mark}] lets it pass"
            fix = BY_NAME if secret.name == "address-login" else way_on
            raise DistillError(Exit.CONFIG, where, what, fix)
        if CONTROL.search(value):
            raise DistillError(Exit.CONFIG, where, f"{key} holds a control character", "remove it")
    elif isinstance(value, float) and not math.isfinite(value):
        raise DistillError(Exit.CONFIG, where, f"{key} is not a finite number", "correct the value")


def apply_override(tree: dict[str, Any], override: str) -> Places:
    """Set `a.b=value` (value in YAML) in `tree`, and return the keys that it set.

    A mapping changes only what it names.
    """
    name, equals, text = override.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path) or secret_in(name):
        place = "an override" if secret_in(override) else override
        raise DistillError(Exit.CONFIG, place, "is not KEY=VALUE", "write key.name=value")
    value, _ = parse_with_places(text, f"override {name.strip()}")
    for part in reversed(path):
        value = {part: value}
    use_present_names(value, Config, "command line", {})
    _merge(tree, value)
    set_there = [path[: n + 1] for path in _paths(value) for n in range(len(path))]
    return dict.fromkeys(set_there, "command line")


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _paths(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the leaves of a tree."""
    if not isinstance(tree, dict) or not tree:
        yield path
        return
    for key, child in tree.items():
        yield from _paths(child, (*path, key))


def find_config(path: Path) -> Path:
    """Return `path`, or the file of that name among those that ship (`configs/NAME`)."""
    if path.is_absolute() or os.path.lexists(path):
        return path
    for root in (Path(__file__).parents[2], Path(__file__).parents[1] / "_data"):
        candidate = root / path
        if ".." not in path.parts and os.path.isfile(candidate):
            return candidate
    return path


def load_config(
    path: Path, overrides: Iterable[str] = (), place: Mapping[str, str] | None = None
) -> Config:
    """Read, override and check the experiment at `path`; raises DistillError (exit 2).

    `place` holds the `name` and `runs` of a folder that is opened; the file's are not read.
    """
    path = find_config(path)
    return parse_config(read_text(path), path, overrides, place)


def parse_config(
    text: str, path: Path, overrides: Iterable[str] = (), place: Mapping[str, str] | None = None
) -> Config:
    """Do what `load_config` does with the text of the file."""
    if len(text.encode()) > MAX_BYTES:
        what = f"a config of more than {MAX_BYTES:,} bytes is not read"
        raise DistillError(Exit.CONFIG, path, what, "shorten its lists")
    tree, places = parse_with_places(text, path)
    if not isinstance(tree, dict):
        what, fix = "holds no mapping of keys", "start from one of configs/*.yaml"
        raise DistillError(Exit.CONFIG, path, what, fix)
    written_by_us = path.suffix == ".json"  # the resolved config of a run
    use_present_names(tree, Config, path, places, tell=not written_by_us)
    tree |= place or {}
    for override in overrides:
        places |= apply_override(tree, override)
    publish = tree.get("publish")
    allowed = publish.get("allow_secrets") if isinstance(publish, dict) else None
    names = [name for name in allowed if isinstance(name, str)] if isinstance(allowed, list) else []
    check_values(tree, str(path), places, allowed=names)
    try:  # through JSON, whose strict mode knows lists and paths, but makes no number of a text
        return Config.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise _explain(error, str(path), places) from None


def place_of(folder: Path) -> dict[str, str]:
    """Return the `name` and `runs` of a run's folder as a config may state them.

    A folder's name that no run could have (`my run (copy)`) gives one by its plain parts and its
    hash. A path that no file may hold is left out: an opened folder says itself where it lies.
    """
    name, runs = folder.name, str(folder.parent)
    if not NAME.fullmatch(name) or secret_in(name):
        plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60]
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        name = f"{'run' if not plain or secret_in(plain) else plain}-{digest}"
    readable = runs.isprintable() and not secret_in(runs)
    return {"name": name, "runs": runs if readable else "runs"}
