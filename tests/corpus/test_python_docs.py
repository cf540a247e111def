"""The documentation of the running interpreter: what it holds, and that it repeats."""

import json
import subprocess
import sys

from distill import shipped_table
from distill.corpus import python_docs
from distill.corpus.python_docs import MAX_TEXT, MIN_DOC, read_python_docs

TABLE = shipped_table("python_apis.yaml")


def test_the_rows_are_apis_of_a_readable_length():
    rows = read_python_docs()
    names = [row["name"] for row in rows]
    assert len(rows) > 500 and names == sorted(names) and len(set(names)) == len(names)
    assert {"os.makedirs", "sorted", "os.path.join", "bisect.insort"} <= set(names)
    for row in rows:
        assert row["text"].startswith(row["name"]) and MIN_DOC <= len(row["text"]) <= MAX_TEXT
        assert " at 0x" not in row["text"]
        assert row["name"].split(".")[0] not in TABLE["excluded"].split()
        assert not any(part.startswith("_") for part in row["name"].split("."))


def test_modules_with_side_effects_are_not_imported():
    code = (
        f"import runpy, sys; sys.argv[1:] = [{json.dumps(TABLE)!r}]; "
        f"runpy.run_path({python_docs.__file__!r}, run_name='__main__'); "
        "print({'antigravity', 'this', 'turtle', 'idlelib', 'test'} & set(sys.modules) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "None" and not done.stderr
