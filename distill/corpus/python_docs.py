"""The documentation of Python's standard library, of the interpreter that runs this.

It is read in a fresh isolated interpreter (`python -I -S python_docs.py TABLE`, a row of JSON a
line), so that neither this process nor what a module does on import can change it.
"""

import contextlib
import importlib
import inspect
import io
import json
import re
import subprocess
import sys

MIN_DOC, MAX_TEXT = 150, 1000  # characters: shorter says little, longer costs the teacher much
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # differs with every process


def read_python_docs() -> list[dict[str, str]]:
    """Return one row an API (`name`, `text`), sorted by name, read by a fresh interpreter."""
    from distill import shipped_table

    table = json.dumps(shipped_table("python_apis.yaml"))
    command = [sys.executable, "-I", "-S", "-W", "ignore", __file__, table]
    process = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=True, stdin=subprocess.DEVNULL
    )
    return [json.loads(line) for line in process.stdout.splitlines()]


def collect(table: dict[str, str]) -> list[dict[str, str]]:
    """Read every public function and class of the standard library in this interpreter."""
    excluded, os_parts = table["excluded"].split(), table["parts_of_os"].split()
    names = sorted(n for n in sys.stdlib_module_names if n[0] != "_" and n not in excluded)
    rows: dict[int, dict[str, str]] = {}
    for path in [*names, *table["submodules"].split()]:
        with contextlib.suppress(ImportError):  # modules of other systems
            module = importlib.import_module(path)
            for name in sorted(getattr(module, "__all__", None) or dir(module)):
                value = getattr(module, name, None)
                if name[0] == "_" or not (inspect.isclass(value) or inspect.isroutine(value)):
                    continue
                homes = getattr(value, "__module__", None) or path, module.__name__
                homes = (home.split(".")[0] for home in homes)
                if len({"os" if home in os_parts else home.lstrip("_") for home in homes}) > 1:
                    continue  # imported from another package
                qualified = name if path == "builtins" else f"{path}.{name}"
                try:
                    signature = str(inspect.signature(value))
                except (TypeError, ValueError, AttributeError):  # of some built-ins, not readable
                    signature = ""
                doc = inspect.cleandoc(value.__doc__ if isinstance(value.__doc__, str) else "")
                text = ADDRESS.sub("", f"{qualified}{signature}\n\n{doc}")
                if len(doc) >= MIN_DOC and len(text) <= MAX_TEXT:
                    rows.setdefault(id(value), {"name": qualified, "text": text})
    return sorted(rows.values(), key=lambda row: row["name"])


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        rows = collect(json.loads(sys.argv[1]))
    sys.stdout.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    print(*map(json.dumps, rows), sep="\n")
