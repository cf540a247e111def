"""Reading what people have: text, HTML, PDF, JSON, CSV, Parquet, a folder of these, or a dataset.

Each reader yields a row as a mapping with its place (`file:line`), or a reject with a reason. A
file that cannot be opened or whose end is missing stops with exit 3; a bad row never does.
"""

import codecs
import csv
import io
import json
import os
import re
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from distill.corpus.pages import docx_text, html_to_text, pdf_pages
from distill.errors import DistillError, Exit
from distill.records import Record
from distill.storage.progress import say

MAX_ROW = 16 * 2**20  # bytes of one row, or of one text file
TEXTS = (".txt", ".md", ".rst", ".html", ".htm")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
SUFFIXES = (*TEXTS, *LINES, ".json", *DELIMITERS)
BINARY_SUFFIXES = (".parquet", ".pdf", ".docx")
PACKED = {".gz": "gzip", ".zst": "zstd"}
ARRAY = re.compile(rb"[\xef\xbb\xbf\xff\xfe\s\0]*\[[\s\0]*\{")  # of rows
MAX_JSON = 2**31  # bytes of a .json file, which is read as one
SAMPLE = 2**18  # bytes from which an encoding is recognised
# Letters of Western Europe beside plain ones or alone, and its marks; no ð, ý, þ: of few languages
ACCENTED = "àáâãäåæçèéêëìíîïñòóôõöøùúûüßœšžÀÁÂÄÅÆÇÈÉÊËÍÎÑÓÔÖØÙÚÛÜŒŠŽ"
WESTERN = re.compile(
    rf"(?<=[a-zA-Z])[{ACCENTED}]{{1,2}}|[{ACCENTED}]{{1,2}}(?=[a-zA-Z])"
    r"|(?<![^\W\d_])[àèéòùÀÉ](?![^\W\d_])|[“”‘’„–—…•«»¡¿°§£€©®™\u00a0]"
)
UNDEFINED = re.compile(rb"[\0\x81\x8d\x8f\x90\x9d]")  # in Windows-1252, or in any text
Bytes = IO[bytes]


class SourceRow(NamedTuple):
    """A row as it was read, and where: `file:line`."""

    where: str
    value: Mapping[str, object]


class Reject(Record):
    """A row or document that was left out, and why; `bad` ones count towards `max_bad_fraction`."""

    where: str
    reason: str
    bad: bool = True


def kind_of(path: Path) -> str | None:
    """Return the suffix that says how to read a file, of the text kinds before `.gz`, or None."""
    name = path.name.lower()
    plain = name.removesuffix(".gz").removesuffix(".zst")
    suffix = Path(plain).suffix
    return suffix if suffix in SUFFIXES or (suffix in BINARY_SUFFIXES and plain == name) else None


