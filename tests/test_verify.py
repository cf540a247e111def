"""`distill verify` on a whole tiny run with its release: made again byte for byte, and no changed
byte passes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from distill import verify
from distill.cli import main
from distill.errors import DistillError, Exit
from distill.responders import prices
from distill.storage.files import read_json, sha256_file, write_json
from distill.storage.run_folder import open_run, sealed
from distill.verify import Check, RunEvidence
from tests.evaluation.test_suites import make_suite
from tests.publishing.test_publish import BASE
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import make_tiny

FREE = {".lock"}  # outside the evidence


def write_config(folder: Path, suite: Path) -> Path:
    """Write a config of twenty sums whose answers were recorded, right and wrong ones."""
    rows = [{"prompt": f"What is {n} and {n}?", "answer": f"It is #### {2 * n}"} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.yaml").write_text(
        "name: tiny\n"
        "corpus: {path: rows.jsonl, format: prompts, reference_pattern: '#### (\\d+)',"
        " split: {validation: 2, heldout: 8}, near_duplicate_threshold: null}\n"
        "prompts: {tasks: [math_word_problem]}\n"
        "teacher: {kind: recorded, model: somebody/one, license: CC0-1.0, max_new_tokens: 12}\n"
        f"student: {{model: {BASE}, dtype: float32}}\n"
        "train: {max_steps: 2, tokens_per_step: 256, eval_steps: 1, save_steps: 1, max_length: 512,"
        " lora: {r: 2}}\n"
        f"evaluation: {{machine: cpu-2-core, samples: 200, tries: {{n: 2}}, suites: ['{suite}']}}\n"
        "publish: {license: Apache-2.0}\n"
    )
    return folder / "c.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a whole run and its release, once; return the folder that holds `runs/tiny` and the
    store."""
    place = tmp_path_factory.mktemp("finished")
    files = {p.name: p.read_bytes() for p in make_tiny(tmp_path_factory.mktemp("base")).iterdir()}
    with fake_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add(BASE, files)
        use_hub(patch, hub, place / "hub")
        config = write_config(place, make_suite(place / "suite"))
        with contextlib.chdir(place):
            assert main(["run", str(config)]) == 0
            assert main(["publish", "runs/tiny", "--override", "a test"]) == 0
        yield place


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may damage, its store beside it, in another folder than
    it was made in."""
    shutil.copytree(finished / "runs", tmp_path / "moved")
    return tmp_path / "moved/tiny"


def bad(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.state not in ("same", "skipped")]


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_finished_run_is_whole_elsewhere_and_on_another_day(run, monkeypatch):
    class Later(date):
        @classmethod
        def today(cls) -> "Later":
            return cls(2099, 1, 1)

    monkeypatch.setattr(prices, "date", Later)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    checks = verify.verify(run.rename(run.with_name("renamed")))
    run.with_name("renamed").rename(run)
    assert bad(checks) == []
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before, "it wrote into the run"
    again = {check.what for check in checks if check.kind == "again"}
    assert {"scores/student.jsonl", "scores/sums/student.jsonl", "requests.jsonl"} < again
    assert "scores/tries.jsonl" in again
    assert {"evaluation.json", "scorecard.json", "scorecard.md", "report.html"} < again
    stored = {check.what for check in checks if check.kind == "store"}
    assert {"responses.jsonl", "answers/base.jsonl", "answers/sums/student.jsonl"} < stored
    assert "answers/tries.jsonl" in stored
    assert Check("release", "its model", "same") in checks
    assert set(RunEvidence(run).outside()) <= FREE


def test_the_command_says_so_and_needs_neither_torch_nor_network(run: Path) -> None:
    script = (
        "import sys, socket; from distill.cli import main\n"
        "socket.socket.connect = None\n"
        f"code = main(['verify', {str(run)!r}, '--json'])\n"
        "sys.exit(code or ' '.join({'torch', 'transformers', 'peft'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["whole"] and told["seal"] == read_json(run / "manifest.json")["sha256"]
    assert set(told["outside"]) <= FREE


def test_nothing_that_was_made_names_a_folder_of_this_machine(finished: Path) -> None:
    made = {**RunEvidence(finished / "runs/tiny").hashes, "manifest.json": ""}
    for name in set(made) - {"config.json"}:  # which says what the user wrote
        content = (finished / "runs/tiny" / name).read_bytes()
        assert str(finished).encode() not in content or name == "stages/evaluate.json", name


def test_one_changed_byte_of_any_file_is_found_and_named(run: Path) -> None:
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.name not in FREE):
        name, kept = path.relative_to(run).as_posix(), path.read_bytes()
        if kept:
            flip(path, len(kept) // 2)
            found = bad(list(verify.check_files(RunEvidence(run)))) or bad(verify.verify(run))
            assert any(name in f"{c.what} {c.where}" or c.what in name for c in found), name
            path.write_bytes(kept)
    assert bad(verify.verify(run)) == []


def forge(run: Path, name: str, old: str, new: str) -> None:
    """Change a file, and every hash of it that was recorded, as a forger would."""
    path = run / name
    before, text = sha256_file(path), path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    replaced = {before: sha256_file(path)}
    for marker in (run / "stages").glob("*.json"):
        was = sha256_file(marker)
        marker.write_text(marker.read_text().replace(before, replaced[before]))
        replaced[was] = sha256_file(marker)
    facts = json.dumps(read_json(run / "manifest.json"))
    for was, now in replaced.items():
        facts = facts.replace(was, now)
    seal(run, json.loads(facts))


def seal(run: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256")
    (run / "manifest.json").write_text(sealed(manifest))


@pytest.mark.parametrize(
    ("name", "old", "new", "where"),
    [
        ("scorecard.json", '"n": 8', '"n": 9', "line"),
        ("report.html", "tiny", "tony", "line"),
        ("scores/student.jsonl", '"value":0.0', '"value":1.0', "line 1"),
    ],
)
def test_a_forged_result_with_forged_hashes_is_not_made_again(run, name, old, new, where):
    """H9: what can be made again is compared."""
    forge(run, name, old, new)
    assert differences(run).get(("again", name), "").startswith(where)


def differences(run: Path) -> dict[tuple[str, str], str]:
    return {(check.kind, check.what): check.where for check in bad(verify.verify(run))}


def test_another_answer_is_not_what_the_store_holds(run: Path) -> None:
    path, name = run / "answers/student.jsonl", "answers/student.jsonl"
    kept = path.read_bytes()
    lines = kept.splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"text":"', b'"text":"x')
    path.write_bytes(b"".join(lines))
    found = differences(run)
    assert found["evaluate", name] == "not as recorded" and found["store", name] == "line 3"
    path.write_bytes(kept)
    text = json.loads(lines[0])["text"]
    forge(run, name, json.dumps(text, ensure_ascii=False), '"#### 4"')
    assert differences(run)["store", name] == "line 1"
    shutil.rmtree(run.parent / ".store")
    assert [c.state for c in verify.verify(run) if c.kind == "store"] == ["skipped"]


def test_other_weights_than_the_evaluated_ones_are_named(run: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = run / "release/model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).flat[0] += 1
    save_file(tensors, weights)
    manifest = read_json(run / "manifest.json")
    manifest["release"]["release/model.safetensors"] = sha256_file(weights)
    seal(run, manifest)
    assert differences(run) == {("release", "its model"): "evaluated and released model differ"}
    config = run / "merged/config.json"
    config.write_text(config.read_text() + " ")
    merged = {("train", "merged/config.json"), ("together", "merged"), ("release", "its model")}
    assert differences(run).keys() == merged


def test_what_was_evaluated_must_be_released(finished, run, capsys):
    card = read_json(run / "scorecard.json")
    card["models"]["student"]["model_sha256"] = "0" * 64
    write_json(run / "scorecard.json", card)
    assert main(["publish", str(run)]) == Exit.PUBLISH
    assert "evaluated was model 000000000000, here is" in capsys.readouterr().err


def test_results_of_other_code_are_named_as_such(run, monkeypatch):
    monkeypatch.setattr("distill.storage.environment.code_hash", lambda: "0" * 64)
    checks = verify.verify(run)
    told = [c for c in checks if c.what == "the code of report"]
    assert bad(checks) == [] and told[0].state == "skipped" and "made by distill" in told[0].where


def test_a_report_made_again_is_recorded_again(run, capsys):
    first = (run / "report.html").read_bytes()
    assert main(["report", str(run), "--redo"]) == 0
    assert (run / "report.html").read_bytes() == first
    assert main(["verify", str(run)]) == 0
    assert "outside the evidence" not in capsys.readouterr().out


def test_programs_run_again_only_where_that_is_allowed(run, monkeypatch):
    monkeypatch.setattr(verify, "RUNS_CODE", {"number"})
    checks = verify.verify(run)
    left = {c.what for c in checks if c.state == "skipped" and "--allow-code" in c.where}
    assert bad(checks) == [] and {"scores/student.jsonl", "evaluation.json"} < left
    assert Check("again", "scorecard.json", "same") in checks


def test_a_file_that_is_gone_is_missing_and_the_exit_is_8(run, capsys):
    """H24"""
    (run / "answers/base.jsonl").unlink()
    assert main(["verify", str(run)]) == Exit.EVALUATION
    shown = capsys.readouterr()
    assert "answers/base.jsonl: missing" in shown.err and shown.err.count("\n") == 1
    assert "answers/base.jsonl is" in shown.out and "skipped" in shown.out
    (run / "stages/report.json").unlink()
    with pytest.raises(DistillError, match="has no report to verify"):
        verify.verify(run)


@pytest.fixture
def at_home(run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the copy of the run where its inputs are at hand: in the folder that its paths are
    told from."""
    monkeypatch.chdir(finished)
    with fake_hub() as hub:
        use_hub(monkeypatch, hub, finished / "hub")
        yield run


