"""Progress: plain lines in a pipe, a bar with rate and time left on a terminal."""

import os
import pty
import subprocess
import sys

from distill.storage import progress

WORK = (
    "import time\n"
    "from distill.storage.progress import say, track\n"
    "say('begins [bold]')\n"
    "for _ in track(range(40), 'answers', 40, 'answers'): time.sleep(0.02)\n"
    "say('ends')\n"
)


def test_a_pipe_gets_plain_lines():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert done.stdout == "" and lines[0] == "begins [bold]" and lines[-1] == "ends"
    assert len(lines) == 3 and "\x1b" not in done.stderr
    assert lines[1].startswith("answers: 40/40, ") and lines[1].endswith(" answers/s, 0:00:00 left")


def on_a_terminal(code: str) -> str:
    """Run Python code on a pseudo-terminal, and return all that it showed."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=child, env=environment)
    os.close(child)
    shown = b""
    try:
        while block := os.read(parent, 65536):
            shown += block
    except OSError:  # how Linux reports that the other side has closed
        pass
    assert process.wait() == 0
    os.close(parent)
    return shown.decode()


def test_a_terminal_gets_a_bar_with_rate_and_time_left():
    shown = on_a_terminal(WORK)
    assert "answers" in shown and "40/40" in shown and "answers/s" in shown and "0:00:0" in shown
    assert shown.index("begins [bold]") < shown.index("40/40") < shown.rindex("ends")


def test_lines_are_rare_and_the_last_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 1e9)
    assert list(progress.track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    list(progress.track("abc", "letters", 3))
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "letters: 1/3",
        "letters: 2/3",
        "letters: 3/3",
    ]


def test_the_rate_names_its_unit_and_extra(capsys):
    with progress.tracking("training", 5, "steps") as tracker:
        tracker.advance(5, extra="loss 1.25")
    assert "steps/s loss 1.25, 0:00:00 left" in capsys.readouterr().err


def test_nothing_to_do_shows_nothing(capsys):
    assert list(progress.track([], "nothing", 0)) == []
    assert capsys.readouterr().err == ""
