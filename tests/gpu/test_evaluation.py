"""One model at a time, timed on the device that is priced."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from distill.evaluation import answering
from distill.evaluation.scorers import HeldOutRequest
from distill.models import loading
from distill.records import Message, Prompt
from distill.responders.local import local_model
from distill.responders.local.local_model import LocalResponder
from distill.storage.files import read_records, write_records
from distill.training import train
from distill.training.soft_labels.labels import read_pairs
from tests.economics.test_run_economics import accounts, make_run
from tests.support.tiny import make_tiny
from tests.support.training import make_soft_run


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
    monkeypatch.setitem(answering.SECONDS, "quick", 0.0)
    answering.answer(run, read_pairs(run)[:3], [])
    assert alive == [0, 0, 0], "of base, student and teacher"


def test_a_run_that_goes_on_on_another_gpu_times_its_models_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responder = LocalResponder.load(str(make_tiny(tmp_path / "tiny")), "float32")
    prompts = [Prompt.make((Message(role="user", content="say it"),), "d", "t")]
    monkeypatch.setattr(answering, "TOKENS", 2)
    path, bytes_of = tmp_path / "timing.jsonl", list[bytes]()
    for gpu in ("", "", "Tesla T4", "Tesla T4", "NVIDIA L4"):
        monkeypatch.setattr(answering, "device_name", lambda place, gpu=gpu: gpu)
        timing = answering.timed(path, responder, prompts)
        assert timing and timing.device == gpu
        bytes_of.append(path.read_bytes())
    assert bytes_of[0] == bytes_of[1] and b"Tesla" not in bytes_of[0]
    assert bytes_of[2] == bytes_of[3] and len(set(bytes_of)) == 3


@pytest.mark.parametrize(
    ("machine", "train", "student", "distillation"),
    [
        ("box", "NVIDIA L4", None, None),
        ("box", "", None, "the stage train ran on a CPU, and the price is of NVIDIA L4"),
        (
            "cpu-2-core",
            "NVIDIA L4",
            *["evaluation.machine is cpu-2-core (a CPU), and this was"] * 2,
        ),
    ],
)
def test_a_gpu_is_paid_at_no_other_device_s_price_and_pays_for_none(
    tmp_path: Path, machine: str, train: str, student: str | None, distillation: str | None
) -> None:
    run, gpu = make_run(tmp_path, {"model": "a/teacher"}, machine=machine), "NVIDIA L4"
    stages = {"train": train, "evaluate": gpu, "report": ""}
    run.note("stages", {name: {"environment": {"gpu": gpu_}} for name, gpu_ in stages.items()})
    rows = read_records(run.path("requests.jsonl"), HeldOutRequest)
    usage = {m: u.model_copy(update={"device": gpu}) for m, u in rows[0].usage.items()}
    write_records(run.path("requests.jsonl"), [r.model_copy(update={"usage": usage}) for r in rows])
    cost = accounts(run, None)["cost"]
    for name, why in (("student", student), ("distillation", distillation)):
        key = "dollars" if name == "distillation" else "dollars_per_1k"
        assert (cost[name][key] is None) == bool(why)
        assert (why or "") in cost[name]["reasons"].get(key, "")
    assert "per_million" in cost["student"]["reasons"], "the timing is of a CPU"
