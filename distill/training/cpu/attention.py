"""Causal attention in a packed row: every segment sees its ancestors and itself; nothing is padded, nothing leaks.

Registered with transformers under the name `packed`, so any model that takes its attention from the library can use
it; the segments travel as a keyword through the model's forward. Queries of the heads that share a key
are stacked, so keys and values are never repeated. On a CPU the products run as plain batched matrix products, a block
of queries at a time (PyTorch's own kernel is several times slower at these lengths). Elsewhere one call of PyTorch's
kernel for rows of various lengths does all segments, where a trial on the device itself shows that it can; else (float32,
an old GPU) its common kernel does one segment after the other.

Shape suffixes: N tokens of the row, T of a block, S keys that it sees, H query heads, K key heads, G = H / K, d the head's size.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from distill.training.host_to_device import send
from distill.training.packing import Segment

NAME = "packed"
BLOCK = 128  # queries at a time: what lies above the diagonal is skipped block by block
OTHER_KINDS = ("sliding_window", "softcap", "s_aux", "position_bias")
KEPT = 512  # blocks that see up to so many keys keep their probabilities for the way back, others make them again


def blocks(segment: Segment) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end) of each block of a segment's queries in the row, and how many keys its last one sees."""
    ancestors = segment.position()
    for start in range(segment.start, segment.end, BLOCK):
        end = min(start + BLOCK, segment.end)
        yield start, end, ancestors + end - segment.start


def _seen(rows_NKd: Tensor, segment: Segment) -> Tensor:
    """Return the keys or values (K, S, d) that a segment sees: its ancestors' and its own."""
    parts = [rows_NKd[start:end] for start, end in segment.ranges()]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _spread(slope_NKd: Tensor, part_KSd: Tensor, segment: Segment) -> None:
    """Add the gradient of what `_seen` returned to its places."""
    start = 0
    for first, last in segment.ranges():
        slope_NKd[first:last] += part_KSd[:, start : start + last - first].transpose(0, 1)
        start += last - first


