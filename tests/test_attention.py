"""Attention of packed rows against PyTorch's own, sample by sample, values and gradients."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.training import attention
from distill.training.attention import attend, blocks
from distill.training.packing import Segment

SIZE = 8


def tensors(count: int, heads: int, keys: int):
    make = torch.Generator().manual_seed(count)
    shapes = [(count, heads, SIZE), (count, keys, SIZE), (count, keys, SIZE)]
    return [torch.randn(s, generator=make, dtype=torch.float64).requires_grad_() for s in shapes]


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
        patch.setattr(attention, "KEPT", kept)
        given_, wanted = tensors(sum(lengths), *groups), tensors(sum(lengths), *groups)
        found = attend(*given_, segments_of(lengths), 0.3)
        exact = reference(*wanted, lengths, 0.3)
        slope = torch.randn_like(found)
        found.backward(slope), exact.backward(slope)
    torch.testing.assert_close(found, exact)
    for one, other in zip(given_, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_blocks_cover_every_place_once():
    found = [b for segment in segments_of([5, 300, 1]) for b in blocks(segment)]
    assert [p for start, end, _ in found for p in range(start, end)] == list(range(306))
    assert list(blocks(Segment(8, 17, ((0, 5),)))) == [(8, 17, 14)]


@pytest.mark.parametrize("kind", ["sliding_window", "softcap"])
def test_other_kinds_of_attention_are_refused(kind):
    row = torch.zeros(1, 2, 3, SIZE)
    with pytest.raises(ValueError):
        attention._registered(
            torch.nn.Identity(), row, row, row, None, segments=[Segment(0, 3)], **{kind: 4}
        )


def test_a_shared_prefix_gives_the_same_as_each_sample_with_its_own():
    prefix, tails = 5, (3, 9)
    shared = [Segment(0, 5), Segment(5, 8, ((0, 5),)), Segment(8, 17, ((0, 5),))]
    packed = tensors(prefix + sum(tails), 4, 2)
    found = attend(*packed, shared, 0.3)
    slope = torch.randn_like(found)
    found.backward(slope)
    rows = [torch.cat([torch.arange(5), torch.arange(s.start, s.end)]) for s in shared[1:]]
    whole = [t.detach().clone().requires_grad_() for t in packed]
    for share, row in zip((1, 0), rows, strict=True):  # the prefix's own output counts once
        out = reference(*(t[row] for t in whole), [len(row)], 0.3)
        weighed = slope[row].clone()
        weighed[:5] *= share
        out.backward(weighed)
        torch.testing.assert_close(found[row], out)
    for one, other in zip(packed, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
