"""Losses as pure functions that return (sum, count); the division happens once, over the full step.

The frozen head is applied at supervised positions only, a block of them at a time, so the logits of
a batch never exist; what follows is float32, a strip of a block at a time, and makes the gradient
of the hidden states in the forward pass.

Shape suffixes: S supervised positions, R those of a block or strip, D hidden size, V vocabulary, P
parts of a loss.
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
    size = logit_rows(STRIP_BYTES, 4, width, kind(logits_RV.device))
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
