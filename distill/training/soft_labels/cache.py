"""The teacher's distributions on disk: for each supervised token its top ids and the tail mass.

A cache is a folder, one for each teacher and setting, of chunks that appear complete or not at all:
a line with the format and the header's length and hash, the header (JSON: the rows' keys and
lengths, the body's hash), and the body, each column cut into its bytes' planes and deflated.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from distill.config.learning import Signals
from distill.errors import DistillError, Exit
from distill.records import canonical, digest
from distill.storage.files import disk_errors, write_atomic
from distill.training.batches import Example

FORMAT = 1
MAGIC = b"distill-signals"
STEPS = 16  # of log-probability a nat
ENDING = ".signals"
CHUNK_TOKENS = 4096  # supervised tokens of a chunk: what a kill can cost
TEXT_ONLY = "train on text: train.loss={ce: 1, forward_kl: 0}"
WAY_OUT = "remove the file; --redo signals captures again what it held"
SLACK = 1e-3  # by which a server's rounded probabilities may sum to more than one
# Ids listed a token, times sqrt(1 - p): 3 at p = .99, 10 at .999 (benchmark_signals.py).
LISTED = 0.33
# Bytes a token, times samples^0.35, on a person's answers; half on a teacher's own
# (benchmark_sampled.py).
SAMPLED = 2.5
BYTES_A_TOKEN, BYTES_AN_ID = 5.0, 2.45  # of files, deflated, with index and checksums


@dataclass(frozen=True)
class Signal:
    """The distributions of N tokens: how many ids each lists, their ids and codes, and the tails.

    A token's ids are its nucleus, by falling probability. A code is steps of 1/16 nat below the
    first (never more than 255), `tail_mass_N` the exact mass of what is not listed, and `tails_TN`
    for each further temperature T the log of the sum of p^(1/T) over that. Probabilities are scaled
    to one minus the tail mass, so one id is exact, and others have a relative error only (Δ²/24
    nat at most, 0.0002).

    Of a sampled token the codes count samples: the first code of a nucleus is always 0, a count
    never. The tail mass is 0. Frequencies are unbiased, where steps would be off by up to 3 % of a
    rare id's, always the same way.
    """

    counts_N: NDArray[np.uint16]
    ids_E: NDArray[np.uint32]
    codes_E: NDArray[np.uint8]
    tail_mass_N: NDArray[np.float32]
    tails_TN: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.counts_N)

    def logs(self) -> NDArray[np.float32]:
        """Return the log-probabilities (E,), those of a token summing to 1 minus its tail mass."""
        codes_E = self.codes_E.astype(np.float64)
        owners_E = np.repeat(np.arange(len(self)), self.counts_N)
        firsts_N = np.cumsum(self.counts_N, dtype=np.int64) - self.counts_N
        sampled_E = (codes_E[firsts_N] > 0)[owners_E]
        logs_E = np.where(sampled_E, np.log(np.maximum(codes_E, 1)), codes_E / -STEPS)
        sums_N = np.bincount(owners_E, np.exp(logs_E), minlength=len(self))
        with np.errstate(divide="ignore"):
            scale_N = np.log1p(-self.tail_mass_N.astype(np.float64)) - np.log(sums_N)
        return (logs_E + scale_N[owners_E]).astype(np.float32)

    @classmethod
    def from_lists(
        cls, lists: Sequence[Mapping[int, float]], settings: Signals, vocabulary: int
    ) -> Self:
        """Return what a server listed for each token (id to log-probability), cut to p and k.

        Ids from `vocabulary` on, which no text has, are left out. Raises ValueError where
        probabilities sum to more than 1.
        """
        counts, entries, tails = list[int](), list[tuple[float, int]](), list[float]()
        for listed in lists:
            rows = sorted((-log, i) for i, log in listed.items() if i < vocabulary)
            mass_K = np.exp([-log for log, _ in rows])
            if not len(rows) or mass_K.sum() > 1 + SLACK or not mass_K[0]:
                what = "its log-probabilities are none: start vLLM with"
                raise ValueError(f"{what} --logprobs-mode raw_logprobs")
            # the first, and others while those before them hold less than p
            before_K = np.cumsum(mass_K) - mass_K
            count = max(1, int(((before_K < settings.p) & (mass_K > 0))[: settings.k].sum()))
            counts.append(count)
            entries += rows[:count]
            tails.append(max(0.0, 1 - float(mass_K[:count].sum())))
        counts_N, none_TN = np.array(counts, np.uint16), np.zeros((0, len(counts)), np.float32)
        logs_E, ids_E = (np.array(column) for column in zip(*entries, strict=True))
        codes_E = codes(-logs_E.astype(np.float32), counts_N)
        columns = (ids_E.astype(np.uint32), codes_E, np.array(tails, np.float32))
        return cls(counts_N, *columns, none_TN)

    @classmethod
    def join(cls, parts: Sequence["Signal"]) -> Self:
        """Lay signals end to end; at least one."""
        names = ("counts_N", "ids_E", "codes_E", "tail_mass_N", "tails_TN")
        return cls(*(np.concatenate([getattr(part, n) for part in parts], -1) for n in names))

    def split(self, lengths: Sequence[int]) -> Iterator["Signal"]:
        """Yield the signals of as many tokens each as `lengths` says, which add up to all."""
        ends_N, start = np.concatenate([[0], np.cumsum(self.counts_N, dtype=np.int64)]), 0
        for length in lengths:
            tokens = slice(start, start := start + length)
            ids = slice(ends_N[tokens.start], ends_N[tokens.stop])
            lists = (self.counts_N[tokens], self.ids_E[ids], self.codes_E[ids])
            yield Signal(*lists, self.tail_mass_N[tokens], self.tails_TN[:, tokens])


def codes(logs_E: NDArray[np.float32], counts_N: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return the codes of log-probabilities, each token's falling: 1/16 nats below its first."""
    firsts_N = np.cumsum(counts_N, dtype=np.int64) - counts_N
    below_E = np.repeat(logs_E[firsts_N], counts_N) - logs_E
    return np.clip(np.rint(below_E * STEPS), 0, 255).astype(np.uint8)


