"""The teacher's distributions on disk: for each supervised token its likeliest ids, their log-probabilities, the rest.

A token's row is its nucleus, likeliest first: ids of three bytes, log-probabilities as steps of 1/16 nat below the
likeliest (never more than 255), and the exact mass of all that is not listed, a float32; for each further temperature T
the log of the sum of p^(1/T) over what is not listed. Listed probabilities are scaled to one minus that mass when they
are read, so one listed id is exact, and a whole row costs its relative error only (Δ²/24 nat at most, 0.0002).

A sampled row holds the ids that came up in some draws, and how often in place of the steps: the first of a nucleus is
always 0, of draws never. Its rest is 0, and its probabilities are the shares of the draws: right in the mean to the
last bit, where rounded steps would be off by up to 3 % of a rare id's, always the same way.

A cache is a folder, one for each teacher and setting, of chunks: a line with the format and the header's length and
hash, the header (JSON: the rows' keys and lengths, the body's hash), and the body, each column cut into its bytes'
planes and deflated. A chunk appears whole or not at all, and is never changed. Headers are read without the bodies.
Needs no torch.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from distill.config import Config, EndpointTeacher, LocalTeacher, Signals
from distill.errors import DistillError, Exit
from distill.models import loading, registry
from distill.models.chat_template import template_hash, vocabulary_hash
from distill.records import Example, canonical, digest
from distill.storage.files import disk_errors, read_json, write_atomic, write_json
from distill.storage.fingerprints import MODEL_FILE
from distill.storage.progress import say

FORMAT = 1
MAGIC = b"distill-signals"
STEPS = 16  # of log-probability a nat
ENDING = ".signals"
TEXT_ONLY = "train on text: train.loss={ce: 1, forward_kl: 0}"
WAY_OUT = "remove the file; --redo signals captures again what it held"
LISTED = 0.33  # ids listed a token, times sqrt(1 - p): 3 at p = .99, 10 at .999 (scripts/benchmarks/benchmark_signals.py)
DRAWN = 2.5  # bytes a token, times draws^0.35, on a person's answers; half on a teacher's own (scripts/benchmarks/benchmark_sampled.py)
BYTES_A_TOKEN, BYTES_AN_ID = 5.0, 2.45  # of files, deflated, with index and checksums


@dataclass(frozen=True)
class Signal:
    """The distributions of N tokens: how many ids each lists, all those ids (E,) and codes, and the masses left over.

    `tails_TN` holds a row for each further temperature.
    """

    counts_N: NDArray[np.uint16]
    ids_E: NDArray[np.uint32]
    codes_E: NDArray[np.uint8]
    rest_N: NDArray[np.float32]
    tails_TN: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.counts_N)

    def logs(self) -> NDArray[np.float32]:
        """Return the log-probabilities (E,) of the listed ids, those of a token summing to one minus its rest."""
        codes_E, owners_E = (
            self.codes_E.astype(np.float64),
            np.repeat(np.arange(len(self)), self.counts_N),
        )
        firsts_N = np.cumsum(self.counts_N, dtype=np.int64) - self.counts_N
        drawn_E = (codes_E[firsts_N] > 0)[owners_E]
        logs_E = np.where(drawn_E, np.log(np.maximum(codes_E, 1)), codes_E / -STEPS)
        sums_N = np.bincount(owners_E, np.exp(logs_E), minlength=len(self))
        with np.errstate(divide="ignore"):
            scale_N = np.log1p(-self.rest_N.astype(np.float64)) - np.log(sums_N)
        return (logs_E + scale_N[owners_E]).astype(np.float32)

    @classmethod
    def join(cls, parts: Sequence["Signal"]) -> Self:
        """Lay signals end to end; at least one."""
        return cls(
            np.concatenate([part.counts_N for part in parts]),
            np.concatenate([part.ids_E for part in parts]),
            np.concatenate([part.codes_E for part in parts]),
            np.concatenate([part.rest_N for part in parts]),
            np.concatenate([part.tails_TN for part in parts], 1),
        )

    def split(self, lengths: Sequence[int]) -> Iterator["Signal"]:
        """Yield the signals of as many tokens each as `lengths` says, which add up to all."""
        ends_N = np.concatenate([[0], np.cumsum(self.counts_N, dtype=np.int64)])
        start = 0
        for length in lengths:
            end, first, last = start + length, ends_N[start], ends_N[start + length]
            yield Signal(
                self.counts_N[start:end],
                self.ids_E[first:last],
                self.codes_E[first:last],
                self.rest_N[start:end],
                self.tails_TN[:, start:end],
            )
            start = end


def codes(logs_E: NDArray[np.float32], counts_N: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return the codes of log-probabilities, each token's in falling order: sixteenths of a nat below its first."""
    firsts_N = np.cumsum(counts_N, dtype=np.int64) - counts_N
    below_E = np.repeat(logs_E[firsts_N], counts_N) - logs_E
    return np.clip(np.rint(below_E * STEPS), 0, 255).astype(np.uint8)


