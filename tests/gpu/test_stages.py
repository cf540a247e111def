"""What a stage held on a GPU is free when it ends."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import DistillError, Exit
from distill.models.loading import load_model
from distill.pipeline import perform
from distill.storage.run_folder import Run, Stage
from distill.training.student import StudentModel, answer_loss
from tests.support.gpu import patch_gpu
from tests.support.runs import make_run
from tests.support.tiny import make_tiny, make_tokenizer
from tests.support.training import pairs


def test_a_stage_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in a cycle of references lives on until Python looks for such."""
    patch_gpu(monkeypatch)
    models, alive = list[Any](), list[bool]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(models[0]() is not None))

    def main(run: Run) -> None:
        model: Any = torch.nn.Linear(2, 2)
        model.itself = [model]
        models.append(weakref.ref(model))
        run.path("a.txt").write_text("")

    run = make_run(tmp_path)
    perform(run, [Stage("first", (), (), ("a.txt",), main)])
    assert alive == [False]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_an_error_that_a_notebook_keeps_holds_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    patch_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    models = list[Any]()

    def main(_: Run) -> None:
        model = torch.nn.Linear(2, 2)
        models.append(weakref.ref(model))
        raise kind("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises((DistillError, KeyboardInterrupt)) as kept:
        perform(make_run(tmp_path), [Stage("first", (), (), ("a.txt",), main)])
    assert kept.value.__traceback__ and models[0]() is None


@pytest.mark.parametrize("text", ["", "Full. Tried 2 GiB. GPU 0 has much more to say"])
def test_a_full_gpu_is_one_line(tmp_path: Path, text: str) -> None:
    def main(_: Run) -> None:
        raise torch.OutOfMemoryError(text)

    with pytest.raises(DistillError, match="stage first: out of GPU memory") as caught:
        perform(make_run(tmp_path), [Stage("first", (), (), ("a.txt",), main)])
    assert caught.value.code == Exit.TRAINING and "more to say" not in caught.value.what


def test_losses_that_run_out_of_memory_go_on_with_shorter_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = load_model(str(make_tiny(tmp_path)), "float32")
    asked = (model, make_tokenizer(), pairs(12), "2026-01-01", 2048)
    expected, hidden = answer_loss(*asked), StudentModel.hidden

    def limited(student: StudentModel, batch: Any) -> Any:
        if len(batch.ids_N) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(student, batch)

    monkeypatch.setattr(StudentModel, "hidden", limited)
    most = 512
    for one, other in zip(answer_loss(*asked), expected, strict=True):
        assert (one.tokens, one.hits) == (other.tokens, other.hits)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert capsys.readouterr().err.count("out of GPU memory") == 1
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        answer_loss(*asked)
