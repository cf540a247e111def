"""Losses as pure functions that return (sum, count); the division happens once, over the whole step.

Shape suffixes: S supervised positions, D hidden size, V vocabulary. The head is applied at supervised positions only,
a chunk of them at a time, so the logits of a batch never exist; logits are in the model's type, what follows the
maximum is float32. The head is frozen: the gradient of the hidden states is made on the way forward.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 2**20  # of float32 logits at a time: small enough to stay in a CPU's cache


class _CrossEntropy(torch.autograd.Function):
    """The weighted sum of cross-entropies, chunk by chunk, with the gradient of the hidden states beside it."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, head_VD: Tensor, bias_V: Tensor | None,
        targets_S: Tensor, weights_S: Tensor, rows: int,
    ) -> Tensor:  # fmt: skip
        total = hidden_SD.new_zeros((), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        gradient_SD = torch.empty_like(hidden_SD) if wanted else None
        for start in range(0, len(targets_S), rows):
            part = slice(start, start + rows)
            targets, weights = targets_S[part, None], weights_S[part]
            logits = torch.nn.functional.linear(hidden_SD[part], head_VD, bias_V)
            logs = torch.log_softmax(logits, -1, dtype=torch.float32)
            total -= logs.gather(1, targets).squeeze(1) @ weights
            if gradient_SD is not None:
                slope = logs.exp_().scatter_add_(1, targets, logs.new_full((len(targets), 1), -1))
                made = torch.mm(slope.to(head_VD.dtype), head_VD)
                gradient_SD[part] = made * weights[:, None]
        ctx.save_for_backward(gradient_SD)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_SD,) = ctx.saved_tensors
        scaled = gradient_SD * upstream[0].to(gradient_SD.dtype)
        return scaled, None, None, None, None, None


def cross_entropy(
    hidden_SD: Tensor,
    head_VD: Tensor,
    targets_S: Tensor,
    weights_S: Tensor,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of -log p(target) in nats, and the sum of weights, both float32 scalars.

    The head gets no gradient. `chunk` is the number of positions at a time; no position at all gives (0, 0).
    """
    rows = chunk or max(16, CHUNK_BYTES // (4 * head_VD.shape[0]))
    weights_S = weights_S.float()
    total = _CrossEntropy.apply(hidden_SD, head_VD, bias_V, targets_S, weights_S, rows)
    return total, weights_S.sum()  # pyright: ignore[reportReturnType]


@torch.no_grad()
def read_targets(
    hidden_SD: Tensor, head_VD: Tensor, targets_S: Tensor, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return -log p(target) in nats (S,) and whether the target is the likeliest token (S,), a chunk at a time."""
    rows = max(16, CHUNK_BYTES // (4 * head_VD.shape[0]))
    losses, hits = [hidden_SD.new_zeros(0, dtype=torch.float32)], [targets_S.new_zeros(0).bool()]
    for start in range(0, len(targets_S), rows):
        part = slice(start, start + rows)
        logits = torch.nn.functional.linear(hidden_SD[part], head_VD, bias_V)
        hits.append(logits.argmax(-1) == targets_S[part])
        logs = torch.log_softmax(logits, -1, dtype=torch.float32)
        losses.append(-logs.gather(1, targets_S[part, None]).squeeze(1))
    return torch.cat(losses), torch.cat(hits)