def starts(example: str, count: int) -> NDArray[np.float64]:
    """Return where in [0, 1) the draws of an example's tokens begin, always the same."""
    return np.frombuffer(hashlib.shake_256(example.encode()).digest(4 * count), "<u4") / 2**32


class SignalKey(NamedTuple):
    """What an example's signal is found and checked by: the example's id, the hash of its supervised ids, how many."""

    example: str
    tokens: str
    count: int


def token_hash(ids: Sequence[int]) -> str:
    """Hash the token ids that an answer's distributions stand for."""
    return digest(list(ids))


def supervised_ids(example: Example) -> list[int]:
    """Return the ids that an example's distributions stand for, in order."""
    return [i for i, weight in zip(example.input_ids, example.weights, strict=True) if weight]


def _deflate(array: NDArray[Any], width: int) -> bytes:
    """Deflate an array's lowest `width` bytes, plane by plane: the high bytes of ids and counts are nearly free."""
    plain = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
    planes = plain.view(np.uint8).reshape(-1, array.dtype.itemsize)[:, :width]
    return zlib.compress(np.ascontiguousarray(planes.T).tobytes(), 6)


def _inflate(data: bytes, count: int, dtype: type[np.generic], width: int) -> NDArray[Any]:
    """Return what `_deflate` packed; raises ValueError where the bytes are others."""
    planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(width, count)
    wide = np.zeros((count, np.dtype(dtype).itemsize), np.uint8)
    wide[:, :width] = planes.T
    return wide.view(np.dtype(dtype).newbyteorder("<")).reshape(count).astype(dtype)


COLUMNS = (("counts_N", np.uint16, 2), ("ids_E", np.uint32, 3), ("codes_E", np.uint8, 1))


def encode_chunk(teacher: str, rows: Sequence[SignalKey], signal: Signal) -> bytes:
    """Return the bytes of a chunk: `signal` holds the rows' tokens, end to end."""
    packed = [_deflate(getattr(signal, name), width) for name, _, width in COLUMNS]
    packed += [_deflate(column, 4) for column in (signal.rest_N, *signal.tails_TN)]
    body = b"".join(packed)
    header = canonical(
        {
            "teacher": teacher,
            "rows": rows,
            "listed": len(signal.ids_E),
            "columns": [len(column) for column in packed],
            "body": hashlib.sha256(body).hexdigest(),
        }
    )
    line = b"%s %d %d %s\n" % (
        *(MAGIC, FORMAT, len(header)),
        hashlib.sha256(header).hexdigest().encode(),
    )
    return line + header + body


