"""Hold this code against commit 07339c8, both run on this machine: what was asked, learnt and
scored is the same.

    python scripts/record.py                    # four tiny pipelines, two paid (a fake server)
    python scripts/record.py --models           # and a small quickstart on its real models
    python scripts/record.py --work FOLDER      # keep both sides there; the old one is made once

Each side works by its own command line in a folder of its own, on the same processor (another gives
other bytes). Equal byte for byte: requests, keys, prompts, dataset, token ids and weights of the
samples, adapter tensors, released weights, values and answers of scores. What may differ is stated
below, each with its reason, and every such difference is listed. Wording is free, and listed too.
Anything else ends with exit 1.
"""

import argparse
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.tiny_runs import COMMIT, EXPERIMENTS, PAID, command, serve, write_files  # noqa: E402

WORDING = "wording"
STATED = {
    "split": "a document's split is a field of its own, and no longer part of its meta",
    "folder": "a model in a folder is its tokenizer, config and template too: other keys",
    "student": "the student's key is that of its merged weights, not of base and adapter",
    "rounding": "evaluation reads the released weights; in float32 the old one read them unrounded",
    "frequencies": "in bfloat16 the old evaluation cast the rotary frequencies of the release too",
    WORDING: "reasons, scorecard, report and card may say the same in other words",
}
FREE = ("scorecard.md", "report.html", "release/README.md")  # compared without their numbers
KEYS = ("id", "request_key")  # of an answer
TREES = ("scorecard.json", "evaluation.json")  # compared by the names of their keys
QUICKSTART = (
    *("prompts.train=24", "prompts.validation=6", "prompts.heldout=12"),
    "train.load_best_model_at_end=false",  # the best step was not kept rightly at that commit
)
ONLINE = {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "2"}
ENCODERS = ("load_tokenizer", "Pair", "encode_pairs")  # what turns a dataset into samples
ENCODE = """
import importlib, json, re, sys
from pathlib import Path
import distill
names, runs = json.loads(sys.argv[1])
package = Path(distill.__file__).parent
def find(name):
    for path in sorted(package.rglob("*.py")):
        if re.search(rf"^(?:def|class) {name}\\(", path.read_text("utf-8"), re.M):
            module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
            return getattr(importlib.import_module(module), name)
    sys.exit(f"distill has no {name}: say in ENCODERS what it is called")
load_tokenizer, Pair, encode_pairs = map(find, names)
for name, (model, revision, date, most) in runs.items():
    run, tokenizer, samples = Path("runs", name), load_tokenizer(model, revision), {}
    for path in sorted(run.glob("**/dataset/*.jsonl")):
        pairs = [Pair.model_validate_json(line) for line in path.read_text("utf-8").splitlines()]
        examples = encode_pairs(tokenizer, pairs, date, most, path) if pairs else []
        place = path.relative_to(run).as_posix()
        samples |= {f"{place}:{n}": [e.input_ids, e.weights] for n, e in enumerate(examples, 1)}
    Path("runs", f"{name}.samples.json").write_text(json.dumps(samples))
"""
SHOWN = 3  # differences of a row and kind on the screen; record.txt has all of them

Lines = list[dict[str, Any]]
Value = tuple[
    str, Any, Any, str
]  # where it stands, on the old side, on the new, how a difference is explained


class Side(NamedTuple):
    """One of the two: its source tree, and the folder that it works in."""

    name: str
    tree: Path
    folder: Path


class Difference(NamedTuple):
    """Two values that are not the same; `kind` is a key of STATED, or empty where nothing explains
    it."""

    kind: str
    where: str
    old: Any
    new: Any


class Row(NamedTuple):
    """What was compared of a run, how many values, and what differed."""

    run: str
    what: str
    values: int
    differences: list[Difference]


