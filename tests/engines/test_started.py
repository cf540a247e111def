"""A local teacher whose answers another engine computes, which is started, asked and ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.config.teachers import Engines
from distill.evaluation import answering
from distill.models.loading import load_tokenizer
from distill.records import Message, Prompt, Response, Timing
from distill.responders import engines
from distill.responders.local.local_model import LocalResponder
from distill.responders.local.served_model import EngineResponder
from distill.responders.responder import Request, Sampling
from distill.storage.files import read_records
from tests.engines.test_gguf import TOKENIZERS, make
from tests.support.engines import python_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python_of("llama.cpp")
    sizes: Any = {"hidden_size": 128, "intermediate_size": 192}  # heads that vLLM takes
    return make(tmp_path_factory.mktemp("models") / "tiny", TOKENIZERS["gpt-2"](), **sizes)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {n} and {n * 7 % 10}?"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree: dict[str, Any] = {
        "name": "r",
        "runs": str(tmp_path / "runs"),
        "corpus": {"path": str(tmp_path / "rows.jsonl"), "near_duplicate_threshold": None,
                   "split": {"validation": 1, "heldout": 2}},
        "teacher": {"model": str(model), "engine": "llama.cpp", "concurrency": 2,
                    "dtype": "float32",
                    "max_new_tokens": 24, "license": "Apache-2.0"},
        "student": {"model": str(model)},
        "terms": {"basis": "a model of our own"},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    return tmp_path / "c.yaml"


def running(text: str) -> list[int]:
    """Return the processes whose command holds a text."""
    pids = list[int]()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if text.encode() in line and b"llama_server" in line:
            pids.append(int(place.name))
    return pids


def answers(config: Path) -> list[Response]:
    return read_records(config.parent / "runs/r/responses.jsonl", Response)


def prepared(config: Path) -> None:
    assert main(["corpus", str(config)]) == 0 and main(["prompts", str(config)]) == 0


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_its_answers_are_stored_and_name_the_engine(
    engine: str, config: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python_of(engine)
    prepared(config)
    named = f"teacher.engine={engine}"
    assert main(["generate", str(config), named]) == 0, capsys.readouterr().err
    responses, ours = answers(config), LocalResponder.load(str(model), "float32")
    assert len(responses) == 12 and {r.stop for r in responses} <= {"end", "length"}
    prompts = {p["id"]: p for p in map(json.loads, (config.parent / "runs/r/prompts.jsonl").open())}
    same = 0
    for response in responses:
        turns = tuple(Message(**m) for m in prompts[response.prompt_id]["messages"])
        request = Request.make(ours.origin, "p", turns, Sampling(max_new_tokens=24))
        (raw,) = ours.ask([request])
        same += raw.response("p").text == response.text
        assert raw.usage.input_tokens == response.usage.input_tokens
    assert same >= 10, "more than near-ties differ"
    stage = json.loads((config.parent / "runs/r/stages/generate.json").read_bytes())
    assert stage["fingerprint"]["engine"].startswith(f"{engine} ")
    (log,) = (config.parent / "runs/.store/responses").glob("*.jsonl")
    assert f"({engine} " in log.read_text()
    assert not running(str(config.parent)) and "starting with" in capsys.readouterr().err
    for stage in ("corpus", "prompts", "generate"):
        assert main([stage, str(config), named, "name=again"]) == 0
    assert "starting with" not in capsys.readouterr().err, "the store had all"
    assert main(["generate", str(config), "teacher.engine=distill"]) == 5


def test_it_is_timed_as_our_own_engine_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (str(model), None, "float32", load_tokenizer(str(model)), "2026-01-01", 2)
    responder = EngineResponder("llama.cpp", Engines(), *settings)
    starts, serve = set[int](), responder.serve

    def served(context: int) -> engines.EngineServer:
        server = serve(context)
        starts.add(server.process.pid)
        return server

    monkeypatch.setattr(responder, "serve", served)
    turns = [(Message(role="user", content=f"say {'so ' * n}"),) for n in range(20)]
    prompts = [Prompt.make(turn, "d", "t") for turn in turns]
    try:
        found = answering.timed(tmp_path / "t.jsonl", responder, prompts, teacher=True)
        assert found and found.engine == "llama.cpp" and len(starts) == 1
        (load,) = found.loads
        assert (load.concurrency, load.requests) == (8, 16) and load.usage.seconds > 0
        ours = LocalResponder.load(str(model), "float32")
        same = answering.timed(tmp_path / "ours.jsonl", ours, prompts, teacher=True)
        assert same and same.read_tokens == found.read_tokens, "the same prompts, as ids"
    finally:
        responder.close()


def test_killed_it_leaves_no_engine_and_goes_on(config: Path, model: Path) -> None:
    prepared(config)
    command = [sys.executable, "-m", "distill", "generate", str(config)]
    slow = ["teacher.max_new_tokens=400", "teacher.concurrency=1"]
    gguf = f"{engines.cache_folder() / 'gguf'}"
    others = set(running(gguf))
    process = subprocess.Popen([*command, *slow], stderr=subprocess.DEVNULL)
    log = config.parent / "runs/.store/responses"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(
        f.stat().st_size > 2000 for f in log.glob("*.jsonl")
    ):
        time.sleep(0.05)
    ours = set(running(gguf)) - others
    assert ours, "it serves while it is killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while ours & set(running(gguf)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not ours & set(running(gguf))
    stored = sum(f.read_text().count('"stop_reason"') for f in log.glob("*.jsonl"))
    assert subprocess.run([*command, *slow], check=False).returncode == 0
    assert len(answers(config)) == 12 and stored < 12


def test_an_engine_that_dies_or_is_missing_is_said_in_a_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(config)
    assert main(["generate", str(config), "engines.llama_cpp.command=no-such-program"]) == 2
    assert "bash scripts/engines.sh llama.cpp" in capsys.readouterr().err
    program, version = tmp_path / "server.sh", '#!/bin/sh\n[ "$1" = --version ] && exit\n'
    command = f"engines.llama_cpp.command={program}"
    program.write_text(f"{version}echo no memory for that model\nexit 3\n")
    program.chmod(0o755)
    assert main(["generate", str(config), command]) == 4
    shown = capsys.readouterr().err
    assert "ended before it answered" in shown and "no memory for that model" in shown
    program.write_text(f"{version}sleep 60\n")
    engines.STARTING, usual = 1.0, engines.STARTING
    try:
        assert main(["generate", str(config), command]) == 4
    finally:
        engines.STARTING = usual
    assert "did not answer within 1 s" in capsys.readouterr().err
    assert Engines().vllm.command is None


def test_student_and_base_answer_and_are_timed_in_the_engine_that_serves_them(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["teacher.engine=distill", "evaluation.engine=llama.cpp", "evaluation.max_new_tokens=8"]
    small = ["train.max_steps=1", "evaluation.concurrency=2", "filters.truncated=false"]
    cache = engines.cache_folder() / "gguf"
    before = len(list(cache.glob("*")))
    assert main(["run", str(config), *named, *small]) == 0, capsys.readouterr().err
    assert len(list(cache.glob("*"))) <= before + 1, "the base's is kept, the student's is not"
    run = config.parent / "runs/r"
    models = json.loads((run / "answers/models.json").read_bytes())
    (ours,) = read_records(run / "timings/teacher.jsonl", Timing)
    assert ours.engine == "distill"
    assert models["student"]["dtype"] == models["base"]["dtype"] == "f16"
    for name in ("student", "base"):
        (timing,) = read_records(run / f"timings/{name}.jsonl", Timing)
        assert timing.engine == "llama.cpp" and timing.loads[0].concurrency == 2
        responses = read_records(run / f"answers/{name}.jsonl", Response)
        assert len(responses) == 2 and {r.model for r in responses} == {name}
        assert (run / f"answers/readings/{name}.jsonl").read_text().count("\n") == 2
    stage = json.loads((run / "stages/evaluate.json").read_bytes())
    assert stage["fingerprint"]["engine"].startswith("llama.cpp ") and not running(str(run))
    capsys.readouterr()
    assert main(["run", str(run)]) == 0 and "starting with" not in capsys.readouterr().err
    assert main(["evaluate", str(run), "evaluation.engine=distill"]) == 5
