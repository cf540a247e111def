"""An adapter on the output head: PEFT's own outputs and gradients, exact when resumed, and merged to what it was."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from distill.config import Loss, Signals
from distill.errors import DistillError, Exit
from distill.models.loading import load_model
from distill.publishing.fidelity import answer_logits, compare_models
from distill.training import adapters, train
from distill.training.divergences import Live
from distill.training.encode import encode_pair
from distill.training.losses import cross_entropy
from distill.training.soft_labels.capture import capture
from distill.training.student import Batch, StudentModel, answer_loss, make_student
from tests.support.tiny import make_tiny, make_tokenizer
from tests.training.test_layers import adapted, examples, gradients, plain
from tests.training.test_merge import ROWS
from tests.training.test_student import DATE
from tests.training.test_train import assert_same, killed_at, make_run, outcome, pairs

TARGETS = ("q_proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("untied"), tied=False)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sum("lm_head" in name for name in found) == 2 and found.keys() == wanted.keys()
    for name, slope in wanted.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-5 * float(slope.norm()))


@pytest.mark.parametrize("fused", [True, False])
def test_loss_and_gradients_are_plain_peft_s(folder, fused):
    wanted_loss, wanted = plain(adapted(folder, TARGETS))
    model = adapted(folder, TARGETS)
    adapters.use_working_copies(model)
    student, notes = make_student(model, fused=fused)
    loss = student(student.batch(examples()))
    loss.backward()
    assert not notes and float(loss.detach()) == pytest.approx(wanted_loss, rel=1e-5)
    assert_close(gradients(model), wanted)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_gradients_of_soft_labels_are_plain_peft_s(folder):
    model = adapted(folder, TARGETS)
    batch, rows = Batch.make(examples(1)), len(make_tokenizer()) + 5
    make = torch.Generator().manual_seed(0)
    teacher = torch.randn(len(batch.indices_S), 8, generator=make)
    head = torch.randn(rows, 8, generator=make)
    logits = model(input_ids=batch.ids_N[None]).logits[0, batch.indices_S]
    logs, aims = torch.log_softmax(logits, -1), torch.softmax(teacher @ head.t(), -1)
    kl = (aims * (aims.log() - logs)).sum()
    loss = 0.5 * kl - 0.5 * logs.gather(1, batch.targets_S[:, None]).sum()
    loss.backward()
    wanted, again = gradients(model), adapted(folder, TARGETS)
    student, _ = make_student(again)
    student.labels = SimpleNamespace(settings=Loss(ce=0.5, forward_kl=0.5))  # pyright: ignore[reportAttributeAccessIssue]
    found = student(replace(batch, soft=Live(teacher, head, rows)))
    found[0].backward()
    assert float(found[0].detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(found[2].detach()) == pytest.approx(float(kl.detach()), rel=1e-5)
    assert_close(gradients(again), wanted)


def test_chunked_equals_whole(folder):
    model = adapted(folder, TARGETS)
    student, _ = make_student(model)
    batch, found = Batch.make(examples()), []
    for chunk in (7, 1000):
        model.zero_grad()
        inputs = (student.states(batch), student.matrices(), batch.targets_S, batch.weights_S)
        cross_entropy(*inputs, chunk=chunk)[0].backward()
        found.append(gradients(model))
    assert_close(*found)


def test_a_head_without_its_adapter_is_found_by_the_probe(folder, monkeypatch):
    model = adapted(folder, TARGETS)
    monkeypatch.setattr(StudentModel, "widen", lambda self, hidden: hidden)
    monkeypatch.setattr(StudentModel, "matrices", lambda self: (self._head[0].weight,))
    with pytest.raises(DistillError, match="logits behind the head"):
        make_student(model)


def test_what_is_read_and_captured_is_what_the_adapted_model_says(folder):
    model = adapted(folder, TARGETS).eval()
    tokenizer, rows = make_tokenizer(), pairs(3)
    readings = answer_loss(model, tokenizer, rows, DATE, 2048)
    plainly = adapted(folder, TARGETS).eval().merge_and_unload()
    for one, other in zip(readings, answer_loss(plainly, tokenizer, rows, DATE, 2048), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.hits == other.hits
    encoded = [encode_pair(tokenizer, pair, DATE) for pair in rows]
    heard = [
        capture(make_student(m)[0], len(tokenizer), encoded, Signals(k=4)) for m in (model, plainly)
    ]
    torch.testing.assert_close(*(torch.tensor(s.tail_mass_N) for s in heard), rtol=1e-4, atol=1e-6)
    assert heard[0].ids_E.tolist() == heard[1].ids_E.tolist()


def make_head_run(folder, name="run"):
    make_tiny(folder / "model", tied=False)
    lora = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": TARGETS}
    return make_run(folder, name, save_steps=1, micro_batch_tokens=300, max_steps=3, lora=lora)


def test_a_killed_run_goes_on_to_the_same_bits_and_merges(tmp_path):
    run, other = make_head_run(tmp_path), make_head_run(tmp_path, "killed")
    train.main(run.config, run)
    with killed_at(4):
        train.main(other.config, other)
    train.main(other.config, other)
    assert_same(outcome(other), outcome(run))
    base, adapter = str(tmp_path / "model"), run.path("adapter")
    weights = adapters.read_tensors(adapter / "adapter_model.safetensors")
    assert all(t.any() for name, t in weights.items() if "lm_head" in name)
    loaded = PeftModel.from_pretrained(load_model(base, "float32"), str(adapter))
    merged = load_model(f"{run.path('merged')}", "float32")
    found = compare_models(*(answer_logits(model, ROWS) for model in (loaded, merged)))
    assert found.same and found.largest_logit_difference < 1e-4
    assert adapters.tensors(loaded).keys() == weights.keys()


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (("q_proj", "lm_head"), "the output head, which is this model's embedding too"),
        (("embed_tokens",), "the embedding"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, targets, what, recwarn):
    with pytest.raises(DistillError, match=what) as fault:
        adapted(make_tiny(tmp_path), targets)
    assert fault.value.code == Exit.TRAINING
    assert not any("tie_word" in str(warning.message) for warning in recwarn)
