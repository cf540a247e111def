"""The student: packed, padded and fused alike with plain PEFT, an adapted head too."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, MistralConfig

from distill.config.learning import Loss
from distill.errors import DistillError, Exit
from distill.records import AnswerLoss
from distill.training.encode import encode_pair
from distill.training.fused_layers import fusible
from distill.training.losses import Live
from distill.training.student import Batch, answer_loss, make_student
from tests.support.tiny import make_tiny, make_tokenizer
from tests.support.training import (
    DATE,
    LENGTHS,
    adapted,
    causal_model,
    examples,
    gradients,
    pairs,
    plain_step,
)

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """Qwen2's biases are zero in a fresh model, which would hide a forgotten one."""
    folder = make_tiny(tmp_path_factory.mktemp("qwen2"), family="qwen2")
    model = causal_model(folder)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(
            one[name], value, rtol=1e-4, atol=1e-5 * max(1.0, float(value.norm()))
        )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("base", "targets"),
    [
        ("folder", "all-linear"),
        ("folder", ("q_proj", "v_proj", "down_proj")),
        ("qwen2", "all-linear"),
        ("qwen2", ("q_proj", "v_proj", "down_proj")),
    ],
)
def test_packed_and_fused_equals_plain_peft_sample_by_sample(base, targets, fused, request):
    folder = request.getfixturevalue(base)
    expected_loss, expected = plain_step(adapted(folder, targets))
    model = adapted(folder, targets)
    student, notes = make_student(model, packing=True, fused=fused)
    assert student.packing and not notes
    assert fused == ("forward" in vars(student.decoder().layers[0]))
    batch = student.batch(examples())
    assert len(batch.ids_N) < sum(LENGTHS)  # two samples share their beginning
    loss = student(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-5)
    assert_close(gradients(model), expected)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_gradient_checkpointing_changes_nothing(folder):
    outcomes = []
    for checkpointing in (False, True):
        model = adapted(folder)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        student, _ = make_student(model.train(), fused=True)
        student(Batch.make(examples())).backward()
        outcomes.append(gradients(model))
    one, other = outcomes
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dropout_and_other_kinds_are_left_to_transformers(folder):
    def layer(**settings: Any) -> Any:
        return adapted(folder, **settings).get_base_model().model.layers[0]

    assert not fusible(layer(dropout=0.5))
    one = layer()
    assert fusible(one)
    one.mlp.act_fn = torch.nn.GELU()
    assert not fusible(one)


def test_a_sliding_window_is_padded_and_said():
    model = causal_model(MistralConfig(**SIZES, sliding_window=4))
    student, notes = make_student(model, fused=True)
    assert not student.packing and "mistral cannot take packed rows" in notes[0]
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(student.decoder().layers[0])


def test_logits_that_are_capped_behind_the_head_are_refused():
    config = Gemma2Config(**SIZES, final_logit_softcapping=0.01)
    with pytest.raises(DistillError, match="caps its logits"):
        make_student(causal_model(config))


def test_an_idle_batch_weighs_nothing(folder):
    student, _ = make_student(adapted(folder))
    loss = student(Batch.make([]))
    loss.backward()
    assert float(loss.detach()) == 0


def test_answer_loss_is_transformers_own_in_the_order_of_the_pairs(folder):
    model, tokenizer, rows = causal_model(folder).eval(), make_tokenizer(), pairs(9)
    longest = max(len(encode_pair(tokenizer, p, DATE).input_ids) for p in rows)
    results = answer_loss(model, tokenizer, rows, DATE, max_length=longest - 1)
    assert model.config._attn_implementation == "sdpa"
    nothing = AnswerLoss(loss=0.0, tokens=0, hits=0)
    assert results.count(nothing) >= 1
    for pair, result in zip(rows, results, strict=True):
        example = encode_pair(tokenizer, pair, DATE)
        if len(example.input_ids) == longest:
            assert result == nothing
            continue
        ids = torch.tensor([example.input_ids])
        labels = torch.where(torch.tensor([example.weights]) > 0, ids, -100)
        with torch.no_grad():
            whole = model(input_ids=ids, labels=labels)
        assert result.tokens == sum(example.weights)
        assert result.loss == pytest.approx(float(whole.loss) * result.tokens, rel=1e-4)
        assert result.hits == int((whole.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum())


def test_gradients_of_soft_labels_are_plain_peft_s(folder):
    model = adapted(folder)
    batch, rows = Batch.make(examples(1)), len(make_tokenizer()) + 5
    make = torch.Generator().manual_seed(0)
    teacher = torch.randn(len(batch.indices_S), 8, generator=make)
    head = torch.randn(rows, 8, generator=make)
    logits = model(input_ids=batch.ids_N[None]).logits[0, batch.indices_S]
    logs, aims = torch.log_softmax(logits, -1), torch.softmax(teacher @ head.t(), -1)
    kl = (aims * (aims.log() - logs)).sum()
    loss = 0.5 * kl - 0.5 * logs.gather(1, batch.targets_S[:, None]).sum()
    loss.backward()
    expected, again = gradients(model), adapted(folder)
    student, _ = make_student(again)
    student.labels = SimpleNamespace(settings=Loss(ce=0.5, forward_kl=0.5))  # pyright: ignore[reportAttributeAccessIssue]
    total, _, divergence = student(replace(batch, soft=Live(teacher, head, rows)))
    total.backward()
    assert float(total.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(divergence.detach()) == pytest.approx(float(kl.detach()), rel=1e-5)
    assert_close(gradients(again), expected)


@pytest.mark.parametrize(
    ("targets", "what"),
    [(("q_proj", "lm_head"), "the head"), (("embed_tokens",), "the embedding")],
)
def test_an_adapter_of_head_or_embedding_is_refused(folder, targets, what, recwarn):
    with pytest.raises(DistillError, match=f"{what} is trained by no adapter") as error:
        adapted(folder, targets)
    assert error.value.code == Exit.TRAINING
    assert not any("tie_word" in str(warning.message) for warning in recwarn)
