"""A model's files are first tried in a process of their own: what is not ours may loop or swell.

A chat template is a program, and a config or a tokenizer can ask for any amount of memory. So a
child with limits reads them first: it opens the tokenizer, renders and encodes conversations, makes
the model without its weights, and puts the adapter on it. `try_model` raises what the child met, as
one line and within seconds; a success is kept in the user's cache by the files' hashes. No weights
are read: `models.loading.check_model` does that.

One process imports the libraries, forks a child for each trial, and ends with this one or when it
was idle for long.
"""

import atexit
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from distill.config.learning import Lora
from distill.config.values import SAFE, Trust
from distill.errors import DistillError, Exit, one_line
from distill.models import registry
from distill.models.chat_template import Reasoning
from distill.models.download import cache_folder, converted_folder
from distill.records import Message, digest
from distill.storage.environment import code_hash, installed
from distill.storage.files import write_json

SECONDS = 5  # of the processor; a tokenizer of 262,144 tokens takes one
MEGABYTES = 2048  # beside what the libraries take
CHARACTERS = 1_000_000  # that a template may make of one short question
IDLE = 20  # seconds after which the process that forks ends


def try_model(
    reference: str,
    revision: str | None = None,
    trust: Trust = SAFE,
    date: str = "2026-01-01",
    lora: Lora | None = None,
    template: Mapping[str, Any] | None = None,
    reasoning: Reasoning | None = None,
) -> list[str]:
    """Try a model's config, tokenizer and template, and with `lora` what a student's must do too.

    Returns notes for the user. Fetches these files where they are not here, and no weights; of a
    model that is one file, and not here, the table has the shape. Raises DistillError (exit 7)
    where a file cannot be used or passes a limit; 2 and 3 as `registry.fetch` does.
    """
    info, folder = registry.lookup(reference), None
    absent = info and info.gguf and not converted_folder(info.name, info.gguf).is_dir()
    if absent and not lora:
        return []
    if not absent:
        folder = registry.fetch(reference, revision, trust, weights=False).absolute()
    settings = {"trust": trust, "date": date, "lora": lora and lora.model_dump(mode="json")}
    settings |= {"seconds": SECONDS, "template": template or {}, "reasoning": reasoning}
    versions = [code_hash(), *map(installed, ("transformers", "tokenizers", "peft", "torch"))]
    files = registry.folder_digest(folder, weights=False) if folder else reference
    key = digest([files, settings, versions])
    with suppress(OSError, ValueError, KeyError, DistillError):
        return json.loads((cache_folder() / f"trials/{key}.json").read_bytes())["notes"]
    reply = _ask({"reference": reference, "folder": folder and str(folder), **settings})
    if error := reply.get("error"):
        code, where, what, fix = (f"{part}".replace(str(folder), reference) for part in error)
        raise DistillError(Exit(int(code)), where, what, fix)
    with suppress(OSError, DistillError):  # where nobody may write it is tried each time
        kept = cache_folder() / f"trials/{key}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, reply)
    return reply["notes"]


@cache
def _servers() -> list[subprocess.Popen[bytes]]:
    """Return the list that holds the running process that forks, ended with this one."""
    servers = list[subprocess.Popen[bytes]]()

    @atexit.register
    def end() -> None:
        for server in servers:
            server.kill()
            server.communicate()

    return servers


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply of a child to a request, started anew where the last one has ended."""
    running, line = _servers(), b""
    for _ in range(2):  # one that was idle may end while it is asked
        if not running or running[0].poll() is not None:
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
            hushed = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            running[:] = [
                subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, **hushed, "CUDA_VISIBLE_DEVICES": ""},
                    start_new_session=True,  # Ctrl-C is this process's to answer
                )
            ]
        stdin, stdout = running[0].stdin, running[0].stdout
        assert stdin and stdout
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        if line:
            return json.loads(line)
        running[0].kill()
        running[0].wait()
    fix = "run `python -c 'import torch, transformers, peft'`: it should say why"
    raise DistillError(Exit.STATE, sys.executable, "a process that tries models ends at once", fix)


def serve() -> None:
    """Answer requests on stdin, each in a child of its own; what libraries print goes nowhere."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    import distill.training.encode  # noqa: F401

    replies = os.dup(1)
    os.dup2(2, 1)
    while select.select([0], [], [], IDLE)[0]:
        request = b""
        while not request.endswith(b"\n"):
            if not (part := os.read(0, 1 << 16)):
                return
            request += part
        if not (child := os.fork()):
            reply = dict[str, Any]()
            try:
                reply = {"notes": _try(**json.loads(request))}
            except DistillError as error:
                reply = {"error": [int(error.code), error.where, error.what, error.fix]}
            except MemoryError:
                os.kill(os.getpid(), signal.SIGKILL)
            except BaseException as error:
                where, what = f"model {json.loads(request)['reference']}", one_line(error)
                reply = {"error": [int(Exit.TRAINING), where, what, "check its files"]}
            os.write(replies, json.dumps(reply).encode() + b"\n")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (
                signal.SIGXCPU,
                signal.SIGALRM,
            )
            limit = f"{SECONDS} seconds" if slow else f"{MEGABYTES:,} MB of memory"
            what = f"config, tokenizer or template need more than {limit}"
            where = f"model {json.loads(request)['reference']}"
            error = [int(Exit.TRAINING), where, what, "use a sound copy of the model"]
            os.write(replies, json.dumps({"error": error}).encode() + b"\n")


