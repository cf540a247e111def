"""The benchmark of draws on tiny models: its errors fall with the draws, and are none where nothing
is left out."""

import json
import sys
from pathlib import Path

from distill.storage.files import write_json
from tests.support.training import make_soft_run

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts" / "benchmarks"))

import benchmark_sampled as benchmark

SAMPLE = Path(__file__).parent.parent.parent / "data/gsm8k/sample.jsonl"


def test_errors_fall_with_the_draws_and_a_whole_list_has_next_to_none(tmp_path):
    run, path = make_soft_run(tmp_path), tmp_path / "found.json"
    write_json(run.path("config.json"), run.config.resolved())
    words = ("--foreign", str(SAMPLE), "--tokens", "300")
    more = ("--samples", "10", "250", "--k", "4", "300", "--json", str(path))
    benchmark.main((str(run.folder), *words, *more))
    few, whole, rough, fine = json.loads(path.read_text())["rows"]
    assert whole["error"] < 0.02 < few["error"] and fine["error"] < rough["error"]
    assert fine["error_of_an_eighth"] > 1.5 * fine["error"]
    assert few["bytes_a_token"] < fine["bytes_a_token"] and fine["rest"] == 0
