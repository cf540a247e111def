"""The comparison of two models on the same prompts."""

import pytest
import torch

from distill.models import loading
from distill.publishing.fidelity import MAX_TOKENS, Conversation, answer_logits, compare_models
from tests.support.tiny import make_tiny


def test_the_comparison_against_float64():
    torch.manual_seed(0)
    before = [torch.randn(5, 11), torch.randn(3, 11)]
    after = [rows + 0.1 * torch.randn_like(rows) for rows in before]
    found = compare_models(before, after)
    p, q = (torch.cat(rows).double().log_softmax(-1) for rows in (before, after))
    assert found.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum() / 8), rel=1e-4)
    assert found.largest_logit_difference == pytest.approx(
        max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    )
    same = compare_models(before, before)
    assert same.mean_kl == 0 and same.greedy_agreement == 1
    assert compare_models(before, [-rows for rows in before]).greedy_agreement == 0


def test_the_logits_of_a_long_answer_are_those_of_its_first_tokens(tmp_path):
    model = loading.load_model(str(make_tiny(tmp_path)), "float32")
    long = Conversation(ids=tuple(range(3, 103)), answer=10)
    (logits_TV,) = answer_logits(model, [long])
    assert len(logits_TV) == MAX_TOKENS
    alone = model(input_ids=torch.tensor([long.ids[:10]])).logits[0, -1]
    torch.testing.assert_close(logits_TV[0], alone, rtol=1e-4, atol=1e-5)
