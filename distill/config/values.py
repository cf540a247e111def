"""What the keys of a config are made of: sections, names, paths, addresses, with their rules."""

import ipaddress
import re
import socket
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
SERVED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,199}")  # what servers call their models
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
METADATA = ("fd00:ec2::254", "100.100.100.200")  # of clouds' services that give out keys
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


File = Annotated[Path, AfterValidator(plain_path)]
Revision = Annotated[str, AfterValidator(plain_revision)]


def checked_model(value: str) -> str:
    """Accept a Hub id, a name of models.yaml or a folder (`./x`, `/x`); refuse traversal."""
    if value.startswith(("./", "/")) and "\0" not in value and ".." not in Path(value).parts:
        return value
    if not MODEL.fullmatch(value):
        raise ValueError("a model is NAME, OWNER/NAME, or a folder written as ./FOLDER or /FOLDER")
    return value


def checked_url(value: str, allow_insecure: bool = False) -> str:
    """Accept an endpoint's address: https, or http here (anywhere with `allow_insecure`)."""
    try:
        parts = urlsplit(value)
        host, _ = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise ValueError("the address cannot be read") from None
    if parts.scheme not in ("http", "https") or not host or not value.isprintable():
        raise ValueError("an address is https://HOST/v1, or http://localhost:PORT/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("an address holds no name, key, query or fragment")
    address = _ip(host)
    # where clouds give out keys: link-local, and AWS's in IPv6
    keys = address and (address.is_link_local or str(address) in METADATA)
    if host == "metadata.google.internal" or keys:
        raise ValueError("the address is that of a cloud's metadata service")
    local = host == "localhost" or bool(address and address.is_loopback)
    if parts.scheme == "http" and not local and not allow_insecure:
        raise ValueError("http is for this machine; use https, or set allow_insecure: true")
    return value.rstrip("/")


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return a host as an IP address, also one written as a number or in octal; None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


class Trust(NamedTuple):
    """What a model's files may be beside safetensors: pickles, and code of the model's author."""

    pickle: bool = False
    code: bool = False


SAFE = Trust()
