"""Attention of packed rows against PyTorch's own, sample by sample, values and gradients."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.training import attention
from distill.training.batches import Segment
from tests.support.training import gradient

SIZE = 8


def tensors(count: int, heads: int, keys: int) -> tuple[Any, Any, Any]:
    make = torch.Generator().manual_seed(count)
    shapes = [(count, heads, SIZE), (count, keys, SIZE), (count, keys, SIZE)]
    query, key, value = (
        torch.randn(s, generator=make, dtype=torch.float64).requires_grad_() for s in shapes
    )
    return query, key, value


def segments_of(lengths) -> list[Segment]:
    ends = list(accumulate(lengths))
    return [Segment(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def reference(query, key, value, lengths, scale):
    """PyTorch's attention, one sample at a time, keys repeated."""
    done = []
    groups = query.shape[1] // key.shape[1]
    for q, k, v in zip(*(t.split(lengths) for t in (query, key, value)), strict=True):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        done.append(out[0].transpose(0, 1))
    return torch.cat(done)


def attend(query, key, value, segments, scale):
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    inputs = (torch.nn.Identity(), query, key, value, None, scale, segments)
    return attention.packed_attention(*inputs)[0][0]


def compare(way, lengths, groups):
    """Hold a way's values and gradients against PyTorch's, sample by sample."""
    given_, wanted = tensors(sum(lengths), *groups), tensors(sum(lengths), *groups)
    found = way(*given_, tuple(segments_of(lengths)), 0.3)
    exact = reference(*wanted, lengths, 0.3)
    slope = torch.randn_like(found)
    found.backward(slope)
    exact.backward(slope)
    torch.testing.assert_close(found, exact)
    for one, other in zip(given_, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    groups=st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    block=st.sampled_from([1, 7, 16, 64]),
    kept=st.sampled_from([0, 20, 999]),
)
def test_equals_each_sample_alone(lengths, groups, block, kept):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        patch.setattr(attention, "SAVED_KEYS", kept)
        compare(attend, lengths, groups)


def test_a_shared_prefix_gives_the_same_as_each_sample_with_its_own():
    prefix, tails = 5, (3, 9)
    shared = [Segment(0, 5), Segment(5, 8, ((0, 5),)), Segment(8, 17, ((0, 5),))]
    packed = tensors(prefix + sum(tails), 4, 2)
    found = attend(packed[0], packed[1], packed[2], shared, 0.3)
    slope = torch.randn_like(found)
    found.backward(slope)
    rows = [torch.cat([torch.arange(5), torch.arange(s.start, s.end)]) for s in shared[1:]]
    whole = [t.detach().clone().requires_grad_() for t in packed]
    for share, row in zip((1, 0), rows, strict=True):  # the prefix's own output counts once
        query, key, value = (t[row] for t in whole)
        out = reference(query, key, value, [len(row)], 0.3)
        weighed = slope[row].clone()
        weighed[:5] *= share
        out.backward(weighed)
        torch.testing.assert_close(found[row], out)
    for one, other in zip(packed, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# What runs on a GPU. `varlen_attn` exists on CUDA only, so a stand-in with its arguments does its
# work here; the device itself tells whether the kernel is right, by `why_apart` and the probe.

LENGTHS = [7, 1, 12]


def stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths = [end - start for start, end in pairwise(cu_seq_q.tolist())]
    assert max_q == max_k == max(lengths) and window_size == (-1, 0) and enable_gqa
    return reference(query, key, value, lengths, scale)


@pytest.fixture
def fresh():
    """Forget trials of before, and of this test after it."""
    attention.why_apart.cache_clear()
    yield
    attention.why_apart.cache_clear()


@pytest.mark.parametrize("way", [attention.apart, attention.joined])
def test_on_a_gpu_each_segment_sees_itself_alone(way, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", stand_in)
    compare(way, LENGTHS, (4, 2))


def test_pytorch_s_kernel_takes_what_it_is_given():
    rows = [t.detach().to("meta", torch.bfloat16).requires_grad_() for t in tensors(20, 4, 2)]
    out = attention.joined(rows[0], rows[1], rows[2], tuple(segments_of(LENGTHS)), 0.3)
    out.backward(torch.empty_like(out))
    assert out.shape == rows[0].shape
    assert all(gradient(row).shape == row.shape for row in rows)


def wrong_gradient(query, key, value, *bounds, **settings):
    return stand_in(query, key, value.detach(), *bounds, **settings)


def leaking(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, **settings):
    return reference(query, key, value, [len(query)], scale)


def failing(*rows, **settings):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize(
    ("kernel", "good"),
    [(stand_in, True), (wrong_gradient, False), (leaking, False), (failing, False), (None, False)],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_trial_decides_whether_one_call_does_all(kernel, good, mode, fresh, monkeypatch):
    if kernel:
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    before = torch.get_rng_state()
    with mode():
        why = attention.why_apart(torch.device("cpu"), torch.bfloat16, 4, 2, SIZE)
    assert (why == "") == good  # None: this build's own, which has no such kernel for a CPU
    assert torch.equal(torch.get_rng_state(), before)


def test_bounds_made_by_a_measurement_serve_a_training_step():
    segments = tuple(segments_of([3, 4, 9]))
    with torch.inference_mode():
        attention.segment_bounds(segments, torch.device("cpu"))
    bounds, longest = attention.segment_bounds(segments, torch.device("cpu"))
    assert bounds.tolist() == [0, 3, 7, 16] and longest == 9 and not bounds.is_inference()
