"""What a run was made with: code, versions, processor and threads. Imports no torch."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill import __version__

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "gguf",
    "numpy",
    "scipy",
    "sacrebleu",
)


def environment() -> dict[str, Any]:
    """Return the facts that a result may depend on, as plain JSON values."""
    return {
        "distill": __version__,
        "revision": revision(),
        "code_sha256": code_hash(),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := installed(name))},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def installed(name: str) -> str | None:
    """Return the version of an installed package without importing it, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def code_hash() -> str:
    """Hash the names and contents of the package's files, which a checkout and an installed package have alike."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".j2"):
            found.update(f"{path.relative_to(PACKAGE).as_posix()}\n".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


@cache
def revision() -> str | None:
    """Return the commit of the source tree, with `+` where it has changes; None outside a checkout."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
        return (
            subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout.strip() or None
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def cpu_facts() -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor() -> str:
    """Return the processor's name."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