@dataclass(frozen=True)
class SignalChunk:
    """A chunk's file and what its header says."""

    path: Path
    begin: int  # of the body
    teacher: str
    rows: tuple[SignalKey, ...]
    listed: int
    columns: tuple[int, ...]
    body: str

    @classmethod
    def open(cls, path: Path) -> "SignalChunk":
        """Read and check a chunk's header and length; raises DistillError (exit 5) where it is damaged or cut off."""
        with disk_errors(path), path.open("rb") as file:
            line = file.readline(200)
            try:
                magic, version, size, checksum = line.split()
                if magic == MAGIC and int(version) > FORMAT:
                    what = f"format {int(version)}, newer than {FORMAT}"
                    raise DistillError(Exit.STATE, path, what, "use a newer distill")
                text = file.read(int(size))
                readable = magic == MAGIC and int(version) == FORMAT
                if not readable or hashlib.sha256(text).hexdigest() != checksum.decode():
                    raise ValueError
                header = json.loads(text)
            except ValueError:
                raise DistillError(Exit.STATE, path, "its header is damaged", WAY_OUT) from None
        begin = len(line) + len(text)
        if path.stat().st_size != begin + sum(header["columns"]):
            raise DistillError(Exit.STATE, path, "is cut off, or longer than it was", WAY_OUT)
        rows = tuple(SignalKey(*row) for row in header["rows"])
        sizes = tuple(header["columns"])
        return cls(path, begin, header["teacher"], rows, header["listed"], sizes, header["body"])

    def read(self) -> dict[str, Signal]:
        """Return the signals by their examples' ids; raises DistillError (exit 5) where a byte is not as written."""
        with disk_errors(self.path), self.path.open("rb") as file:
            file.seek(self.begin)
            body = file.read()
        if hashlib.sha256(body).hexdigest() != self.body:
            raise DistillError(Exit.STATE, self.path, "is damaged", WAY_OUT)
        ends = np.cumsum((0, *self.columns))
        packed = [body[a:b] for a, b in itertools.pairwise(ends)]
        tokens = sum(row.count for row in self.rows)
        lengths = {"counts_N": tokens, "ids_E": self.listed, "codes_E": self.listed}
        columns = {
            name: _inflate(data, lengths[name], dtype, width)
            for data, (name, dtype, width) in zip(packed, COLUMNS, strict=False)
        }
        floats = [_inflate(data, tokens, np.float32, 4) for data in packed[len(COLUMNS) :]]
        tails_TN = np.stack(floats[1:]) if floats[1:] else np.zeros((0, tokens), np.float32)
        signal = Signal(**columns, rest_N=floats[0], tails_TN=tails_TN)
        parts = signal.split([row.count for row in self.rows])
        return {row.example: part for row, part in zip(self.rows, parts, strict=True)}


@dataclass
class SignalCache:
    """The chunks of one teacher and setting; `teacher` is the digest of both, and the folder's name.

    Opening reads the headers. One process at a time adds to it, under the folder's lock.
    """

    folder: Path
    teacher: str
    index: dict[str, tuple[SignalChunk, SignalKey]] = field(default_factory=dict)

    @classmethod
    def open(cls, store: Path, teacher: str) -> "SignalCache":
        """Open the cache of `teacher` in the shared store; raises DistillError (exit 5) naming a chunk that is wrong."""
        cache = cls(store / "signals" / teacher, teacher)
        for path in sorted(cache.folder.glob(f"*{ENDING}")):
            cache._add(SignalChunk.open(path))
        return cache

    def _add(self, chunk: SignalChunk) -> None:
        if chunk.teacher != self.teacher:
            what = f"holds signals of another teacher or setting ({chunk.teacher[:12]})"
            raise DistillError(Exit.STATE, chunk.path, what, WAY_OUT)
        self.index |= {row.example: (chunk, row) for row in chunk.rows}

    def append(self, rows: Sequence[SignalKey], signal: Signal) -> None:
        """Write a chunk, durably; raises DistillError (exit 5) on a full disk, and leaves what was there."""
        last = max((int(path.stem) for path in self.folder.glob(f"*{ENDING}")), default=0)
        path = self.folder / f"{last + 1:08}{ENDING}"
        write_atomic(path, encode_chunk(self.teacher, rows, signal))
        self._add(SignalChunk.open(path))

    def check(self, rows: Iterable[SignalKey]) -> None:
        """Stop where a row is not in the cache, or stands there for other tokens; raises DistillError (exit 5)."""
        for row in rows:
            entry = self.index.get(row.example)
            if entry is None:
                what = f"holds no signal of example {row.example}"
                raise DistillError(Exit.STATE, self.folder, what, "--redo signals captures it")
            if entry[1] != row:
                what = f"example {row.example} stands there with other tokens"
                raise DistillError(Exit.STATE, entry[0].path, what, WAY_OUT)

    def read(self, rows: Sequence[SignalKey]) -> dict[str, Signal]:
        """Return the signals of `rows` by their examples' ids, every chunk that holds one checked to the byte."""
        self.check(rows)
        requested = dict.fromkeys(row.example for row in rows)
        chunks = {chunk.path: chunk for chunk, _ in (self.index[name] for name in requested)}
        signals: dict[str, Signal] = {}
        for chunk in chunks.values():
            signals |= {name: part for name, part in chunk.read().items() if name in requested}
        return signals

    def bytes(self) -> int:
        """Return the bytes of all chunks."""
        return sum(path.stat().st_size for path in self.folder.glob(f"*{ENDING}"))


