"""Reading what people have: text, Markdown, HTML, JSON lines, CSV, TSV, Parquet, a folder of these, or a dataset.

Every row comes out as a mapping with the place it came from, or as a reject with a reason. A file that cannot be
opened or whose end is missing stops with exit 3; a bad row never does. Lines end at newlines and nowhere else.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from distill.errors import DistillError, Exit
from distill.progress import say
from distill.records import Record

MAX_ROW = 16 * 2**20  # bytes of one row, or of one text file
TEXTS = (".txt", ".md", ".rst", ".html", ".htm")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*TEXTS, ".jsonl", *DELIMITERS)
BINARY_SUFFIXES = (".parquet",)
BLOCKS = frozenset(
    "address article aside blockquote br dd div dl dt figcaption footer h1 h2 h3 h4 h5 h6 header hr li main ol p pre "
    "section table td th tr ul".split()
)
HIDDEN = frozenset("script style template noscript title nav".split())
MAX_OPEN = (
    4096  # characters of a construct that never closes; parsing more takes time in its square
)
Bytes = io.BufferedReader | gzip.GzipFile


class Row(NamedTuple):
    """A row as it was read, and where: `file:line`."""

    where: str
    value: dict[str, Any]


class Reject(Record):
    """A row or document that was left out, and why; `bad` ones count towards `max_bad_fraction`."""

    where: str
    reason: str
    bad: bool = True


def kind_of(path: Path) -> str | None:
    """Return the suffix that says how to read a file (`.gz` of the text kinds apart), or None."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    suffix = Path(plain).suffix
    return suffix if suffix in SUFFIXES or (suffix in BINARY_SUFFIXES and plain == name) else None


def list_files(path: Path) -> tuple[list[Path], int]:
    """Return the readable files at or below a path, sorted, and how many others were passed by.

    Raises DistillError (exit 3) where the path is missing or holds nothing that can be read.
    """
    if not path.exists():
        raise DistillError(Exit.INPUT, path, "does not exist", "check corpus.path")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_visible(p, path))
    known = [file for file in files if kind_of(file)]
    if not known:
        names = " ".join((*SUFFIXES, *BINARY_SUFFIXES))
        raise DistillError(Exit.INPUT, path, "holds no file of a known kind", f"known are {names}")
    return known, len(files) - len(known)


def _is_visible(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.is_file()


def read_file(path: Path, shown: str) -> Iterator[Row | Reject]:
    """Yield the rows of one file; `shown` names it in places. Raises DistillError (exit 3) where it cannot be read."""
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, shown)
            return
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if kind == ".jsonl":
                yield from read_lines(file, shown)
            elif kind in DELIMITERS:
                yield from _read_csv(file, shown, DELIMITERS[kind])
            else:
                yield from _read_text(file, shown, html=kind in (".html", ".htm"))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DistillError(
            Exit.INPUT, path, "is a damaged or cut-off .gz", "fetch or pack it again"
        ) from None
    except OSError as error:
        raise DistillError(
            Exit.INPUT, path, error.strerror or str(error), "check the file and its rights"
        ) from None


def _read_text(file: Bytes, shown: str, html: bool) -> Iterator[Row | Reject]:
    data = file.read(MAX_ROW + 1)
    try:
        if len(data) > MAX_ROW:
            raise ValueError(f"larger than {MAX_ROW:,} bytes")
        text = decode(data)
        yield Row(f"{shown}:1", {"text": html_to_text(text) if html else text})
    except ValueError as error:
        yield Reject(where=f"{shown}:1", reason=str(error))


