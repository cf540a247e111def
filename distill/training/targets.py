"""What a student is trained towards besides the tokens themselves: the teacher's distributions, stored or live.

Shape suffixes: N supervised positions, M entries of all positions' lists, D the teacher's hidden size, V its vocabulary.
"""

from typing import NamedTuple

from torch import Tensor


class SoftTargets(NamedTuple):
    """The teacher's likeliest tokens at N supervised positions, as lists of various lengths, and what they leave over.

    Position n has the entries `offsets_N1[n]` up to `offsets_N1[n + 1]`; no id stands twice in a list. `logprobs_M` are
    natural logarithms at temperature 1, renormalised so that a list and its `rest_N` sum to 1. `tail_N` is
    log sum exp(logprob / T) over the unlisted tokens, for the one temperature T that is trained at (None: only T = 1,
    where it is log(rest_N)).
    """

    ids_M: Tensor
    logprobs_M: Tensor
    offsets_N1: Tensor
    rest_N: Tensor
    tail_N: Tensor | None = None


class Live(NamedTuple):
    """A teacher in memory: its last hidden states at the N supervised positions, and its head.

    `vocabulary` is how many ids the tokenizer makes: both models' heads are cut to it, for each pads its own in its way.
    """

    hidden_ND: Tensor
    head_VD: Tensor
    vocabulary: int
    bias_V: Tensor | None = None
