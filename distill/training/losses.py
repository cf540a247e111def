"""Losses as pure functions that return (sum, count); the division happens once, over the full step.

The head is applied at supervised positions only, a block of them at a time, so the logits of a
batch never exist; what follows is float32, a strip of a block at a time, and makes the gradients in
the forward pass. An adapted head is W and the scaled B side by side, for (h, A h) side by side.

Shape suffixes: S supervised positions, R those of a block or strip, D hidden size, E the columns of
all matrices of a head, V vocabulary, P parts of a loss.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from distill.models.arithmetic import BLOCK_BYTES, STRIP_BYTES, logit_rows
from distill.models.devices import kind, send

# Of the positions of a strip, the student's logits there (R, V) and a live teacher's (else the same
# again), returns the values (P, R) of a loss's parts, and overwrites the student's with the loss's
# gradient by them.
Measure = Callable[[slice, Tensor, Tensor], Tensor]
TeacherLogits = Callable[[slice], Tensor]  # the logits of a block of positions
Head = Tensor | tuple[Tensor, ...]  # (V, D), or several side by side for hidden states (S, E)


class _AtHead(torch.autograd.Function):
    """A measure's weighted sums over all positions, block by block, and their gradients."""

    @staticmethod
    def forward(
        ctx: Any, weights_S: Tensor, measure: Measure, teacher: TeacherLogits | None,
        mix_P: Tensor, rows: int, hidden_SE: Tensor, bias_V: Tensor | None, *heads: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs = zip((hidden_SE, bias_V, *heads), ctx.needs_input_grad[5:], strict=True)
        gradients = [torch.zeros_like(t) if need and t is not None else None for t, need in inputs]
        grad_SE, grad_V, *grads_VD = gradients
        parts_P, widths = torch.zeros_like(mix_P), [head_VD.shape[1] for head_VD in heads]
        for start in range(0, len(hidden_SE), rows):
            block, sums = slice(start, start + rows), list[Tensor]()
            logits_RV, weights_R = apply_head(hidden_SE[block], heads, bias_V), weights_S[block]
            teacher_RV = teacher(block) if teacher else logits_RV
            for strip in _strips(logits_RV):
                positions = slice(start + strip.start, start + strip.stop)
                values_PR = measure(positions, logits_RV[strip], teacher_RV[strip])
                sums.append(values_PR @ weights_R[strip])
            parts_P += torch.stack(sums).sum(0)
            grad_RV, heavy_R = logits_RV, weights_R.to(logits_RV.dtype)
            states = hidden_SE[block].split(widths, 1)
            for n, (head_VD, grad_VD) in enumerate(zip(heads, grads_VD, strict=True)):
                if grad_SE is not None:
                    grad_RD = grad_SE[block].split(widths, 1)[n]
                    torch.mm(grad_RV, head_VD, out=grad_RD).mul_(weights_R[:, None])
                if grad_VD is not None:
                    grad_VD.addmm_(grad_RV.t(), states[n] * heavy_R[:, None])
            if grad_V is not None:
                grad_V += heavy_R @ grad_RV
            del logits_RV, grad_RV, teacher_RV  # the next block's take their place
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(parts_P)
        return mix_P @ parts_P, parts_P

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else grad * upstream[0] for grad in ctx.saved_tensors]
        return None, None, None, None, None, *scaled


def apply_head(hidden_SE: Tensor, head: Head, bias_V: Tensor | None = None) -> Tensor:
    """Return the logits (S, V)."""
    heads = (head,) if isinstance(head, Tensor) else head
    states_SD, *others = hidden_SE.split([head_VD.shape[1] for head_VD in heads], 1)
    logits_SV = linear(states_SD, heads[0], bias_V)
    for low_SD, head_VD in zip(others, heads[1:], strict=True):
        logits_SV.addmm_(low_SD, head_VD.t())
    return logits_SV


def _strips(logits_RV: Tensor) -> Iterator[slice]:
    count, width = logits_RV.shape
    size = logit_rows(STRIP_BYTES, 4, width, kind(logits_RV.device))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def apply_at_head(
    measure: Measure,
    mix: Sequence[float],
    hidden_SE: Tensor,
    head: Head,
    weights_S: Tensor,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
    teacher: TeacherLogits | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a measure's weighted sum, the sum of weights, and its parts' unmixed sums (P,).

    The gradients that the measure makes are those of the mixed loss. `chunk` is the number of
    positions in a block.
    """
    weights_S, heads = weights_S.float(), (head,) if isinstance(head, Tensor) else head
    mix_P = send(torch.tensor(mix, dtype=torch.float32), weights_S.device)
    settings = (weights_S, measure, teacher, mix_P, chunk or _block_rows(heads[0]))
    total, parts_P = _AtHead.apply(*settings, hidden_SE, bias_V, *heads)  # pyright: ignore[reportGeneralTypeIssues]
    return total, weights_S.sum(), parts_P


def _block_rows(head_VD: Tensor) -> int:
    width, device = head_VD.element_size(), kind(head_VD.device)
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
    hidden_SE: Tensor,
    head: Head,
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

    return apply_at_head(measure, [1.0], hidden_SE, head, weights_S, bias_V, chunk)[:2]


@torch.no_grad()
def evaluate_targets(
    hidden_SE: Tensor, head_VE: Tensor, targets_S: Tensor, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return -log p(target) in nats (S,) and whether the target is the argmax (S,)."""
    rows = _block_rows(head_VE)
    losses, hits = [hidden_SE.new_zeros(0, dtype=torch.float32)], [targets_S.new_zeros(0).bool()]
    for start in range(0, len(targets_S), rows):
        targets_R = targets_S[start : start + rows]
        logits_RV = apply_head(hidden_SE[start : start + rows], head_VE, bias_V)
        hits.append(logits_RV.argmax(-1) == targets_R)
        losses += [score_tokens(logits_RV[part], targets_R[part])[0] for part in _strips(logits_RV)]
    return torch.cat(losses), torch.cat(hits)
