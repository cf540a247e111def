"""Pinned wheels as data: downloaded once by pip, by name and hash, opened as zip files."""

import os
import subprocess
import sys
import zipfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest

TRL = "trl==1.16.0"  # Apache-2.0, https://github.com/huggingface/trl
TRL_HASH = "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill-tests"


@cache
def chat_templates() -> dict[str, str]:
    """Return the chat templates in TRL's wheel, by name; skips the test where it cannot be had."""
    path, command = CACHE / "trl-1.16.0-py3-none-any.whl", ["pip", "download", "--no-deps", TRL]
    command += ["-d", str(CACHE)]
    if not path.exists():
        quiet = ["--quiet", "--disable-pip-version-check", "--timeout=10", "--retries=1"]
        subprocess.run(
            [sys.executable, "-m", *command, *quiet], check=False, timeout=120, capture_output=True
        )
    if not path.exists():
        pytest.skip(f"needs TRL's wheel: {' '.join(command)}")
    assert sha256(path.read_bytes()).hexdigest() == TRL_HASH
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".jinja")]
        return {Path(name).stem: wheel.read(name).decode() for name in names}
