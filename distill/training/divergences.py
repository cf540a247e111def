"""Divergences from a teacher's distributions, cached or live, alone or mixed with the cross-entropy of the tokens.

P is the teacher's distribution of the next token, Q the student's, both at the loss's temperature T: softmax(z / T).

    forward_kl   KL(P || Q)
    reverse_kl   KL(Q || P)
    jsd          beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q       (GKD, arXiv 2306.13649)
    skew_kl      KL(P || alpha P + (1 - alpha) Q)                                    (DistiLLM, arXiv 2402.03898)

Each is multiplied by T^2, so that its gradient keeps its size whatever T is (arXiv 1503.02531); `ce`, the cross-entropy
of the tokens, is always at temperature 1 and over the student's whole head. All are in nats.

A cached list covers only the teacher's likeliest tokens. All others are one outcome more on both sides, the tail, of
P's exact remainder and Q's mass of everything unlisted. Merging outcomes never adds to a divergence of these four (they
are f-divergences), so the cached value is a lower bound of the live one; what it misses is how P and Q differ within the
tail, and it is exact where their tails are alike or where everything is listed. Within the tail Q keeps its own
proportions: no unlisted token is pushed up or down but with all others.

A list of draws leaves nothing to the tail. Forward KL's slope by the logits, Q - P, is linear in P, so at temperature 1
it is right in the mean over draws; its value is too high by P's entropy less that of the draws, whatever Q is.

Shape suffixes: those of losses.py, and O outcomes: a vocabulary, or the tail and a list; M entries of a strip's lists.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from distill.training.losses import Head, Measure, apply_at_head, normalise, score_tokens
from distill.training.targets import Live, SoftTargets

FLOOR = -80.0  # the log-probability of what does not happen: finite, and exp() of it nothing beside 1, yet no denormal
LEAST_REST = 2.0**-24  # a remainder of 0 is one below float32's resolution
TINY = torch.finfo(torch.float32).tiny


class Distribution(NamedTuple):
    """Probabilities (R, O) and their logarithms, in float32."""

    probs: Tensor
    logs: Tensor

    @classmethod
    def over_words(cls, logits_RV: Tensor, temperature: float) -> "Distribution":
        """Return softmax(z / T) of a whole vocabulary."""
        probs_RV, sums_R1 = normalise(logits_RV, temperature)
        z_RV = logits_RV if temperature == 1 else logits_RV.float() / temperature
        return cls(probs_RV, z_RV - sums_R1)

    @classmethod
    def over_table(cls, table_RO: Tensor) -> "Distribution":
        """Return the softmax of a table of outcomes, some of which may not happen."""
        logs_RO = torch.log_softmax(table_RO, -1).clamp_min(FLOOR)
        return cls(logs_RO.exp(), logs_RO)


# Of P and Q, the values (R,) and their slopes by the logits of Q (R, O).
Divergence = Callable[[Distribution, Distribution], tuple[Tensor, Tensor]]


def forward_kl(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Return KL(P || Q) and its slope, Q - P."""
    values = torch.linalg.vecdot(teacher.probs, teacher.logs - student.logs)
    return values, student.probs - teacher.probs


