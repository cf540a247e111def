"""Inference engines that are started for a model: vLLM, or llama.cpp, as a child of this process.

An engine serves on a loopback port of its own, with a key of its own, and is asked through the
endpoint responder, without a price. It ends with whoever asks, also where that is killed, and then
holds no memory of a GPU.
"""

import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import httpx2

from distill.config.teachers import AnyEngine, EndpointTeacher, Engine, Engines
from distill.errors import DistillError, Exit, one_line
from distill.models.devices import device
from distill.models.download import cache_folder
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.storage.environment import gpu_facts
from distill.storage.progress import say

STARTING = 900.0  # seconds until an engine must answer: a large model is read from a disk
LINES = 12  # of its log, where it does not
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
CACHE_GIB = "2"  # of vLLM's keys and values on a CPU
ROOM = 256  # the context is a multiple of this many tokens
UNCUT = {"top_k": 0, "min_p": 0.0}  # turns off what llama.cpp cuts from a distribution by itself
BY_SCRIPT = "bash scripts/engines.sh"
# Ends the engine, and what it has started, when this process ends in whatever way: the pipe closes.
GUARD = """
import os, signal, subprocess, sys, threading
engine = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def end():
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=end, daemon=True).start()
code = engine.wait()
os._exit(code if code >= 0 else 128 - code)
"""


def engine_folder(engine: Engine) -> Path:
    """Return the environment that scripts/engines.sh makes for an engine."""
    return cache_folder() / "engines" / engine


def find_engine(engine: Engine, settings: Engines) -> list[str] | None:
    """Return the command that starts an engine, up to the model; None where there is none.

    What the config names, else the program on the PATH, else what scripts/engines.sh has made.
    """
    vllm, folder = engine == "vllm", engine_folder(engine)
    stated = (settings.vllm if vllm else settings.llama_cpp).command
    program = shutil.which("vllm" if vllm else "llama-server")
    if stated or program:
        command = shlex.split(stated) if stated else [f"{program}", *(["serve"] if vllm else [])]
        return command if vllm else [*command, "--model"]
    if not (folder / "package").is_file():
        return None
    # its `vllm serve` looks for a package of the name vllm, which the build for a CPU is not
    module = ["-m", "vllm.entrypoints.openai.api_server"]
    server = module if vllm else [f"{Path(__file__).with_name('llama_server.py')}"]
    return [f"{folder / 'bin/python'}", *server, "--model"]


def require_engine(engine: Engine, settings: Engines) -> list[str]:
    """Return the command that starts an engine; raises DistillError (exit 2) where none does."""
    command = find_engine(engine, settings)
    if command is None or not shutil.which(command[0]):
        where = command[0] if command else engine
        key = f"engines.{engine.replace('.', '_')}.command"
        fix = f"install it, name it in {key}, or {BY_SCRIPT} {engine}"
        raise DistillError(Exit.CONFIG, where, "is not installed", fix)
    return command


def settled(engine: AnyEngine, engines: Engines) -> Engine:
    """Return an engine by its name: `auto` is vLLM where it and a GPU are here, else our own."""
    if engine != "auto":
        return engine
    return "vllm" if find_engine("vllm", engines) and gpu_facts() else "distill"


def engine_facts(engine: AnyEngine, engines: Engines) -> dict[str, str]:
    """Return the version of what computes answers, where it is not our own engine.

    Raises DistillError (exit 2) where that is not installed.
    """
    name = settled(engine, engines)
    if name == "distill":
        return {}
    return {"engine": f"{name} {engine_version(tuple(require_engine(name, engines)))}"}


