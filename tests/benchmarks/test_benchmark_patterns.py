"""No pattern and no loop over a text takes time in its square (H18): each reads what would make it
so, long enough to tell."""

import sys
import tracemalloc
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts" / "benchmarks"))

import benchmark_patterns as benchmark

from distill.corpus.corpus import split
from distill.tasks.checkers import KINDS

SIZE = 200_000  # characters: what reads them again and again takes a minute or more
SECONDS = 8  # what reads them once takes under two
PIECES = (
    *("spaces", "newlines", "digits", "digits apart", "a long word", "words", "fences", "<", "@"),
    *("CJK", "combining marks", "Devanagari", "thoughts", "brackets", "backticks"),
    *("points in lines", "backslashes", "rows of a table"),
)
QUADRATIC = {  # what once took time in the square of a text, and which text showed it
    "corpus.clean.normalise": ("", "spaces"),
    "corpus.rows.interpret": ("", "spaces"),
    "corpus.rows.interpret, prompt": ("", "spaces"),
    "corpus.contamination.flag": ("", "digits apart"),
    "corpus.contamination.flag, many items": ("", "digits apart"),
    "corpus.prompts.read_questions": ("Q", "spaces"),
    "corpus.prompts.distinct": ("", "spaces"),
    "tasks.checkers, choice": ("answer", "spaces"),
    "tasks.programs, program": ("", "newlines"),
    "publishing.secret_scan": ("", "a long word"),
    "config.check_values": ("://", "digits"),
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_what_was_quadratic_reads_a_long_text_in_seconds(name: str) -> None:
    head, piece = QUADRATIC[name]
    text = benchmark.made(head, benchmark.PIECES[piece], SIZE)
    assert benchmark.seconds_of(benchmark.READERS[name], text, SECONDS) < SECONDS


@pytest.mark.parametrize("name", benchmark.READERS)
def test_every_reader_takes_the_usual_pieces(name: str) -> None:
    """At a size at which a quadratic reader takes more than the limit for one of them."""
    read = benchmark.READERS[name]
    for piece in PIECES:
        text = benchmark.made("", benchmark.PIECES[piece], 50_000)
        assert benchmark.seconds_of(read, text, SECONDS) < SECONDS, piece


def test_every_checker_is_a_reader_unless_it_has_a_clock_of_its_own() -> None:
    clocked = {"math", "regex", "python_tests"}
    lacking = {kind for kind in KINDS if f"tasks.checkers, {kind}" not in benchmark.READERS}
    assert lacking == clocked


def test_fields_that_lie_deep_take_no_memory_in_their_square() -> None:
    tracemalloc.start()
    try:
        benchmark.READERS["tasks.checkers, field_f1 deep"]("a" * 50_000)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_many_documents_are_split_in_seconds() -> None:
    ids = [f"{place:x}" for place in range(80_000)]
    found: list[object] = []
    took = benchmark.seconds_of(lambda _: found.append(split(ids, 1, 0.1, 0.1)), "", SECONDS)
    assert took < SECONDS and len(found) == 1


def test_what_takes_time_in_its_square_is_seen_by_the_benchmark() -> None:
    def quadratic(text: str) -> None:
        for _ in range(30 * len(text)):  # so slow that the first text decides
            text.count("no such thing in it")

    timings = benchmark.measure(quadratic, 1_000_000, 0.3)
    assert timings and all(timing.ratio == float("inf") for timing in timings)