class Run:
    """A run of both sides."""

    def __init__(self, name: str, old: Path, new: Path) -> None:
        self.name, self.old, self.new = name, old, new
        self.config = json.loads((old / "config.json").read_bytes())
        models = json.loads((old / "answers/models.json").read_bytes())
        released = "".join(tensors_of(old / "release/model.safetensors").values())
        # how other answers of the student are explained; nothing explains them where the release
        # was in float32
        evaluated = {"float32": "rounding", "bfloat16": "frequencies"}
        self.of_student = evaluated[models["student"]["dtype"]] if "BF16" in released else ""

    def names(self, *patterns: str) -> list[str]:
        """Return the files of either side that a pattern fits, those that are no results apart."""
        names = {
            path.relative_to(folder).as_posix()
            for folder in (self.old, self.new)
            for pattern in patterns
            for path in folder.glob(pattern)
        }
        return sorted(n for n in names if not n.startswith(("checkpoints/", ".old/", ".release/")))

    def lines(self, name: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield the place and both sides' row of each line of a file; a row that is not there is
        empty."""
        old, new = (read_lines(folder / name) for folder in (self.old, self.new))
        for number, (one, other) in enumerate(zip_longest(old, new, fillvalue={}), 1):
            yield f"{name}:{number}", one, other

    def explanation(self, name: str) -> str:
        """Return how another answer, or a judge's word about it, is explained in a file."""
        return self.of_student if Path(name).stem == "student" or "/judge/" in name else ""

    def compare(self) -> list[Row]:
        """Compare everything but the requests, which the server has."""
        return [
            row_of(self.name, what, values)
            for what, values in (
                ("documents", self._documents()),
                ("prompts", self._prompts()),
                ("keys", self._keys()),
                ("dataset", self._dataset()),
                ("samples", self._samples()),
                (
                    "adapter tensors",
                    self._tensors("adapter/*.safetensors", "refined/**/adapter/*.safetensors"),
                ),
                ("released weights", self._tensors("release/*.safetensors")),
                ("answers", self._answers()),
                ("scores", self._scores()),
                ("reports", self._reports()),
            )
        ]

    def _documents(self) -> Iterator[Value]:
        def plain(row: dict[str, Any]) -> dict[str, Any]:
            meta = dict(row.get("meta", {}))
            return {**row, "split": row.get("split", meta.pop("split", None)), "meta": meta}

        for where, old, new in self.lines("documents.jsonl"):
            yield where, old, new, "split" if plain(old) == plain(new) else ""

    def _prompts(self) -> Iterator[Value]:
        for name in ("prompts.jsonl", "questions.jsonl"):
            yield from ((*row, "") for row in self.lines(name))

    def _keys(self) -> Iterator[Value]:
        """Compare under which keys answers are kept; those of local models may be stated to
        change."""
        teacher, student = self.config["teacher"], self.config["student"]["model"]
        folders = {
            "responses": teacher["kind"] == "local" and teacher["model"].startswith((".", "/")),
            "base": student.startswith((".", "/")),
        }
        folders["teacher"] = folders["responses"]
        for name in self.names("responses.jsonl", "answers/**/*.jsonl"):
            stem = Path(name).stem
            kind = "student" if stem == "student" else "folder" if folders.get(stem) else ""
            for where, old, new in self.lines(name):
                if "request_key" in old or "request_key" in new:
                    one, other = (
                        [r.get(k) for k in ("request_key", "sample", "id")] for r in (old, new)
                    )
                    yield where, one, other, kind

    def _dataset(self) -> Iterator[Value]:
        """Compare what is taught, without the keys and the seconds of the answers, and what was
        dropped."""

        def plain(row: dict[str, Any]) -> dict[str, Any]:
            response = {k: v for k, v in row.get("response", {}).items() if k not in KEYS}
            usage = {k: v for k, v in response.get("usage", {}).items() if k != "seconds"}
            return {**row, "response": {**response, "usage": usage}}

        for name in self.names("dataset/*.jsonl", "refined/**/dataset/*.jsonl"):
            yield from ((where, plain(a), plain(b), "") for where, a, b in self.lines(name))
        for where, old, new in self.lines("dropped.jsonl"):
            yield f"{where} prompt", old.get("prompt_id"), new.get("prompt_id"), ""
            yield f"{where} reason", old.get("reason"), new.get("reason"), WORDING

    def _samples(self) -> Iterator[Value]:
        old, new = (
            json.loads((folder.parent / f"{self.name}.samples.json").read_bytes())
            for folder in (self.old, self.new)
        )
        return ((name, old.get(name), new.get(name), "") for name in sorted({**old, **new}))

    def _tensors(self, *patterns: str) -> Iterator[Value]:
        for name in self.names(*patterns):
            old, new = (tensors_of(folder / name) for folder in (self.old, self.new))
            for tensor in sorted({**old, **new}):
                yield f"{name} {tensor}", old.get(tensor), new.get(tensor), ""

    def _answers(self) -> Iterator[Value]:
        for name in self.names("answers/**/*.jsonl"):
            for where, old, new in self.lines(name):
                if "text" in old or "text" in new:
                    one, other = (
                        [r.get(k) for k in ("prompt_id", "text", "stop")] for r in (old, new)
                    )
                    yield where, one, other, self.explanation(name)
                elif "loss" in old or "loss" in new:  # how a model reads the teacher's answers
                    yield where, old, new, self.explanation(name)

    def _scores(self) -> Iterator[Value]:
        for name in self.names("scores/**/*.jsonl", "answers/judge/*.jsonl"):
            for where, old, new in self.lines(name):
                one, other = (
                    [r.get(k) for k in ("item_id", "value", "answer")] for r in (old, new)
                )
                yield where, one, other, self.explanation(name)
                yield f"{where} reason", old.get("reason"), new.get("reason"), WORDING

    def _reports(self) -> Iterator[Value]:
        """Compare the words of what people read, and the names of what programs do."""
        for name in self.names(*FREE):
            old, new = (words_of(folder / name) for folder in (self.old, self.new))
            for how, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
                one, other = "\n".join(old[a:b]), "\n".join(new[c:d])
                yield f"{name}:{a + 1}", one, other, WORDING if how != "equal" else ""
        for name in self.names(*TREES):
            old, new = (
                key_names(json.loads((f / name).read_bytes())) for f in (self.old, self.new)
            )
            for key in sorted(old | new):
                yield f"{name} {key}", key in old, key in new, WORDING


def row_of(run: str, what: str, values: Iterator[Value]) -> Row:
    """Return the row of values that were compared."""
    rows = list(values)
    different = [Difference(kind, where, old, new) for where, old, new, kind in rows if old != new]
    return Row(run, what, len(rows), different)


def read_lines(path: Path) -> Lines:
    """Read a file of JSON lines; one that is not there has none."""
    data = path.read_bytes() if path.is_file() else b""
    return [json.loads(line) for line in data.split(b"\n") if line]


def tensors_of(path: Path) -> dict[str, str]:
    """Return type, shape and hash of each tensor in a safetensors file, which begins with its
    header's length."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    spans = {
        n: data[start + t["data_offsets"][0] : start + t["data_offsets"][1]]
        for n, t in header.items()
    }
    return {
        name: f"{tensor['dtype']} {tensor['shape']} {hashlib.sha256(spans[name]).hexdigest()}"
        for name, tensor in header.items()
    }


def words_of(path: Path) -> list[str]:
    """Return the lines of a text without its numbers, which are measured anew on each side."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    plain = re.sub(r"\b[0-9a-f]{7,}\+?|\d[\d.,e+-]*", "#", text)
    return re.sub(r"([ \t-])[ \t-]*", r"\1", plain).splitlines()


def key_names(tree: Any, path: str = "") -> set[str]:
    """Return the dotted names of all keys of a JSON value."""
    if not isinstance(tree, dict):
        return set()
    return {
        name
        for key, child in tree.items()
        for name in {f"{path}{key}", *key_names(child, f"{path}{key}.")}
    }


def paid_for(side: Side) -> Counter[str]:
    """Return the keys of all attempts that were paid for, as the side's store has them."""
    store = side.folder / "runs/.store/responses"
    lines = (line for path in store.glob("**/*.jsonl") for line in path.read_bytes().split(b"\n"))
    return Counter(str(line.split(b" ")[2]) for line in lines if line[65:72] == b"intent ")


def requests_row(old: Side, new: Side, name: str) -> Row:
    """Compare what the server was sent in a run: addresses and bodies, whatever their order."""
    one, other = (
        Counter(json.loads((side.folder / f"runs/{name}.requests.json").read_bytes()))
        for side in (old, new)
    )
    return row_of(name, "requests", ((key, one[key], other[key], "") for key in {**one, **other}))


def perform(side: Side, name: str, *words: str, **changes: str) -> None:
    """Do a command of a side; ends the program where it fails."""
    run, environment = command(side.tree, side.folder, *words, **changes)
    done = subprocess.run(run, cwd=side.folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side.name} {name}: distill {' '.join(words)} failed\n{done.stderr[-3000:]}")


def encode(side: Side, configs: dict[str, dict[str, Any]], **changes: str) -> None:
    """Let a side turn the datasets of its runs into samples, and keep them beside the runs."""
    arguments = {
        name: [
            *(config["student"]["model"], config["student"]["revision"]),
            *(config["template_date"], config["train"]["max_length"]),
        ]
        for name, config in configs.items()
    }
    _, environment = command(side.tree, side.folder, **changes)
    run = [sys.executable, "-c", ENCODE, json.dumps([ENCODERS, arguments])]
    done = subprocess.run(run, cwd=side.folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side.name}: no samples\n{done.stderr[-2000:]}")


def make_tiny_runs(side: Side, port: int) -> None:
    """Perform the tiny experiments on one side, publish what can be, and keep what the server was
    asked."""
    for name, tree in EXPERIMENTS.items():
        print(f"{side.name}: {name}", flush=True)
        if name in PAID:
            with serve(port) as server:
                perform(side, name, "run", f"{name}.yaml")
            requests = [
                f"{a} {b.decode()}" for a, b in zip(server.paths, server.bodies, strict=True)
            ]
            (side.folder / f"runs/{name}.requests.json").write_text(json.dumps(requests))
        else:
            perform(side, name, "run", f"{name}.yaml")
        if not tree["student"]["model"].startswith("."):
            perform(side, name, "publish", f"runs/{name}", "--override", "the record")


def make_quickstart(side: Side, config: Path) -> None:
    """Perform the old commit's quickstart, small, on one side."""
    print(f"{side.name}: quickstart", flush=True)
    side.folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, side.folder / "quickstart.yaml")
    perform(side, "quickstart", "run", "quickstart.yaml", *QUICKSTART, **ONLINE)
    perform(side, "quickstart", "publish", "runs/quickstart", "--override", "the record", **ONLINE)


