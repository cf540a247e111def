"""The documentation of Python's standard library, of the interpreter that runs this.

It is read in a fresh isolated interpreter (`python -I -S python_docs.py`, one JSON row a line), so
that neither this process nor what a module does on import can change it. No other imports.
"""

import contextlib
import importlib
import inspect
import io
import json
import re
import subprocess
import sys

# modules that open windows, print, or run something on import, and those that document no API
EXCLUDED = frozenset(
    "__main__ antigravity ensurepip genericpath idlelib lib2to3 msilib nt ntpath nturl2path posix "
    "posixpath pyexpat rlcompleter site sitecustomize test this tkinter turtle turtledemo "
    "usercustomize".split()
)
HOMES: dict[str, str] = dict.fromkeys(("posix", "nt", "posixpath", "ntpath", "genericpath"), "os")
SUBMODULES = (
    "collections.abc concurrent.futures email.header email.message email.parser email.policy "
    "email.utils html.parser http.client http.cookiejar http.cookies http.server "
    "importlib.metadata importlib.resources importlib.util logging.config logging.handlers "
    "multiprocessing.pool multiprocessing.shared_memory os.path unittest.mock urllib.parse "
    "urllib.request urllib.robotparser wsgiref.util xml.dom.minidom xml.etree.ElementTree "
    "xml.sax.saxutils"
).split()
MIN_DOC, MAX_TEXT = 150, 1000  # characters: shorter says little, longer costs the teacher much
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # differs with every process


def read_python_docs() -> list[dict[str, str]]:
    """Return one row an API (`name`, `text`), sorted by name, read by a fresh interpreter."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", __file__]
    process = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=True, stdin=subprocess.DEVNULL
    )
    return [json.loads(line) for line in process.stdout.splitlines()]


def collect() -> list[dict[str, str]]:
    """Read every public function and class of the standard library in this interpreter."""
    names = sorted(n for n in sys.stdlib_module_names if n[0] != "_" and n not in EXCLUDED)
    rows: dict[int, dict[str, str]] = {}
    for path in [*names, *SUBMODULES]:
        with contextlib.suppress(ImportError):  # modules of other systems
            module = importlib.import_module(path)
            for name in sorted(getattr(module, "__all__", None) or dir(module)):
                value = getattr(module, name, None)
                if name[0] == "_" or not (inspect.isclass(value) or inspect.isroutine(value)):
                    continue
                home = (getattr(value, "__module__", None) or path).split(".")[0]
                package = module.__name__.split(".")[0]
                if HOMES.get(home, home).lstrip("_") != HOMES.get(package, package).lstrip("_"):
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
        rows = collect()
    sys.stdout.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    print(*map(json.dumps, rows), sep="\n")
