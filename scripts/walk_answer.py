"""Follow one answer of an endpoint to the scorecard: `python scripts/walk_answer.py [--code
CHECKOUT] [--list]`.

A run of a few prompts is done against a server on this machine whose every answer holds a marker.
From `generate` to `report` each call of a function of the package is watched, and counted where an
argument, or what it holds, contains the marker: the files and functions that the answer passes.
`--code` watches the package of another checkout instead.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKER = "zebrafinch"
DEPTH = 4  # of what an argument holds


class Teacher(BaseHTTPRequestHandler):
    """Answers every request with the marker, as an OpenAI-compatible server does."""

    def do_POST(self) -> None:
        """Send one chat completion."""
        self.rfile.read(int(self.headers["content-length"]))
        message = {"role": "assistant", "content": f"The {MARKER} sings."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 20, "completion_tokens": 6, "total_tokens": 26}
        body = json.dumps({"id": "1", "model": "m", "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def holds(value: Any, depth: int = DEPTH) -> bool:
    """Tell whether a value contains the marker, within a few levels and items."""
    if isinstance(value, str):
        return MARKER in value
    if isinstance(value, bytes):
        return MARKER.encode() in value
    if depth == 0 or isinstance(value, int | float | type(None)):
        return False
    if isinstance(value, dict):
        return any(holds(child, depth - 1) for child in list(value.values())[:20])
    if isinstance(value, list | tuple | set | frozenset):
        return any(holds(child, depth - 1) for child in list(value)[:20])
    fields = getattr(value, "__dict__", None)
    named = type(value).__module__.startswith("distill") and isinstance(fields, dict)
    return named and holds(fields, depth - 1)


def walk(config: Path, overrides: list[str]) -> list[tuple[str, str]]:
    """Do the run, and return the (file, function) pairs of the package that were handed the
    answer."""
    import distill
    from distill.cli import main

    package = str(Path(str(distill.__file__)).parent)
    passed: set[tuple[str, str]] = set()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package):
            return
        place = (os.path.relpath(code.co_filename, package), code.co_qualname)
        if place not in passed and any(holds(value) for value in list(frame.f_locals.values())):
            passed.add(place)

    threading.settrace(watch)
    sys.settrace(watch)
    try:
        code = main(["run", str(config), *overrides])
    finally:
        sys.settrace(None)
    if code:
        raise SystemExit(f"the run ended with exit code {code}")
    return sorted(passed)


def write_run(folder: Path, port: int) -> Path:
    """Write a corpus, a tiny model and a config; return the config."""
    try:
        from tests.support.tiny import make_tiny
    except ImportError:  # a checkout from before the tests were sorted
        from tests.tiny import make_tiny  # pyright: ignore[reportMissingImports]

    make_tiny(folder / "tiny", seed=1)
    words = "stone river cloud amber fox piano lantern harbour".split()
    texts = [
        f"A note about the {a} and the {b} near the {c}, number {i}." * 2
        for i, (a, b, c) in enumerate(
            (a, b, c) for a in words[:3] for b in words[3:6] for c in words[6:]
        )
    ]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    tree = {
        "name": "walk",
        "runs": str(folder / "runs"),
        "corpus": {
            "path": str(folder / "corpus.jsonl"),
            "near_duplicate_threshold": None,
            "split": {"validation": 3, "heldout": 4},
        },
        "prompts": {"tasks": ["summary"]},
        "teacher": {"kind": "endpoint", "model": "m", "base_url": f"http://127.0.0.1:{port}/v1"},
        "terms": {"basis": "a server of our own"},
        "student": {"model": str(folder / "tiny"), "dtype": "float32"},
        "train": {"max_steps": 1, "max_length": 512, "lora": {"r": 2}},
        "evaluation": {"samples": 100, "max_new_tokens": 8},
    }
    (folder / "walk.yaml").write_text(json.dumps(tree))
    return folder / "walk.yaml"


def main() -> None:
    """Print the counts, and with `--list` every place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--code", type=Path, help="the checkout whose package is watched")
    parser.add_argument("--list", action="store_true", help="print every file and function")
    words = parser.parse_args()
    code = (words.code or ROOT).resolve()
    if words.code:  # another process, whose imports come from there
        arguments = [sys.executable, __file__, *(["--list"] if words.list else [])]
        environment = {**os.environ, "PYTHONPATH": str(code), "WALK_CODE": "1"}
        raise SystemExit(
            subprocess.run(arguments, env=environment, cwd=code, check=False).returncode
        )
    if "WALK_CODE" not in os.environ:
        sys.path.insert(0, str(ROOT))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        passed = walk(write_run(Path(name), server.server_port), [])
    server.shutdown()
    if words.list:
        print(*(f"{file}: {function}" for file, function in passed), sep="\n")
    print(f"{len({file for file, _ in passed})} files, {len(passed)} functions")


if __name__ == "__main__":
    main()
