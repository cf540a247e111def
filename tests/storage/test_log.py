"""The store: a kill at every call, a cut at every byte, a flipped bit, a disk that refuses."""

import errno
import itertools
import os
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from distill.errors import DistillError, Exit
from distill.records import Document
from distill.storage import files
from distill.storage import log as logs
from distill.storage.files import folder_lock
from distill.storage.log import Log
from distill.storage.repair import repair
from tests.support.mortal import killed_at_every_call, open_file

BODIES = {f"k{n}": {"text": f"answer {n} é — " + "x" * (n * 7 % 20), "n": n} for n in range(12)}


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return memory


def fill(folder: Path, keys: list[str] | None = None) -> Path:
    """Write BODIES (or some of them) into a log, and return its only segment."""
    with Log(folder) as log:
        log.append(("response", key, BODIES[key]) for key in keys or BODIES)
    return folder / "00000001.jsonl"


def contents(folder: Path, writable: bool = True) -> dict[str, object]:
    """Return every record of a log by key."""
    with Log(folder, writable) as log:
        return {key: log.get("response", key) for key in log.keys("response")}


def fault(work: Callable[[], object]) -> DistillError:
    """Run `work`, which must stop with a DistillError of exit 5."""
    with pytest.raises(DistillError) as caught:
        work()
    assert caught.value.code == Exit.STATE
    assert "\n" not in str(caught.value)
    return caught.value


# --- what is stored comes back


def test_round_trip_and_first_record_stays(tmp_path):
    with Log(tmp_path / "s") as log:
        assert (
            log.append([("a", "1", {"v": 1}), ("a", "1", {"v": 2}), ("b", "1", "é\n\u2028")]) == 2
        )
        assert log.append([("a", "1", {"v": 3})]) == 0
        assert log.get("a", "1") == {"v": 1}
        assert ("b", "1") in log and ("b", "2") not in log
    with Log(tmp_path / "s", writable=False) as log:
        assert (log.get("a", "1"), log.get("b", "1"), log.get("c", "1")) == (
            {"v": 1},
            "é\n\u2028",
            None,
        )
        assert list(log.keys("a")) == ["1"]
        fault(lambda: log.append([("a", "2", 0)]))


def test_segments_roll_over_and_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(Log, "SEGMENT_BYTES", 300)
    fill(tmp_path, ["k0"])
    with Log(tmp_path) as log:
        for key, body in BODIES.items():
            log.append([("response", key, body)])
    assert len(logs.segments(tmp_path)) > 3
    assert list(contents(tmp_path).items()) == list(BODIES.items())
    (tmp_path / "00000002.jsonl").unlink()
    assert "segment 00000002 is missing" in str(fault(lambda: contents(tmp_path)))


def test_each_writer_appends_to_segments_of_its_own_and_readers_take_all(tmp_path, monkeypatch):
    monkeypatch.setattr(Log, "SEGMENT_BYTES", 300)
    folder = tmp_path / "s"
    with Log(folder, writable=False) as one, Log(folder, writable=False) as two:
        with one.writing(shared=True), two.writing(shared=True):
            for log, keys in ((one, list(BODIES)[:6]), (two, list(BODIES)[6:])):
                assert sum(log.append([("response", key, BODIES[key])]) for key in keys) == 6
    names = [path.name for path in logs.segments(folder)]
    assert {name[:-14] for name in names} == {"", "w2-"} and len(names) >= 4
    # a record that two bought at once: the first segment by name counts, and neither is damage
    again = logs.encode_line("response", "k0", "bought again")
    (folder / "w3-00000001.jsonl").write_bytes(again)
    for writer in "", "w2":  # tails of writers that were killed
        path = [p for p in logs.segments(folder) if logs.writer_of(p) == writer][-1]
        path.write_bytes(path.read_bytes() + b"torn " + writer.encode())
    with Log(folder) as log:
        assert log.append([("response", "new", 1)]) == 1
    new = {**BODIES, "new": 1}
    assert contents(folder) == new
    assert len(repair(folder)) == 1 and contents(folder) == new


