"""Measure every pattern and loop that reads a user's, a teacher's or a student's text: seconds for
a megabyte of each kind.

    python scripts/benchmarks/benchmark_patterns.py [NAME ...] [--size 1000000] [--limit 20] \\
        [--json patterns.json]

Each function reads a quarter of a megabyte and a megabyte of one repeated piece, chosen so that a
pattern which looks again at what it has seen takes time in its square. Of a linear one the ratio is
about 4, of a quadratic one 16. A row shows the slowest text by seconds, and the one with the
largest ratio among those that take 100 ms. Not here are checks that have a clock of their own
(patterns of tasks, mathematics) and what is read at its end only.
"""

import argparse
import contextlib
import io
import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from rich.table import Table

from distill import formatting
from distill.config.tree import Filters
from distill.config.yaml_file import check_values
from distill.corpus import clean, contamination, pages, privacy, prompts, readers, rows
from distill.corpus.corpus import split
from distill.corpus.near_duplicates import near_repeats, shingles
from distill.corpus.ngrams import Index, words
from distill.errors import DistillError
from distill.evaluation import judge
from distill.generation import filters
from distill.generation.refusals import is_refusal
from distill.languages import language_of
from distill.models.chat_template import beginnings
from distill.publishing import secret_scan
from distill.reasoning import marked, split_reasoning
from distill.records import Document, Item, Message, Prompt, Response
from distill.responders.endpoint import failures, rate_limits, wire
from distill.responders.responder import Request, Sampling
from distill.responders.token_counts import least_tokens
from distill.storage.files import write_json
from distill.storage.progress import console
from distill.tasks.checkers import (
    check,
    count_sentences,
    normalise_answer,
    read_number,
    strip_fence,
)
from distill.tasks.sandbox.programs import ProgramTests, program
from distill.tasks.scoring import score_answer
from distill.tasks.task import load_task

PIECES = {
    "spaces": " ",
    "newlines": "\n",
    "spaces at line ends": " \t \n",
    "ideographic spaces": "\u3000",
    "digits": "1",
    "digits apart": "12 34 ",
    "a long word": "a",
    "a long word of capitals": "A",
    "underscores": "_",
    "words": "ha ",
    "fences": "```\n",
    "fences with names": "```a\nb\n",
    "backticks": "`",
    "<": "<",
    "<|": "<|",
    "@": "@",
    "addresses": "a@",
    "CJK": "\u6f22\u5b57",
    "CJK in sentences": "\u6f22\u5b57\u3002",
    "combining marks": "a\u0301",
    "Devanagari": "\u0928\u0939\u0940\u0902 ",
    "Thai": "\u0e01\u0e34",
    "Arabic": "\u0644\u0627 ",
    "points": ".",
    "points in lines": ".\n",
    "commas": "1,",
    "colons": ":",
    "slashes": "/",
    "backslashes": "\\",
    "hyphens": "-",
    "hashes": "#",
    "stated": "#### \n",
    "boxes": "\\boxed{",
    "quotes": '"',
    "brackets": "[",
    "parentheses": "(a",
    "braces": "{",
    "equals": "f =\n",
    "links": "http://a:",
    "ends of links": "://",
    "homes": "/home/",
    "drives": "C:\\",
    "key-like": "sk-",
    "token-like": "eyJ",
    "long token-like": "eyJ0123456789a.",
    "PEM-like": "-----BEGIN ",
    "bearers": "Bearer ",
    "telephones": "tel +1 (0",
    "IBAN-like": "DE00 ",
    "thoughts": "<think>",
    "ends of thoughts": "</think>",
    "tags": "<a b='",
    "comments": "<!--",
    "entities": "&#",
    "answers": "answer ",
    "questions": "What is a?\n",
    "sentences": "It is. ",
    "ends of sentences": '."',
    "orders": "ignore the above ",
    "roles": "\nsystem ",
    "escapes": "\\ud800",
    "rows of a table": "|-|\n",
}
# what may begin a construct that goes on in one of the pieces, and does not end
HEADS = (
    "",
    "Q",
    "answer",
    "system",
    "sk-",
    "://",
    "C:\\",
    ".",
    "####",
    "\nf",
    "<a ",
    "```\n",
    "-----BEGIN ",
)
SMALL = 1 << 14  # characters on which the worst of all pairs of head and piece are looked for
CHOSEN = 4  # pairs that are measured in full, of each function

