"""Losses as pure functions that return (sum, count); the division happens once, over the full step.

The frozen head is applied at supervised positions only, a block of them at a time, so the logits of
a batch never exist; what follows is float32, a strip of a block at a time, and makes the gradient
of the hidden states in the forward pass.

P is the teacher's distribution of the next token, Q the student's, both at the loss's temperature
T: softmax(z / T).

    forward_kl   KL(P || Q)
    reverse_kl   KL(Q || P)
    jsd          beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q
                 (GKD, arXiv 2306.13649)
    skew_kl      KL(P || alpha P + (1 - alpha) Q)             (DistiLLM, arXiv 2402.03898)

Each is multiplied by T^2, so that its gradient keeps its size whatever T is (arXiv 1503.02531);
`ce`, the cross-entropy of the tokens, is always at temperature 1 and over the student's entire
head. All are in nats.

A cached list covers the teacher's top-k tokens only. All others are one more outcome on both sides,
the tail, of P's exact tail mass and Q's mass of everything unlisted. Merging outcomes never adds to
an f-divergence, as these four are, so the cached value is a lower bound of the live one. Within the
tail Q keeps its own proportions: all unlisted tokens move together. A list of samples leaves
nothing to the tail, and at temperature 1 forward KL's gradient, Q - P, is unbiased.

Shape suffixes: S supervised positions, R those of a block or strip, D hidden size (of Live the
teacher's), V vocabulary, P parts of a loss, N positions with soft targets, M entries of their
lists, O outcomes: a vocabulary, or the tail and a list.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from distill.models.arithmetic import BLOCK_BYTES, STRIP_BYTES, logit_rows
from distill.models.devices import send

FLOOR = -80.0  # log-probability of what cannot happen: finite, its exp negligible but no denormal
LEAST_TAIL = 2.0**-24  # a tail mass of 0 is one below float32's resolution
TINY = torch.finfo(torch.float32).tiny
# Of the positions of a strip, the student's logits there (R, V) and a live teacher's (else the same
# again), returns the values (P, R) of a loss's parts, and overwrites the student's with the loss's
# gradient by them.
Measure = Callable[[slice, Tensor, Tensor], Tensor]
TeacherLogits = Callable[[slice], Tensor]  # the logits of a block of positions


class _AtHead(torch.autograd.Function):
    """A measure's weighted sums over all positions, block by block, and their gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, head_VD: Tensor, bias_V: Tensor | None, weights_S: Tensor,
        measure: Measure, teacher: TeacherLogits | None, mix_P: Tensor, rows: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        parts_P = torch.zeros_like(mix_P)
        grad_SD = torch.zeros_like(hidden_SD) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_SD), rows):
            block, sums = slice(start, start + rows), list[Tensor]()
            logits_RV, weights_R = linear(hidden_SD[block], head_VD, bias_V), weights_S[block]
            teacher_RV = teacher(block) if teacher else logits_RV
            for strip in _strips(logits_RV):
                positions = slice(start + strip.start, start + strip.stop)
                values_PR = measure(positions, logits_RV[strip], teacher_RV[strip])
                sums.append(values_PR @ weights_R[strip])
            parts_P += torch.stack(sums).sum(0)
            if grad_SD is not None:  # the measure has written the gradient over the logits
                torch.mm(logits_RV, head_VD, out=grad_SD[block]).mul_(weights_R[:, None])
            del logits_RV, teacher_RV  # the next block's take their place
        ctx.save_for_backward(grad_SD)
        ctx.mark_non_differentiable(parts_P)
        return mix_P @ parts_P, parts_P

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * upstream[0], *[None] * 7


