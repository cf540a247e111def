"""A model's files are first tried in a process of their own: what is not ours may loop or swell.

A chat template is a program, and a config or a tokenizer can ask for any amount of memory. So a
child with limits reads them first, and its success is kept in the user's cache by the files'
hashes. No weights are read: `models.loading.check_model` does that.
"""

import json
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from distill.config.values import SAFE, Trust
from distill.errors import DistillError, Exit, one_line
from distill.models import registry
from distill.models.chat_template import DATE, Reasoning
from distill.models.download import cache_folder, converted_folder
from distill.records import Message, digest
from distill.storage.environment import code_hash, installed
from distill.storage.files import write_json
from distill.tasks.sandbox.namespaces import die_with_parent

SECONDS = 5  # of the processor; a tokenizer of 262,144 tokens takes one
MEGABYTES = 2048  # beside what the libraries take
UNFIT = {  # for a student
    "quantization_config": "has quantised weights, into which an adapter cannot be merged",
    "final_logit_softcapping": "caps its logits behind the head, which the loss does not know",
}


class ModelTrial(NamedTuple):
    """A model and how it will be used; `targets` of an adapter, where it is to be trained."""

    reference: str
    revision: str | None = None
    trust: Trust = SAFE
    date: str = DATE
    targets: str | tuple[str, ...] | None = None
    template: Mapping[str, Any] = {}
    reasoning: Reasoning | None = None


def try_model(model: ModelTrial) -> list[str]:
    """Try a model's config, tokenizer and template, and of a student the adapter too.

    Returns notes for the user. Fetches these files where they are not here, and no weights; of a
    model that is one file, and not here, the table has the shape. Raises DistillError (exit 7)
    where a file cannot be used or passes a limit; 2 and 3 as `registry.fetch` does.
    """
    info, folder = registry.lookup(model.reference), None
    if not info or not info.gguf or converted_folder(info.name, info.gguf).is_dir():
        folder = registry.fetch(model.reference, model.revision, model.trust, weights=False)
        folder = folder.absolute()
    elif not model.targets:
        return []
    files = registry.folder_digest(folder, weights=False) if folder else model.reference
    versions = [code_hash(), *map(installed, ("transformers", "tokenizers", "peft", "torch"))]
    path = Path(f"trials/{digest([files, *model[2:], versions])}.json")
    with suppress(OSError, ValueError, KeyError, DistillError):
        return json.loads((cache_folder() / path).read_bytes())["notes"]
    reply = _in_child(model, folder)
    if error := reply.get("error"):
        code, where, what, fix = (f"{x}".replace(f"{folder}", model.reference) for x in error)
        raise DistillError(Exit(int(code)), where, what, fix)
    with suppress(OSError, DistillError):  # where nobody may write it is tried each time
        write_json(cache_folder() / path, reply)
    return reply["notes"]


def _in_child(model: ModelTrial, folder: Path | None) -> dict[str, list[Any]]:
    """Return the notes of `_try`, or its error, from a child whose end this process awaits.

    The child is a fork, as the libraries are imported here once for all that follows.
    """
    import peft  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    import distill.training.encode  # noqa: F401

    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(writer, model, folder), daemon=True)
    child.start()
    writer.close()
    try:
        return json.loads(reader.recv_bytes())  # JSON, as pickles of a child can run code here
    except (EOFError, OSError):
        child.join()
        slow = child.exitcode in (-signal.SIGXCPU, -signal.SIGALRM)
        limit = f"{SECONDS} seconds" if slow else f"{MEGABYTES:,} MB of memory"
        what = f"config, tokenizer or template need more than {limit}"
        return {"error": [Exit.TRAINING, f"model {model.reference}", what, "use a sound copy"]}
    finally:
        child.kill()
        child.join()


def _answer(writer: Connection, model: ModelTrial, folder: Path | None) -> None:
    """Send what `_try` returns or raises, within seconds and a share of memory, or be ended.

    It computes in one thread, since those of OpenMP are not in a fork, and touches no GPU.
    """
    import torch

    os.setsid()  # Ctrl-C is the parent's to answer
    die_with_parent()
    for stream in (1, 2):  # what libraries print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(12 * SECONDS)  # of the clock, on a busy machine
    status = re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())
    data = (int(status[1]) << 10 if status else 0) + (MEGABYTES << 20)
    limits = {resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_DATA: data, resource.RLIMIT_CORE: 0}
    for kind, most in limits.items():
        bound = resource.getrlimit(kind)[1]
        most = most if bound == resource.RLIM_INFINITY else min(most, bound)
        resource.setrlimit(kind, (most, bound))
    try:
        reply = {"notes": _try(model, folder)}
    except MemoryError:
        os._exit(1)
    except DistillError as error:
        reply = {"error": [error.code, error.where, error.what, error.fix]}
    except BaseException as error:
        what = [Exit.TRAINING, f"model {model.reference}", one_line(error), "check its files"]
        reply = {"error": what}
    writer.send_bytes(json.dumps(reply).encode())


def _try(model: ModelTrial, folder: Path | None) -> list[str]:
    """Do what training and answering will do before they compute; return notes for the user."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distill.models import loading
    from distill.models.chat_template import encode_prompt
    from distill.training import adapters
    from distill.training.encode import check_template

    notes, trust, targets = list[str](), model.trust, model.targets
    if folder:
        settings = (None, trust, model.template, model.reasoning)
        tokenizer = loading.load_tokenizer(f"{folder}", *settings)
        user = Message(role="user", content="What is 2 and 2?")
        system, answer = (Message(role=role, content="4.") for role in ("system", "assistant"))
        encode_prompt(tokenizer, [user], model.date)
        for messages in ([system, user], [user, answer, user]):
            with suppress(DistillError):  # it may refuse a role; whether prompts have it they show
                encode_prompt(tokenizer, messages, model.date)
        for path in (folder / "config.json", folder / "tokenizer_config.json"):
            if not trust.code and path.is_file() and "auto_map" in registry.read_object(path):
                notes.append(f"{path.name}: auto_map is ignored, transformers has the class")
        config = loading.decoder_config(folder, trust)[0]
        if targets:
            check_template(tokenizer, model.date, thought=model.reasoning == "keep")
        for what in (what for key, what in UNFIT.items() if targets and getattr(config, key, None)):
            fix = "use another student, or the model that it was made from"
            raise DistillError(Exit.TRAINING, f"model {model.reference}", what, fix)
    else:  # a Llama, or a Qwen2 of the same modules
        config = LlamaConfig(num_hidden_layers=registry.shape_of(model.reference).layers)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, trust_remote_code=trust.code)
    if targets:
        wrapped = adapters.inject(network, 1, 1, 0.0, targets, 0)
        if targets == "all-linear" and (others := adapters.unadapted(wrapped)):
            notes.append(f"no adapter on {', '.join(others)}: they are no linear modules")
    return notes