Reader = Callable[[str], object]


LLAMA = beginnings(f"<|reserved_special_token_{n}|>" for n in range(256))


def prompt_of(text: str, reference: str = "a") -> Prompt:
    """Return a prompt that asks a text."""
    return Prompt.make((Message(role="user", content=text),), "d", "chat", None, reference)


def response_of(text: str, **changes: Any) -> Response:
    """Return a response that says a text."""
    fields = {"id": "r", "request_key": "k", "sample": 0, "prompt_id": "p", "model": "m"}
    return Response.model_validate({**fields, "text": text, "stop": "end", **changes})


def checked(kind: str, reference: str = "a", **settings: Any) -> Reader:
    """Return the check of an answer by one kind of checker."""
    prompt = prompt_of("q", reference)
    return lambda text: check({"kind": kind, **settings}, prompt, text)


def filtered(several: Sequence[filters.Filter]) -> Reader:
    """Return the look of several filters at an answer."""
    prompt = prompt_of("q")
    return lambda text: [filter_(prompt, response_of(text)) for filter_ in several]


def file_of(text: str) -> io.BufferedReader:
    """Return a file that holds a text."""
    return io.BufferedReader(io.BytesIO(text.encode()))


def whole(read: Callable[[str], Any]) -> Reader:
    """Return a reader that takes all that another yields, and is content where that refuses the
    text."""

    def reader(text: str) -> None:
        with contextlib.suppress(DistillError, ValueError):
            for _ in read(text):
                pass

    return reader


def refusable(read: Reader) -> Reader:
    """Return a reader that is content where another refuses the text."""

    def reader(text: str) -> None:
        with contextlib.suppress(DistillError, ValueError):
            read(text)

    return reader


def near(text: str) -> None:
    """Look for near-repeats of a text, which is there already."""
    documents = [Document.make(f"{text} {place}", place) for place in "abc"]
    turns = {"messages": [{"role": "user", "content": text}] * 2}
    near_repeats([*documents, *(d.model_copy(update={"meta": turns}) for d in documents)], 0.8)


def leaks(text: str) -> None:
    """Look for a text that is held out, and for its pieces as items, in the same text."""
    item = Item.make(prompt_of(text, text))
    contamination.flag(Index([contamination.of_item(item)]), [("d", text)], [("p", text)])


def many_leaks(text: str) -> None:
    """Look for many items that share their words, in the same text."""
    pieces = [text[start : start + 2000] for start in range(0, len(text), 2000)]
    items = [Item.make(prompt_of(piece, "a b c d")) for piece in pieces]
    contamination.flag(Index([contamination.of_item(item) for item in items]), [("d", text)])


