"""Readers: every kind of file, every kind of damage; a bad row is a reject with its place."""

import gzip
import importlib.util
import io
import json
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distill.corpus import readers
from distill.corpus.clean import normalise
from distill.corpus.readers import SUFFIXES, Reject, SourceRow, list_files, read_file
from distill.errors import DistillError, Exit
from tests.support.errors import stops


def read(path: Path) -> list[SourceRow | Reject]:
    return list(read_file(path, path.name))


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    if name.endswith(".zst"):
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.txt.gz", "a.rst.zst", "A.MD"])
def test_a_text_file_is_one_row(tmp_path, name):
    path = write(tmp_path, name, "\ufeffÜber\r\nline".encode())
    assert read(path) == [SourceRow(f"{name}:1", {"text": "Über\r\nline"})]


PAGES = yaml.safe_load(Path("tests/fixtures/pages.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("page", "text"), [row.values() for row in PAGES], ids=range(len(PAGES)))
def test_a_page_reads_as_a_browser_shows_it(tmp_path, page, text):
    (row,) = read(write(tmp_path, "a.html.gz", page.encode()))
    assert isinstance(row, SourceRow) and normalise(row.value["text"]) == text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson.zst"])
def test_lines_end_at_newlines_only(tmp_path, name):
    rows = [{"text": "one\u2028two\x85three\x0cfour"}, {"text": "next"}]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    found = read(write(tmp_path, name, b"\xef\xbb\xbf" + data.encode() + b"\n"))
    assert found == [SourceRow(f"{name}:1", rows[0]), SourceRow(f"{name}:2", rows[1])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not JSON"),
        (b"[1]", "not an object but list"),
        (b"null", "not an object but NoneType"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"text": "a", "text": "b"}', "a key stands twice"),
        (b'{"text": "c", "meta": {"k": 1, "k": 2}}', "a key stands twice"),
        (b"\x00", "not JSON"),
    ],
    ids=range(9),
)
def test_a_bad_line_is_rejected_and_the_next_is_read(tmp_path, line, reason):
    bad, good = read(write(tmp_path, "a.jsonl", line + b'\n{"text": "good"}'))
    assert isinstance(bad, Reject) and bad.where == "a.jsonl:1" and reason in bad.reason
    assert good == SourceRow("a.jsonl:2", {"text": "good"})


@pytest.mark.parametrize("extra", [-1, 0, 1, 100])
def test_a_row_that_is_too_long_is_rejected(tmp_path, extra, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW", 100)
    line = json.dumps({"text": "x" * (100 + extra - len('{"text": ""}') - 1)})
    found = read(write(tmp_path, "a.jsonl", f'{line}\n{{"text": "good"}}\n'.encode()))
    assert isinstance(found[0], Reject) is (extra > 0)
    assert found[1:] == [SourceRow("a.jsonl:2", {"text": "good"})]
    text = read(write(tmp_path, "a.txt", b"x" * (100 + extra)))
    assert isinstance(text[0], Reject) is (extra > 0)
    for middle in ("1," + "x" * 500, '1,"' + "x\n" * 90):
        rows = read(write(tmp_path, "a.csv", f"id,text\n{middle}\n9,good\n".encode()))
        assert isinstance(rows[0], Reject) and rows[0].where == "a.csv:2"
        assert isinstance(rows[-1], SourceRow) and rows[-1].value == {"id": "9", "text": "good"}


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None
)
@example(b"[{")
@example(b'[{"a": 1, "a": 2}]')
@given(
    data=st.binary(max_size=60)
    | st.text(alphabet='{}[]":,\n\r\\u d8019a', max_size=60).map(str.encode)
)
def test_no_bytes_make_a_reader_raise(tmp_path, data):
    for name in (f"a{suffix}" for suffix in SUFFIXES if suffix != ".json"):
        head = b"a,b\n" if name == "a.csv" else b"a\n" if name == "a.tsv" else b""
        found = read(write(tmp_path, name, head + data))
        assert all(isinstance(row, SourceRow | Reject) for row in found)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_array_that_is_too_large_is_refused_and_never_cut(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "MAX_JSON", 60)
    rows = json.dumps([{"text": f"row {n}"} for n in range(9)], indent=0).encode()
    with pytest.raises(DistillError, match="is larger than 60 bytes"):
        read(write(tmp_path, name, rows))


def test_csv_rows_have_the_names_of_the_header(tmp_path):
    rows = '\ufeffid,text\n1,"a ""quoted""\nline, b"\n\n2,a 19" disk\n3\n'
    assert read(write(tmp_path, "a.csv", rows.encode())) == [
        SourceRow("a.csv:3", {"id": "1", "text": 'a "quoted"\nline, b'}),
        SourceRow("a.csv:5", {"id": "2", "text": 'a 19" disk'}),
        Reject(where="a.csv:6", reason="1 fields under 2 names"),
    ]


@pytest.mark.parametrize("place", [1, 10, 1000])
@pytest.mark.parametrize(
    "bad",
    [
        '"{n},text of row {n}',  # the row of H16: it begins with a quote that does not close
        '{n},"text of row {n}',
        '{n},"text "of" row {n}"',
        '{n},"text" of row {n}',
        '{n},"the \\"text\\" of row {n}"',
        "{n},text, of row",
        "{n}",
    ],
)
@pytest.mark.parametrize("others", ["plain", "quoted", "over lines"])
def test_a_broken_csv_row_costs_no_other(tmp_path, place, bad, others):
    """H16: a bad row is named by file and line."""

    def written(number: int) -> str:
        ending = {"plain": "", "quoted": ', "so" it is', "over lines": "\n\nand on"}[others]
        value = f"text of row {number}{ending}"
        return (
            f"{number},{value}"
            if others == "plain"
            else f'{number},"{value.replace(chr(34), chr(34) * 2)}"'
        )

    rows = [bad.format(n=n) if n == place else written(n) for n in range(1, 1001)]
    data = "\ufeff" + "\n".join(["id,text", *rows]) + "\n"
    found = read(write(tmp_path, "a.csv", data.encode()))
    rejects = [row for row in found if isinstance(row, Reject)]
    line = 1 + data[: data.index("\n" + bad.format(n=place) + "\n")].count("\n") + 1
    assert [row.where for row in rejects] == [f"a.csv:{line}"] and rejects[0].bad
    kept = [int(str(row.value["id"])) for row in found if isinstance(row, SourceRow)]
    assert kept == [n for n in range(1, 1001) if n != place]


@pytest.mark.parametrize("line", ['a","b', '"', '"a', '"a\n'])
def test_csv_of_quotes_takes_no_time_in_its_square(tmp_path, line):
    data = b'id,text\n"open\n' + f"{line}\n".encode() * 30_000
    started = time.monotonic()
    found = read(write(tmp_path, "a.csv", data))
    assert isinstance(found[0], Reject) and found[0].where == "a.csv:2"
    assert time.monotonic() - started < 10


def test_two_columns_of_one_name_stop_and_are_named(tmp_path):
    """H16."""
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for path in (
        write(tmp_path, "a.csv", b"text,id,text\na,1,b\n"),
        write(tmp_path, "b.csv", b'\xef\xbb\xbf"text",text\na,b\n'),
        write(tmp_path, "a.tsv", b"text\ttext\na\tb\n"),
        tmp_path / "a.parquet",
    ):
        with stops(Exit.INPUT, "names the column 'text' twice") as caught:
            read(path)
        assert path.name in caught.value.where


@pytest.mark.parametrize("head", ['id,"text', 'id,"te"xt', '"id,text'])
def test_a_head_that_cannot_be_read_stops(tmp_path, head):
    with pytest.raises(DistillError) as caught:
        read(write(tmp_path, "a.csv", f"{head}\n1,a\n2,b\n".encode()))
    assert (caught.value.code, caught.value.where) == (Exit.INPUT, "a.csv:1")


@pytest.mark.parametrize(
    "text",
    [
        "question;answer\r\nOne, two?;a\r\n",
        "sep=;\r\nquestion;answer\r\nOne, two?;a\r\n",
        "question\tanswer\nOne, two?\ta\n",
        'question|answer\n"One, two?"|a\n',
    ],
)
@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_h16_what_excel_and_databases_call_csv(tmp_path, text, codec):
    """H16: the head says what stands between columns."""
    (row,) = read(write(tmp_path, "a.csv", text.encode(codec)))
    assert row == SourceRow(
        f"a.csv:{3 if 'sep' in text else 2}", {"question": "One, two?", "answer": "a"}
    )


def test_parquet_rows(tmp_path):
    path, rows = tmp_path / "a.parquet", [{"text": "a", "n": 1}, {"text": None, "n": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [SourceRow("a.parquet:1", rows[0]), SourceRow("a.parquet:2", rows[1])]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-20]),
        ("none.txt.gz", b"plain text"),
        ("flipped.txt.gz", gzip.compress(b"text" * 99)[:-9] + b"\0" * 9),
        ("none.parquet", b"PAR1 not really"),
        ("cut.md.zst", pyarrow.compress(b"text" * 999, codec="zstd", asbytes=True)[:-6]),
        ("none.csv.zst", b"plain text"),
        ("cut.json", b'[{"text": "a"}, {"te'),
        ("twice.json", b'[{"text": "a", "text": "b"}]'),
        ("deep.json", b"[" * 100_000),
        ("cut.txt", "Sprich über Öl.".encode("utf-16")[:-1]),
        ("late.csv", "text\n".encode("utf-16") + b"a\0" * 200_000 + b"\x00\xd8"),
    ],
    ids=range(11),  # packed bytes hold the time
)
def test_a_damaged_file_stops_and_is_named(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with stops(Exit.INPUT) as caught:
        read(path)
    assert name in caught.value.where


def test_files_are_listed_in_order_and_others_counted(tmp_path):
    for name in "b.txt a/c.jsonl.gz a/x.parquet.gz image.png .git/config.txt z.CSV".split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.txt").mkdir()
    known, others = list_files(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in known] == ["a/c.jsonl.gz", "b.txt", "z.CSV"]
    assert [str(p.relative_to(tmp_path)) for p in others] == ["a/x.parquet.gz", "image.png"]


def test_linked_folders_are_read_once_and_lock_files_are_not(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("in/sub/a.txt", "elsewhere/b.txt", "in/~$c.docx", "in/.d.txt"):
        (tmp_path / name).write_text("x")
    for name, target in (("out", "../elsewhere"), ("loop", "."), ("again", "sub"), ("e.txt", "no")):
        (tmp_path / "in" / name).symlink_to(target)
    known, others = list_files(tmp_path / "in")
    names = [str(p.relative_to(tmp_path / "in")) for p in known]
    assert names == ["e.txt", "out/b.txt", "sub/a.txt"] and not others
    with stops(Exit.INPUT, "e.txt"):  # a link to nothing is no file less, without a word
        read(known[0])


@pytest.mark.parametrize("name", ["a.txt", "a.html.gz", "a.md"])
def test_an_empty_file_is_left_out_and_is_no_bad_row(tmp_path, name):
    (reject,) = read(write(tmp_path, name, b"\xef\xbb\xbf \n"))
    assert reject == Reject(where=f"{name}:1", reason="the file is empty", bad=False)


@pytest.mark.parametrize("name", ["missing", "empty", "image.png"])
def test_nothing_to_read_stops_and_names_the_path(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.png").write_bytes(b"x")
    with stops(Exit.INPUT) as caught:
        list_files(tmp_path / name)
    assert name in caught.value.where


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
@pytest.mark.parametrize(
    "form", ["array", "data", "rows beside facts", "lines", "indented", "one row", "UTF-16"]
)
def test_a8_json_is_read_in_its_usual_forms(tmp_path, name, form):
    rows = [{"text": "one", "tags": ["x"]}, {"text": "two\u2028"}]
    if form == "one row":
        rows = [{"messages": [{"role": "user", "content": "Hi?"}]}]
    written: dict[str, object] = {
        "array": rows,
        "data": {"data": rows},
        "rows beside facts": {"version": "1.1", "rows": rows, "names": ["a"]},
        "indented": rows,
        "one row": rows[0],
        "UTF-16": rows,
    }
    text = json.dumps(written.get(form), indent=2 if form == "indented" else None)
    if form == "lines":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    found = read(write(tmp_path, name, text.encode("utf-16" if form == "UTF-16" else "utf-8-sig")))
    assert found == [SourceRow(f"{name}:{n}", row) for n, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a.jsonl", [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]),
        ("a.json", {"question": ["q", "r"], "answer": ["a", "b"]}),
        ("a.json", {"question": {"0": "q", "1": "r"}, "answer": {"0": "a", "1": "b"}}),
    ],
)
def test_a8_arrays_in_jsonl_and_tables_of_pandas(tmp_path, name, value):
    found = read(write(tmp_path, name, json.dumps(value).encode()))
    rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]
    assert found == [SourceRow(f"{name}:{n}", row) for n, row in enumerate(rows, 1)]


TEXTS = {
    "utf-16": "Füße, naïve – 日本語, שלום and हिन्दी.\nSecond line.",
    "latin-1": "Le café était fermé; la forêt, là-bas, brûlait. Größe über Öl.",
    "cp1252": "He said: “It’s done” – and left… The cost was 5 €.",
}


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "json.gz"])
@pytest.mark.parametrize("codec", TEXTS)
def test_encodings_are_recognised_and_said(tmp_path, codec, suffix, capsys):
    text, name = TEXTS[codec], codec.replace("latin-1", "cp1252")
    row = json.dumps({"text": text}, ensure_ascii=False)
    quoted = text.replace('"', '""')
    content = {"txt": text, "jsonl": row + "\n", "csv": f'text\n"{quoted}"\n'}.get(
        suffix, f"[{row}]"
    )
    (found,) = read(write(tmp_path, f"a.{suffix}", content.encode(codec)))
    assert isinstance(found, SourceRow) and found.value == {"text": text}
    assert capsys.readouterr().err == f"a.{suffix} is read as {name}\n"


