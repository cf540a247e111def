"""Progress: plain lines in a pipe, a bar with rate and time left on a terminal."""

import os
import pty
import subprocess
import sys
import types

import pytest

from distill.storage import progress

WORK = """
import time
from distill.storage.progress import say, tracking
say('begins [bold]')
with tracking('answers', 40, 'answers') as tracker:
    for _ in range(40):
        time.sleep(0.02)
        tracker.advance()
say('ends')
"""


def test_a_pipe_gets_plain_lines():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert done.stdout == "" and lines[0] == "begins [bold]" and lines[-1] == "ends"
    assert len(lines) == 3 and "\x1b" not in done.stderr
    assert lines[1].startswith("answers: 40/40, ") and lines[1].endswith(" answers/s, 0:00:00 left")


@pytest.mark.parametrize("cell", [False, True])
def test_a_terminal_gets_a_bar_but_for_a_command_in_a_cell_of_a_notebook(cell):
    parent, child = pty.openpty()
    more = {"JPY_PARENT_PID": "1"} if cell else {}
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **more}
    process = subprocess.Popen([sys.executable, "-c", WORK], stderr=child, env=environment)
    os.close(child)
    shown = b""
    try:
        while block := os.read(parent, 65536):
            shown += block
    except OSError:  # how Linux reports that the other side has closed
        pass
    os.close(parent)
    text = shown.decode()
    assert process.wait() == 0 and all(part in text for part in ("40/40", "answers/s", "0:00:0"))
    assert text.index("begins [bold]") < text.index("40/40") < text.rindex("ends")
    assert ("\x1b[" in text) != cell
    assert not cell or text.count("answers: 40/40, ") == text.count("40/40") == 1


@pytest.mark.parametrize("widgets", [True, False])
def test_a_cell_of_a_notebook_gets_a_bar_where_it_has_widgets(monkeypatch, capsys, widgets):
    drawn = []

    class Output:  # of ipywidgets: what is displayed inside its block replaces what it held
        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

        def clear_output(self, wait):
            assert wait

    display = types.ModuleType("IPython.display")
    widget = types.ModuleType("ipywidgets")
    vars(display)["display"], vars(widget)["Output"] = drawn.append, Output
    for name, module in (("IPython", types.ModuleType("IPython")), ("IPython.display", display)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "ipywidgets", widget)
    monkeypatch.setattr(progress, "find_spec", lambda name: widgets or None)
    monkeypatch.setattr(progress.console, "is_jupyter", True)
    with progress.tracking("letters", 3, "letters") as tracker:
        for _ in range(3):
            tracker.advance()
    shown = [str(getattr(part, "text", part)) for part in drawn]
    bars = [text for text in shown if "/3" in text and "letters: 3/3" not in text]
    assert not widgets or "3/3" in bars[-1], "the last bar is the finished one"
    assert bool(bars) == widgets == any(isinstance(part, Output) for part in drawn)
    assert any("letters: 3/3, " in text for text in shown) != widgets


def test_lines_are_rare_and_the_last_is_shown(capsys, monkeypatch):
    for pause, count in ((1e9, 1), (0.0, 3)):
        monkeypatch.setattr(progress, "PLAIN_SECONDS", pause)
        with progress.tracking("letters", 3, "letters") as tracker:
            for _ in range(3):
                tracker.advance(extra="loss 1.25")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == count and "letters/s loss 1.25, 0:00:00 left" in lines[-1]
        assert lines[-1].startswith("letters: 3/3")
