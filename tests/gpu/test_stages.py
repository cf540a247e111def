"""What a stage held on a GPU is free when it ends."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.pipeline import perform
from distill.storage.run_folder import Run, Stage
from tests.support.gpu import patch_gpu
from tests.support.runs import make_run


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