def decode(data: bytes) -> str:
    """Decode UTF-8, without a byte-order mark; raises ValueError naming the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def read_lines(file: Bytes, shown: str) -> Iterator[Row | Reject]:
    """Yield the rows of JSON lines; memory stays bounded by the longest allowed row."""
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        where, whole = f"{shown}:{number}", len(line) <= MAX_ROW
        while not line.endswith(b"\n") and not whole and (line := file.readline(MAX_ROW)):
            pass
        if not whole:
            yield Reject(where=where, reason=f"longer than {MAX_ROW:,} bytes")
        elif line.strip():
            yield _parsed(line, where)


def _parsed(line: bytes, where: str) -> Row | Reject:
    try:
        value = json.loads(
            decode(line), parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats
        )
    except json.JSONDecodeError as error:
        return Reject(where=where, reason=f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Reject(where=where, reason="nested too deeply")
    except ValueError as error:
        return Reject(where=where, reason=f"not JSON: {error}"[:200])
    if not isinstance(value, dict):
        return Reject(where=where, reason=f"not an object but {type(value).__name__}")
    return Row(where, value)


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object whose keys stand once each; of two, JSON does not say which one counts."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"key {ascii(counts.most_common(1)[0][0][:60])} stands twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _read_csv(file: Bytes, shown: str, delimiter: str) -> Iterator[Row | Reject]:
    """Yield the rows of CSV or TSV, read strictly: a row whose quote does not close costs that row alone.

    Such a row is rejected at the line where it begins, and reading goes on at the line after it, so that it swallows
    none of the rows below. Raises DistillError (exit 3) where the head cannot be read or names a column twice.
    """
    # bytes that are not UTF-8 become lone surrogates, which cleaning rejects row by row
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_ROW)
    again, taken = deque[str](), list[str]()  # lines to be read again; lines of the row at hand
    number = 0  # lines of the file that lie behind
    # A row left open at the end of a line has the fate of every other that is open there: one failure at a later line
    # settles all that begin above that line. Without this, each of them would be read to its end: quadratic.
    hopeless, unclosed, size = 0, "a quote is not closed", 0

    def next_line() -> str:
        nonlocal size
        if taken and number + len(taken) < hopeless:
            raise csv.Error(unclosed)
        line = again.popleft() if again else text.readline(MAX_ROW + 1)
        size = size + len(line) if taken else len(line)
        if line:
            taken.append(line)
        if size > MAX_ROW:
            raise csv.Error(f"longer than {MAX_ROW:,} characters")
        return line

    names: list[str] | None = None
    rows = csv.reader(iter(next_line, ""), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        reason, fields = "", list[str]()
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            reason = unclosed if "unexpected end" in str(error) else str(error)
            if len(taken) > 1 and reason != unclosed:
                reason = f"{unclosed}, or {reason}"
        if names is not None and fields and len(fields) != len(names):
            reason = f"{len(fields)} fields under {len(names)} names"
            if len(taken) > 1:
                reason += f", on {len(taken)} lines: perhaps {unclosed}"
        elif reason:
            reason = f"not CSV: {reason}"
        if reason:
            where = f"{shown}:{number + 1}"
            if names is None:
                raise DistillError(Exit.INPUT, where, f"the head is {reason}", "correct the line")
            yield Reject(where=where, reason=reason)
            while len(taken[0]) > MAX_ROW and not taken[0].endswith(("\n", "\r")):
                taken[0] = text.readline(MAX_ROW + 1) or "\n"
            hopeless = max(hopeless, number + len(taken))
            again.extendleft(reversed(taken[1:]))
            number += 1
            rows = csv.reader(iter(next_line, ""), delimiter=delimiter, strict=True)
            continue
        number += len(taken)
        where = f"{shown}:{number}"
        if names is None and any(field.strip() for field in fields):
            names = [name if name.strip() else "" for name in fields]
            _refuse_twins(names, where)
            if nameless := [str(place) for place, name in enumerate(names, 1) if not name]:
                say(f"{where}: columns without a name are left out: {', '.join(nameless[:20])}")
        elif names is not None and fields:
            pairs = zip(names, fields, strict=True)
            yield Row(where, {name: value for name, value in pairs if name})


def _refuse_twins(names: list[str], where: object) -> None:
    """Stop (exit 3) where two columns have one name: only one of them could be read."""
    twins = [name for name, count in Counter(names).items() if name and count > 1]
    if twins:
        what = f"names the column {ascii(twins[0][:60])} twice"
        raise DistillError(Exit.INPUT, where, what, "give each column a name of its own")


def _read_parquet(path: Path, shown: str) -> Iterator[Row | Reject]:
    import pyarrow  # costs a second to import, and few need it
    import pyarrow.parquet

    try:
        file, number = pyarrow.parquet.ParquetFile(path), 0
        _refuse_twins(file.schema_arrow.names, path)
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{shown}:{number}", value)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        what = f"is no readable Parquet file: {str(error).splitlines()[0][:120]}"
        raise DistillError(Exit.INPUT, path, what, "write it again") from None


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder was written by `datasets`' save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def read_dataset(reference: str, config: str | None, split: str) -> Iterator[Row]:
    """Yield the rows of a Hub dataset or of a folder saved with save_to_disk; raises DistillError (exit 3)."""
    import datasets  # heavy, and few need it

    try:
        if reference.startswith(("/", "./")):
            found = datasets.load_from_disk(reference)
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(reference, config, split=split)
    except KeyError:
        raise DistillError(
            Exit.INPUT, reference, f"has no split {split}", "set corpus.dataset_split"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        what = f"could not be loaded: {str(error).splitlines()[0][:160]}"
        fix = "check the name and the connection, or set corpus.path to a file"
        raise DistillError(Exit.INPUT, f"dataset {reference}", what, fix) from None
    for number, value in enumerate(found, 1):
        yield Row(f"{reference}/{split}:{number}", dict(value))


class _Text(HTMLParser):
    """Collects the visible text; a block element ends a line, `pre` keeps its spaces."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in HIDDEN
        self.verbatim += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n\n" if tag[0] in "ph" else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in HIDDEN))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if tag in BLOCKS:
            self.parts.append("\n\n" if tag[0] in "ph" else "\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else _one_space(data))


def _one_space(data: str) -> str:
    """Collapse white space as a browser does, keeping one space at each end that had any."""
    middle = " ".join(data.split())
    if not middle:
        return " " if data else ""
    return " " * data[0].isspace() + middle + " " * data[-1].isspace()


def html_to_text(html: str) -> str:
    """Return the visible text of a page, one block a paragraph."""
    parser = _Text()
    parser.feed(html)
    if len(parser.rawdata) <= MAX_OPEN:
        parser.close()
    elif not parser.hidden:
        parser.parts.append(parser.rawdata)
    return "".join(parser.parts)