@pytest.mark.parametrize(
    "data",
    [
        "Zażółć gęślą jaźń, powiedział.".encode("cp1250"),
        "東京の天気は晴れです。カメラを持って出かけましょう。".encode("cp932"),
        "他们在河边散步，谈论今天的天气和明天的工作。".encode("gb18030"),
        "Они гуляли у реки и говорили о погоде.".encode("cp1251"),
        "Þetta er íslenska, ðað er.".encode("latin-1"),
        "สวัสดีครับ วันนี้อากาศดี".encode("tis-620"),
        "مرحبا بكم في المدينة".encode("cp1256"),
        b"plain \xff text",
        "Größe ".encode() * 9 + b"\xe4\xff",  # damaged, and UTF-8 all the same
        "It isn’t, and it won’t. ".encode() * 9 + b"\xff",
        bytes(range(1, 256)),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x01\0",
    ],
    ids=range(12),
)
def test_what_is_not_recognised_is_refused_with_its_name(tmp_path, data):
    """No text is read in a wrong encoding; a page of the wrong kind is refused too."""
    for name in ("a.txt", "a.jsonl"):
        content = (
            data
            if name == "a.txt"
            else b'{"text": "' + bytes(b for b in data if b not in b"\r\n") + b'"}\n'
        )
        (found,) = read(write(tmp_path, name, content))
        if isinstance(found, SourceRow):  # NUL characters and the like: cleaning says so
            with pytest.raises(ValueError):
                normalise(found.value["text"])
        else:
            assert found.where == f"{name}:1" and found.bad


