"""Training in float16, as on GPUs without bfloat16: gradients do not vanish in its narrow range."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.models import loading
from distill.training import train
from tests.support.training import make_run, training


def history(folder: Path, name: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the steps of a training whose frozen base is in `dtype`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "pick_dtype", lambda name="auto": dtype)
        run = make_run(folder, name, bf16="auto", lora={"r": 4, "alpha": 8, "dropout": 0.0})
        train.main(run)
    return training(run)["history"]


def test_a_frozen_base_in_float16_trains_as_in_float32(tmp_path: Path) -> None:
    full, half = (history(tmp_path, str(t), t) for t in (torch.float32, torch.float16))
    assert len(full) == len(half) > 1
    for one, other in zip(full, half, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=3e-2)
