"""The student: padding where packing cannot be, loud about heads it does not know, losses by sample."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

from distill.errors import DistillError
from distill.records import AnswerLoss
from distill.training.encode import encode_pair
from distill.training.student import Batch, answer_loss, make_student
from tests.support.tiny import make_tiny, make_tokenizer
from tests.training.test_layers import adapted, examples
from tests.training.test_train import pairs

DATE = "2026-01-01"
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_padded_and_packed_batches_have_one_loss(tmp_path):
    model = adapted(make_tiny(tmp_path))
    packed, _ = make_student(model)
    found = float(packed(Batch.make(examples())).detach())
    model.set_attn_implementation("sdpa")
    padded, notes = make_student(model, packing=False)
    assert not padded.packing and not notes
    assert float(padded(Batch.make(examples())).detach()) == pytest.approx(found, rel=1e-5)


def test_a_sliding_window_is_padded_and_said(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=4))
    student, notes = make_student(model, fused=True)
    assert not student.packing and "mistral cannot take packed rows" in notes[0]
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(student.decoder().layers[0])


def test_logits_that_are_capped_behind_the_head_are_refused():
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, final_logit_softcapping=0.01)
    with pytest.raises(DistillError, match="scales or caps its logits"):
        make_student(AutoModelForCausalLM.from_config(config))


def test_an_idle_batch_weighs_nothing(tmp_path):
    student, _ = make_student(adapted(make_tiny(tmp_path)))
    loss = student(Batch.make([]))
    loss.backward()
    assert float(loss.detach()) == 0


def test_places_predict_the_next_token():
    batch = Batch.make(examples(2))
    assert torch.equal(batch.ids_N[batch.indices_S + 1], batch.targets_S)
    first = examples(1)[0]
    wanted = [i for i, w in zip(first.input_ids, first.weights, strict=True) if w]
    assert batch.targets_S[: len(wanted)].tolist() == wanted


def test_answer_loss_is_transformers_own_in_the_order_of_the_pairs(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path)).eval()
    tokenizer, rows = make_tokenizer(), pairs(9)
    longest = max(len(encode_pair(tokenizer, p, DATE).input_ids) for p in rows)
    found = answer_loss(model, tokenizer, rows, DATE, max_length=longest - 1)
    assert model.config._attn_implementation == "sdpa"
    assert found.count(AnswerLoss(loss=0.0, tokens=0, hits=0)) >= 1
    for pair, reading in zip(rows, found, strict=True):
        total, count, hits = reading.loss, reading.tokens, reading.hits
        example = encode_pair(tokenizer, pair, DATE)
        if len(example.input_ids) == longest:
            assert (total, count, hits) == (0.0, 0, 0)
            continue
        ids = torch.tensor([example.input_ids])
        labels = torch.where(torch.tensor([example.weights]) > 0, ids, -100)
        with torch.no_grad():
            whole = model(input_ids=ids, labels=labels)
        mean, likeliest = float(whole.loss), whole.logits[:, :-1].argmax(-1)
        assert count == sum(example.weights)
        assert total == pytest.approx(mean * count, rel=1e-4)
        assert hits == int((likeliest == labels[:, 1:]).sum())
