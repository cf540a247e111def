"""What answers that are yet to be made will take, as ranges of tokens and dollars: pure statistics, no files.

Of a kind of which no answer is known, the range holds whatever the request allows: one token to its cap. Where enough
answers are known (a pilot's, or those of an unfinished run), it is the interval in which the sum of the others lies at
95 %, as for a random sample of the same kind. Money is Decimal at its ends; statistics are floats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import groupby

from distill.estimates import NOTHING, Span, total
from distill.generation.prices import MILLION, TokenPrice
from distill.records import Stop, Usage

BYTES = Span(2, 6)  # of a token, in any language
TEMPLATE = Span(3, 60)  # tokens of a chat template, and of a system prompt that the server adds
CONFIDENCE = 0.95
FEWEST = 5  # answers of a kind from which its others are foretold


@dataclass(frozen=True)
class Sample:
    """One answer that is known: the bytes of its question, what it took, and how it stopped.

    `waiting` are the seconds until it came, `seconds` those since the answer before came.
    """

    size: int
    usage: Usage
    dollars: Decimal | None
    stop: Stop
    waiting: float
    seconds: float


@dataclass(frozen=True)
class Group:
    """Requests of one kind that are to be asked: how many, bytes of a question (their mean), output cap, known answers."""

    name: str
    count: Span
    size: Span
    cap: int
    samples: tuple[Sample, ...] = ()
    bytes_per_token: Span = BYTES


@dataclass(frozen=True)
class Forecast:
    """What is to be asked takes in all; dollars are None where no price is known, seconds where no answer is.

    `waiting` is one answer after the other; `seconds` as fast as those that are known came.
    """

    count: Span
    input: Span
    output: Span
    dollars: tuple[Decimal, Decimal] | None
    waiting: Span | None
    seconds: Span | None
    samples: tuple[Sample, ...]  # which it rests on


def input_tokens(size: Span, bytes_per_token: Span = BYTES) -> Span:
    """Return the tokens of a question from its bytes."""
    return Span(size.low / bytes_per_token.high, size.high / bytes_per_token.low) + TEMPLATE


def dollars_of(price: TokenPrice, read: Span, written: Span) -> tuple[Decimal, Decimal]:
    """Return what ranges of tokens cost; cached input is counted as if it were new."""
    ends = []
    for tokens_in, tokens_out in ((read.low, written.low), (read.high, written.high)):
        paid = math.ceil(tokens_in) * price.dollars_per_million_input
        ends.append((paid + math.ceil(tokens_out) * price.dollars_per_million_output) / MILLION)
    return ends[0], ends[1]


def forecast(groups: Sequence[Group], price: TokenPrice | None) -> Forecast:
    """Return what all groups take together: those that are known by interval, the others by what is allowed."""
    unknown, known = [], []
    for group in pooled([group for group in groups if group.count.high]):
        (known if len(group.samples) >= FEWEST else unknown).append(group)
    samples = tuple(sample for group in known for sample in group.samples)
    ratio = sum(s.usage.input_tokens for s in samples) / max(1, sum(s.size for s in samples))
    read = interval(known, lambda s: s.usage.input_tokens, ratio) + total(
        g.count * input_tokens(g.size, g.bytes_per_token) for g in unknown
    )
    foretold = interval(known, lambda s: s.usage.output_tokens)
    written = foretold + total(g.count * Span(1, g.cap) for g in unknown)
    return Forecast(
        count=total(group.count for group in groups),
        input=read,
        output=written,
        dollars=_dollars(known, unknown, price, ratio),
        waiting=None if unknown else interval(known, lambda s: s.waiting),
        seconds=None if unknown else interval(known, lambda s: s.seconds),
        samples=samples,
    )


def pooled(groups: Sequence[Group]) -> list[Group]:
    """Join groups of one cap that have too few known answers each, but together enough."""
    few = [group for group in groups if 0 < len(group.samples) < FEWEST]
    found = [group for group in groups if group not in few]
    for cap, kinds in groupby(sorted(few, key=lambda g: g.cap), key=lambda g: g.cap):
        alike = list(kinds)
        if sum(len(group.samples) for group in alike) >= FEWEST:
            count = total(group.count for group in alike)
            size = total(group.count * group.size for group in alike)
            mean = Span(size.low / max(1, count.low), size.high / max(1, count.high))
            samples = tuple(sample for group in alike for sample in group.samples)
            found.append(replace(alike[0], count=count, size=mean, cap=cap, samples=samples))
        else:
            found += alike
    return found


def _dollars(
    known: Sequence[Group], unknown: Sequence[Group], price: TokenPrice | None, ratio: float
) -> tuple[Decimal, Decimal] | None:
    """Return the dollars of all groups; a server that states what answers cost needs no price."""
    if any(s.dollars is None for group in known for s in group.samples) or (unknown and not price):
        return None
    slope = ratio * float(price.dollars_per_million_input / MILLION) if price else 0.0
    foretold = interval(known, lambda s: float(s.dollars or 0), slope)
    low, high = (Decimal(f"{end:.9f}") for end in (foretold.low, foretold.high))
    if price:
        asked = total(g.count * input_tokens(g.size, g.bytes_per_token) for g in unknown)
        allowed = dollars_of(price, asked, total(g.count * Span(1, g.cap) for g in unknown))
        low, high = low + allowed[0], high + allowed[1]
    return low, high


def interval(groups: Sequence[Group], value: Callable[[Sample], float], slope: float = 0.0) -> Span:
    """Return the interval, at 95 %, of the sum of `value` over the requests of `groups`.

    What is averaged is the difference from `slope` times the bytes of the question, so that a value which grows with
    them is foretold from the questions that are there (a difference estimator: Cochran, Sampling Techniques, 1977,
    section 7). Groups are strata; degrees of freedom after Satterthwaite (1946).
    """
    ends = [_stratified(groups, value, slope, high) for high in (False, True)]
    low, high = (middle - half for middle, half in ends), (middle + half for middle, half in ends)
    return Span(max(0.0, min(low)), max(0.0, *high)) if groups else NOTHING


def more_of(counts: Sequence[int], left: int, most: int) -> Span:
    """Return how many questions come of `left` documents: as of those before, else up to the `most` asked for."""
    if len(counts) < FEWEST:
        return Span(0, most)
    samples = (Sample(0, Usage(output_tokens=n), None, "end", 0, 0) for n in counts)
    group = Group("", Span(left, left), NOTHING, 0, tuple(samples))
    return interval([group], lambda sample: sample.usage.output_tokens)


def _stratified(
    groups: Sequence[Group], value: Callable[[Sample], float], slope: float, high: bool
) -> tuple[float, float]:
    """Return the middle and half the width of the interval, for the low or the high ends of counts and sizes."""
    middle = variance = freedom = 0.0
    for group in groups:
        count, size = (
            (group.count.high, group.size.high) if high else (group.count.low, group.size.low)
        )
        rests = [value(sample) - slope * sample.size for sample in group.samples]
        n, mean = len(rests), math.fsum(rests) / len(rests)
        spread = math.fsum((rest - mean) ** 2 for rest in rests) / (n - 1)
        own = spread * count * (1 + count / n)  # of the sum, and of the mean that foretells it
        middle += count * (slope * size + mean)
        variance, freedom = variance + own, freedom + own**2 / (n - 1)
    if not variance:
        return middle, 0.0
    from scipy.special import stdtrit  # a quarter of a second to import

    quantile = float(stdtrit(variance**2 / freedom, (1 + CONFIDENCE) / 2))
    return middle, quantile * math.sqrt(variance)
