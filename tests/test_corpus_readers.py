"""Readers: every kind of file, every kind of damage; a bad row is a reject with its place, never a crash."""

import csv
import gzip
import json
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.corpus import readers
from distill.corpus.readers import Reject, Row, html_to_text, list_files, read_file
from distill.errors import DistillError, Exit


def read(path: Path) -> list[Row | Reject]:
    return list(read_file(path, path.name))


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.txt.gz", "a.rst.gz", "A.MD"])
def test_a_text_file_is_one_row(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, "\ufeffÜber\r\nline".encode())
    assert read(path) == [Row(f"{name}:1", {"text": "Über\r\nline"})]


def test_html_gives_its_visible_text(tmp_path: Path) -> None:
    page = (
        "<html><head><title>t</title><style>p {}</style></head><body><script>evil()</script>"
        "<h1>Title</h1><p>One &amp;\n two <b>bold</b> word.</p><ul><li>a<li>b</ul><pre>x\n  y</pre></body>"
    )
    text = html_to_text(page)
    assert "evil" not in text and "p {}" not in text
    assert [line for line in text.split("\n") if line.strip()] == [
        "Title",
        "One & two bold word.",
        "a",
        "b",
        "x",
        "  y",
    ]
    assert read(write(tmp_path, "a.html.gz", page.encode())) == [Row("a.html.gz:1", {"text": text})]


@pytest.mark.parametrize("part", ["<", "<a ", "<!--", "<![CDATA[", "</", "<a b='", "<script>", "&"])
def test_a_hostile_page_takes_no_time_in_its_square(part: str) -> None:
    started = time.monotonic()
    assert html_to_text("<p>Text.</p>" + part * 50_000).strip().startswith("Text.")
    assert time.monotonic() - started < 5


def test_a_page_without_its_closing_tags_keeps_its_text() -> None:
    page = "<head><title>t</title><p>One.<p>Two <script>" + "evil();" * 1000
    assert html_to_text(page).split() == ["One.", "Two"]


@settings(deadline=None)
@given(st.text(alphabet="<>/!-[]&;#pscript \n'\"=a", max_size=80))
def test_no_page_makes_the_html_reader_raise(page: str) -> None:
    assert isinstance(html_to_text(page), str)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_end_at_newlines_only(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one\u2028two\x85three\x0cfour"}, {"text": "next"}]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    found = read(write(tmp_path, name, b"\xef\xbb\xbf" + data.encode() + b"\n"))
    assert found == [Row(f"{name}:1", rows[0]), Row(f"{name}:2", rows[1])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not JSON"),
        (b"[1]", "not an object but list"),
        (b"null", "not an object but NoneType"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"x": NaN}', "NaN"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"x": ' + b"1" * 5_000 + b"}", "not JSON"),
        (b"\x00", "not JSON"),
    ],
    ids=range(9),
)
def test_a_bad_line_is_rejected_and_the_next_is_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    bad, good = read(write(tmp_path, "a.jsonl", line + b'\n{"text": "good"}'))
    assert isinstance(bad, Reject) and bad.where == "a.jsonl:1" and reason in bad.reason
    assert good == Row("a.jsonl:2", {"text": "good"})


@pytest.mark.parametrize("extra", [-1, 0, 1, 100])
def test_a_row_that_is_too_long_is_rejected(
    tmp_path: Path, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW", 100)
    line = json.dumps({"text": "x" * (100 + extra - len('{"text": ""}') - 1)})
    found = read(write(tmp_path, "a.jsonl", f'{line}\n{{"text": "good"}}\n'.encode()))
    assert isinstance(found[0], Reject) is (extra > 0)
    assert found[1:] == [Row("a.jsonl:2", {"text": "good"})]
    text = read(write(tmp_path, "a.txt", b"x" * (100 + extra)))
    assert isinstance(text[0], Reject) is (extra > 0)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None
)
@given(
    data=st.binary(max_size=60)
    | st.text(alphabet='{}[]":,\n\r\\u d8019a', max_size=60).map(str.encode)
)
def test_no_bytes_make_a_reader_raise(tmp_path: Path, data: bytes) -> None:
    for name in ("a.txt", "a.html", "a.jsonl", "a.csv"):
        assert all(isinstance(row, Row | Reject) for row in read(write(tmp_path, name, data)))


def test_csv_rows_have_the_names_of_the_header(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], ["1", 'a "quoted"\nline, b'], ["2", "ü"]])
    assert read(tmp_path / "a.csv") == [
        Row("a.csv:3", {"id": "1", "text": 'a "quoted"\nline, b'}),
        Row("a.csv:4", {"id": "2", "text": "ü"}),
    ]


def test_a_csv_row_of_other_length_is_rejected(tmp_path: Path) -> None:
    found = read(write(tmp_path, "a.csv", b"id,text\n1,a,b\n\n2\n3,c\n"))
    assert [type(row) for row in found] == [Reject, Reject, Row]
    assert found[0].where == "a.csv:2"


def test_parquet_rows(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.parquet", [{"text": "a", "n": 1}, {"text": None, "n": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [Row("a.parquet:1", rows[0]), Row("a.parquet:2", rows[1])]


def test_a_saved_dataset_is_read_with_its_split(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "many")
    rows.save_to_disk(tmp_path / "one")
    for name in ("many", "one"):
        assert readers.is_saved_dataset(tmp_path / name)
        found = [row.value for row in readers.read_dataset(str(tmp_path / name), None, "train")]
        assert found == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DistillError, match="has no split test"):
        list(readers.read_dataset(str(tmp_path / "many"), None, "test"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-20]),
        ("none.txt.gz", b"plain text"),
        ("flipped.txt.gz", gzip.compress(b"text" * 99)[:-9] + b"\0" * 9),
        ("none.parquet", b"PAR1 not really"),
    ],
)
def test_a_damaged_file_stops_and_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DistillError) as caught:
        read(path)
    assert caught.value.code == Exit.INPUT and name in caught.value.where


def test_files_are_listed_in_order_and_others_counted(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a/c.jsonl.gz",
        "a/x.parquet.gz",
        "image.png",
        ".git/config.txt",
        "z.CSV",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.txt").mkdir()
    known, others = list_files(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in known] == ["a/c.jsonl.gz", "b.txt", "z.CSV"]
    assert others == 2


@pytest.mark.parametrize("name", ["missing", "empty", "image.png"])
def test_nothing_to_read_stops_and_names_the_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DistillError) as caught:
        list_files(tmp_path / name)
    assert caught.value.code == Exit.INPUT and name in caught.value.where