def reverse_kl(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Return KL(Q || P) and its slope, Q (log Q / P - KL)."""
    gap = student.logs - teacher.logs
    values = torch.linalg.vecdot(student.probs, gap)
    return values, gap.sub_(values[:, None]).mul_(student.probs)


def jsd(teacher: Distribution, student: Distribution, beta: float) -> tuple[Tensor, Tensor]:
    """Return the generalised Jensen-Shannon divergence and its slope, (1 - beta) Q (log Q / M - KL(Q || M))."""
    (p, log_p), (q, log_q) = teacher, student
    mixed = torch.lerp(q, p, beta).clamp_min_(TINY).log_()
    gap = log_q - mixed
    back = torch.linalg.vecdot(q, gap)
    values = beta * torch.linalg.vecdot(p, mixed.neg_().add_(log_p)) + (1 - beta) * back
    return values, gap.sub_(back[:, None]).mul_(q).mul_(1 - beta)


def skew_kl(teacher: Distribution, student: Distribution, alpha: float) -> tuple[Tensor, Tensor]:
    """Return KL(P || M), M = alpha P + (1 - alpha) Q, and its slope, Q sum(A) - A with A = (1 - alpha) P Q / M."""
    (p, log_p), q = teacher, student.probs
    mixed = torch.lerp(q, p, alpha).clamp_min_(TINY)
    moved = (p * q).div_(mixed).mul_(1 - alpha)
    values = torch.linalg.vecdot(p, mixed.log_().neg_().add_(log_p))
    return values, (q * moved.sum(1, keepdim=True)).sub_(moved)


class Mixture(NamedTuple):
    """The parts of a loss and their weights, none 0: the cross-entropy (`hard`) first, where it is one of them."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    hard: float
    divergences: tuple[Divergence, ...]
    temperature: float

    @classmethod
    def make(
        cls, mix: Mapping[str, float], beta: float, alpha: float, temperature: float
    ) -> "Mixture":
        """Name the parts; raises ValueError for one that is unknown, or a number out of its range."""
        if not (0 < beta < 1 and 0 <= alpha < 1 and temperature > 0):
            raise ValueError(f"{beta=} (0 < beta < 1), {alpha=} (0 <= alpha < 1), {temperature=}")
        by_name: dict[str, Divergence] = {
            "forward_kl": forward_kl,
            "reverse_kl": reverse_kl,
            "jsd": partial(jsd, beta=beta),
            "skew_kl": partial(skew_kl, alpha=alpha),
        }
        if unknown := set(mix) - {"ce", *by_name}:
            raise ValueError(f"no loss is called {', '.join(sorted(unknown))}")
        soft = [name for name in by_name if mix.get(name)]
        names = (*(["ce"] if mix.get("ce") else []), *soft)
        weights = tuple(mix[name] for name in names)
        divergences = tuple(by_name[name] for name in soft)
        return cls(names, weights, mix.get("ce", 0.0), divergences, temperature)

    def diverge(self, teacher: Distribution, student: Distribution) -> tuple[list[Tensor], Tensor]:
        """Return each divergence's values, T^2 included, and the slope of their sum by the student's logits."""
        slope, values = torch.zeros_like(student.probs), []
        weights = self.weights[len(self.weights) - len(self.divergences) :]
        for divergence, weight in zip(self.divergences, weights, strict=True):
            value, gradient = divergence(teacher, student)
            values.append(value * self.temperature**2)
            slope.add_(gradient, alpha=weight * self.temperature)  # T^2, and d(z / T) / dz
        return values, slope


def soft_loss(
    hidden_SE: Tensor,
    head: Head,
    targets_S: Tensor,
    weights_S: Tensor,
    soft: SoftTargets | Live,
    mix: Mapping[str, float],
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the weighted sum of a mixed loss, the sum of weights, and the weighted sum of each part, for the log.

    `mix` gives each part's share, such as {"ce": 0.5, "forward_kl": 0.5}; the parts' sums are before it. One pass over
    the logits serves all parts. Raises ValueError for a part that is unknown, a number out of its range, targets of
    other positions, or lists without a tail for a temperature other than 1.
    """
    mixture = Mixture.make(mix, beta, alpha, temperature)
    positions = len(soft.hidden_ND if isinstance(soft, Live) else soft.rest_N)
    if not len(hidden_SE) == len(targets_S) == positions:
        raise ValueError(f"{len(hidden_SE)} positions, but soft targets of {positions}")
    if isinstance(soft, Live):
        criterion = partial(_against_teacher, mixture, soft, targets_S)
    else:
        criterion = partial(_against_lists, mixture, _Lists.make(soft, temperature), targets_S)
    total, count, parts_P = apply_at_head(
        criterion, mixture.weights, hidden_SE, head, weights_S, bias_V, chunk
    )
    return total, count, dict(zip(mixture.names, parts_P.unbind(), strict=True))


def _against_teacher(mixture: Mixture, live: Live, targets_S: Tensor, block: slice) -> Measure:
    """Measure a block's logits against a teacher's, over the ids that the tokenizer makes."""
    bias = None if live.bias_V is None else live.bias_V[: live.vocabulary]
    head = live.head_VD[: live.vocabulary]
    teacher_RV = torch.nn.functional.linear(live.hidden_ND[block], head, bias)
    targets_R = targets_S[block]

    def measure(strip: slice, logits_RV: Tensor) -> Tensor:
        known_RV = logits_RV[:, : live.vocabulary]
        both = (teacher_RV[strip], known_RV)
        distributions = [Distribution.over_words(z, mixture.temperature) for z in both]
        values, slope = mixture.diverge(*distributions)
        if mixture.hard:
            value, gradient = score_tokens(logits_RV, targets_R[strip])
            values.insert(0, value)
            gradient.mul_(mixture.hard)[:, : live.vocabulary] += slope
            logits_RV.copy_(gradient)
        else:
            known_RV.copy_(slope)
            logits_RV[:, live.vocabulary :] = 0
        return torch.stack(values)

    return measure


class _Lists(NamedTuple):
    """The lists of some positions as a table of outcomes: each entry's row, its column (0 is the tail), and its id."""

    rows_M: Tensor
    columns_M: Tensor
    ids_M: Tensor
    logits_M: Tensor
    tails_R: Tensor
    offsets: Sequence[int]

    @classmethod
    def make(cls, soft: SoftTargets, temperature: float) -> "_Lists":
        """Lay out all positions; raises ValueError where the temperature has no tails."""
        if temperature == 1:
            tails_N = soft.rest_N.clamp_min(LEAST_REST).log()
        elif soft.tail_N is not None:
            tails_N = soft.tail_N
        else:
            raise ValueError(f"the tails were not captured at temperature {temperature}")
        lengths_N = soft.offsets_N1.diff()
        rows_M = torch.repeat_interleave(lengths_N)
        places_M = torch.arange(len(rows_M), device=rows_M.device)
        columns_M = places_M - soft.offsets_N1[rows_M] + 1
        logits_M = soft.logprobs_M.float() / temperature
        offsets = soft.offsets_N1.tolist()
        return cls(rows_M, columns_M, soft.ids_M, logits_M, tails_N.float(), offsets)

    def cut(self, start: int, count: int) -> "_Lists":
        """Return the lists of `count` positions from `start` on."""
        offsets = self.offsets[start : start + count + 1]
        part = slice(offsets[0], offsets[-1])
        entries = (self.columns_M[part], self.ids_M[part], self.logits_M[part])
        tails_R = self.tails_R[start : start + count]
        return _Lists(self.rows_M[part] - start, *entries, tails_R, offsets)

    def teacher(self) -> Distribution:
        """Return P of the outcomes."""
        return Distribution.over_table(self.table(self.logits_M, self.tails_R))

    def table(self, entries_M: Tensor, tails_R: Tensor) -> Tensor:
        """Return the outcomes' logits (R, O): tails in the first column, -inf where a list is shorter than the longest."""
        longest = max(end - start for start, end in pairwise(self.offsets))
        table_RO = entries_M.new_full((len(tails_R), longest + 1), -inf)
        table_RO[:, 0] = tails_R
        table_RO[self.rows_M, self.columns_M] = entries_M
        return table_RO

    def fold(self, logs_M: Tensor, probs_RV: Tensor) -> tuple[Distribution, Tensor]:
        """Return the student's Q of the outcomes and its tails (R,); the probabilities become those of the unlisted."""
        probs_RV[self.rows_M, self.ids_M] = 0
        tails_R = probs_RV.sum(1)
        return Distribution.over_table(self.table(logs_M, tails_R.log())), tails_R

    def unfold(self, slope_RO: Tensor, tails_R: Tensor, unlisted_RV: Tensor) -> None:
        """Turn the unlisted probabilities into the slope of all: the tail's is shared out in proportion."""
        unlisted_RV.mul_((slope_RO[:, 0] / tails_R.clamp_min(TINY))[:, None])
        unlisted_RV[self.rows_M, self.ids_M] = slope_RO[self.rows_M, self.columns_M]


def _against_lists(mixture: Mixture, all_lists: _Lists, targets_S: Tensor, block: slice) -> Measure:
    """Measure a block's logits against cached lists; at temperature 1 the cross-entropy comes from the same table."""
    targets_R, hard = targets_S[block], mixture.hard

    def measure(strip: slice, logits_RV: Tensor) -> Tensor:
        lists, targets = all_lists.cut(block.start + strip.start, len(logits_RV)), targets_R[strip]
        apart = score_tokens(logits_RV, targets) if mixture.temperature != 1 and hard else None
        probs_RV, sums_R1 = normalise(logits_RV, mixture.temperature)
        logs_M = logits_RV[lists.rows_M, lists.ids_M].float() / mixture.temperature
        student, tails = lists.fold(logs_M - sums_R1[lists.rows_M, 0], probs_RV)
        values, slope_RO = mixture.diverge(lists.teacher(), student)
        if hard and not apart:
            values.insert(0, (sums_R1 - logits_RV.gather(1, targets[:, None])).squeeze(1))
            slope_RO.add_(student.probs, alpha=hard)
        lists.unfold(slope_RO, tails, probs_RV)
        if hard and not apart:
            probs_RV[torch.arange(len(targets), device=targets.device), targets] -= hard
        elif apart:
            values.insert(0, apart[0])
            probs_RV.add_(apart[1], alpha=hard)
        logits_RV.copy_(probs_RV)
        return torch.stack(values)

    return measure