def list_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the readable files at or below a path, sorted, and the others; exit 3 without any."""
    if not path.exists():
        raise DistillError(Exit.INPUT, path, "does not exist", "check corpus.path")
    files, seen = [path] if path.is_file() else [], set[str]()
    for folder, below, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder that holds it
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".") and name != "__MACOSX"]
        below.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        paths = [Path(folder, name) for name in names if not name.startswith((".", "~$"))]
        files += [path for path in paths if path.is_file() or path.is_symlink()]
    files.sort()
    readable = [file for file in files if kind_of(file)]
    if not readable:
        names = " ".join((*SUFFIXES, *BINARY_SUFFIXES))
        raise DistillError(Exit.INPUT, path, "holds no file of a known kind", f"known are {names}")
    return readable, [file for file in files if not kind_of(file)]


def read_file(
    path: Path, source: str, encoding: str | None = None, others: dict[str, list[str]] | None = None
) -> Iterator[SourceRow | Reject]:
    """Yield the rows of one file, called `source` in places; exit 3 where it cannot be read.

    What is not in UTF-8 is in `encoding`, or in one that is recognised: noted in `others`, or said.
    """
    kind = kind_of(path)
    try:
        if kind in BINARY_SUFFIXES:
            yield from (_read_parquet if kind == ".parquet" else _read_document)(path, source)
            return
        with _open(path) as file:
            sample = file.read(SAMPLE)
        codec = recognise(sample, encoding)
        if codec and others is None:
            say(f"{source} is read as {codec}")
        elif codec and others is not None:
            others.setdefault(f"read as {codec}", []).append(source)
        with _open(path) as packed, tempfile.TemporaryFile() as copy:
            if codec:  # read in UTF-8, from a copy
                text = io.TextIOWrapper(packed, codec, newline="")
                while block := text.read(2**20):
                    copy.write(block.encode())
                copy.seek(0)
            file = copy if codec else packed
            if kind == ".json" or (kind in LINES and ARRAY.match(sample)):
                yield from read_json(file, source, lines=kind in LINES)
            elif kind in LINES:
                yield from read_lines(file, source)
            elif kind in DELIMITERS:
                yield from read_csv(file, source, DELIMITERS[kind])
            else:
                yield _read_text(file, f"{source}:1", html=kind in (".html", ".htm"))
    except UnicodeDecodeError as error:
        what = f"is no valid {error.encoding}, as it begins: {error.reason} (or it is cut off)"
        raise DistillError(Exit.INPUT, path, what, "fetch it again, or convert it") from None
    except OSError as error:
        what = error.strerror or f"is damaged or cut off: {error}"
        fix = "check the file and its rights, or fetch it again"
        raise DistillError(Exit.INPUT, path, what, fix) from None


def _open(path: Path) -> Bytes:
    """Open a file to read its bytes, unpacked."""
    if (packed := path.suffix.lower()) not in PACKED:
        return path.open("rb")
    import pyarrow  # costs a second to import, and few need it

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=PACKED[packed]))


def recognise(sample: bytes, stated: str | None) -> str | None:
    """Return the codec of a text that is not UTF-8, or None where it is, or is not recognised.

    `stated` is for what is not UTF-16 either. Windows-1252, which holds Latin-1, is recognised if
    nearly all characters are those that Western Europe writes.
    """
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample, len(sample) < SAMPLE)
    except UnicodeDecodeError:
        foreign = sum(byte > 127 for byte in sample)
        damaged = len(sample) - len(sample.decode("utf-8", "ignore").encode())
        if not stated and 2 * damaged < foreign:  # some damaged bytes in UTF-8 are no other one
            return None
        western = "".join(WESTERN.findall(sample.decode("cp1252", "replace")))
        likely = not UNDEFINED.search(sample) and len(western) >= 0.95 * foreign
        return stated or ("cp1252" if likely else None)
    return None


def _read_text(file: Bytes, where: str, html: bool) -> SourceRow | Reject:
    data = file.read(MAX_ROW + 1)
    if not data.strip(b"\xef\xbb\xbf \t\r\n"):
        return Reject(where=where, reason="the file is empty", bad=False)
    try:
        if len(data) > MAX_ROW:
            raise ValueError(f"larger than {MAX_ROW:,} bytes")
        text = decode(data)
        return SourceRow(where, {"text": html_to_text(text) if html else text})
    except ValueError as error:
        return Reject(where=where, reason=str(error))


def decode(data: bytes) -> str:
    """Decode UTF-8, without a byte-order mark; raises ValueError naming the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def parse_json(data: bytes) -> object:
    """Read a JSON value; raises ValueError with the reason, also where a key stands twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        value = dict(pairs)
        if len(value) < len(pairs):  # JSON does not say which of equal keys counts
            raise ValueError(f"a key stands twice among {ascii([key for key, _ in pairs])[:120]}")
        return value

    try:
        return json.loads(decode(data), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(file: Bytes, source: str, lines: bool = False) -> Iterator[SourceRow | Reject]:
    """Yield the rows of a JSON file: of an array, of the one list in an object, or the object.

    An object of columns, as pandas writes it, is a table; JSON lines are read as such. Raises
    DistillError (exit 3) where it is neither.
    """
    data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        what = f"is larger than {MAX_JSON:,} bytes"
        raise DistillError(Exit.INPUT, source, what, "write it as .jsonl")
    try:
        value = parse_json(data)
    except ValueError as error:
        if lines or (isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"):
            yield from read_lines(io.BytesIO(data), source)
            return
        what, fix = f"is no JSON, or is cut off: {error}", "correct it, or fetch it again"
        raise DistillError(Exit.INPUT, source, what, fix) from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        lists = [rows for rows in lists if not rows[0].keys() & {"role", "from"}]
        columns = [[*v.values()] if isinstance(v, dict) and "0" in v else v for v in value.values()]
        if len(value) > 1 and all(
            isinstance(column, list) and len(column) == len(columns[0]) for column in columns
        ):
            lists = [[dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]]
        value = lists[0] if len(lists) == 1 else [value]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield _object_row(row, f"{source}:{number}")


def _object_row(value: object, where: str) -> SourceRow | Reject:
    if isinstance(value, dict):
        return SourceRow(where, value)
    return Reject(where=where, reason=f"not an object but {type(value).__name__}")


def read_lines(file: Bytes, source: str) -> Iterator[SourceRow | Reject]:
    """Yield the rows of JSON lines; memory stays bounded by the longest allowed row."""
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        where = f"{source}:{number}"
        if len(line) > MAX_ROW:
            yield Reject(where=where, reason=f"longer than {MAX_ROW:,} bytes")
            while not line.endswith(b"\n") and (line := file.readline(MAX_ROW)):
                pass
        elif line.strip():
            try:
                yield _object_row(parse_json(line), where)
            except ValueError as error:
                yield Reject(where=where, reason=f"not JSON: {error}"[:200])


def read_csv(file: Bytes, source: str, delimiter: str) -> Iterator[SourceRow | Reject]:
    """Yield the rows of CSV or TSV; a row whose quote does not close costs that row alone.

    After a bad row, reading goes on at the line behind the one where it begins. If the head lacks
    the delimiter, what it has in its place counts. Columns without a name are left out. Exit 3
    where the head cannot be read or names a column twice.
    """
    # bytes that are not UTF-8 become lone surrogates, which cleaning rejects row by row
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_ROW)
    head, number = text.readline(MAX_ROW + 1), 0  # lines of the file before the present row
    if re.fullmatch(r"sep=.\s*", head):  # of Excel
        delimiter, head, number = head[4], text.readline(MAX_ROW + 1), 1
    elif delimiter not in head and (other := max(";\t|,", key=head.count)) in head:
        delimiter = other
        say(f"{source} has {other!r} between its columns")
    again, lines = deque([head]), list[str]()  # lines to be read again; lines of the present row
    # A row left open at the end of a line has the fate of every other that is open there: one
    # failure at a later line settles all that begin above that line. Without this, each of them
    # would be read to its end: quadratic.
    hopeless, size = 0, 0

    def next_line() -> str:
        nonlocal size
        if lines and number + len(lines) < hopeless:
            raise csv.Error("a quote is not closed")
        line = again.popleft() if again else text.readline(MAX_ROW + 1)
        size = size + len(line) if lines else len(line)
        if line:
            lines.append(line)
        if size > MAX_ROW:
            raise csv.Error(f"longer than {MAX_ROW:,} characters")
        return line

    names: list[str] | None = None
    rows = csv.reader(iter(next_line, ""), delimiter=delimiter, strict=True)
    while True:
        lines.clear()
        reason, fields = "", list[str]()
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"not CSV: {error}"
        if names is not None and fields and len(fields) != len(names):
            reason = f"{len(fields)} fields under {len(names)} names"
        if reason:
            where = f"{source}:{number + 1}"
            if len(lines) > 1:
                reason += f", on {len(lines)} lines: perhaps a quote is not closed"
            if names is None:
                raise DistillError(Exit.INPUT, where, f"the head is {reason}", "correct the line")
            yield Reject(where=where, reason=reason)
            while len(lines[0]) > MAX_ROW and not lines[0].endswith(("\n", "\r")):
                lines[0] = text.readline(MAX_ROW + 1) or "\n"
            hopeless = max(hopeless, number + len(lines))
            again.extendleft(reversed(lines[1:]))
            number += 1
            rows = csv.reader(iter(next_line, ""), delimiter=delimiter, strict=True)
            continue
        number += len(lines)
        where = f"{source}:{number}"
        if names is None and any(field.strip() for field in fields):
            names = [name if name.strip() else "" for name in fields]
            _refuse_same_columns(names, where)
        elif names is not None and fields:
            pairs = zip(names, fields, strict=True)
            yield SourceRow(where, {name: value for name, value in pairs if name})


def _refuse_same_columns(names: list[str], where: object) -> None:
    """Stop (exit 3) where two columns have one name: only one of them could be read."""
    repeated = [name for name, count in Counter(names).items() if name and count > 1]
    if repeated:
        what = f"names the column {repeated[0][:60]!a} twice"
        raise DistillError(Exit.INPUT, where, what, "give each column a name of its own")


def _read_parquet(path: Path, source: str) -> Iterator[SourceRow | Reject]:
    import pyarrow
    import pyarrow.parquet

    try:
        file, number = pyarrow.parquet.ParquetFile(path), 0
        _refuse_same_columns(file.schema_arrow.names, path)
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield SourceRow(f"{source}:{number}", value)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        what = f"is no readable Parquet file: {str(error).splitlines()[0][:120]}"
        raise DistillError(Exit.INPUT, path, what, "write it again") from None


def _read_document(path: Path, source: str) -> Iterator[SourceRow | Reject]:
    """Yield each page of a PDF with its number, or a .docx file as one text."""
    try:
        rows = list((pdf_pages if path.suffix.lower() == ".pdf" else docx_text)(path))
        if not any(row["text"] for row in rows):
            raise ValueError("it holds no text, as of scanned pages")
        for row in rows:
            yield SourceRow(f"{source}:{row.get('page', 1)}", row)
    except ImportError:
        what, fix = f"{path.suffix} needs the extra `documents`", "pip install 'distill[documents]'"
        raise DistillError(Exit.INPUT, path, what, fix) from None
    except Exception as error:  # damaged files make these libraries raise whatever there is
        yield Reject(where=f"{source}:1", reason=f"cannot be read as {path.suffix}: {error}"[:200])


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder was written by `datasets`' save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def read_dataset(reference: str, config: str | None, split: str) -> Iterator[SourceRow]:
    """Yield the rows of a Hub dataset, or of a folder saved with save_to_disk, or stop (exit 3)."""
    import datasets  # heavy, and few need it

    try:
        if reference.startswith(("/", "./")):
            rows = datasets.load_from_disk(reference)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(reference, config, split=split)
    except KeyError:
        what, fix = f"has no split {split}", "set corpus.dataset_split"
        raise DistillError(Exit.INPUT, reference, what, fix) from None
    except (OSError, ValueError, RuntimeError) as error:
        what = f"could not be loaded: {str(error).splitlines()[0][:160]}"
        fix = "check the name and the connection, or set corpus.path to a file"
        raise DistillError(Exit.INPUT, f"dataset {reference}", what, fix) from None
    for number, value in enumerate(rows, 1):
        yield SourceRow(f"{reference}/{split}:{number}", dict(value))
