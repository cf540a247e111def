"""The command line: verbs, reuse, faults in one line with their exit codes (A1, A5, A7), and no
torch before its time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from distill.cli import app, main
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit, exit_code
from distill.pipeline import STAGES, perform
from distill.storage.run_folder import Stage, open_run
from distill.tasks.sandbox.programs import unavailable

ROOT = Path(__file__).parent.parent
KEY = "sk-ant-0123456789abcdefghij"


def write_rows(*rows: dict[str, str]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    """Return a config of recorded answers, in a folder of its own that is the working one."""
    monkeypatch.chdir(tmp_path)
    write_rows(*({"prompt": f"What is 1 and {n}?", "answer": f"{1 + n} of it."} for n in range(20)))
    Path("c.yaml").write_text(
        "name: mine\n"
        "corpus: {path: rows.jsonl, format: prompts, split: {validation: 2, heldout: 4}, "
        "near_duplicate_threshold: null}\n"
        "teacher: {kind: recorded, model: somebody, license: CC0-1.0}\n"
        "student: {model: smollm2-135m-instruct}\n"
    )
    return "c.yaml"


def say(capsys, *words: str) -> tuple[int, str, list[str]]:
    """Run a command; return its exit code, what it printed, and its lines on stderr."""
    code = main(words)
    shown = capsys.readouterr()
    return code, shown.out, shown.err.splitlines()


def test_stages_run_alone_and_are_reused(config, capsys):
    for stage in ("corpus", "prompts", "generate", "filter"):
        code, _, lines = say(capsys, stage, config)
        assert (code, lines[-1]) == (0, f"{stage}: done")
    assert json.loads(Path("runs/mine/config.json").read_text())["name"] == "mine"
    made = json.loads(Path("runs/mine/manifest.json").read_text())["stages"]["corpus"]
    assert "libraries" in made["environment"]
    assert len(Path("runs/mine/dataset/train.jsonl").read_text().splitlines()) == 14
    assert say(capsys, "filter", "runs/mine")[2] == ["filter: done before, reused"]


def test_a_missing_input_names_the_command_that_makes_it(config, capsys):
    code, _, lines = say(capsys, "filter", config)
    assert code == Exit.STATE and "distill corpus CONFIG" in lines[-1]


def test_other_settings_stop_with_a_diff_and_redo_remakes(config, capsys):
    assert say(capsys, "corpus", config)[0] == 0
    before = Path("runs/mine/config.json").read_bytes()
    code, _, (line,) = say(capsys, "corpus", config, "corpus.limit=10")
    assert code == Exit.STATE
    assert "corpus.limit was unset, is 10" in line and "--redo corpus" in line
    assert Path("runs/mine/config.json").read_bytes() == before
    assert say(capsys, "corpus", config, "corpus.limit=10", "--redo")[0] == 0
    assert len(Path("runs/mine/documents.jsonl").read_text().splitlines()) == 10
    assert list(Path("runs/mine/.old").glob("corpus-1/**/documents.jsonl"))


def test_a_plan_counts_what_a_run_in_a_folder_of_any_name_has(config, capsys, monkeypatch):
    for stage in ("corpus", "prompts"):
        assert say(capsys, stage, config)[0] == 0
    Path("runs/mine").rename("runs/mine (old)")
    monkeypatch.setattr("distill.planning.work.corpus_stage.main", None)  # nothing is made again
    code, shown, _ = say(capsys, "plan", "runs/mine (old)")
    assert code == 0 and "plan of mine-old-" in shown


def test_status_says_what_is_done_left_and_stale(config, capsys):
    for stage in ("corpus", "prompts"):
        assert say(capsys, stage, config)[0] == 0
    code, shown, _ = say(capsys, "status", "runs/mine")
    state = {
        line.split()[1]: line.split()[3] for line in shown.splitlines() if line.startswith("│")
    }
    assert code == 0
    assert (state["corpus"], state["prompts"], state["train"]) == ("done", "done", "left")
    _, shown, _ = say(capsys, "status", config, "corpus.limit=10")
    assert "stale" in shown and "corpus: corpus.limit was unset, is 10" in shown
    Path("rows.jsonl").unlink()
    code, shown, _ = say(capsys, "status", "runs/mine")
    assert code == 0 and "unknown" in shown and "rows.jsonl: does not exist" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bogus"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "c.yaml", "--bogus"], "No such option"),
        (["prompts", "c.yaml", "--allow-code"], "No such option"),
        (["run", "c.yaml", "trian.lr=1"], "did you mean train?"),
        (["run", "nowhere.yaml"], "No such file"),
        (["run", "."], "has no config.json"),
        (["run", "c.yaml", "--redo", "trian"], "one of corpus"),
        (["status", "nowhere"], "No such file"),
        (["run", "c.yaml", f"teacher.api_key={KEY}"], "holds a secret"),
        (["run", "c.yaml", KEY], "KEY=VALUE"),
    ],
)
def test_a_fault_is_one_line_and_exit_2(config, capsys, words, says):
    code, shown, lines = say(capsys, *words)
    assert (code, shown, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ") and says in lines[0]
    assert "sk-ant" not in lines[0]
    assert not Path("runs").exists()


def test_debug_lets_the_traceback_through(config):
    with pytest.raises(DistillError):
        main(["run", config, "seed=x", "--debug"])


def test_any_exception_is_one_printable_line(capsys):
    def broken() -> None:
        raise RuntimeError("line one\nline two \x1b[31m")

    assert exit_code(broken) == 1
    assert capsys.readouterr().err == (
        "error: RuntimeError: line one line two \\x1b[31m (--debug shows where)\n"
    )


def stage(name: str, work, inputs: tuple[str, ...] = ()) -> Stage:
    return Stage(name, (), inputs, (f"{name}.txt",), work)


def write(name: str):
    return lambda run: run.path(f"{name}.txt").write_text(name)


def test_ctrl_c_exits_130_and_the_same_command_continues(config, capsys):
    def interrupted(run) -> None:
        raise KeyboardInterrupt

    run = open_run(Path(config))
    stages = (stage("first", write("first")), stage("second", interrupted))
    assert exit_code(lambda: perform(run, stages)) == Exit.INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err
    assert exit_code(lambda: perform(run, (stages[0], stage("second", write("second"))))) == 0
    assert capsys.readouterr().err == "first: done before, reused\nsecond: done\n"


def test_a_second_run_in_the_folder_is_told_who_holds_it(config, capsys):
    with open_run(Path(config)).lock():
        code, _, lines = say(capsys, "corpus", config)
    assert code == Exit.STATE and f"lock held by pid {os.getpid()}" in lines[0]
    assert say(capsys, "corpus", config)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "H23 SIGHUP"])
def test_a_signal_ends_a_stage_like_ctrl_c(config, number):
    script = (
        "import sys, time; from distill import api, cli\n"
        "wait = lambda run: (print('working', flush=True), time.sleep(60))\n"
        "from distill.storage.run_folder import Stage\n"
        "api.STAGES = (Stage('corpus', (), (), ('x',), wait), *api.STAGES[1:])\n"
        "sys.exit(cli.main(['run', 'c.yaml']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout and child.stdout.readline() == "working\n"
    child.send_signal(number)
    _, told = child.communicate(timeout=20)
    assert child.returncode == Exit.INTERRUPTED
    *before, last = told.splitlines()  # a slow machine says first how long it will take
    assert last.startswith("interrupted") and not any("Traceback" in line for line in before)


@pytest.mark.parametrize("words", [["repair", "."], ["compare", ".", "."]], ids=" ".join)
def test_h4_the_folder_itself_is_a_path_like_others(config, capsys, words):
    code, _, lines = say(capsys, *words)
    assert code in (Exit.INPUT, Exit.STATE) and len(lines) == 1


def test_h23_ctrl_c_while_the_command_is_imported_is_one_line():
    script = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'rich': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from distill.__main__ import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (Exit.INTERRUPTED, 1), done.stderr


@pytest.mark.parametrize(
    ("out", "encoding", "code", "told"),
    [
        pytest.param("/dev/full", "utf-8", Exit.STATE, "standard output: No space", id="H23 full"),
        pytest.param("pipe", "utf-8", 141, "", id="H23 closed pipe"),
        pytest.param("file", "latin-1", 0, "", id="H23 Latin-1"),
        pytest.param("file", "ascii", 0, "", id="H23 ASCII"),
    ],
)
def test_what_cannot_be_printed_is_escaped_or_said(config, tmp_path, out, encoding, code, told):
    Path("模型 é.yaml").write_text(Path(config).read_text().replace("mine", "m"))
    command = [sys.executable, "-m", "distill", "status", "模型 é.yaml", "runs=模型 é"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    if out == "pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        place = tmp_path / "out" if out == "file" else out
        write = os.open(place, os.O_WRONLY | os.O_CREAT)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, text=True)
    os.close(write)
    assert done.returncode == code and told in done.stderr, done.stderr
    assert done.stderr.count("\n") == bool(told)
    if out == "file":
        assert b"\\u6a21" in (tmp_path / "out").read_bytes()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        pytest.param("status {} 2>&- >&- <&-", 0, id="H23 no streams"),
        pytest.param("status {} x=1 2>/dev/full", Exit.CONFIG, id="H23 full stderr"),
        pytest.param("status {} x=1 2>&-", Exit.CONFIG, id="H23 no stderr"),
    ],
)
def test_a_stream_that_is_closed_or_full_changes_no_outcome(config, words, code):
    command = f"{sys.executable} -m distill {words.format(config)}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (code, b"")


def test_h23_a_table_has_its_words_on_a_terminal_of_20_columns(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert "generate" in say(capsys, "status", config)[1]


def test_every_verb_has_help_and_stands_in_a_group():
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    verbs = "init run plan status verify compare score probe publish fetch repair"
    assert set(verbs.split()) | {stage.name for stage in STAGES} <= set(commands)
    assert all(command.help and command.rich_help_panel for command in commands.values())


def test_init_writes_a_config_that_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "lighthouse wave harbour gull lantern anchor tide rope mast sail reef storm".split()
    turned = [words[n:] + words[:n] for n in range(12)]
    notes = [
        f"Note {n}. The {', the '.join(w[::2])} and {w[1]} were seen." for n, w in enumerate(turned)
    ]
    Path("notes").mkdir()
    for n, note in enumerate(notes):
        Path(f"notes/{n}.txt").write_text(note)
    code, out, lines = say(capsys, "init", "notes")
    assert code == 0 and "plan of notes" in out and "distill run notes/config.yaml" in out, lines
    written = load_config(Path("notes/config.yaml"))
    assert (written.name, written.prompts.tasks[0]) == ("notes", "prose_summary")
    code, _, (line,) = say(capsys, "init", "notes")
    assert code == Exit.CONFIG and "is there already" in line

    write_rows(*({"prompt": note} for note in notes))
    hosted = ("--base-url", "https://api.openai.com/v1", "--api-key-env", "OPENAI_API_KEY")
    code, out, _ = say(
        capsys, "init", "asks", "--corpus", "rows.jsonl", "--teacher", "gpt-5.6-terra", *hosted
    )
    written = load_config(Path("asks/config.yaml"))
    assert code == 0 and not written.prompts.tasks, "rows that are prompts get no task"
    assert written.teacher.base_urls == ("https://api.openai.com/v1",)
    assert "exit 10 until terms.basis is stated" in out

    assert say(capsys, "init", "empty", "--corpus", "nothing")[0] == Exit.INPUT


def test_status_and_plan_tell_scripts_what_they_tell_people(config, capsys):
    assert say(capsys, "corpus", config)[0] == 0
    status = json.loads(say(capsys, "status", config, "--json")[1])
    assert [s["state"] for s in status["stages"]][:2] == ["done", "left"]
    assert status["all"]["seconds"] >= 0 and not status["doubts"]


def test_allow_inexact_reaches_the_training_alone(config, monkeypatch):
    """The flag that the errors advise is there on run and train."""
    options: list[dict[str, bool]] = []

    def main(run, **given):
        options.append(given)

    stages = [Stage(n, (), (), (), main) for n in ("filter", "train")]
    perform(open_run(Path(config)), stages, allow_inexact=True)
    assert options == [{}, {"allow_inexact": True}]
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    having = {n for n, c in commands.items() if any("--allow-inexact" in p.opts for p in c.params)}
    assert having == {"run", "train"}


PROGRAMS = ("```python\ndef f(x):\n    return x + {n}\n```", "def f(x):\n    return 0", "exit(0)")


@pytest.fixture
def programs(config, tmp_path) -> str:
    """Return a config whose task is checked by running programs: of three answers, the first is
    right."""
    rows = []
    for n in range(1, 22):
        row = {"prompt": f"Write f, which adds {n}.", "tests": f"assert f(1) == {1 + n}"}
        rows.append({**row, "answer": PROGRAMS[n % 3].replace("{n}", str(n))})
    write_rows(*rows)
    Path("configs/tasks").mkdir(parents=True)
    Path("configs/tasks/adds.yaml").write_text(
        "metric: passes\nstudent: {user: '{{ prompt }}'}\nreference: '{{ document.meta.tests }}'\n"
        "checker: {kind: python_tests, seconds: 5}\n"
    )
    with Path(config).open("a") as file:
        file.write("prompts: {tasks: [adds]}\n")
    return config


def test_a_task_that_runs_programs_stops_before_anything_is_spent(programs, capsys):
    for verb in ("run", "filter", "evaluate"):
        code, shown, (line,) = say(capsys, verb, programs)
        assert (code, shown) == (Exit.CONFIG, "")
        assert "task adds: is checked by running the programs" in line and "--allow-code" in line
    assert not Path("runs").exists()


@pytest.mark.skipif(bool(unavailable()), reason=f"no sandbox here: {unavailable()}")
def test_programs_that_pass_their_tests_are_kept(programs, capsys):
    for stage in ("corpus", "prompts", "generate"):
        assert say(capsys, stage, programs)[0] == 0
    assert say(capsys, "filter", programs, "--allow-code")[0] == 0
    kept, dropped = (
        list(map(json.loads, Path("runs/mine", name).read_text().splitlines()))
        for name in ("dataset/train.jsonl", "dropped.jsonl")
    )
    assert kept and all("return x +" in row["response"]["text"] for row in kept)
    assert dropped and {row["reason"] for row in dropped} == {"failed checker"}
    assert all("return x +" not in row["text"] for row in dropped)
    assert say(capsys, "filter", programs)[:1] == (0,)  # done: nothing is left to run


def test_a_config_that_could_not_be_read_again_is_not_written(config, capsys):
    stops = ", ".join(f"s{number}" for number in range(6000))  # 40 kB of YAML, 90 kB of JSON
    text = Path("c.yaml").read_text()
    path = Path("c.yaml")
    path.write_text(text + f"prompts: {{tasks: [{stops}]}}\n")
    assert path.stat().st_size < 64_000
    code, _, lines = say(capsys, "corpus", config)
    assert code == Exit.CONFIG and len(lines) == 1, lines
    assert not Path("runs/mine/config.json").exists()
    path.write_text(text + 'runs: "C1 \\x85 \\u2028"\n')
    for _ in range(2):
        assert say(capsys, "corpus", config)[0] == 0
    assert say(capsys, "status", "C1 \x85 \u2028/mine")[0] == 0
