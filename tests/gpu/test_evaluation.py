"""What a model held is free before the next one is loaded."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from distill.evaluation import answering
from distill.models import loading
from distill.responders.local import local_model
from distill.training import train
from tests.support.training import dataset, make_soft_run


def test_an_evaluation_has_one_model_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_soft_run(tmp_path, train={"max_steps": 1, "bf16": False})
    train.main(run)
    load, models, alive = loading.load_model, list[Any](), list[int]()

    def counted(*reference: Any, **options: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        model = load(*reference, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_model", counted)
    monkeypatch.setattr(local_model, "load_model", counted)
    monkeypatch.setattr(answering, "SECONDS", 0.0)
    answering.answer(run, dataset(run)[:3], [])
    assert alive == [0, 0, 0], "of base, student and teacher"