@contextmanager
def old_tree(path: Path | None) -> Iterator[Path]:
    """Yield a checkout of the old commit; one that was not given is made, and removed at the
    end."""
    if path:
        yield path.resolve()
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            [*git, "add", "--detach", str(tree), COMMIT], check=True, capture_output=True
        )
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def both_sides(work: Path, old: Path, new: Path, models: bool) -> list[Row]:
    """Make both sides in the work folder, the old one where it is not there yet, and compare
    them."""
    if not (work / "port").exists():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        write_files(work / "files", port)
        (work / "port").write_text(str(port))
    port, rows = int((work / "port").read_text()), list[Row]()
    sides = Side("old", old, work / "old"), Side("new", new, work / "new")
    shutil.rmtree(work / "new", ignore_errors=True)
    for side in sides:
        if not (side.folder / "made").exists():
            shutil.rmtree(side.folder, ignore_errors=True)
            shutil.copytree(work / "files", side.folder)
            make_tiny_runs(side, port)
            (side.folder / "made").touch()
    runs = runs_of(sides, EXPERIMENTS)
    for run in runs:
        rows += [requests_row(*sides, run.name)] if run.name in PAID else []
        rows += run.compare()
    one, other = map(paid_for, sides)
    keys = ((key, one[key], other[key], "") for key in sorted(one | other))
    rows.append(row_of("all", "keys of paid requests", keys))
    if models:
        large = [side._replace(folder=side.folder / "models") for side in sides]
        for side in large:
            if not (side.folder / "made").exists():
                make_quickstart(side, old / "configs/quickstart.yaml")
                (side.folder / "made").touch()
        rows += [row for run in runs_of(large, ["quickstart"], **ONLINE) for row in run.compare()]
    return rows