ODD_NAMES = [".прогон 模型 (copy)", "\x1b[31m[red]\n100% {x} '\"\\", "C1 \x85" + "x" * 120]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_copied_run_may_have_any_name(at_home, name, capfd):
    """H19"""
    home = at_home.parent.rename(at_home.parent.with_name("two\nlines C1 \x85 \u2028"))
    copy = home / name
    shutil.copytree(home / at_home.name, copy)
    for _ in range(2):  # the second finds what the first wrote
        assert main(["run", str(copy)]) == 0
        assert main(["status", str(copy)]) == 0
        assert main(["verify", str(copy)]) == 0
    assert main(["publish", str(copy), "--override", "a test"]) == 0
    assert main(["verify", str(copy)]) == 0
    said = capfd.readouterr().err
    assert "error" not in said and "generate: done before, reused" in said
    assert {path.name for path in home.iterdir()} == {".store", at_home.name, name}


def test_a_folder_whose_name_is_not_utf_8_is_refused_untouched(at_home, capsys):
    """H19"""
    folder = at_home.rename(at_home.with_name(os.fsdecode(b"no \xff utf-8")))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    for verb in ("run", "status", "publish", "verify"):
        assert main([verb, str(folder)]) == Exit.CONFIG
        (line,) = capsys.readouterr().err.splitlines()
        assert "no UTF-8 path" in line and line.startswith("error: ")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_folder_that_an_older_version_wrote_its_name_into_is_opened(at_home: Path) -> None:
    copy = at_home.rename(at_home.with_name("my run (copy)"))
    config = {**read_json(copy / "config.json"), "name": copy.name, "runs": "two\nlines"}
    write_json(copy / "config.json", config)
    assert main(["status", str(copy)]) == 0
    assert main(["run", str(copy)]) == 0
    assert main(["verify", str(copy)]) == 0