def _stacked(heads_THd: Tensor, groups: int, scale: float = 1.0) -> Tensor:
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
    """Return the causal softmax (K, G·T, S) of a block of scaled queries, the last of which sees all S keys."""
    scores = torch.bmm(query_KXd, key_KSd.transpose(1, 2))
    K, X, S = scores.shape
    corner = scores.view(K, X // rows, rows, S)[..., S - rows :]
    corner += torch.full(
        (rows, rows), float("-inf"), dtype=scores.dtype, device=scores.device
    ).triu_(1)
    return torch.softmax(scores, -1)


def forward(
    query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor, segments: Sequence[Segment], scale: float
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the attention's output (N, H, d), and the probabilities that are worth keeping for the way back."""
    out_NHd = torch.empty_like(query_NHd, memory_format=torch.contiguous_format)
    groups, saved = query_NHd.shape[1] // key_NKd.shape[1], []
    for segment in segments:
        key_KSd, value_KSd = _seen(key_NKd, segment), _seen(value_NKd, segment)
        for start, end, seen in blocks(segment):
            query = _stacked(query_NHd[start:end], groups, scale)
            weights = _probabilities(query, key_KSd[:, :seen], end - start)
            _unstack(torch.bmm(weights, value_KSd[:, :seen]), out_NHd[start:end])
            saved.append(weights if seen <= KEPT else None)
    return out_NHd, saved


def backward(
    slope_NHd: Tensor,
    query_NHd: Tensor,
    key_NKd: Tensor,
    value_NKd: Tensor,
    kept: Sequence[Tensor | None],
    segments: Sequence[Segment],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value (Dao et al. 2022, appendix B, by blocks of queries only)."""
    groups, saved = query_NHd.shape[1] // key_NKd.shape[1], iter(kept)
    slope_q = torch.empty_like(query_NHd, memory_format=torch.contiguous_format)
    slope_k = torch.zeros(
        key_NKd.shape, dtype=torch.float32, device=key_NKd.device
    )  # of many parts
    slope_v = torch.zeros_like(slope_k)
    for segment in segments:
        key_KSd, value_KSd = _seen(key_NKd, segment), _seen(value_NKd, segment)
        part_k, part_v = torch.zeros_like(key_KSd), torch.zeros_like(value_KSd)
        for start, end, seen in blocks(segment):
            query = _stacked(query_NHd[start:end], groups, scale)
            weights = next(saved)
            if weights is None:
                weights = _probabilities(query, key_KSd[:, :seen], end - start)
            slope = _stacked(slope_NHd[start:end], groups)
            part_v[:, :seen].baddbmm_(weights.transpose(1, 2), slope)
            scores = torch.bmm(slope, value_KSd[:, :seen].transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(scores, weights, -1, weights.dtype)
            _unstack(torch.bmm(scores, key_KSd[:, :seen]), slope_q[start:end], scale)
            part_k[:, :seen].baddbmm_(scores.transpose(1, 2), query)
        _spread(slope_k, part_k, segment)
        _spread(slope_v, part_v, segment)
    return slope_q, slope_k.to(key_NKd.dtype), slope_v.to(key_NKd.dtype)


class _Attention(torch.autograd.Function):
    """`forward` and `backward` for the models that autograd runs through."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query, key, value, ctx.segments, ctx.scale = given
        out, saved = forward(*given)
        ctx.save_for_backward(query, key, value, *(saved if any(ctx.needs_input_grad) else ()))
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        return *backward(upstream[0], query, key, value, saved, ctx.segments, ctx.scale), None, None


def attend(
    query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor, segments: Sequence[Segment], scale: float
) -> Tensor:
    """Return softmax(QK'·scale)V of every segment over its ancestors and itself, causal, as (N, H, d).

    Only a CPU's rows may share prefixes.
    """
    if query_NHd.device.type == "cpu":
        return _Attention.apply(query_NHd, key_NKd, value_NKd, segments, scale)  # pyright: ignore[reportReturnType]
    H, d = query_NHd.shape[1:]
    able = can_join(query_NHd.device, query_NHd.dtype, H, key_NKd.shape[1], d)
    return (_joined if able else _apart)(query_NHd, key_NKd, value_NKd, tuple(segments), scale)


def _apart(
    query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor, segments: tuple[Segment, ...], scale: float
) -> Tensor:  # fmt: skip
    """Return the attention of segments without ancestors, one after the other, by PyTorch's common kernel."""
    lengths = [segment.end - segment.start for segment in segments]
    done = []
    for rows in zip(*(t.split(lengths) for t in (query_NHd, key_NKd, value_NKd)), strict=True):
        query, key, value = (t.transpose(0, 1)[None] for t in rows)
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        done.append(out[0].transpose(0, 1))
    return torch.cat(done)


def _joined(
    query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor, segments: tuple[Segment, ...], scale: float
) -> Tensor:  # fmt: skip
    """Return the attention of segments without ancestors by one call of PyTorch's kernel for various lengths."""
    from torch.nn.attention.varlen import varlen_attn  # slow to import, and not wanted on a CPU

    bounds, longest = _bounds(segments, query_NHd.device)
    causal, limits = (-1, 0), (bounds, bounds, longest, longest)
    return varlen_attn(
        query_NHd, key_NKd, value_NKd, *limits, scale=scale, window_size=causal, enable_gqa=True
    )  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=8)
def _bounds(segments: tuple[Segment, ...], device: torch.device) -> tuple[Tensor, int]:
    """Return the bounds between segments on the device, copied once for all layers, and the longest length."""
    lengths = [segment.end - segment.start for segment in segments]
    with torch.inference_mode(False):  # a training step may meet what a measurement made
        ends = send(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    return ends, max(lengths)


@lru_cache
def can_join(device: torch.device, dtype: torch.dtype, heads: int, keys: int, size: int) -> bool:
    """Tell by a trial whether `_joined` gives on this device what `_apart` gives, and their gradients."""
    make, segments = torch.Generator(device).manual_seed(0), (Segment(0, 7), Segment(7, 19))
    shapes = [(19, heads, size), (19, keys, size), (19, keys, size), (19, heads, size)]
    with torch.inference_mode(False), torch.enable_grad():
        query, key, value, slope = (
            torch.randn(shape, generator=make, device=device).to(dtype).requires_grad_()
            for shape in shapes
        )
        results = []
        try:
            for way in (_joined, _apart):
                out = way(query, key, value, segments, size**-0.5)
                parts = (out, *torch.autograd.grad(out, (query, key, value), slope))
                results.append(torch.cat([part.float().flatten() for part in parts]))
        except (RuntimeError, TypeError, ImportError):  # neither this type nor GPU, or torch is old
            return False
    joined, apart = results
    return bool((joined - apart).norm() <= 0.02 * apart.norm())


def _registered(
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
    """Be transformers' attention function for one packed row: (1, heads, N, d) in, (1, N, heads, d) out.

    Raises ValueError for kinds of attention that this is not; the student's probe then pads instead.
    """
    unknown = [name for name in OTHER_KINDS if others.get(name) is not None]
    if unknown or dropout or query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(f"{type(module).__name__}: {unknown}, dropout {dropout}")
    rows = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(*rows, segments=segments or [Segment(0, query.shape[2])], scale=scale)[None], None


AttentionInterface.register(NAME, _registered)