def runs_of(sides: Sequence[Side], names: Iterable[str], **changes: str) -> list[Run]:
    """Return the runs of both sides, after their samples were made."""
    runs = [Run(name, *(side.folder / "runs" / name for side in sides)) for name in names]
    for side in sides:
        encode(side, {run.name: run.config for run in runs}, **changes)
    return runs


def table_of(rows: Sequence[Row]) -> Table:
    """Return the table of what was compared, a row each."""
    kinds = [
        kind for kind in STATED if any(d.kind == kind for row in rows for d in row.differences)
    ]
    columns = ["run", "what", "values", "equal", *kinds, "unexplained"]
    table = Table(*columns, title=f"{COMMIT} and this tree")
    for row in rows:
        counts = Counter(d.kind for d in row.differences)
        cells = [row.run, row.what, row.values, row.values - len(row.differences)]
        table.add_row(*map(str, [*cells, *(counts[k] or "" for k in kinds), counts[""] or ""]))
    return table


def listing(rows: Sequence[Row], most: int | None = None) -> Iterator[str]:
    """Yield the lines that list the differences, those that nothing explains last; of a row and
    kind at most so many."""
    for kind in (*STATED, ""):
        by_row = [(row, [d for d in row.differences if d.kind == kind]) for row in rows]
        if count := sum(len(differences) for _, differences in by_row):
            yield f"\n{count} {kind or 'UNEXPLAINED'}: {STATED.get(kind, 'nothing states these')}"
        for row, differences in by_row:
            for difference in differences[:most]:
                yield f"  {row.run}, {row.what}, {difference.where}"
                yield f"    old: {difference.old!s:.300}"
                yield f"    new: {difference.new!s:.300}"
            if most is not None and len(differences) > most:
                yield f"  {row.run}, {row.what}: and {len(differences) - most} more"


def main() -> int:
    """Compare, print the table and the differences, and return 1 where one is not explained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", action="store_true", help="the small quickstart too")
    parser.add_argument(
        "--work", type=Path, help="the folder of both sides; a temporary one otherwise"
    )
    parser.add_argument(
        "--old", type=Path, help=f"a checkout of {COMMIT}; made where it is not given"
    )
    parser.add_argument(
        "--new", type=Path, default=ROOT, help="the tree to hold against it; this one"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, old_tree(arguments.old) as old:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        rows = both_sides(work, old, arguments.new.resolve(), arguments.models)
        (work / "record.txt").write_text("\n".join(listing(rows)), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)
    console.print(table_of(rows))
    for line in listing(rows, SHOWN):
        console.print(line, markup=False)
    return int(any(not d.kind for row in rows for d in row.differences))


if __name__ == "__main__":
    sys.exit(main())
