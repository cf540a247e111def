"""A teacher in memory: the same loss as from the whole of its distributions on disk, and a resume to the same bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.storage.run_folder import Run
from distill.training import train
from distill.training.prepare import load_adapted
from distill.training.soft_labels import capture
from distill.training.soft_labels.labels import load_labels, load_live
from distill.training.student import make_student
from tests.training.test_capture import SOFT, dataset, exact
from tests.training.test_capture import make_run as make_captured
from tests.training.test_labels import (
    SETTINGS,
    assert_deal_does_not_matter,
    examples,
    history,
    other_teacher,
    other_tokenizer,
)
from tests.training.test_train import assert_same, killed_at, outcome

LIVE = {**SOFT, "teacher": "live"}


def make_run(folder: Path, name: str = "run", loss: dict = LIVE, **train_) -> Run:
    """A run in float32 whose teacher is read live, with no signals of its own."""
    return make_captured(folder, name, train={**SETTINGS, "loss": loss, **train_})


def live_student(run: Run):
    student, _ = make_student(
        load_adapted(run.config.student, run.config.train, run.config.train_seed)
    )
    student.labels = load_live(run.config, run, examples(run))
    return student.eval()


def test_the_loss_is_the_divergence_of_the_whole_vocabularies(tmp_path):
    run = make_run(tmp_path)
    student = live_student(run)
    with torch.no_grad():
        _, _, kl = student(student.batch(examples(run))).tolist()
    own = {"teacher": run.config.teacher.model_copy(update={"model": run.config.student.model})}
    untrained, wanted = Run(run.config.model_copy(update=own)), 0.0
    for pair in dataset(run):
        p, q = exact(run, pair), exact(untrained, pair)
        q = q - q.logsumexp(1, keepdim=True)
        wanted += float((p.exp() * (p - q)).sum())
    assert kl == pytest.approx(wanted, rel=1e-4)


def test_a_cache_of_everything_says_the_same(tmp_path):
    everything = {"p": 0.9999999, "k": 1024}
    run = make_captured(tmp_path, train={**SETTINGS, "loss": SOFT}, signals=everything)
    capture.main(run.config, run)
    student = live_student(run)
    with torch.no_grad():
        live = student(student.batch(examples(run))).tolist()
        student.labels = load_labels(run.config, run, examples(run), len(student.head()[0]))
        cached = student(student.batch(examples(run))).tolist()
    assert cached == pytest.approx(live, rel=0.03)  # but for sixteenths of a nat, on few tokens


def test_packed_and_padded_batches_agree_and_an_idle_one_weighs_nothing(tmp_path):
    assert_deal_does_not_matter(make_run, tmp_path)
    student = live_student(make_run(tmp_path))
    assert student(student.batch([])).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("call", [2, 7])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, call):
    whole, broken = make_run(tmp_path), make_run(tmp_path, "broken")
    train.main(whole.config, whole)
    with killed_at(call):
        train.main(broken.config, broken)
    train.main(broken.config, broken)
    assert_same(outcome(broken), outcome(whole))


def test_the_teacher_is_neither_trained_nor_saved(tmp_path):
    run = make_run(tmp_path)
    train.main(run.config, run)
    saved = load_file(run.path("adapter/adapter_model.safetensors"))
    student = live_student(run)
    teacher = load_live(run.config, run, examples(run)).teacher
    assert not any("labels" in name for name, _ in student.named_parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert len(saved) == sum(p.requires_grad for p in student.parameters())


def test_a_resume_towards_another_teacher_stops(tmp_path):
    run = make_run(tmp_path)
    with killed_at(5):
        train.main(run.config, run)
    other_teacher(run)
    with pytest.raises(DistillError, match="changed: signals"):
        train.main(run.config, run)


def test_another_tokenizer_is_found_before_the_first_step(tmp_path):
    run = make_run(tmp_path)
    other_tokenizer(run)
    with pytest.raises(DistillError, match="have different tokenizers") as fault:
        train.main(run.config, run)
    assert fault.value.code == Exit.CONFIG and not run.path("checkpoints").exists()


def test_a_live_teacher_needs_no_capture_and_any_temperature(tmp_path):
    run = make_run(tmp_path, loss={**LIVE, "temperature": 2.0})
    assert not run.config.captures and run.config.distributions
    with pytest.raises(ValueError, match="is not captured"):
        make_run(tmp_path, loss={**SOFT, "temperature": 2.0})
    with pytest.raises(ValueError, match="a local teacher must read"):
        tree = run.config.model_dump(mode="json")
        recorded = {"kind": "recorded", "model": "someone"}
        Config.model_validate({**tree, "teacher": recorded})


def test_another_training_seed_keeps_the_split(tmp_path):
    one, two = make_run(tmp_path), make_run(tmp_path, "two", seed=1)
    train.main(one.config, one)
    train.main(two.config, two)
    assert one.config.seed == two.config.seed and history(one) != history(two)
