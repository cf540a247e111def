"""The documentation of Python's standard library, of the interpreter that runs this.

Signatures and docstrings are read in a fresh isolated interpreter (`python -I -S python_docs.py`,
one JSON row a line), so that neither what this process has imported nor what a module does on
import can change the documents. Imports the standard library only.
"""

import contextlib
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
from types import ModuleType

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
    names = sorted(
        n for n in sys.stdlib_module_names if not n.startswith("_") and n not in EXCLUDED
    )
    rows: dict[int, dict[str, str]] = {}
    for path in [*names, *SUBMODULES]:
        with contextlib.suppress(ImportError):  # modules of other systems
            module = importlib.import_module(path)
            for name in sorted(getattr(module, "__all__", None) or dir(module)):
                value = getattr(module, name, None)
                if name.startswith("_") or not _belongs_to(value, module):
                    continue
                qualified = name if path == "builtins" else f"{path}.{name}"
                try:
                    signature = str(inspect.signature(value))  # pyright: ignore[reportArgumentType]
                except (TypeError, ValueError, AttributeError):  # of some built-ins, not readable
                    signature = ""
                doc = value.__doc__ if isinstance(value.__doc__, str) else ""
                doc = inspect.cleandoc(doc)
                text = ADDRESS.sub("", f"{qualified}{signature}\n\n{doc}")
                if len(doc) >= MIN_DOC and len(text) <= MAX_TEXT:
                    rows.setdefault(id(value), {"name": qualified, "text": text})
    return sorted(rows.values(), key=lambda row: row["name"])


def _belongs_to(value: object, module: ModuleType) -> bool:
    """Tell whether a function or class is of the module's own package, with its private modules."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return False
    home = (getattr(value, "__module__", None) or module.__name__).split(".")[0]
    package = module.__name__.split(".")[0]
    return HOMES.get(home, home).lstrip("_") == HOMES.get(package, package).lstrip("_")


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        rows = collect()
    sys.stdout.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    for row in rows:
        print(json.dumps(row))