def context_for(longest: int, most: int) -> int:
    """Return the context to start an engine with, for a longest text and the model's own limit."""
    return min(most, -(-longest // ROOM) * ROOM)


@cache
def engine_version(command: tuple[str, ...]) -> str:
    """Return what an engine's environment says of its version, or "unknown"; nothing is started."""
    program = shutil.which(command[0])
    package = Path(program).parent.parent / "package" if program else None
    if package and package.is_file():
        return package.read_text().partition("==")[2]
    line = [*command[:1], "--version"]
    try:
        output = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    words = (output.stdout + output.stderr).strip().splitlines()
    return words[-1][:80] if words else "unknown"


class EngineServer:
    """A running engine that serves a folder or a GGUF as `name`, `rows` requests at once.

    `context` holds a prompt and its answer; `options` are further ones of the engine. `url` and
    `key` are how it is asked; `close` ends it.
    """

    def __init__(
        self,
        engine: Engine,
        command: Sequence[str],
        model: Path,
        name: str,
        rows: int,
        context: int,
        options: Sequence[str] = (),
    ) -> None:
        """Start it and wait until it answers; raises DistillError (exit 4) where it does not."""
        with socket.socket() as free:  # until the engine takes it, another could: it would fail
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.engine, self.key, self.failed = engine, secrets.token_urlsafe(24), False
        self.address = f"http://127.0.0.1:{port}"
        self.url = f"{self.address}/v1"
        self.log = cache_folder() / f"engines/{engine}-{os.getpid()}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        line = [*command, f"{model}", "--host", "127.0.0.1", "--port", f"{port}", *options]
        if engine == "vllm":
            line += ["--served-model-name", name, "--generation-config", "vllm"]
            line += ["--max-model-len", f"{context}", "--max-num-seqs", f"{rows}"]
        else:
            line += ["--alias", name, "--ctx-size", f"{context * rows}", "--parallel", f"{rows}"]
        settings = {"VLLM_API_KEY": self.key, "LLAMA_API_KEY": self.key, **QUIET}
        if device().type == "cpu":  # else vLLM asks for nine tenths of the memory
            settings |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB}
        say(f"{engine} {engine_version(tuple(command))}: starting with {name}")
        started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", GUARD, *line],
                stdin=subprocess.PIPE,  # which the guard watches
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **settings},
                start_new_session=True,
            )
        while (seconds := time.monotonic() - started) < STARTING:
            if self.process.poll() is not None:
                raise self.failure("ended before it answered")
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{self.address}/health", trust_env=False).status_code == 200:
                    say(f"{engine}: answers after {seconds:.0f} s")
                    return
            time.sleep(0.2)
        raise self.failure(f"did not answer within {STARTING:.0f} s")

    def failure(self, what: str) -> DistillError:
        """Return the error of an engine that failed, with what it said last as a note."""
        self.failed = True
        self.close()
        log_lines = self.log.read_text(errors="replace").strip().splitlines()
        fix = f"see {self.log}; the same command continues"
        error = DistillError(Exit.TEACHER, self.engine, what, fix)
        causes = [line for line in log_lines[:-LINES] if re.search(r"(?<!`)\b\w+Error: ", line)]
        for line in [*causes[:1], *log_lines[-LINES:]]:  # the first is often why the others came
            error.add_note(f"  {line[:300]}")
        return error

    def post(self, path: str, **body: object) -> httpx2.Response:
        """Return its reply to one request; raises DistillError (exit 4) where there is none."""
        keys = {"authorization": f"Bearer {self.key}"}
        url = f"{self.address}{path}"
        try:
            return httpx2.post(url, json=body, headers=keys, timeout=900, trust_env=False)
        except httpx2.TransportError as error:
            raise self.failure(f"does not answer: {one_line(error)}") from None

    def responder(
        self,
        model: str,
        concurrency: int,
        extra_body: Mapping[str, object],
        api: Literal["chat", "completions"] = "chat",
    ) -> EndpointResponder:
        """Return what asks it for `model`, without a price."""
        endpoint = EndpointTeacher(
            kind="endpoint",
            model=model,
            base_url=self.url,
            api=api,
            concurrency=concurrency,
            read_timeout=3600,
            total_timeout=3600,
            max_retries=2,
            extra_body=dict(extra_body),
        )
        responder = EndpointResponder(endpoint)
        responder.key = self.key
        return responder

    def close(self) -> None:
        """End the engine, its children too; the log of one that failed stays."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()
        if not self.failed:
            self.log.unlink(missing_ok=True)
