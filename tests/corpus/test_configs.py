"""Every shipped experiment loads, and the tasks that it names are there and fit one another."""

from pathlib import Path

import pytest

from distill.config_file import load_config, parse_yaml, read_text
from distill.corpus import prompts
from distill.tasks.task import load_task

EXPERIMENTS = [
    path
    for path in sorted(Path("configs").glob("*.yaml"))
    if "corpus" in parse_yaml(read_text(path), path)
]


def test_there_are_experiments() -> None:
    names = {path.stem for path in EXPERIMENTS}
    assert names >= {"quickstart", "folder", "gsm8k", "one-gpu"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_shipped_experiment_loads_and_is_named_after_its_file(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    for name in config.prompts.tasks:
        assert load_task(name).student.user
    assert len(prompts.identity(config)) == max(1, len(config.prompts.tasks))


def test_the_quickstart_has_the_sizes_that_it_is_compared_at() -> None:
    config = load_config(Path("configs/quickstart.yaml"))
    assert (config.prompts.train, config.corpus.limit) == (96, 180)
    assert config.teacher.max_new_tokens == 128 and config.prompts.per_document == "rotate"
    table = load_config(Path("configs/python-docs.yaml"))  # the README's
    assert (table.prompts.train, table.prompts.validation, table.prompts.heldout) == (240, 360, 66)
    assert table.student == config.student and table.train == config.train