def test_d8_memory_holds_the_index_and_not_the_bodies(tmp_path):
    count, size = 20_000, 2_000
    with Log(tmp_path / "s") as log:
        log.append(("response", f"{n:032x}", "x" * size) for n in range(count))
    tracemalloc.start()
    with Log(tmp_path / "s", writable=False) as log:
        held, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(list(log.keys("response"))) == count
        assert log.get("response", f"{count // 2:032x}") == "x" * size
    assert held < 250 * count and most < held + 8 * size + (4 << 20), "bodies stay on the disk"


# --- torn tails (D2) and damage (D3)


def test_truncation_at_every_byte_of_the_last_records(tmp_path, capsys):
    segment = fill(tmp_path)
    data = segment.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(ends[-4], len(data) + 1):
        segment.write_bytes(data[:cut])
        whole = sum(end - 1 <= cut for end in ends)  # complete JSON without its newline is whole
        found = contents(tmp_path)
        assert found == dict(list(BODIES.items())[:whole])
        torn = cut not in ends and cut + 1 not in ends
        assert ("moved to torn/" in capsys.readouterr().err) == torn
        if cut % 7 == 0 or not torn:
            fill(tmp_path)  # the next append begins on a new line
            assert contents(tmp_path) == BODIES
    assert (tmp_path / "torn").is_dir()


def test_a_reader_opens_beside_a_writer_and_leaves_its_tail_alone(tmp_path):
    segment = fill(tmp_path)
    with Log(tmp_path) as log:
        log.append([("response", "new", 1)])
        whole = segment.read_bytes()
        with segment.open("ab") as file:  # a write that is under way
            file.write(b"0" * 90)
        assert contents(tmp_path, writable=False) == {**BODIES, "new": 1}
        assert segment.read_bytes() == whole + b"0" * 90 and not (tmp_path / "torn").exists()


def test_every_flipped_bit_is_found_with_its_line(tmp_path):
    segment, draw, damage = fill(tmp_path), random.Random(0), 0
    data = segment.read_bytes()
    for _ in range(1000):
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        segment.write_bytes(changed)
        if place == len(data) - 1:  # without its newline a line is a torn tail, and set aside
            assert len(contents(tmp_path)) == len(BODIES) - 1
            continue
        error, line = fault(lambda: contents(tmp_path)), data[:place].count(b"\n") + 1
        assert f"00000001.jsonl:{line}: damaged record (distill repair" in str(error)
        damage += 1
    assert damage >= 990


def test_a_line_that_stands_twice_is_damage(tmp_path):
    segment = fill(tmp_path)
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([*lines, lines[3]]))
    assert ":13: response k3 stands a second time" in str(fault(lambda: contents(tmp_path)))


def test_a_record_damaged_after_opening_is_found_when_read(tmp_path):
    segment = fill(tmp_path)
    with Log(tmp_path) as log:
        segment.write_bytes(segment.read_bytes().replace(b"answer 2 ", b"answer 9 "))
        fault(lambda: log.get("response", "k2"))
        assert log.get("response", "k3") == BODIES["k3"]


# --- repair


def test_repair_keeps_what_is_whole_and_explains_the_rest(tmp_path):
    folder = tmp_path / "responses"
    segment = fill(folder)
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b"answer", b"ansver")
    damaged = b"".join([*lines, lines[0], b"cut"])
    segment.write_bytes(damaged)
    fault(lambda: contents(folder))
    head, *lost = repair(folder)
    assert contents(folder) == {k: v for k, v in BODIES.items() if k != "k4"}
    assert (tmp_path / "responses.damaged-1" / segment.name).read_bytes() == damaged
    assert "11 records" in head and "responses.damaged-1" in head
    for line, number, why in zip(
        lost, (5, 13, 14), ("damaged", "a second time", "cut off"), strict=True
    ):
        assert line.startswith(f"00000001.jsonl:{number}: ") and why in line
    assert len(repair(folder)) == 1