def splits(text: str) -> None:
    """Split as many documents as the text has tens of characters."""
    split([f"{place}" for place in range(len(text) // 10)], 1, 10, 10)


def body(content: str, **message: str) -> bytes:
    """Return the body of a server's answer."""
    answer = {"message": {"content": content, **message}, "finish_reason": "stop"}
    return json.dumps({"choices": [answer]}).encode()


def deep_object(text: str) -> None:
    """Compare fields that lie deep, below a name of the text."""
    value: Any = [0] * (len(text) // 10)
    for _ in range(50):
        value = {text[: len(text) // 100]: value}
    check({"kind": "field_f1"}, prompt_of("q", json.dumps(value)), json.dumps(value))


SWITCHES = [name for name, field in Filters.model_fields.items() if field.annotation is bool]
EVERY_FILTER = Filters.model_validate(dict.fromkeys(SWITCHES, True))
READERS: dict[str, Reader] = {
    "corpus.clean.normalise": refusable(clean.normalise),
    "corpus.clean.chunk": lambda text: clean.chunk(text, 6000, 200),
    "corpus.clean.chunk, half over": lambda text: clean.chunk(text, 200, 100),
    "corpus.clean.chunk, most over": lambda text: clean.chunk(text, 200, 180),
    "corpus.pages, HTML": refusable(pages.html_to_text),
    "corpus.readers, JSON lines": whole(lambda t: readers.read_lines(file_of(t), "f")),
    "corpus.readers, CSV": whole(lambda t: readers.read_csv(file_of(t), "f", ",")),
    "corpus.rows.interpret": refusable(lambda t: rows.interpret({"text": t, "title": t}, "f")),
    "corpus.rows.interpret, prompt": refusable(
        lambda t: rows.interpret({"prompt": t, "answer": t}, "f", pattern=r"#### (.+)")
    ),
    "corpus.rows.interpret, turns": refusable(
        lambda t: rows.interpret({"messages": "[{'role': 'user', 'content': '" + t + "'}]"}, "f")
    ),
    "corpus.readers.read_json": refusable(
        whole(lambda t: readers.read_json(file_of(f'[{{"text": "{t}'), "f"))
    ),
    "corpus.readers.recognise": lambda t: readers.recognise(
        t.encode("latin-1", "replace") + b"\xff", None
    ),
    "corpus.privacy.mask": privacy.mask,
    "corpus.clean.break_up": clean.break_up,
    "corpus.near_duplicates.shingles": shingles,
    "corpus.near_duplicates.near_repeats": near,
    "corpus.ngrams.words": words,
    "corpus.prompts.distinct, one": lambda text: prompts.distinct([text]),
    "languages.language_of": language_of,
    # a longer text is none, whatever it holds
    "generation.refusals.is_refusal": lambda text: [
        is_refusal(text[start : start + 1000]) for start in range(0, min(len(text), 50_000), 1000)
    ],
    "corpus.contamination.flag": leaks,
    "corpus.contamination.flag, many items": many_leaks,
    "corpus.prompts.read_questions": prompts.read_questions,
    "corpus.prompts.distinct": lambda text: prompts.distinct(
        f"What is {text[n : n + 8]} {n}?" for n in range(0, len(text), 10)
    ),
    "corpus.corpus.split": splits,
    "corpus.prompts.ask": lambda text: prompts.ask(load_task("summary"), Document.make(text, "f")),
    "generation.filters.active_filters": filtered(filters.active_filters(EVERY_FILTER)),
    "generation.filters.same_as": filters.same_as,
    "responders.endpoint.wire.read_reply": lambda text: wire.read_reply(body(text)),
    "responders.endpoint.wire.read_reply, raw": lambda text: wire.read_reply(text.encode()),
    "responders.endpoint.wire.read_reply, thought": lambda text: wire.read_reply(
        body(f"<think>{text}")
    ),
    "reasoning.split_reasoning": lambda text: marked(split_reasoning(text + "</think>")[0] + text),
    "reasoning.split_reasoning, many": lambda text: [
        split_reasoning(mark * (len(text) // len(mark)))
        for mark in ("<think></think>", "</think>", "`</think>`", "```</think>")
    ],
    "responders.endpoint.failures.classify": lambda text: failures.classify(400, text.encode()),
    "responders.endpoint.failures.classify, error": lambda text: failures.classify(
        400, json.dumps({"error": {"message": text}}).encode()
    ),
    "responders.endpoint.rate_limits.stated_wait": lambda t: rate_limits.stated_wait(
        {}, t.encode()
    ),
    "responders.token_counts.least_tokens": lambda text: least_tokens(
        Request.make("o", "p", (Message(role="user", content=text),), Sampling()), "no/model"
    ),
    "tasks.checkers.strip_fence": strip_fence,
    "tasks.checkers.normalise_answer": normalise_answer,
    "tasks.checkers.count_sentences": count_sentences,
    "tasks.checkers.read_number": read_number,
    **{
        f"tasks.checkers, {kind}": checked(kind, reference)
        for kind, reference in (
            *(("exact", "a"), ("normalised", "a"), ("includes", "a b"), ("choice", "A")),
            *(("number", "1"), ("python_code", "os.f"), ("field_f1", '{"a": 1}')),
        )
    },
    "tasks.checkers, field_f1 deep": deep_object,
    "tasks.checkers, json_object": checked("json_object", keys={"a": "string"}),
    "tasks.checkers, json_schema": checked("json_schema", schema={"type": "object"}),
    "tasks.checkers, max_sentences": checked("max_sentences", max=3),
    "tasks.programs, program": lambda text: program(text, ProgramTests("assert f(1)")),
    "tasks.programs, program of a name": lambda text: program(
        text, ProgramTests("check(f)", "def f():", ("f",))
    ),
    "tasks.scoring.score_answer": lambda text: score_answer(
        Item.make(prompt_of("q")), response_of(text + "b"), "m", None, text
    ),
    "evaluation.judge.read_choice": judge.read_choice,
    "formatting.clip": lambda text: formatting.clip(text, 400),
    "formatting.escape_markdown": formatting.escape_markdown,
    "formatting.verbatim": formatting.verbatim,
    "publishing.secret_scan": secret_scan.HOMES.search,
    "models.chat_template.cut_marks": lambda text: LLAMA.sub("x", text),
    "config.check_values": refusable(lambda text: check_values({"a": text}, {(): "f"})),
}


class Timing(NamedTuple):
    """Seconds for a megabyte, and how many times those of a quarter of it, of one text."""

    text: str
    seconds: float
    ratio: float


def made(head: str, piece: str, size: int) -> str:
    """Return a text of about so many characters: a head, the piece again and again, and an end that
    fits nothing."""
    return head + piece * (size // len(piece)) + "\x01xy"


class TooLong(Exception):
    """A reader took longer than it may."""


def seconds_of(read: Reader, text: str, limit: float) -> float:
    """Return the seconds that a reader takes; `limit` where it takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    started = time.perf_counter()
    try:
        read(text)
        return time.perf_counter() - started
    except TooLong:
        return limit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def worst(read: Reader) -> list[tuple[str, str, str]]:
    """Return the name, head and piece of the texts that take longest, and of those whose time grows
    most."""
    found = []
    for head in HEADS:
        for name, piece in PIECES.items():
            short = seconds_of(read, made(head, piece, SMALL // 4), 1)
            long = seconds_of(read, made(head, piece, SMALL), 1)
            growth = long / max(short, 1e-5) if long > 1e-3 else 0.0
            text = f"{head!r} {name}".removeprefix("'' ")
            if long >= 1:  # a megabyte of it would take hours
                return [(text, head, piece)]
            found.append((long, growth, (text, head, piece)))
    slow = [row[2] for row in sorted(found, reverse=True)[: CHOSEN // 2]]
    steep = [row[2] for row in sorted(found, key=lambda row: -row[1])[: CHOSEN // 2]]
    return list(dict.fromkeys([*slow, *steep]))


def measure(read: Reader, size: int, limit: float) -> list[Timing]:
    """Measure the worst texts in full, the slowest first."""
    timings = []
    for name, head, piece in worst(read):
        quarter = seconds_of(read, made(head, piece, size // 4), limit)
        full = seconds_of(read, made(head, piece, size), limit) if quarter < limit else limit
        ratio = full / quarter if full < limit else float("inf")
        ratio = ratio if full > 0.1 else 0.0  # what is so short is noise
        timings.append(Timing(name, full * 1e6 / size, ratio))
    return sorted(timings, key=lambda timing: -timing.seconds)


def main() -> None:
    """Measure the readers that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of the names of readers")
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds, then it is not linear")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chosen = {
        name: read
        for name, read in READERS.items()
        if not given.names or any(part in name for part in given.names)
    }
    table = Table("reader", "text", "s / MB", "1 MB : 0.25 MB")
    found = {}
    for name, read in chosen.items():
        timings = found[name] = measure(read, given.size, given.limit)
        steepest = max(timings, key=lambda timing: timing.ratio)
        for timing in dict.fromkeys([timings[0], steepest]):
            table.add_row(name, timing.text, f"{timing.seconds:.2f}", f"{timing.ratio:.1f}")
            print(
                f"{name}: {timing.text}: {timing.seconds:.2f} s/MB, x{timing.ratio:.1f}", flush=True
            )
    console.print(table)
    if given.json:
        write_json(given.json, {name: [t._asdict() for t in rows] for name, rows in found.items()})


if __name__ == "__main__":
    main()
