"""Attention of grouped heads on a GPU, for float32 and for GPUs before Ampere.

Only PyTorch's flash kernel takes grouped heads as they are. Where it cannot run, PyTorch would fall
back to one that holds the square of the length for each head, and with a gradient for each layer
too. The memory-efficient kernel does not, given keys and values that are repeated.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def ungrouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values (B, K, S, d) of causal attention, repeated where need be."""
    groups, cuda = query.shape[1] // key.shape[1], torch.backends.cuda
    params = cuda.SDPAParams(query, key, value, None, 0.0, True, True)
    if groups == 1 or cuda.can_use_flash_attention(params):
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Be transformers' SDPA, which repeats keys and values itself where there is a mask."""
    if mask is None and getattr(module, "num_key_value_groups", 1) > 1:
        key, value = ungrouped(query, key, value)
        if key.shape[1] == query.shape[1]:
            module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(module, query, key, value, mask, **settings)


def use_grouped_attention() -> None:
    """Let every model of this process attend so, whose attention is transformers' SDPA."""
    AttentionInterface.register("sdpa", _attend)