def _limit(seconds: int) -> None:
    """Let this process end before it takes more than `seconds`, or its share of memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    now = sum(int(line.split()[1]) for line in status if line.startswith("VmData"))
    signal.alarm(12 * seconds)  # of the clock, on a busy machine
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_DATA, (now << 10) + (MEGABYTES << 20)),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def _try(
    reference: str, folder: str | None, trust: list[bool], date: str,
    lora: dict[str, Any] | None, seconds: int,
    template: dict[str, Any], reasoning: Reasoning | None,
) -> list[str]:  # fmt: skip
    """Do what training and answering will do before they compute; return notes for the user."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distill.models import loading
    from distill.models.chat_template import encode_prompt, render
    from distill.training import adapters
    from distill.training.encode import check_template

    _limit(seconds)
    notes = list[str]()
    if folder:
        tokenizer = loading.load_tokenizer(folder, None, Trust(*trust), template, reasoning)
        user = Message(role="user", content="What is 2 and 2?")
        system, answer = (Message(role=role, content="4.") for role in ("system", "assistant"))
        for messages in ([user], [system, user], [user, answer, user]):
            try:
                text = render(tokenizer, messages, date)
            except DistillError:
                if messages == [user]:
                    raise
                continue  # a template may refuse a role; whether prompts have it is seen by them
            if len(text) > CHARACTERS:
                what = f"makes {len(text):,} characters of a short question"
                fix = "use a sound copy of the model"
                raise DistillError(Exit.TRAINING, f"chat template of {folder}", what, fix)
            encode_prompt(tokenizer, messages, date)
        files = [Path(folder) / name for name in ("config.json", "tokenizer_config.json")]
        for path in [] if trust[1] else filter(Path.is_file, files):
            if "auto_map" in registry.read_object(path):
                notes.append(f"{path.name}: auto_map is ignored, transformers has the class")
        if lora:
            check_template(tokenizer, date, thought=reasoning == "keep")
        config = loading.decoder_config(Path(folder), Trust(*trust))[0]
        if lora and getattr(config, "quantization_config", None):
            what = "has quantised weights, into which an adapter cannot be merged"
            fix = "name the model that it was made from; student.load_in_4bit trains that in 4 bits"
            raise DistillError(Exit.TRAINING, f"model {reference}", what, fix)
        if lora and getattr(config, "final_logit_softcapping", None):
            what = "caps its logits behind the head, which the loss does not know"
            raise DistillError(Exit.TRAINING, f"model {reference}", what, "use another student")
    else:
        shape = registry.shape_of(reference)
        sizes: dict[str, Any] = {"vocab_size": shape.vocab, "hidden_size": shape.hidden}
        sizes |= {"intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers}
        sizes |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
        # or a qwen2 of the same modules
        config = LlamaConfig(**sizes, tie_word_embeddings=shape.tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust[1])
    if lora:
        settings = Lora.model_validate(lora)
        wrapped = adapters.inject(model, 1, 1, 0.0, settings.target_modules, 0)
        if settings.target_modules == "all-linear" and (others := adapters.unadapted(wrapped)):
            notes.append(f"no adapter on {', '.join(others)}: they are no linear modules")
    return notes