def test_a_stated_encoding_is_for_what_is_not_unicode(tmp_path, capsys):
    text = "Zażółć gęślą jaźń."
    for codec in ("cp1250", "utf-8", "utf-16"):
        path = write(tmp_path, "a.txt", text.encode(codec))
        (found,) = read_file(path, "a.txt", "cp1250", others := {})
        assert isinstance(found, SourceRow) and found.value == {"text": text}
        assert others == {
            "cp1250": {"read as cp1250": ["a.txt"]},
            "utf-16": {"read as utf-16": ["a.txt"]},
        }.get(codec, {})
    assert not capsys.readouterr().err


WITHOUT = {
    name: pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason="pip install 'distill[documents]'"
    )
    for name, module in (("pdf", "pypdf"), ("docx", "docx"))
}


def pdf(pages: list[str]) -> bytes:
    """Return a PDF with a line of text on each page."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(pages)))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>"]
    font = (
        "/MediaBox[0 0 600 800]/Resources<</Font<</F<</Type/Font/Subtype/Type1/BaseFont/Arial>>>>>>"
    )
    for n, text in enumerate(pages):
        stream = f"BT /F 12 Tf 50 700 Td ({text}) Tj ET" if text else ""
        objects.append(f"<</Type/Page/Parent 2 0 R{font}/Contents {4 + 2 * n} 0 R>>")
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
    out, places = io.BytesIO(b"%PDF-1.4\n"), list[int]()
    out.seek(0, io.SEEK_END)
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(f"{number} 0 obj{body}endobj\n".encode())
    start = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{place:010} 00000 n \n" for place in places).encode())
    out.write(f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{start}\n%%EOF".encode())
    return out.getvalue()


@WITHOUT["pdf"]
def test_a_pdf_is_read_page_by_page(tmp_path):
    long = [f"Page {word} has words enough. " * 9 for word in ("two", "four")]
    found = read(write(tmp_path, "a.pdf", pdf(["Title", long[0], "", long[1], "The end."])))
    assert [(row.where, row.value["page"]) for row in found if isinstance(row, SourceRow)] == [
        ("a.pdf:1", 1),
        ("a.pdf:4", 4),
    ]
    texts = [str(row.value["text"]) for row in found if isinstance(row, SourceRow)]
    assert texts[0].startswith("Title\n\nPage two") and texts[1].endswith("The end.")
    for data in (pdf(["", ""]), b"%PDF-1.4 not really", b"", pdf(long)[:300]):
        (reject,) = read(write(tmp_path, "b.pdf", data))
        assert (
            isinstance(reject, Reject) and reject.where == "b.pdf:1" and "as .pdf" in reject.reason
        )


@WITHOUT["docx"]
def test_a_docx_is_read_in_its_order(tmp_path):
    import docx

    document = docx.Document()
    document.add_heading("Title")
    document.add_paragraph("Before the table.")
    table = document.add_table(rows=2, cols=2)
    for number, cell in enumerate(cell for row in table.rows for cell in row.cells):
        cell.text = f"c{number}"
    wide = table.add_row().cells
    wide[0].merge(wide[1]).text = "over both"
    document.add_paragraph("After it.")
    document.save(str(tmp_path / "a.docx"))
    text = "Title\n\nBefore the table.\n\nc0\tc1\nc2\tc3\nover both\n\nAfter it."
    assert read(tmp_path / "a.docx") == [SourceRow("a.docx:1", {"text": text})]
    (reject,) = read(write(tmp_path, "b.docx", (tmp_path / "a.docx").read_bytes()[:-99]))
    assert isinstance(reject, Reject) and ".docx" in reject.reason


@pytest.mark.parametrize(("name", "module"), [("a.pdf", "pypdf"), ("a.docx", "docx")])
def test_a_missing_extra_is_one_line_with_the_command(tmp_path, name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with stops(Exit.INPUT, "needs the extra `documents`") as caught:
        read(write(tmp_path, name, b"x"))
    assert name in caught.value.where and "pip install 'distill[documents]'" in caught.value.fix
