"""Read the YAML that users write, strictly: numbers as people mean them, no surprises, and the line of each key.

`1e-4` is a number; `on`, `no` and `010` are texts; a key stands once; aliases, tags and merges are refused, so that no
file can build an object or grow when it is read. Every fault is a DistillError (exit 2) with file and line.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent

from distill.errors import DistillError, Exit

MAX_BYTES = 64_000  # a larger file is none that a person wrote; this much is read in half a second
MAX_DEPTH = 20
PLAIN = "write plain YAML"
Places = dict[tuple[str, ...], str]  # where each key of the tree was set, as FILE:LINE

SECRET = re.compile(
    r"(?:\b(?:sk|gsk|xai|pplx|nvapi|rk|pk)[-_][A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bAIza[\w-]{30,}"
    r"|\bgh[opsu]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}|\bxox[abp]-[\w-]{10,}"
    r"|\bBearer\s+\S{8,}|://[^/\s:@]*:?[^/\s:@]+@|-----BEGIN [A-Z ]*PRIVATE KEY)"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without the conversions that surprise, without aliases, tags and deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not allowed", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="tags (!...) are not allowed", problem_mark=event.start_mark
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


KEPT = ("tag:yaml.org,2002:null",)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag in KEPT]
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
    """Build a mapping, and refuse a key that stands twice or is not a text."""
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(
                problem=f"a key must be a text, not {str(key)[:40]}",
                problem_mark=key_node.start_mark,
            )
        if key in result:
            raise yaml.MarkedYAMLError(
                problem=f"key {key[:60]!r} stands twice", problem_mark=key_node.start_mark
            )
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: object) -> Any:
    """Parse one YAML document; raises DistillError (exit 2) with the line of the fault."""
    return parse_with_places(text, where)[0]


def parse_with_places(text: str, where: object) -> tuple[Any, Places]:
    """Parse one YAML document, and say where each of its keys stands."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = loader.construct_document(node) if node else None
    except yaml.YAMLError as error:
        raise _fault(error, where) from None
    except (ValueError, OverflowError):  # Python reads no number of 5,000 digits
        raise DistillError(Exit.CONFIG, where, "a number in it is too long", PLAIN) from None
    return value, _places(node, where)


def _fault(error: yaml.YAMLError, where: object) -> DistillError:
    """Turn a parser's complaint into one line; a secret in it is not repeated."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    place = f"{where}:{mark.line + 1}" if mark else where
    return DistillError(
        Exit.CONFIG, place, "not readable here" if SECRET.search(what) else what, PLAIN
    )


def _places(node: yaml.Node | None, where: object, path: tuple[str, ...] = ()) -> Places:
    places: Places = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            places[inner] = f"{where}:{key.start_mark.line + 1}"
            places |= _places(value, where, inner)
    return places


def read_text(path: Path) -> str:
    """Read a small UTF-8 text file that the user named; raises DistillError (exit 2) where it is none."""
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
        raise DistillError(
            Exit.CONFIG, path, "begins with a byte order mark", "save it as UTF-8 without"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at byte {error.start}"
        raise DistillError(Exit.CONFIG, path, what, "save the file as UTF-8") from None