def test_a_link_is_the_run_that_it_leads_to(at_home: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for name in (at_home.name, "another"):
        link = tmp_path / "links" / name
        link.symlink_to(at_home)
        opened = open_run(link)
        assert (opened.folder, opened.config.name) == (at_home.resolve(), at_home.name)
        assert main(["run", str(link)]) == 0
        assert main(["verify", str(link)]) == 0
    assert {path.name for path in (tmp_path / "links").iterdir()} == {at_home.name, "another"}


def test_a_folder_is_named_in_any_way(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for here, place in (
        (at_home, "."),
        (at_home / "dataset", ".."),
        (at_home.parent, f"./{at_home.name}/"),
    ):
        monkeypatch.chdir(here)
        opened = open_run(Path(place))
        assert (opened.folder.resolve(), opened.config.name) == (at_home.resolve(), at_home.name)
        assert opened.config.store_folder().resolve() == (at_home.parent / ".store").resolve()
        assert main(["verify", place]) == 0


def test_another_name_makes_another_run_beside_it(at_home: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in at_home.rglob("*")}
    opened = open_run(at_home, ["name=other", "seed=3"])
    assert opened.folder == at_home.parent / "other" and opened.config.seed == 3
    elsewhere = open_run(at_home, [f"runs={at_home.parent / 'more'}"])
    assert elsewhere.folder == at_home.parent / "more" / at_home.name
    assert {p: p.stat().st_mtime_ns for p in at_home.rglob("*")} == before
