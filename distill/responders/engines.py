"""Inference engines that are started for a model: vLLM, or llama.cpp, as a child of this process.

An engine serves on a loopback port of its own, with a key of its own, and is asked through the
endpoint responder, without a price. A prompt goes to it as token ids, rendered and encoded as our
own engine does it: so template, dates and control tokens in a corpus are the same whoever answers.
The engine ends with whoever asks, also where that is killed, and then holds no memory of a GPU.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import torch

from distill.config.teachers import EndpointTeacher, Engine, Engines, LocalTeacher
from distill.errors import DistillError, Exit, one_line
from distill.models.chat_template import encode_prompt, template_hash
from distill.models.devices import device, pick_dtype
from distill.models.download import cache_folder
from distill.models.gguf_file import write_gguf
from distill.models.loading import load_tokenizer
from distill.models.registry import fetch, folder_facts, identity, read_object, text_config
from distill.records import digest
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.local.local_model import end_of_turn
from distill.responders.responder import Encoded, Raw, Request
from distill.storage.progress import say

STARTING = 900.0  # seconds until an engine must answer: a large model is read from a disk
LINES = 12  # of its log, where it does not
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
CACHE_GIB = "2"  # of vLLM's keys and values on a CPU
ROOM = 256  # the context is a multiple of this many tokens
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
    python = engine_folder(engine) / "bin/python"
    made = (engine_folder(engine) / "package").is_file()
    if engine == "vllm":
        if settings.vllm.command:
            return shlex.split(settings.vllm.command)
        if program := shutil.which("vllm"):
            return [program, "serve"]
        # its `vllm serve` looks for a package of the name vllm, which the build for a CPU is not
        module = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
        return [f"{python}", *module] if made else None
    if settings.llama_cpp.command:
        return [*shlex.split(settings.llama_cpp.command), "--model"]
    if program := shutil.which("llama-server"):
        return [program, "--model"]
    script = Path(__file__).with_name("llama_server.py")
    return [f"{python}", f"{script}", "--model"] if made else None


def require_engine(engine: Engine, settings: Engines) -> list[str]:
    """Return the command that starts an engine; raises DistillError (exit 2) where none does."""
    command = find_engine(engine, settings)
    if command is None or not shutil.which(command[0]):
        where = command[0] if command else engine
        key = f"engines.{engine.replace('.', '_')}.command"
        fix = f"install it, name it in {key}, or {BY_SCRIPT} {engine}"
        raise DistillError(Exit.CONFIG, where, "is not installed", fix)
    return command


def engine_of(settings: LocalTeacher, engines: Engines) -> Engine:
    """Return what computes a model's answers: `auto` is vLLM where it and a GPU are here."""
    if settings.engine != "auto":
        return settings.engine
    vllm_here = torch.cuda.is_available() and find_engine("vllm", engines) is not None
    return "vllm" if vllm_here else "distill"


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
    """A running engine; `url` and `key` are how it is asked. `close` ends it."""

    def __init__(self, command: Sequence[str], name: str) -> None:
        with socket.socket() as free:  # until the engine takes it, another could: it would fail
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.name, self.key, self.failed = name, secrets.token_urlsafe(24), False
        self.address = f"http://127.0.0.1:{port}"
        self.url = f"{self.address}/v1"
        self.log = cache_folder() / f"engines/{name}-{os.getpid()}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, "-c", GUARD, *command, "--host", "127.0.0.1", "--port", f"{port}"]
        settings = {"VLLM_API_KEY": self.key, "LLAMA_API_KEY": self.key, **QUIET}
        if device().type == "cpu":  # else vLLM asks for nine tenths of the memory
            settings |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,  # which the guard watches
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **settings},
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return once it answers; raises DistillError (exit 4) with the last lines of its log."""
        deadline = time.monotonic() + STARTING
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self.failure("ended before it answered")
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{self.address}/health", trust_env=False).status_code == 200:
                    return
            time.sleep(0.2)
        raise self.failure(f"did not answer within {STARTING:.0f} s")

    def failure(self, what: str) -> DistillError:
        """Return the error of an engine that failed, with what it said last as a note."""
        self.failed = True
        self.close()
        log_lines = self.log.read_text(errors="replace").strip().splitlines()
        fix = f"see {self.log}; the same command continues"
        error = DistillError(Exit.TEACHER, self.name, what, fix)
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
        self, model: str, concurrency: int, extra_body: Mapping[str, object], **settings: Any
    ) -> EndpointResponder:
        """Return what asks it for `model`, without a price; `settings` are those of an endpoint."""
        endpoint = EndpointTeacher(
            kind="endpoint",
            model=model,
            base_url=self.url,
            concurrency=concurrency,
            read_timeout=3600,
            total_timeout=3600,
            extra_body=dict(extra_body),
            **settings,
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


class EngineResponder:
    """Answers with a model that an engine serves; it is started at the first request.

    `settings` say which model and how it is sampled, `engine` who computes. `concurrency` requests
    run at once.
    """

    def __init__(
        self,
        engine: Engine,
        settings: LocalTeacher,
        engines: Engines,
        date: str,
        concurrency: int,
    ) -> None:
        self.engine, self.settings, self.date = engine, settings, date
        self.concurrency = concurrency
        self.fresh = False  # whether llama.cpp reads a prompt anew that it has just read
        self.command = require_engine(engine, engines)
        self.version = engine_version(tuple(self.command))
        self.model = Path(settings.model).name
        reference, revision = settings.model, settings.revision
        template = settings.chat_template_kwargs
        self.tokenizer = load_tokenizer(reference, revision, template=template)
        self.dtype = str(pick_dtype(settings.dtype)).removeprefix("torch.")
        self.origin = digest(
            {
                "engine": engine,
                "weights": identity(reference, revision),
                "dtype": self.dtype if engine == "vllm" else "f16",
                "template": template_hash(self.tokenizer, date),
                **folder_facts("weights", reference),
            }
        )
        self.folder = fetch(reference, revision)
        shape = text_config(read_object(self.folder / "config.json"))
        self.most = int(shape["max_position_embeddings"])  # tokens of prompt and answer
        self.server: EngineServer | None = None
        self.context = self.rows = 0  # of the server

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request as it comes; one that is too long fails.

        Raises DistillError (exit 4) with the end of its log where the engine fails: what it had
        answered before is kept by whoever asks.
        """
        prompts = list[Encoded]()
        for request in requests:
            ids = tuple(encode_prompt(self.tokenizer, request.messages, self.date))
            length = len(ids) + request.sampling.max_new_tokens
            if length > self.most:
                what = f"too long: {length:,} tokens of prompt and answer, of {self.most:,}"
                yield Raw.failed(request, what, self.model)
            else:
                prompts.append(Encoded(**request.model_dump(), ids=ids))
        if not prompts:
            return
        longest = max(len(one.ids) + one.sampling.max_new_tokens for one in prompts)
        server = self.serve(min(self.most, -(-longest // ROOM) * ROOM))
        fields = self.sampled_from_all()
        responder = server.responder(
            self.model, self.concurrency, fields, api="completions", max_retries=2
        )
        try:
            for raw in responder.ask(prompts):
                if raw.error and "sha256" not in raw.body:
                    raise server.failure(f"does not answer: {raw.error}")
                model = f"{self.model} ({self.engine} {self.version})"
                yield raw.model_copy(update={"model": model})
        except DistillError as error:
            if server.process.poll() is None:
                raise
            raise server.failure(f"ended while it answered: {error.what}") from None

    def sampled_from_all(self) -> dict[str, object]:
        """Return the fields that turn off what an engine cuts from a distribution by itself, and
        the use of prompts that it has read at another time."""
        if self.engine == "llama.cpp":
            return {"top_k": 0, "min_p": 0.0, "cache_prompt": not self.fresh}
        ends = sorted(end_of_turn(self.tokenizer, self.date))
        return {"stop_token_ids": ends, "cache_salt": secrets.token_hex(8)}

    def serve(self, context: int) -> EngineServer:
        """Return the engine, started or started anew where its context is too short."""
        enough = self.context >= context and self.rows >= self.concurrency
        if self.server and self.server.process.poll() is None and enough:
            return self.server
        self.close()
        started, rows = time.monotonic(), self.concurrency
        if self.engine == "vllm":
            line = [*self.command, f"{self.folder}", "--served-model-name", self.model]
            line += ["--dtype", self.dtype, "--max-model-len", f"{context}"]
            line += ["--generation-config", "vllm", "--max-num-seqs", f"{rows}"]
            if (gpus := torch.cuda.device_count()) > 1:  # a copy of the model on each
                line += ["--data-parallel-size", f"{gpus}"]
        else:
            line = [*self.command, f"{self.gguf()}", "--alias", self.model]
            line += ["--ctx-size", f"{context * rows}", "--parallel", f"{rows}"]
        say(f"{self.engine} {self.version}: starting with {self.model}")
        self.server = EngineServer(line, self.engine)
        self.context, self.rows = context, rows
        self.server.wait()
        say(f"{self.engine}: answers after {time.monotonic() - started:.0f} s")
        return self.server

    def gguf(self) -> Path:
        """Return the model as a GGUF in float16, made once and kept in the cache."""
        file = cache_folder() / "gguf" / f"{self.origin[:24]}-F16.gguf"
        if not file.is_file():
            say(f"{self.model}: converting to GGUF (once)")
            file.parent.mkdir(parents=True, exist_ok=True)
            work = file.with_name(f".{file.name}.{os.getpid()}")
            try:
                write_gguf(self.folder, work, "F16", self.model)
                work.rename(file)
            finally:
                work.unlink(missing_ok=True)
        return file

    def close(self) -> None:
        """End the engine, if it was started."""
        if self.server:
            self.server.close()
        self.server = None