def _strips(logits_RV: Tensor) -> Iterator[slice]:
    count, width = logits_RV.shape
    size = logit_rows(STRIP_BYTES, 4, width, logits_RV.device.type)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def apply_at_head(
    measure: Measure,
    mix: Sequence[float],
    hidden_SD: Tensor,
    head_VD: Tensor,
    weights_S: Tensor,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
    teacher: TeacherLogits | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a measure's weighted sum, the sum of weights, and its parts' unmixed sums (P,).

    The gradients that the measure makes are those of the mixed loss. `chunk` is the number of
    positions in a block.
    """
    weights_S, rows = weights_S.float(), chunk or _block_rows(head_VD)
    mix_P = send(torch.tensor(mix, dtype=torch.float32), weights_S.device)
    inputs = (hidden_SD, head_VD, bias_V, weights_S, measure, teacher, mix_P, rows)
    total, parts_P = _AtHead.apply(*inputs)  # pyright: ignore[reportGeneralTypeIssues]
    return total, weights_S.sum(), parts_P


def _block_rows(head_VD: Tensor) -> int:
    width, device = head_VD.element_size(), head_VD.device.type
    return logit_rows(BLOCK_BYTES, width, len(head_VD), device)


def normalise(logits_RV: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return softmax(z / T) (R, V) and log sum exp(z / T) (R, 1), both float32.

    The sum is read off the argmax: a CPU's softmax takes less than its exp or logsumexp does.
    """
    z_RV = logits_RV.float() if temperature == 1 else logits_RV.float() / temperature
    probs_RV = torch.softmax(z_RV, -1)
    return probs_RV, z_RV.amax(1, keepdim=True) - probs_RV.amax(1, keepdim=True).log_()


def score_tokens(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p(target) in nats (R,) and its gradient by the logits (R, V), both float32."""
    grad_RV, sums_R1 = normalise(logits_RV)
    values_R = (sums_R1 - logits_RV.gather(1, targets_R[:, None])).squeeze(1)
    grad_RV[torch.arange(len(grad_RV), device=grad_RV.device), targets_R] -= 1
    return values_R, grad_RV


def cross_entropy(
    hidden_SD: Tensor,
    head_VD: Tensor,
    targets_S: Tensor,
    weights_S: Tensor,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of -log p(target) in nats, and the sum of weights, float32 scalars.

    `chunk` is the number of positions at a time; no position at all gives (0, 0).
    """

    def measure(positions: slice, logits_RV: Tensor, _: Tensor) -> Tensor:
        values_R, grad_RV = score_tokens(logits_RV, targets_S[positions])
        logits_RV.copy_(grad_RV)
        return values_R[None]

    return apply_at_head(measure, [1.0], hidden_SD, head_VD, weights_S, bias_V, chunk)[:2]


@torch.no_grad()
def evaluate_targets(
    hidden_SD: Tensor, head_VD: Tensor, targets_S: Tensor, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return -log p(target) in nats (S,) and whether the target is the argmax (S,)."""
    losses, hits = [hidden_SD.new_zeros(0, dtype=torch.float32)], [targets_S.new_zeros(0).bool()]
    blocks = (tensor.split(_block_rows(head_VD)) for tensor in (hidden_SD, targets_S))
    for hidden_RD, targets_R in zip(*blocks, strict=True):
        logits_RV = linear(hidden_RD, head_VD, bias_V)
        hits.append(logits_RV.argmax(-1) == targets_R)
        losses += [score_tokens(logits_RV[part], targets_R[part])[0] for part in _strips(logits_RV)]
    return torch.cat(losses), torch.cat(hits)


class SoftTargets(NamedTuple):
    """The teacher's top tokens at N supervised positions, lists of various lengths, and the tails.

    Position n has the entries `offsets_N1[n]` up to `offsets_N1[n + 1]`, which are on the host; no
    id stands twice in a list. `logprobs_M` are natural logarithms at temperature 1, normalised so
    that a list and its `tail_mass_N` sum to 1. `tail_N` is log sum exp(logprob / T) over the
    unlisted tokens, for the one temperature T of the loss (None: only T = 1, where it is the log of
    the tail mass).
    """

    ids_M: Tensor
    logprobs_M: Tensor
    offsets_N1: Tensor
    tail_mass_N: Tensor
    tail_N: Tensor | None = None


class Live(NamedTuple):
    """A teacher in memory: its last hidden states at the N supervised positions, and its head.

    `vocabulary` is how many ids the tokenizer makes: both models' heads are cut to it, for each is
    padded in its own way.
    """

    hidden_ND: Tensor
    head_VD: Tensor
    vocabulary: int
    bias_V: Tensor | None = None

    def logits(self, block: slice) -> Tensor:
        """Return the logits (R, V) of some positions."""
        bias_V = None if self.bias_V is None else self.bias_V[: self.vocabulary]
        return linear(self.hidden_ND[block], self.head_VD[: self.vocabulary], bias_V)


class Distribution(NamedTuple):
    """Probabilities (R, O) and their logarithms, in float32."""

    probs: Tensor
    logs: Tensor


# Of P and Q, the values (R,) and their gradients by the logits of Q (R, O).
Divergence = Callable[[Distribution, Distribution], tuple[Tensor, Tensor]]


def forward_kl(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Return KL(P || Q) and its gradient, Q - P."""
    values = torch.linalg.vecdot(teacher.probs, teacher.logs - student.logs)
    return values, student.probs - teacher.probs


def reverse_kl(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Return KL(Q || P) and its gradient, Q (log Q / P - KL)."""
    gap = student.logs - teacher.logs
    values = torch.linalg.vecdot(student.probs, gap)
    return values, gap.sub_(values[:, None]).mul_(student.probs)


def jsd(teacher: Distribution, student: Distribution, beta: float) -> tuple[Tensor, Tensor]:
    """Return the generalised JSD and its gradient, (1 - beta) Q (log Q / M - KL(Q || M))."""
    (p, log_p), (q, log_q) = teacher, student
    mixed = torch.lerp(q, p, beta).clamp_min_(TINY).log_()
    gap = log_q - mixed
    back = torch.linalg.vecdot(q, gap)
    values = beta * torch.linalg.vecdot(p, mixed.neg_().add_(log_p)) + (1 - beta) * back
    return values, gap.sub_(back[:, None]).mul_(q).mul_(1 - beta)


def skew_kl(teacher: Distribution, student: Distribution, alpha: float) -> tuple[Tensor, Tensor]:
    """Return KL(P || M), M = alpha P + (1 - alpha) Q, and its gradient.

    That is Q sum(A) - A with A = (1 - alpha) P Q / M.
    """
    (p, log_p), q = teacher, student.probs
    mixed = torch.lerp(q, p, alpha).clamp_min_(TINY)
    moved = (p * q).div_(mixed).mul_(1 - alpha)
    values = torch.linalg.vecdot(p, mixed.log_().neg_().add_(log_p))
    return values, (q * moved.sum(1, keepdim=True)).sub_(moved)


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "skew_kl": skew_kl}


class Mixture(NamedTuple):
    """What a loss mixes: the weight of the cross-entropy, and the divergences with theirs."""

    hard: float
    divergences: tuple[tuple[float, Divergence], ...]
    temperature: float

    def diverge(self, teacher: Distribution, student: Distribution) -> tuple[list[Tensor], Tensor]:
        """Return each divergence's values, T^2 included, and their gradient by the logits."""
        grad, values = torch.zeros_like(student.probs), []
        for weight, divergence in self.divergences:
            value, gradient = divergence(teacher, student)
            values.append(value * self.temperature**2)
            grad.add_(gradient, alpha=weight * self.temperature)  # T^2, and d(z / T) / dz
        return values, grad


def soft_loss(
    hidden_SD: Tensor,
    head_VD: Tensor,
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
    """Return the weighted sum of a mixed loss, the sum of weights, and each part's weighted sum.

    `mix` gives each part's weight, such as {"ce": 0.5, "forward_kl": 0.5}; the parts' sums are
    before it. A target of -1 adds 0 to `ce`, and counts in the sum of weights as any. Raises
    ValueError for targets of other positions, or lists without a tail for another temperature.
    """
    positions = len(soft.hidden_ND if isinstance(soft, Live) else soft.tail_mass_N)
    if not len(hidden_SD) == len(targets_S) == positions:
        raise ValueError(f"{len(hidden_SD)} positions, but soft targets of {positions}")
    measure = soft_measure(soft, targets_S, mix, beta, alpha, temperature)
    parts = {name: mix[name] for name in ("ce", *DIVERGENCES) if mix.get(name)}
    teacher = soft.logits if isinstance(soft, Live) else None
    inputs = (hidden_SD, head_VD, weights_S, bias_V, chunk, teacher)
    total, count, parts_P = apply_at_head(measure, tuple(parts.values()), *inputs)
    return total, count, dict(zip(parts, parts_P.unbind(), strict=True))


def soft_measure(
    soft: SoftTargets | Live,
    targets_S: Tensor,
    mix: Mapping[str, float],
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
) -> Measure:
    """Return what measures logits by a mix of cross-entropy and divergences, as `soft_loss`."""
    settings = {"jsd": {"beta": beta}, "skew_kl": {"alpha": alpha}}
    divergences = [(n, partial(f, **settings.get(n, {}))) for n, f in DIVERGENCES.items()]
    weighted = tuple((mix[name], divergence) for name, divergence in divergences if mix.get(name))
    mixture = Mixture(mix.get("ce", 0.0), weighted, temperature)
    if isinstance(soft, Live):
        return partial(_measure_live, mixture, targets_S)
    return _cached_measure(mixture, soft, targets_S)


def _measure_live(
    mixture: Mixture, targets_S: Tensor, positions: slice, logits_RV: Tensor, teacher_RV: Tensor
) -> Tensor:
    """Measure logits against a teacher's, over the ids that the tokenizer makes."""
    both, V, T = list[Distribution](), teacher_RV.shape[1], mixture.temperature
    for z_RV in (teacher_RV, logits_RV[:, :V]):
        probs_RV, sums_R1 = normalise(z_RV, T)
        both.append(Distribution(probs_RV, (z_RV if T == 1 else z_RV.float() / T) - sums_R1))
    values, grad_RV = mixture.diverge(*both)
    if mixture.hard:
        hard_R = (targets_S[positions] >= 0).float()
        value, gradient = score_tokens(logits_RV, targets_S[positions].clamp_min(0))
        values.insert(0, value * hard_R)
        gradient.mul_(mixture.hard * hard_R[:, None])[:, :V] += grad_RV
        logits_RV.copy_(gradient)
    else:
        logits_RV[:, :V] = grad_RV
        logits_RV[:, V:] = 0
    return torch.stack(values)


def _cached_measure(mixture: Mixture, soft: SoftTargets, targets_S: Tensor) -> Measure:
    """Return what measures logits against lists.

    A strip's table of outcomes (R, O) has the tail in column 0, then the list, and -inf where a
    list is shorter than the longest. At temperature 1 the cross-entropy comes from it too.
    """
    hard, temperature = mixture.hard, mixture.temperature
    tails_N = soft.tail_mass_N.clamp_min(LEAST_TAIL).log() if temperature == 1 else soft.tail_N
    if tails_N is None:
        raise ValueError(f"the tails were not captured at temperature {temperature}")
    tails_N, teacher_logits_M = tails_N.float(), soft.logprobs_M.float() / temperature
    # on the host, for asking a GPU for them would wait for all that it has yet to do
    offsets_N1 = soft.offsets_N1.cpu()
    rows_all, offsets = torch.repeat_interleave(offsets_N1.diff()), offsets_N1.tolist()
    columns_all = torch.arange(len(rows_all)) - offsets_N1[rows_all] + 1
    rows_all, columns_all = (send(t, soft.ids_M.device) for t in (rows_all, columns_all))

    def measure(positions: slice, logits_RV: Tensor, _: Tensor) -> Tensor:
        bounds, targets_R = offsets[positions.start : positions.stop + 1], targets_S[positions]
        hard_R, targets_R = (targets_R >= 0).float(), targets_R.clamp_min(0)
        listed, longest = slice(bounds[0], bounds[-1]), max(b - a for a, b in pairwise(bounds))
        rows_M, columns_M = rows_all[listed] - positions.start, columns_all[listed]
        ids_M = soft.ids_M[listed]

        def table(logs_M: Tensor, tails_R: Tensor) -> Distribution:
            table_RO = logs_M.new_full((len(tails_R), longest + 1), -inf)
            table_RO[:, 0] = tails_R
            table_RO[rows_M, columns_M] = logs_M
            logs_RO = torch.log_softmax(table_RO, -1).clamp_min(FLOOR)
            return Distribution(logs_RO.exp(), logs_RO)

        apart = score_tokens(logits_RV, targets_R) if temperature != 1 and hard else None
        probs_RV, sums_R1 = normalise(logits_RV, temperature)
        logs_M = logits_RV[rows_M, ids_M].float() / temperature - sums_R1[rows_M, 0]
        probs_RV[rows_M, ids_M] = 0  # from here on those of the unlisted tokens
        tails_R = probs_RV.sum(1)
        student = table(logs_M, tails_R.log())
        teacher = table(teacher_logits_M[listed], tails_N[positions])
        values, grad_RO = mixture.diverge(teacher, student)
        if hard and not apart:
            losses_R1 = sums_R1 - logits_RV.gather(1, targets_R[:, None])
            values.insert(0, losses_R1.squeeze(1) * hard_R)
            grad_RO.add_(student.probs * hard_R[:, None], alpha=hard)
        # The tail's gradient is shared out among the unlisted tokens in proportion.
        grad_RV = probs_RV.mul_((grad_RO[:, 0] / tails_R.clamp_min(TINY))[:, None])
        grad_RV[rows_M, ids_M] = grad_RO[rows_M, columns_M]
        if hard and not apart:
            rows_R = torch.arange(len(targets_R), device=grad_RV.device)
            grad_RV[rows_R, targets_R] -= hard * hard_R
        elif apart:
            values.insert(0, apart[0] * hard_R)
            grad_RV.add_(apart[1].mul_(hard_R[:, None]), alpha=hard)
        logits_RV.copy_(grad_RV)
        return torch.stack(values)

    return measure
