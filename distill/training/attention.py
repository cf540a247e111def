"""Causal attention in a packed row: each segment attends to its ancestors and itself, unpadded.

Registered with transformers as `packed`: the segments travel as a keyword through the model. On a
CPU, queries of the heads that share a key are stacked, a block at a time, for batched products
(several times faster than PyTorch's kernel at these lengths). Elsewhere one call of PyTorch's
variable-length kernel does all segments, or its common one (for float32, an old GPU) each in turn.

Shape suffixes: N tokens of the row, T of a block, S keys that it attends to, H query heads, K key
heads, G = H / K, d the head's size.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from distill.errors import one_line
from distill.models.arithmetic import BLOCK, SAVED_KEYS
from distill.models.devices import raise_device_error, send
from distill.models.grouped_attention import ungrouped
from distill.training.batches import Segment

NAME = "packed"
OTHER_KINDS = ("sliding_window", "softcap", "s_aux", "position_bias")


def blocks(segment: Segment) -> Iterator[tuple[int, int, int]]:
    """Yield start and end of each block of a segment's queries, and the keys of its last one."""
    ancestors = segment.position()
    for start in range(segment.start, segment.end, BLOCK):
        end = min(start + BLOCK, segment.end)
        yield start, end, ancestors + end - segment.start


def _gather(rows_NKd: Tensor, segment: Segment) -> Tensor:
    """Return the keys or values (K, S, d) of a segment's ancestors and its own."""
    parts = [rows_NKd[start:end] for start, end in segment.ranges()]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _stack(heads_THd: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """Lay (T, K·G, d) out as (K, G·T, d), times `scale`."""
    T, H, d = heads_THd.shape
    out_KXd = heads_THd.new_empty(H // groups, groups * T, d)
    source = heads_THd.view(T, H // groups, groups, d).permute(1, 2, 0, 3)
    torch.mul(source, scale, out=out_KXd.view(H // groups, groups, T, d))
    return out_KXd


def _unstack(stacked_KXd: Tensor, out_THd: Tensor, scale: float = 1.0) -> None:
    """Write (K, G·T, d), times `scale`, into a view of (T, K·G, d)."""
    T, H, d = out_THd.shape
    K = stacked_KXd.shape[0]
    source = stacked_KXd.view(K, H // K, T, d).permute(2, 0, 1, 3)
    torch.mul(source, scale, out=out_THd.view(T, K, H // K, d))


def _probabilities(query_KXd: Tensor, key_KSd: Tensor, rows: int) -> Tensor:
    """Return the causal softmax (K, G·T, S) of a block of scaled queries."""
    scores = torch.bmm(query_KXd, key_KSd.transpose(1, 2))
    K, X, S = scores.shape
    corner = scores.view(K, X // rows, rows, S)[..., S - rows :]
    corner += scores.new_full((rows, rows), float("-inf")).triu_(1)
    return torch.softmax(scores, -1)


def forward(
    query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor, segments: Sequence[Segment], scale: float
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the output (N, H, d), and the blocks' probabilities that are saved for backward."""
    out_NHd = torch.empty_like(query_NHd, memory_format=torch.contiguous_format)
    groups, saved = query_NHd.shape[1] // key_NKd.shape[1], []
    for segment in segments:
        key_KSd, value_KSd = _gather(key_NKd, segment), _gather(value_NKd, segment)
        for start, end, keys in blocks(segment):
            query = _stack(query_NHd[start:end], groups, scale)
            weights = _probabilities(query, key_KSd[:, :keys], end - start)
            _unstack(torch.bmm(weights, value_KSd[:, :keys]), out_NHd[start:end])
            saved.append(weights if keys <= SAVED_KEYS else None)
    return out_NHd, saved


def backward(
    gradient_NHd: Tensor,
    query_NHd: Tensor,
    key_NKd: Tensor,
    value_NKd: Tensor,
    saved: Sequence[Tensor | None],
    segments: Sequence[Segment],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value (Dao et al. 2022, appendix B)."""
    groups, probabilities = query_NHd.shape[1] // key_NKd.shape[1], iter(saved)
    grad_q = torch.empty_like(query_NHd, memory_format=torch.contiguous_format)
    grad_k = key_NKd.new_zeros(key_NKd.shape, dtype=torch.float32)  # sums of many parts
    grad_v = torch.zeros_like(grad_k)
    for segment in segments:
        key_KSd, value_KSd = _gather(key_NKd, segment), _gather(value_NKd, segment)
        part_k, part_v = torch.zeros_like(key_KSd), torch.zeros_like(value_KSd)
        for start, end, keys in blocks(segment):
            query = _stack(query_NHd[start:end], groups, scale)
            weights = next(probabilities)
            if weights is None:
                weights = _probabilities(query, key_KSd[:, :keys], end - start)
            upstream = _stack(gradient_NHd[start:end], groups)
            part_v[:, :keys].baddbmm_(weights.transpose(1, 2), upstream)
            scores = torch.bmm(upstream, value_KSd[:, :keys].transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(scores, weights, -1, weights.dtype)
            _unstack(torch.bmm(scores, key_KSd[:, :keys]), grad_q[start:end], scale)
            part_k[:, :keys].baddbmm_(scores.transpose(1, 2), query)
        start = 0
        for first, last in segment.ranges():  # what `_gather` brought together goes back
            part = slice(start, start := start + last - first)
            grad_k[first:last] += part_k[:, part].transpose(0, 1)
            grad_v[first:last] += part_v[:, part].transpose(0, 1)
    return grad_q, grad_k.to(key_NKd.dtype), grad_v.to(key_NKd.dtype)


class _Blockwise(torch.autograd.Function):
    """`forward` and `backward` for the models that autograd runs through."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, ctx.segments, ctx.scale = inputs
        out, saved = forward(*inputs)
        ctx.save_for_backward(query, key, value, *(saved if any(ctx.needs_input_grad) else ()))
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        return *backward(upstream[0], query, key, value, saved, ctx.segments, ctx.scale), None, None


def apart(
    query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor,
    segments: tuple[Segment, ...], scale: float,
) -> Tensor:  # fmt: skip
    """Return the attention of segments without ancestors, one after the other."""
    lengths, outputs = [segment.end - segment.start for segment in segments], []
    for rows in zip(*(t.split(lengths) for t in (query_NHd, key_NKd, value_NKd)), strict=True):
        query, key, value = (t.transpose(0, 1)[None] for t in rows)
        key, value = ungrouped(query, key, value)
        grouped = key.shape[1] < query.shape[1]
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def joined(
    query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor,
    segments: tuple[Segment, ...], scale: float,
) -> Tensor:  # fmt: skip
    """Return the attention of segments without ancestors by one call of PyTorch's kernel."""
    from torch.nn.attention.varlen import varlen_attn  # slow to import, and not wanted on a CPU

    bounds, longest = segment_bounds(segments, query_NHd.device)
    causal, limits = (-1, 0), (bounds, bounds, longest, longest)
    return varlen_attn(
        query_NHd, key_NKd, value_NKd, *limits, scale=scale, window_size=causal, enable_gqa=True
    )  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=8)
def segment_bounds(segments: tuple[Segment, ...], device: torch.device) -> tuple[Tensor, int]:
    """Return the segments' bounds on the device, copied once for all layers, and the longest."""
    lengths = [segment.end - segment.start for segment in segments]
    with torch.inference_mode(False):  # a training step may meet what an evaluation made
        ends = send(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    return ends, max(lengths)


@lru_cache
def why_apart(device: torch.device, dtype: torch.dtype, heads: int, keys: int, size: int) -> str:
    """Return why segments are not attended to in one call; empty where they can be.

    A trial on the device decides: `joined` must have the values and gradients of `apart`.
    """
    segments = (Segment(0, 7), Segment(7, 19))
    shapes = [(19, heads, size), (19, keys, size), (19, keys, size), (19, heads, size)]
    with torch.inference_mode(False), torch.enable_grad():
        results = []
        try:
            make = torch.Generator(device).manual_seed(0)
            query, key, value, upstream = (
                torch.randn(shape, generator=make, device=device).to(dtype).requires_grad_()
                for shape in shapes
            )
            for way in (joined, apart):
                out = way(query, key, value, segments, size**-0.5)
                parts = (out, *torch.autograd.grad(out, (query, key, value), upstream))
                results.append(torch.cat([part.float().flatten() for part in parts]))
        except (RuntimeError, TypeError, ImportError) as error:  # of this type, GPU or torch
            raise_device_error(error)
            return one_line(error)
    difference = (results[0] - results[1]).norm()
    return "" if difference <= 0.02 * results[1].norm() else "it has other values"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Sequence[Segment] = (),
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Be transformers' attention function of one packed row: (1, H, N, d) in, (1, N, H, d) out.

    Only a CPU's rows may share prefixes. Raises ValueError for kinds of attention that this is not;
    the student's probe then pads instead.
    """
    unknown = [name for name in OTHER_KINDS if others.get(name) is not None]
    if unknown or dropout or query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(f"{type(module).__name__}: {unknown}, dropout {dropout}")
    _, H, N, d = query.shape
    query_NHd, key_NKd, value_NKd = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = d**-0.5 if scaling is None else scaling
    inputs = (query_NHd, key_NKd, value_NKd, tuple(segments) or (Segment(0, N),), scale)
    if query.device.type == "cpu":
        out: Any = _Blockwise.apply(*inputs)
    else:
        slow = why_apart(query.device, query.dtype, H, key.shape[1], d)
        out = (apart if slow else joined)(*inputs)
    return out[None], None


AttentionInterface.register(NAME, packed_attention)
