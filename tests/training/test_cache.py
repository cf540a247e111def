"""The cache of distributions: what was written is read, and any damage is found."""

from pathlib import Path

import numpy as np
import pytest

from distill.errors import DistillError, Exit
from distill.storage.files import folder_lock
from distill.training.soft_labels.cache import (
    Signal,
    SignalCache,
    SignalChunk,
    SignalKey,
    codes,
    encode_chunk,
)
from tests.support.mortal import killed_at_every_call

TEACHER = "f" * 32


def made(tokens: int = 40, seed: int = 0, temperatures: int = 0) -> tuple[Signal, np.ndarray]:
    """A signal of random distributions over ids up to 2^24, and its exact log-probabilities."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 9, tokens).astype(np.uint16)
    rest = random.uniform(0, 0.2, tokens).astype(np.float32)
    logs = []
    for count, left in zip(counts, rest, strict=True):
        weights = np.sort(random.dirichlet(np.full(count, 0.7)))[::-1] + 1e-5
        logs.append(np.log(weights / weights.sum() * (1 - left)))
    exact = np.concatenate(logs).astype(np.float32)
    ids = random.integers(0, 1 << 24, len(exact)).astype(np.uint32)
    tails = random.normal(size=(temperatures, tokens)).astype(np.float32)
    return Signal(counts, ids, codes(exact, counts), rest, tails), exact


def rows(*counts: int) -> list[SignalKey]:
    return [SignalKey(f"{n:032x}", f"{n + 99:032x}", count) for n, count in enumerate(counts)]


def test_what_is_read_back_is_within_a_half_step_and_a_single_id_is_exact():
    signal, exact = made(200)
    owners = np.repeat(np.arange(200), signal.counts_N)
    assert np.abs(signal.logs() - exact)[signal.codes_E < 255].max() < 1 / 16
    single = signal.counts_N[owners] == 1
    assert single.any() and np.allclose(signal.logs()[single], exact[single], atol=1e-6)
    probs, rest = np.exp(exact.astype(np.float64)), signal.tail_mass_N
    kl = np.bincount(owners, probs * (exact - signal.logs()))
    sums = np.bincount(owners, np.exp(signal.logs().astype(np.float64)))
    assert np.allclose(sums + rest, 1, atol=1e-6)
    assert abs(kl.mean()) < (1 / 16) ** 2 / 24 * 1.2 and (rest > 0).all()


@pytest.mark.parametrize("temperatures", [0, 2])
def test_a_cache_gives_back_what_was_put_in(tmp_path, temperatures):
    signal, _ = made(40, temperatures=temperatures)
    cache = SignalCache(tmp_path, TEACHER)
    cache.append(rows(10, 0, 25, 5), signal)
    found = SignalCache(tmp_path, TEACHER).read(rows(10, 0, 25, 5))
    whole = Signal.join([found[row.example] for row in rows(10, 0, 25, 5)])
    for name in ("counts_N", "ids_E", "codes_E", "tail_mass_N", "tails_TN"):
        one, other = getattr(whole, name), getattr(signal, name)
        assert one.dtype == other.dtype and np.array_equal(one, other), name


def test_chunks_follow_each_other_and_only_what_is_asked_is_returned(tmp_path):
    cache = SignalCache(tmp_path, TEACHER)
    first, second = rows(4, 6), [SignalKey("a" * 32, "b" * 32, 5)]
    cache.append(first, made(10)[0])
    cache.append(second, made(5, seed=1)[0])
    assert [path.name for path in sorted(cache.folder.iterdir())] == [
        "00000001.signals",
        "00000002.signals",
    ]
    found = SignalCache(tmp_path, TEACHER).read([first[1], *second])
    assert list(found) == [first[1].example, "a" * 32]
    assert np.array_equal(found["a" * 32].ids_E, made(5, seed=1)[0].ids_E)


def test_a_row_that_is_missing_or_stands_for_other_tokens_is_an_error(tmp_path):
    cache = SignalCache(tmp_path, TEACHER)
    cache.append(rows(4, 6), made(10)[0])
    for row in (SignalKey("c" * 32, "", 1), rows(4)[0]._replace(tokens="d" * 32)):
        with pytest.raises(DistillError, match=f"no signal of example {row.example} .*--redo") as e:
            cache.read([row])
        assert e.value.code == Exit.STATE


def test_every_cut_and_every_flipped_byte_is_found_with_its_file(tmp_path):
    whole = encode_chunk(TEACHER, rows(1, 1), made(2)[0])
    path = tmp_path / "signals" / TEACHER / "00000001.signals"
    path.parent.mkdir(parents=True)
    damaged = [whole[:length] for length in range(len(whole))]
    damaged += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    for data in [*damaged, whole + b"x"]:
        path.write_bytes(data)
        with pytest.raises(DistillError, match=r"00000001.signals: .*\(\S+") as fault:
            SignalCache(tmp_path, TEACHER).read(rows(1, 1))
        assert fault.value.code == Exit.STATE
    path.write_bytes(whole)
    assert SignalCache(tmp_path, TEACHER).read(rows(1, 1))


def test_a_chunk_of_another_teacher_or_of_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "signals" / TEACHER / "00000001.signals"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode_chunk("0" * 32, rows(5), made(5)[0]))
    with pytest.raises(DistillError, match="another teacher"):
        SignalCache(tmp_path, TEACHER)
    path.write_bytes(encode_chunk(TEACHER, rows(5), made(5)[0]).replace(b" 1 ", b" 2 ", 1))
    with pytest.raises(DistillError, match="newer"):
        SignalChunk.open(path)


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path, monkeypatch):
    cache = SignalCache(tmp_path, TEACHER)
    cache.append(rows(5), made(5)[0])
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full")
    opened = Path.open

    def fills_up(path, mode="r", *words, **named):
        return opened(full if path.suffix == ".tmp" else path, mode, *words, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fills_up)
        with pytest.raises(DistillError, match=r"No space left.*free space") as fault:
            cache.append([SignalKey("a" * 32, "b" * 32, 5)], made(5)[0])
    assert fault.value.code == Exit.STATE
    assert list(SignalCache(tmp_path, TEACHER).read(rows(5))) == [rows(5)[0].example]


def test_killed_at_any_call_to_the_disk_no_finished_chunk_is_lost(memory):
    SignalCache(memory, TEACHER).append([SignalKey("a" * 32, "t", 5)], made(5)[0])

    def check() -> None:
        cache = SignalCache(memory, TEACHER)
        for name in cache.index:
            assert np.array_equal(cache.read([cache.index[name][1]])[name].ids_E, made(5)[0].ids_E)
        assert "a" * 32 in cache.index
        with folder_lock(cache.folder):  # removes what the kill left behind
            assert not list(cache.folder.glob(".*.tmp"))

    def append() -> None:
        cache = SignalCache(memory, TEACHER)
        cache.append([SignalKey(f"{len(cache.index):032x}", "t", 5)], made(5)[0])

    assert killed_at_every_call(append, check) >= 4
