"""Inference engines as people run them: real servers on loopback ports, each in its environment.

`bash scripts/engines.sh` makes the environments; `transformers serve` needs none.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.torch import load_file, save_file

from distill.config.teachers import EndpointTeacher
from distill.models.gguf_file import write_gguf
from distill.models.loading import load_tokenizer
from distill.records import Message, Response
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling, origin_of
from tests.support.asking import answer_all
from tests.support.tiny import make_tiny

LLAMA_SERVER = Path("distill/responders/llama_server.py").resolve()
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill/engines"
DATE = "2026-01-01"
TEXTS = [f"{'words ' * (i * 5 % 7)}{chr(97 + i)}?" for i in range(12)]
ENGINES = ("transformers", "llama.cpp", "vllm")


def python_of(engine: str) -> str:
    """Return the engine's Python, or skip the test with the command that makes it."""
    if engine == "transformers":
        return sys.executable
    folder = CACHE / engine
    if not (folder / "package").exists():
        pytest.skip(f"{engine} is not installed: bash scripts/engines.sh {engine}")
    return str(folder / "bin/python")


def make_served(folder: Path) -> Path:
    """Save a tiny model that says varied things in printable ASCII, of sizes that vLLM takes."""
    make_tiny(folder, "qwen2", seed=1, hidden=128, tied=False)
    file = folder / "model.safetensors"
    tokenizer: Any = load_tokenizer(str(folder))
    tensors = {name: t * (1 if t.dim() == 1 else 4) for name, t in load_file(file).items()}
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(len(tokenizer))]
    head_VH = tensors["lm_head.weight"]
    head_VH *= 4  # what is said has a logit far above the 0 of what is not
    texts[tokenizer.eos_token_id] = "end"
    said = [bool(text) and text.isascii() and text.isprintable() for text in texts]
    head_VH[[i for i in range(len(head_VH)) if i >= len(said) or not said[i]]] = 0
    rounded = {name: t.half().float() for name, t in tensors.items()}  # as a GGUF holds them
    save_file(rounded, file, {"format": "pt"})
    return folder


class Engine:
    """A server of the model in `folder`, under its name; killed at the end of `with`.

    Of `transformers`, `folder` may hold several models: it serves any of them.
    """

    def __init__(self, engine: str, folder: Path, context: int = 1024) -> None:
        self.engine, self.python = engine, python_of(engine)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.address}/v1"
        self.home = folder.parent if (folder / "config.json").exists() else folder
        self.log = self.home / f"{self.port}.log"
        self.folder, self.context = folder, context

    def command(self) -> Sequence[str]:
        """Return what a user types, with sizes for a test."""
        place = ("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32")
        if self.engine == "transformers":
            one = (self.folder.name,) if self.home != self.folder else ()
            module = ("-m", "transformers.cli.transformers", "serve", *one)
            return (self.python, *module, *place, "--device", "cpu")
        if self.engine == "vllm":  # its `vllm serve` looks for a package of the name vllm
            module = ("-m", "vllm.entrypoints.openai.api_server", "--model", self.folder.name)
            sizes = ("--max-model-len", str(self.context), "--enforce-eager")
            return (self.python, *module, *place, *sizes)
        file = self.home / "tiny.gguf"
        write_gguf(self.folder, file, "F16", "tiny")
        sizes = ("--ctx-size", f"{4 * self.context}", "--parallel", "4", "--threads", "1")
        model = ("--model", str(file), "--alias", "tiny", "--cache-type", "f32")
        return (self.python, str(LLAMA_SERVER), *model, *place[:4], *sizes)

    def start(self) -> None:
        """Start it; `wait` returns once it answers."""
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        # Without its target vLLM loads AVX-512 kernels wherever it runs.
        small = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.home,
                env=os.environ | quiet | small,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # vLLM computes in a child
            )

    def wait(self) -> None:
        """Return once it answers."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx2.get(f"{self.address}/health").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        self.kill()
        raise AssertionError(self.log.read_text()[-2000:])

    def kill(self) -> None:
        """Kill it and its children, as a machine that goes away does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()

    def __enter__(self) -> "Engine":
        self.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def settings(server: Engine | Sequence[Engine], **changes: Any) -> EndpointTeacher:
    """Return how a server, or its replicas, are asked."""
    several = [server] if isinstance(server, Engine) else server
    given = {
        "kind": "endpoint",
        "model": "tiny",
        "base_url": tuple(one.url for one in several),
        "extra_body": {"frequency_penalty": 0},
        "concurrency": 4,
        **changes,
    }
    return EndpointTeacher.model_validate(given)


def requests_to(origin: str, texts: Sequence[str], tokens: int) -> list[Request]:
    """Return greedy questions."""
    greedy = Sampling(max_new_tokens=tokens)
    return [
        Request.make(origin, f"p{i}", (Message(role="user", content=text),), greedy)
        for i, text in enumerate(texts)
    ]


def served(
    asked: EndpointTeacher, store: Path, texts: Sequence[str] = TEXTS, tokens: int = 16
) -> list[Response]:
    """Return what servers answer."""
    return answer_all(EndpointResponder(asked), requests_to(origin_of(asked), texts, tokens), store)


def local(
    folder: Path, store: Path, texts: Sequence[str] = TEXTS, tokens: int = 16
) -> list[Response]:
    """Return what the local teacher answers."""
    responder = LocalResponder.load(str(folder), "float32", date=DATE)
    return answer_all(responder, requests_to(responder.origin, texts, tokens), store)
