"""Attention in training on a GPU: which of PyTorch's kernels it is given to, and what is said."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.models.grouped_attention import use_grouped_attention
from distill.training import attention
from distill.training.batches import Segment
from distill.training.student import attention_notes

SEGMENTS = (Segment(0, 5), Segment(5, 17))


def attended(heads: int, keys: int, segments: tuple[Segment, ...]) -> torch.Tensor:
    """Return the attention of 17 tokens."""
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(17, count, 8, generator=make) for count in (heads, keys, keys))
    return attention.apart(query, key, value, segments, 0.3)


@pytest.mark.parametrize(("flash", "heads"), [(False, [4, 4]), (True, [4, 2])])
def test_grouped_keys_are_repeated_where_flash_cannot_run(
    flash: bool, heads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the math kernel holds heads times length squared, in every layer, for the backward."""
    calls, attend = list[tuple[list[int], bool]](), functional.scaled_dot_product_attention

    def spied(query: Any, key: Any, value: Any, *, enable_gqa: bool, **settings: Any) -> Any:
        calls.append(([t.shape[1] for t in (query, key)], enable_gqa))
        return attend(query, key, value, enable_gqa=enable_gqa, **settings)

    expected = attended(4, 2, (Segment(0, 17),))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", spied)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: flash)
    torch.testing.assert_close(attended(4, 2, (Segment(0, 17),)), expected)
    assert calls == [(heads, flash)]
    calls.clear()
    attended(4, 4, SEGMENTS)
    assert calls == [([4, 4], False)] * 2


@pytest.mark.parametrize("masked", [False, True])
def test_transformers_attention_repeats_them_too(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows without padding it asks for grouped heads in every type, which is the math kernel."""
    make = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    query, key, value = (torch.randn(shape, generator=make) for shape in shapes)
    mask = torch.ones(9, 9).tril().bool()[None, None] if masked else None
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    inputs = (module, query, key, value, mask)
    expected, usual = sdpa_attention_forward(*inputs)[0], AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", usual)
    use_grouped_attention()
    attend, heads = functional.scaled_dot_product_attention, list[int]()

    def spied(query: Any, key: Any, *rest: Any, **settings: Any) -> Any:
        heads.append(key.shape[1])
        assert not settings.get("enable_gqa")
        return attend(query, key, *rest, **settings)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spied)
    out = AttentionInterface()["sdpa"](*inputs)[0]
    torch.testing.assert_close(out, expected)
    assert heads == [4]


@pytest.fixture
def fresh_trials() -> Any:
    attention.why_apart.cache_clear()
    yield
    attention.why_apart.cache_clear()


def test_a_kernel_without_grouped_heads_is_said(
    fresh_trials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old(query: Any, key: Any, value: Any, *bounds: Any, scale: float, window_size: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", old)
    assert "enable_gqa" in attention.why_apart(torch.device("cpu"), torch.float32, 4, 2, 8)
    shape = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    shape.get_text_config = lambda: shape
    model = SimpleNamespace(config=shape, dtype=torch.bfloat16)
    (note,) = attention_notes(torch.device("meta"), model)
    assert note.startswith("attention takes a row's samples one by one, which is slower: ")
    assert attention_notes(torch.device("cpu"), model) == []


def test_a_trial_that_runs_out_of_memory_decides_nothing(
    fresh_trials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention.why_apart(torch.device("cpu"), torch.float32, 4, 2, 8)
