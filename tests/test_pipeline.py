"""The stages read what they say: at another price only the report is made again."""

from pathlib import Path
from typing import Any

from distill.config.tree import Config, Evaluation
from distill.pipeline import MONEY, STAGES
from distill.storage.run_folder import Run


def fingerprints(folder: Path, **evaluation: Any) -> dict[str, dict[str, Any]]:
    config = Config.model_validate(
        {
            "name": "r",
            "runs": str(folder),
            "corpus": {"path": str(folder)},
            "teacher": {"kind": "recorded"},
            "student": {"model": "a/student"},
            "evaluation": evaluation,
        }
    )
    chosen = [stage for stage in STAGES if stage.name in ("train", "evaluate", "report")]
    return {stage.name: Run(config).fingerprint(stage) for stage in chosen}


def test_another_price_measures_nothing_again(tmp_path: Path) -> None:
    values = {"teacher_price": "x", "utilisation": 0.1, "requests_per_month": 7}
    for key, value in {**values, "machine": "h100", "prices": "p.yaml"}.items():
        before, after = fingerprints(tmp_path), fingerprints(tmp_path, **{key: value})
        assert [name for name in before if before[name] != after[name]] == ["report"]


def test_every_other_key_of_the_evaluation_is_measured(tmp_path: Path) -> None:
    assert set(MONEY) < Evaluation.model_fields.keys()
    read = fingerprints(tmp_path)["evaluate"]
    measured = {key.split(".")[1] for key in read if key.startswith("evaluation.")}
    assert measured == Evaluation.model_fields.keys() - set(MONEY)