def test_repair_refuses_what_is_no_store_and_what_is_in_use(tmp_path):
    assert "is no store" in str(fault(lambda: repair(tmp_path)))
    fault(lambda: repair(tmp_path / "missing"))
    fill(tmp_path / "s")
    with Log(tmp_path / "s"):
        assert f"pid {os.getpid()}" in str(fault(lambda: repair(tmp_path / "s")))


def test_a_copy_that_differs_takes_nobody_s_place(tmp_path, monkeypatch):
    folder, write = tmp_path / "s", files.write_atomic
    segment = fill(folder)
    data = segment.read_bytes()

    def garble(path: Path, lines: Iterable[bytes]) -> None:
        write(path, (line.replace(b"answer 2 ", b"answer 9 ") for line in lines))

    monkeypatch.setattr("distill.storage.repair.write_atomic", garble)
    assert "the copy cannot be read: damaged record" in str(fault(lambda: repair(folder)))
    assert segment.read_bytes() == data


def test_no_empty_log_takes_the_place_of_one_whose_copy_was_cut_off(tmp_path):
    fill(tmp_path / "s.repaired")
    assert "a copy was cut off" in str(fault(lambda: contents(tmp_path / "s")))
    assert not (tmp_path / "s").exists()


# --- versions (D7)


def test_a_newer_version_is_refused(tmp_path):
    fill(tmp_path)
    (tmp_path / "version.json").write_text('{"version": 2}')
    for work in (contents, repair):
        assert "newer than 1 (use a newer distill)" in str(fault(lambda work=work: work(tmp_path)))


@pytest.mark.parametrize("text", [None, "[]", '{"version": "x"}'])
def test_a_lost_or_damaged_version_is_repaired(tmp_path, text):
    folder = tmp_path / "s"
    fill(folder)
    (folder / "version.json").unlink() if text is None else (folder / "version.json").write_text(
        text
    )
    fault(lambda: contents(folder))
    repair(folder)
    assert contents(folder) == BODIES


# --- a disk that refuses (D4)


