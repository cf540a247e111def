"""Measure the code of distill/ as a mirror for those who change it: sizes, doors, and words that
say too little.

    python scripts/house.py             # the figures
    python scripts/house.py --places    # and the places worth looking at
    python scripts/house.py --write     # puts the figures, with today's date, into CONTRIBUTING.md

Look before and after a change. The figures are no gate: where one could only be met by making the
code read worse, the code wins, and the commit says so.
"""

import argparse
import ast
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- house -->\n).*?(<!-- end of house -->)", re.DOTALL)
# As names of variables these say that something happened, not what it is.
PARTICIPLES = frozenset(
    "asked chosen found given kept known left made named own said shown taken told wanted whole "
    "written".split()
)
LONGEST_FILES = 5


class House(NamedTuple):
    """The figures by name, and the places behind them as `file:line: what`."""

    figures: dict[str, int | str]
    places: list[str]


def measure(root: Path) -> House:
    """Measure the package, the tests and the README below `root`."""
    texts = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((root / "distill").rglob("*.py"))
    }
    lines = {path: text.count("\n") for path, text in texts.items()}
    homes: dict[str, list[str]] = defaultdict(list)  # the files that define a type name
    counts, findings, sizes = Counter[str](), list[str](), list[int]()
    for path, text in texts.items():
        tree = ast.parse(text)
        for name in dict.fromkeys(type_names(tree)):
            homes[name].append(path)
        for line, kind, name in look(tree, Counter(re.findall(r"\b[A-Za-z_]\w*\b", text))):
            counts[kind] += 1
            findings.append(f"{path}:{line}: {kind}: {name}")
        sizes += function_sizes(tree)
    homes = {name: paths for name, paths in sorted(homes.items()) if len(paths) > 1}
    stems = Counter(Path(path).stem for path in texts if "__" not in path)
    twice = [stem for stem, count in sorted(stems.items()) if count > 1]
    sizes = sorted(sizes) or [0]
    shape = (statistics.median_low(sizes), sizes[int(len(sizes) * 0.9)], sizes[-1])
    tests = [path.read_text(encoding="utf-8") for path in (root / "tests").rglob("*.py")]
    figures: dict[str, int | str] = {
        "lines of `distill/`": sum(lines.values()),
        "files of `distill/`": len(lines),
        "lines of the longest file": max(lines.values(), default=0),
        "lines of a function: median / nine in ten / longest": " / ".join(map(str, shape)),
        "type names with several meanings": len(homes),
        "module names used twice": len(twice),
        **{figure: counts[kind] for kind, figure in KINDS.items()},
        "words of README": len((root / "README.md").read_text(encoding="utf-8").split()),
        "lines of tests": sum(text.count("\n") for text in tests),
    }
    longest = sorted(lines, key=lambda path: -lines[path])[:LONGEST_FILES]
    places = [f"{path}: {lines[path]} lines" for path in longest]
    places += [f"{', '.join(paths)}: type name: {name}" for name, paths in homes.items()]
    places += [f"module name: {stem}, {stems[stem]} times" for stem in twice]
    return House(figures, places + findings)


def type_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names of a module's classes and type aliases."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from (name for name in names if name[0].isupper() and not name.isupper())


ONCE, CONFIG, PARTICIPLE, ANY = "called once", "takes the whole config", "bare participle", "Any"
KINDS = {  # what `look` finds, and the name of the figure that counts it
    ONCE: "private functions called once in their file",
    CONFIG: "functions that take the whole config",
    PARTICIPLE: "variables named by a bare participle",
    ANY: "`Any` in annotations",
}


def look(tree: ast.Module, uses: Counter[str]) -> Iterator[tuple[int, str, str]]:
    """Yield line, kind and name of what is worth a look; `uses` counts the words of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            private = node.name.startswith("_") and not node.name.startswith("__")
            if private and uses[node.name] == 2:  # its definition and one use
                yield node.lineno, ONCE, node.name
            types = [argument.annotation for argument in (*node.args.args, *node.args.kwonlyargs)]
            if any(isinstance(kind, ast.Name) and kind.id == "Config" for kind in types):
                yield node.lineno, CONFIG, node.name
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store) and node.id in PARTICIPLES:
                yield node.lineno, PARTICIPLE, node.id
            if node.id == "Any":
                yield node.lineno, ANY, node.id


def function_sizes(tree: ast.Module) -> list[int]:
    """Return how many lines each function has."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes]


def table(figures: dict[str, int | str]) -> str:
    """Return the figures as a Markdown table that names the day."""
    rows = [
        f"| {name} | {f'{value:,}' if isinstance(value, int) else value} |"
        for name, value in figures.items()
    ]
    return "\n".join([f"| on {date.today()} | |", "|---|--:|", *rows]) + "\n"


def main() -> None:
    """Print the figures, and the places or the table where they are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--places", action="store_true", help="print the places worth looking at")
    parser.add_argument("--write", action="store_true", help="fill the table in CONTRIBUTING.md")
    options = parser.parse_args()
    house = measure(ROOT)
    print(table(house.figures), end="")
    if options.places:
        print("", *house.places, sep="\n")
    if options.write:
        page = ROOT / "CONTRIBUTING.md"
        text = page.read_text(encoding="utf-8")
        filled = BLOCK.sub(lambda block: block[1] + table(house.figures) + block[2], text)
        page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