def open_teacher(config: Config) -> tuple[Any, dict[str, Any]]:
    """Return the tokenizer of the teacher whose distributions are captured, and the facts that name its signals.

    Raises DistillError (exit 2) where its vocabulary is not the student's.
    """
    teacher, student = config.soft_teacher(), config.student
    trusted = config.reader()[0] == student.model and student.trust_remote_code
    tokenizer = loading.load_tokenizer(*config.reader(), trusted)
    other = loading.load_tokenizer(student.model, student.revision, student.trust_remote_code)
    vocabulary = vocabulary_hash(tokenizer)
    if vocabulary != vocabulary_hash(other):
        where = f"teacher {teacher.model} and student {student.model}"
        what = "have different tokenizers: a distribution over one's tokens says nothing in the other's"
        raise DistillError(Exit.CONFIG, where, what, TEXT_ONLY)
    return tokenizer, {
        **config.signals.shape,
        **reader_facts(config),
        "template": template_hash(tokenizer, config.template_date),
        "vocabulary": vocabulary,
    }


def reader_facts(config: Config) -> dict[str, Any]:
    """Return what names the model that reads: its weights and precision, or where it is served and as what."""
    teacher = config.soft_teacher()
    if isinstance(teacher, EndpointTeacher):
        settings = config.signals
        extra = teacher.extra_body if settings.endpoint or settings.from_answers else {}
        facts = {"endpoint": teacher.base_urls[0], "served": teacher.model}
        came = {"from_answers": True} if settings.from_answers else {}
        return {**facts, **came, "revision": teacher.revision, "extra_body": extra}
    assert isinstance(teacher, LocalTeacher)
    dtype = str(loading.pick_dtype(teacher.dtype)).removeprefix("torch.")
    pinned = registry.identity(teacher.model, teacher.revision)
    return {"weights": pinned, **registry.folder_facts("weights", teacher.model), "dtype": dtype}


def as_captured(store: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts under which the store keeps the signals that these facts name.

    An earlier distill knew a model in a folder by its weights alone. Its cache goes on as that of the first model that
    asks for it (`adopted.json` there), and is not found any more once a file of that folder has changed.
    """
    former = {key: value for key, value in facts.items() if not MODEL_FILE.fullmatch(key)}
    folder = store / "signals" / describe(former)
    if former == facts or not folder.is_dir():
        return facts
    adopted = folder / "adopted.json"
    if not adopted.exists():
        write_json(adopted, facts)
        what = "is named by the hash of the teacher's weights alone"
        say(f"signals: {folder} {what}, and counts as that of the model as it is now")
    return former if read_json(adopted) == facts else facts


def expected_bytes(tokens: int, settings: Signals) -> float:
    """Return about how many bytes the signals of `tokens` take, from what was measured on a teacher's own text."""
    if settings.method == "sampled":
        return tokens * DRAWN * settings.samples**0.35
    listed = min(settings.k, LISTED * (1 - settings.p) ** -0.5)
    return tokens * (BYTES_A_TOKEN + BYTES_AN_ID * listed)


def describe(settings: Mapping[str, Any]) -> str:
    """Return the digest of what shapes a teacher's signals, with the format: the name of its cache."""
    return digest({"format": FORMAT, "steps": STEPS, **settings})