def supervised_ids(example: Example) -> list[int]:
    """Return the ids that an example's distributions stand for, in order."""
    return [i for i, weight in zip(example.input_ids, example.weights, strict=True) if weight]


class SignalKey(NamedTuple):
    """What names and checks an example's signal: its id, its supervised ids' hash, how many."""

    example: str
    tokens: str
    length: int

    @classmethod
    def of(cls, example: Example) -> "SignalKey":
        """Return the key of an example's signal."""
        ids = supervised_ids(example)
        return cls(example.id, digest(ids), len(ids))


def _deflate(array: NDArray[Any], width: int) -> bytes:
    """Deflate an array's lowest `width` bytes, plane by plane: high bytes are nearly free."""
    plain = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
    planes = plain.view(np.uint8).reshape(-1, array.dtype.itemsize)[:, :width]
    return zlib.compress(np.ascontiguousarray(planes.T).tobytes(), 6)


def _inflate(data: bytes, count: int, dtype: type[np.generic], width: int) -> NDArray[Any]:
    """Return what `_deflate` packed; raises ValueError where the bytes are others."""
    planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(width, count)
    wide = np.zeros((count, np.dtype(dtype).itemsize), np.uint8)
    wide[:, :width] = planes.T
    return wide.view(np.dtype(dtype).newbyteorder("<")).reshape(count).astype(dtype)


def encode_chunk(teacher: str, rows: Sequence[SignalKey], signal: Signal) -> bytes:
    """Return the bytes of a chunk: `signal` holds the rows' tokens, end to end."""
    columns = [(signal.counts_N, 2), (signal.ids_E, 3), (signal.codes_E, 1)]
    columns += [(column, 4) for column in (signal.tail_mass_N, *signal.tails_TN)]
    packed = [_deflate(column, width) for column, width in columns]
    body = b"".join(packed)
    facts = {
        "teacher": teacher,
        "rows": rows,
        "listed": len(signal.ids_E),
        "columns": [len(column) for column in packed],
        "body": hashlib.sha256(body).hexdigest(),
    }
    header = canonical(facts)
    checksum = hashlib.sha256(header).hexdigest().encode()
    return b"%s %d %d %s\n" % (MAGIC, FORMAT, len(header), checksum) + header + body


class SignalChunk(NamedTuple):
    """A chunk's file, where its body begins, and its header as `encode_chunk` wrote it."""

    path: Path
    begin: int
    header: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "SignalChunk":
        """Read and check a chunk's header and length; raises DistillError (exit 5) for damage."""
        with disk_errors(path), path.open("rb") as file:
            line = file.readline(200)
            try:
                magic, version, size, checksum = line.split()
                if magic == MAGIC and int(version) > FORMAT:
                    what = f"format {int(version)}, newer than {FORMAT}"
                    raise DistillError(Exit.STATE, path, what, "use a newer distill")
                text = file.read(int(size))
                same = hashlib.sha256(text).hexdigest() == checksum.decode()
                if (magic, int(version), same) != (MAGIC, FORMAT, True):
                    raise ValueError
                chunk = cls(path, len(line) + len(text), json.loads(text))
                if path.stat().st_size != chunk.begin + sum(chunk.header["columns"]):
                    raise ValueError
            except ValueError:
                raise DistillError(Exit.STATE, path, "is damaged", WAY_OUT) from None
        return chunk

    def rows(self) -> list[SignalKey]:
        """Return what names the signals, in their order."""
        return [SignalKey(*row) for row in self.header["rows"]]

    def read(self) -> dict[str, Signal]:
        """Return the signals by their examples' ids; raises DistillError (exit 5) for damage."""
        with disk_errors(self.path):
            body = self.path.read_bytes()[self.begin :]
        if hashlib.sha256(body).hexdigest() != self.header["body"]:
            raise DistillError(Exit.STATE, self.path, "is damaged", WAY_OUT)
        names, lengths = zip(*((row.example, row.length) for row in self.rows()), strict=True)
        tokens, listed, sizes = sum(lengths), self.header["listed"], self.header["columns"]
        kinds = [(tokens, np.uint16, 2), (listed, np.uint32, 3), (listed, np.uint8, 1)]
        kinds += [(tokens, np.float32, 4)] * (len(sizes) - 3)
        ends = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        counts_N, ids_E, codes_E, tail_mass_N, *tails = (
            _inflate(body[slice(*end)], *kind) for end, kind in zip(ends, kinds, strict=True)
        )
        tails_TN = np.array(tails, np.float32).reshape(len(tails), tokens)
        signal = Signal(counts_N, ids_E, codes_E, tail_mass_N, tails_TN)
        return dict(zip(names, signal.split(lengths), strict=True))


