"""What the keys of a config are made of: sections, names, paths, addresses, with their rules."""

import ipaddress
import re
import socket
import unicodedata
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import regex
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
SERVED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,199}")  # what servers call their models
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
# Where clouds give out keys, beside all that is link-local: AWS, Alibaba, Azure, Google, Oracle
METADATA_NAMES = re.compile(
    r"(metadata|instance-data|metadata\.google\.internal|metadata\.goog|instance-data\.ec2\.internal)"
)
METADATA = (
    *("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    *("169.254.169.254", "169.254.170.2", "169.254.170.23", "169.254.0.23", "169.254.10.10"),
)
IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def plain_path(value: Path) -> Path:
    """Refuse a path that no file system would take."""
    if any(len(part.encode()) > 255 for part in value.parts) or len(str(value)) > 4000:
        raise ValueError("the path is too long")
    return value


def plain_revision(value: str) -> str:
    """Accept a branch, tag or commit."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", value) or ".." in value:
        raise ValueError("a revision is a branch, a tag or a commit")
    return value


def text_encoding(value: str) -> str:
    """Accept an encoding of text that Python knows."""
    with suppress(LookupError, ValueError):
        if b"a".decode(value) == "a":
            return value
    raise ValueError("no encoding of text that Python knows")


def one_group(value: str) -> str:
    """Accept a regular expression with one group."""
    with suppress(regex.error):
        if regex.compile(value).groups == 1:
            return value
    raise ValueError("not a regular expression with exactly one group")


File = Annotated[Path, AfterValidator(plain_path)]
Revision = Annotated[str, AfterValidator(plain_revision)]
Date = Annotated[str, AfterValidator(lambda day: date.fromisoformat(day).isoformat())]
Encoding = Annotated[str, AfterValidator(text_encoding)]
Pattern = Annotated[str, AfterValidator(one_group)]
Name = Annotated[str, Field(pattern=rf"^{NAME.pattern}$")]
ReleaseName = Annotated[str, Field(pattern=rf"^{MODEL.pattern}$")]


def template_variables(value: dict[str, Any]) -> dict[str, Any]:
    """Accept names that a template can use, but for those that are set with each conversation."""
    ours = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"}
    for name in value:
        if not VARIABLE.fullmatch(name) or name in ours:
            raise ValueError(f"{name[:40]!r} is no variable of a chat template that can be set")
    return value


TemplateVariables = Annotated[dict[str, Any], AfterValidator(template_variables)]


def checked_model(value: str) -> str:
    """Accept a Hub id, a name of models.yaml or a folder (`./x`, `/x`); refuse traversal."""
    if value.startswith(("./", "/")) and "\0" not in value and ".." not in Path(value).parts:
        return value
    if not MODEL.fullmatch(value):
        raise ValueError("a model is NAME, OWNER/NAME, or a folder written as ./FOLDER or /FOLDER")
    return value


ModelName = Annotated[str, AfterValidator(checked_model)]


def checked_url(value: str, allow_insecure: bool = False) -> str:
    """Accept an endpoint's address: https, or http here (anywhere with `allow_insecure`)."""
    try:
        parts = urlsplit(value)
        # as a name is looked up: full-width dots and digits are plain ones, a final dot is none
        host, _ = unicodedata.normalize("NFKC", parts.hostname or "").lower(), parts.port
        host = host.replace("\u3002", ".").rstrip(".")
    except ValueError:
        raise ValueError("the address cannot be read") from None
    if parts.scheme not in ("http", "https") or not host or not value.isprintable():
        raise ValueError("an address is https://HOST/v1, or http://localhost:PORT/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("an address holds no name, key, query or fragment")
    address = ip_of(host)
    if METADATA_NAMES.fullmatch(host) or (address and gives_out_keys(address)):
        raise ValueError("the address is that of a cloud's metadata service")
    if parts.scheme == "http" and not is_here(host) and not allow_insecure:
        raise ValueError("http is for this machine; use https, or set allow_insecure: true")
    return value.rstrip("/")


def is_here(host: str | None) -> bool:
    """Tell whether a host is this machine."""
    address = ip_of(host or "")
    return host == "localhost" or bool(address and address.is_loopback)


def ip_of(host: str) -> IPAddress | None:
    """Return a host as an IP address, also one written as a number or in octal; None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


def gives_out_keys(address: IPAddress) -> bool:
    """Tell the address of a cloud's metadata service, also one that is wrapped in IPv6 by 6to4 (RFC
    3056), Teredo (RFC 4380) or a translator (RFC 6052, 2.2)."""
    data = address.packed
    inside = [(data[n:8] + data[max(n, 9) :])[:4] for n in (2, 4, 5, 6, 7, 8, 12)]
    inside += [data, bytes(byte ^ 255 for byte in data[12:])]
    return address.is_link_local or any(
        ipaddress.ip_address(place).packed in inside for place in METADATA
    )


class Trust(NamedTuple):
    """What a model's files may be beside safetensors: pickles, and code of the model's author."""

    pickle: bool = False
    code: bool = False


SAFE = Trust()
