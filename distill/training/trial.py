"""A model's files are first tried in a process of their own: what is not ours may loop or swell.

A chat template is a program, and a config or a tokenizer can ask for any amount of memory. So a
child with limits reads them first: it opens the tokenizer, renders and encodes conversations, makes
the model without its weights, and puts the adapter on it. `try_model` raises what the child met, as
one line and within seconds; a success is kept in the user's cache by the files' hashes. No weights
are read: `models.loading.check_model` does that.
"""

import json
import os
import resource
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.config.learning import Lora
from distill.config.values import SAFE, Trust
from distill.errors import DistillError, Exit, one_line
from distill.models import registry
from distill.models.chat_template import DATE, Reasoning
from distill.models.download import cache_folder, converted_folder
from distill.records import Message, digest
from distill.storage.environment import code_hash, die_with_parent, installed
from distill.storage.files import write_json

SECONDS = 5  # of the processor; a tokenizer of 262,144 tokens takes one
MEGABYTES = 2048  # beside what the libraries take
CHARACTERS = 1_000_000  # that a template may make of one short question


def try_model(
    reference: str,
    revision: str | None = None,
    trust: Trust = SAFE,
    date: str = DATE,
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
    settings = [trust, date, lora and lora.model_dump(mode="json"), template or {}, reasoning]
    versions = [code_hash(), *map(installed, ("transformers", "tokenizers", "peft", "torch"))]
    files = registry.folder_digest(folder, weights=False) if folder else reference
    key = digest([files, settings, versions])
    with suppress(OSError, ValueError, KeyError, DistillError):
        return json.loads((cache_folder() / f"trials/{key}.json").read_bytes())["notes"]
    reply = _in_child(reference, folder, trust, date, lora, template or {}, reasoning)
    if error := reply.get("error"):
        code, where, what, fix = (f"{part}".replace(str(folder), reference) for part in error)
        raise DistillError(Exit(int(code)), where, what, fix)
    with suppress(OSError, DistillError):  # where nobody may write it is tried each time
        kept = cache_folder() / f"trials/{key}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, reply)
    return reply["notes"]


def _in_child(reference: str, *settings: Any) -> dict[str, Any]:
    """Return the notes of `_try`, or its error, from a child whose end this process awaits.

    The child is a fork, as the libraries are imported here once for all that follows. It computes
    in one thread, since those of OpenMP are not in a fork, and touches no GPU.
    """
    import peft  # noqa: F401
    import torch
    import transformers.modeling_utils  # noqa: F401

    import distill.training.encode  # noqa: F401

    where, fix, reply = f"model {reference}", "use a sound copy of the model", ""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            os.setsid()  # Ctrl-C is the parent's to answer
            die_with_parent()
            for stream in (1, 2):  # what libraries print goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            torch.set_num_threads(1)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            _limit()
            reply = json.dumps({"notes": _try(reference, *settings)})
        except MemoryError:
            os.kill(os.getpid(), signal.SIGKILL)
        except BaseException as raised:
            error = (Exit.TRAINING, where, one_line(raised), "check its files")
            if isinstance(raised, DistillError):
                error = (raised.code, raised.where, raised.what, raised.fix)
            reply = json.dumps({"error": [int(error[0]), *map(str, error[1:])]})
        with suppress(OSError):
            os.write(writer, reply.encode())
        os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            reply = pipe.read().decode()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        status = os.waitpid(child, 0)[1]
    if not status:
        return json.loads(reply)
    slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM)
    limit = f"{SECONDS} seconds" if slow else f"{MEGABYTES:,} MB of memory"
    what = f"config, tokenizer or template need more than {limit}"
    return {"error": [int(Exit.TRAINING), where, what, fix]}


def _limit() -> None:
    """Let this process end before it takes more than its seconds, or its share of memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    now = sum(int(line.split()[1]) for line in status if line.startswith("VmData"))
    for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(12 * SECONDS)  # of the clock, on a busy machine
    for kind, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_DATA, (now << 10) + (MEGABYTES << 20)),
        (resource.RLIMIT_CORE, 0),
    ):
        bound = resource.getrlimit(kind)[1]
        most = most if bound == resource.RLIM_INFINITY else min(most, bound)
        resource.setrlimit(kind, (most, bound))


def _try(
    reference: str, folder: Path | None, trust: Trust, date: str,
    lora: Lora | None, template: Mapping[str, Any], reasoning: Reasoning | None,
) -> list[str]:  # fmt: skip
    """Do what training and answering will do before they compute; return notes for the user."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distill.models import loading
    from distill.models.chat_template import encode_prompt, render
    from distill.training import adapters
    from distill.training.encode import check_template

    notes = list[str]()
    if folder:
        tokenizer = loading.load_tokenizer(str(folder), None, trust, template, reasoning)
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
        files = [folder / name for name in ("config.json", "tokenizer_config.json")]
        for path in [] if trust.code else filter(Path.is_file, files):
            if "auto_map" in registry.read_object(path):
                notes.append(f"{path.name}: auto_map is ignored, transformers has the class")
        if lora:
            check_template(tokenizer, date, thought=reasoning == "keep")
        config = loading.decoder_config(folder, trust)[0]
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
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust.code)
    if lora:
        wrapped = adapters.inject(model, 1, 1, 0.0, lora.target_modules, 0)
        if lora.target_modules == "all-linear" and (others := adapters.unadapted(wrapped)):
            notes.append(f"no adapter on {', '.join(others)}: they are no linear modules")
    return notes