class SignalCache:
    """The chunks of one teacher and setting; `teacher` is the digest of both, the folder's name.

    Opening reads the headers, and raises DistillError (exit 5) for a bad one. One process at a time
    adds to it, under the folder's lock.
    """

    def __init__(self, store: Path, teacher: str) -> None:
        self.folder, self.teacher = store / "signals" / teacher, teacher
        self.index: dict[str, tuple[SignalChunk, SignalKey]] = {}
        for path in sorted(self.folder.glob(f"*{ENDING}")):
            self._add(path)

    def _add(self, path: Path) -> None:
        chunk = SignalChunk.open(path)
        if (teacher := chunk.header["teacher"]) != self.teacher:
            what = f"holds signals of another teacher or setting ({teacher[:12]})"
            raise DistillError(Exit.STATE, path, what, WAY_OUT)
        self.index |= {row.example: (chunk, row) for row in chunk.rows()}

    def append(self, rows: Sequence[SignalKey], signal: Signal) -> None:
        """Write a chunk, durably; raises DistillError (exit 5) on a full disk."""
        last = max((int(path.stem) for path in self.folder.glob(f"*{ENDING}")), default=0)
        path = self.folder / f"{last + 1:08}{ENDING}"
        write_atomic(path, encode_chunk(self.teacher, rows, signal))
        self._add(path)

    def read(self, rows: Sequence[SignalKey]) -> dict[str, Signal]:
        """Return the signals of `rows` by their examples' ids, each chunk checked to the byte.

        Raises DistillError (exit 5) where a row is missing, or stands there for other tokens.
        """
        chunks, signals = dict[Path, SignalChunk](), dict[str, Signal]()
        for row in rows:
            chunk, stored = self.index.get(row.example, (None, None))
            if chunk is None or stored != row:
                what = f"holds no signal of example {row.example} with these tokens"
                raise DistillError(Exit.STATE, self.folder, what, "--redo signals captures it")
            chunks[chunk.path] = chunk
        for chunk in chunks.values():
            signals |= chunk.read()
        return {row.example: signals[row.example] for row in rows}

    def fill(
        self, texts: Sequence[Example], read: Callable[[Sequence[Example]], Iterable[Signal | str]]
    ) -> list[tuple[Example, str]]:
        """Append what `read` yields for each text: its signal, or why it has none.

        A chunk has about CHUNK_TOKENS, in the order of the texts, so it is the same after a kill.
        Returns the texts without a signal, and why.
        """
        failures, part, tokens = list[tuple[Example, str]](), list[Example](), 0
        for number, text in enumerate(texts, 1):
            part.append(text)
            tokens += len(supervised_ids(text))
            if tokens < CHUNK_TOKENS and number < len(texts):
                continue
            pairs = list(zip(part, read(part), strict=True))
            failures += [(one, why) for one, why in pairs if isinstance(why, str)]
            signals = {SignalKey.of(one): s for one, s in pairs if isinstance(s, Signal)}
            if signals:
                self.append(list(signals), Signal.join(list(signals.values())))
            part, tokens = [], 0
        return failures


def sample_offsets(example: str, count: int) -> NDArray[np.float64]:
    """Return where in [0, 1) the samples of an example's tokens begin, always the same."""
    return np.frombuffer(hashlib.shake_256(example.encode()).digest(4 * count), "<u4") / 2**32


def expected_bytes(tokens: int, settings: Signals) -> float:
    """Return about how many bytes the signals of `tokens` take, as measured on teachers' texts."""
    if settings.method == "sampled":
        return tokens * SAMPLED * settings.samples**0.35
    listed = min(settings.k, LISTED * (1 - settings.p) ** -0.5)
    return tokens * (BYTES_A_TOKEN + BYTES_AN_ID * listed)
