"""Settings that an out-of-memory makes one lower: the same command goes on with them."""

from pathlib import Path
from typing import Any

import pytest

from distill.config.tree import Config
from distill.storage.files import write_json
from distill.storage.run_folder import Run, Stage


def run_with(folder: Path, **sections: Any) -> Run:
    tree = {"name": "r", "runs": folder, "corpus": {"path": "x"}, "student": {"model": "s"}}
    return Run(Config.model_validate({**tree, "teacher": {"model": "t"}, **sections}))


def stage_of(section: str) -> Stage:
    return Stage("work", (section,), (), ("parts",), lambda *_: None)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ("teacher", {"model": "t", "concurrency": 64}, {"model": "t", "concurrency": 8}),
        ("teacher", {"model": "t"}, {"model": "t", "concurrency": 8}),
        ("train", {"micro_batch_tokens": 4096}, {"micro_batch_tokens": 512}),
        ("train", {}, {"gradient_checkpointing": True}),
        ("evaluation", {}, {"concurrency": 4}),
    ],
)
def test_a_setting_of_memory_makes_no_stage_stale(
    section: str, old: Any, new: Any, finished: bool, tmp_path: Path
) -> None:
    before, after = (run_with(tmp_path, **{section: value}) for value in (old, new))
    stage = stage_of(section)
    before.path("parts").mkdir(parents=True)
    (before.path("parts") / "1").write_text("")
    write_json(
        before.path(stage.marker), {"fingerprint": before.fingerprint(stage), "finished": finished}
    )
    assert after.state(stage)[0] == ("done" if finished else "unfinished")


def test_a_setting_that_shapes_results_still_does(tmp_path: Path) -> None:
    before, after = (run_with(tmp_path, train={"learning_rate": rate}) for rate in (1e-4, 2e-4))
    stage = stage_of("train")
    before.path("parts").mkdir(parents=True)
    (before.path("parts") / "1").write_text("")
    write_json(
        before.path(stage.marker), {"fingerprint": before.fingerprint(stage), "finished": False}
    )
    assert after.state(stage)[0] == "stale"
