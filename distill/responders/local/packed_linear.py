"""Linear layers for inference in bfloat16 on a CPU, their weights in the order of oneDNN.

A plain `nn.Linear` reorders its weight at every call, which for the few tokens of a decoding step
costs as much as the product itself. The results are bit for bit the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distill.models.devices import free_memory

CHUNK = 16_384  # outputs of a vocabulary head computed at once, so that they stay in the cache


class PackedLinear(nn.Module):
    """An `nn.Linear` whose weight is reordered once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, self.bias = linear.weight.detach(), linear.bias
        self.out_features = weight.shape[0]
        self.parts = [
            torch.ops.mkldnn._reorder_linear_weight(part.contiguous())
            for part in weight.split(CHUNK if len(weight) > 2 * CHUNK else len(weight))
        ]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `inputs @ weight.T + bias`."""
        product = torch.ops.mkldnn._linear_pointwise
        if len(self.parts) == 1:
            return product(inputs, self.parts[0], self.bias, "none", [], "")
        output = inputs.new_empty((*inputs.shape[:-1], self.out_features))
        for place, part in zip(output.split(CHUNK, dim=-1), self.parts, strict=True):
            place.copy_(product(inputs, part, None, "none", [], ""))
        return output if self.bias is None else output + self.bias


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Use packed linear layers inside the block, where that is faster and memory allows a copy."""
    mkldnn = torch.backends.mkldnn
    able = mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    layers = [
        (owner, name, child)
        for owner in (model.modules() if able else ())
        for name, child in owner.named_children()
        if type(child) is nn.Linear
        and child.weight.device.type == "cpu"
        and child.weight.dtype == torch.bfloat16
    ]
    if sum(linear.weight.nbytes for _, _, linear in layers) >= free_memory() / 2:
        layers = []
    try:
        for owner, name, linear in layers:
            setattr(owner, name, PackedLinear(linear))
        yield
    finally:
        for owner, name, linear in layers:
            setattr(owner, name, linear)
