"""Training in float16, as on GPUs without bfloat16: gradients do not vanish in its narrow range."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import DistillError, Exit
from distill.models import loading
from distill.training import train
from distill.training.student import Batch, StudentModel
from tests.support.training import killed_at, make_run, training


def overflowing(patch: pytest.MonkeyPatch, passes: set[int], dtype: torch.dtype) -> None:
    """Let some passes of a training, counted from 0, overflow."""
    forward, number = StudentModel.forward, iter(range(10**6))
    patch.setattr(loading, "pick_dtype", lambda name="auto": dtype)

    def checked(self: StudentModel, batch: Batch) -> torch.Tensor:
        loss = forward(self, batch)
        return loss * float("inf") if self.training and next(number) in passes else loss

    patch.setattr(StudentModel, "forward", checked)


STEPS: dict[str, Any] = {  # of a pass each
    "bf16": "auto",
    "lora": {"r": 4, "alpha": 8},
    "micro_batch_tokens": 10_000,
    "max_steps": 8,
    "eval_steps": None,
    "save_steps": 1,
}


def test_a_step_that_overflows_in_float16_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, **STEPS)
    with pytest.MonkeyPatch.context() as patch:
        overflowing(patch, {0}, torch.float16)
        with killed_at(2):  # after the first step, which began no optimizer
            train.main(run)
    overflowing(monkeypatch, {2}, torch.float16)
    train.main(run)
    result = training(run)
    assert result["steps"] == 8 and result["skipped"] == [1, 4]
    assert [row["step"] for row in result["history"]] == [2, 3, 5, 6, 7, 8]
    assert "step 4 overflowed in float16 and was skipped" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "fails"), [(4, 4), (20, train.SKIPS)])
def test_steps_that_all_overflow_end_with_the_key_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, fails: int
) -> None:
    overflowing(monkeypatch, set(range(1000)), torch.float16)
    with pytest.raises(DistillError, match=r"train\.bf16=false.*--redo train") as error:
        train.main(make_run(tmp_path, **{**STEPS, "max_steps": steps}))
    assert error.value.code == Exit.TRAINING and "\n" not in str(error.value)
    assert f"overflowed in {fails} steps" in str(error.value)


def test_an_overflow_in_another_type_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflowing(monkeypatch, {0}, torch.float32)
    with pytest.raises(DistillError, match=r"step 1.*look at these samples"):
        train.main(make_run(tmp_path, **STEPS))