def refuse(monkeypatch, name: str, code: int) -> None:
    """Make one call of `os` fail."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize(("call", "code"), [("write", errno.ENOSPC), ("fsync", errno.EIO)])
def test_a_failed_write_is_taken_back_and_ends_writing(tmp_path, monkeypatch, call, code):
    segment = fill(tmp_path, ["k0", "k1"])
    before = segment.read_bytes()
    with Log(tmp_path) as log:
        with monkeypatch.context() as patch:
            refuse(patch, call, code)
            fault(lambda: log.append([("response", "k2", BODIES["k2"])]))
        assert segment.read_bytes() == before
        assert "an earlier write failed" in str(fault(lambda: log.append([("a", "b", 1)])))
        assert ("response", "k2") not in log
    fill(tmp_path)
    assert contents(tmp_path) == BODIES


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    fault(lambda: contents(tmp_path / "file" / "store"))
    fault(lambda: files.write_atomic(tmp_path / "file" / "x", b""))
    fault(lambda: files.write_atomic(tmp_path, b""))
    fault(lambda: files.read_json(tmp_path))
    fault(lambda: files.read_records(tmp_path, Document))
    assert not list(tmp_path.glob(".*.tmp"))


# --- a kill at every call (D1)


def test_kill_at_every_call_of_an_append(tmp_path, monkeypatch):
    monkeypatch.setattr(Log, "SEGMENT_BYTES", 300)
    told = tmp_path / "told"  # keys for which append returned, in the child
    told.touch()
    folder = tmp_path / "round0"

    def work() -> None:
        with Log(folder) as log, open_file(told, "a") as acknowledged:
            for key, body in BODIES.items():
                log.append([("response", key, body), ("intent", key, 1)])
                acknowledged.write(key + "\n")
                acknowledged.flush()

    def check() -> None:
        nonlocal folder
        kept = contents(folder)
        assert kept == {k: v for k, v in BODIES.items() if k in kept}
        assert set(told.read_text().split()) <= kept.keys()
        fill(folder)
        assert contents(folder) == BODIES  # and no key stands twice, or opening would stop
        told.write_text("")
        folder = tmp_path / f"round{int(folder.name[5:]) + 1}"

    assert killed_at_every_call(work, check) > 45


def test_kill_at_every_call_while_a_torn_tail_is_moved(tmp_path):
    segment = fill(tmp_path / "s")
    data = segment.read_bytes()[:-5]

    def check() -> None:
        assert len(contents(tmp_path / "s")) == len(BODIES) - 1
        tails = {path.read_bytes() for path in (tmp_path / "s" / "torn").iterdir()}
        assert tails == {data[data.rfind(b"\n") + 1 :]}
        segment.write_bytes(data)

    segment.write_bytes(data)
    assert killed_at_every_call(lambda: contents(tmp_path / "s"), check) >= 8


def test_kill_at_every_call_of_a_repair(tmp_path):
    rounds = (tmp_path / str(n) / "s" for n in itertools.count())
    folder, damaged = tmp_path, b""

    def begin() -> None:
        nonlocal folder, damaged
        folder = next(rounds)
        segment = fill(folder)
        damaged = segment.read_bytes().replace(b"answer 4", b"answer 5")
        segment.write_bytes(damaged)

    def check() -> None:
        if not (folder / "repair.json").exists():
            fault(lambda: contents(folder))
        repair(folder)
        assert contents(folder) == {k: v for k, v in BODIES.items() if k != "k4"}
        originals = folder.parent.glob("s.damaged-*/00000001.jsonl")
        assert damaged in [path.read_bytes() for path in originals]
        begin()

    begin()
    assert killed_at_every_call(lambda: repair(folder), check) > 20


# --- locks and atomic files


def test_lock_names_its_holder_and_is_free_after_a_kill(tmp_path):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with folder_lock(tmp_path):
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    error = fault(lambda: folder_lock(tmp_path).__enter__())
    assert f"lock held by pid {pid} (wait for it, or end it)" in str(error)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / ".lock").read_text() == str(pid)
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        fault(lambda: folder_lock(tmp_path).__enter__())


def test_atomic_write_is_old_or_new_at_every_kill(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def check() -> None:
        assert path.read_bytes() in (b"old", b"new" * 1000)
        path.write_bytes(b"old")
        with folder_lock(tmp_path):
            assert {p.name for p in tmp_path.iterdir()} == {"f", ".lock"}

    assert killed_at_every_call(lambda: files.write_atomic(path, b"new" * 1000), check) == 5


def test_records_files_name_the_damaged_line(tmp_path):
    path = tmp_path / "d.jsonl"
    documents = [Document.make(f"text {n}", "here") for n in range(3)]
    files.write_records(path, documents)
    assert files.read_records(path, Document) == documents
    path.write_text(path.read_text().replace("text 1", 'te"xt 1'))
    assert f"{path}:2: is damaged" in str(fault(lambda: files.read_records(path, Document)))
    path.unlink()
    assert "is missing (run the stage" in str(fault(lambda: files.read_records(path, Document)))


def test_appended_records_survive_a_cut_at_every_byte(tmp_path):
    path = tmp_path / "ledger.jsonl"
    documents = [Document.make(f"text {n}", "é") for n in range(3)]
    for document in documents[:2]:
        files.append_record(path, document)
    data = path.read_bytes()
    for cut in range(data.index(b"\n") + 1, len(data)):
        path.write_bytes(data[:cut])
        assert files.read_records(path, Document, torn=True) == documents[:1]
        files.append_record(path, documents[2])
        assert files.read_records(path, Document) == [documents[0], documents[2]]
