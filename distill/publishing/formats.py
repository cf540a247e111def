"""The files of a release for other runners: GGUF of several sizes, and Ollama's Modelfile.

A file that the last release holds of the same model is taken over. The Modelfile's template is
Go's: the texts that stand between two turns, found by rendering the chat template with sentinels.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from distill.config.tree import Format
from distill.errors import DistillError, Exit
from distill.formatting import size
from distill.models.chat_template import render
from distill.models.gguf_file import write_gguf
from distill.models.loading import context_length
from distill.records import Message, Prompt, Role
from distill.responders.engines import BY_SCRIPT, engine_folder
from distill.responders.local.local_model import end_of_turn
from distill.storage.files import sha256_file
from distill.storage.progress import say

KINDS: dict[Format, str] = {"gguf-f16": "F16", "gguf-q8_0": "Q8_0", "gguf-q4_k_m": "Q4_K_M"}
BYTES = {"F16": 2.0, "Q8_0": 34 / 32, "Q4_K_M": 0.7}  # of a weight, about
OLLAMA = "Q8_0"  # what the Modelfile names
MODELFILE = "Modelfile"
MOST_CONTEXT = 8192  # tokens that Ollama reserves memory for, unless the user wants more
Turns = Mapping[tuple[str, str], str]  # the text between the turns of two roles; "" is either end


def kinds_of(formats: Collection[Format]) -> list[str]:
    """Return the kinds of GGUF file that formats need, in the order in which they are made."""
    names = {KINDS[one] for one in formats if one in KINDS}
    return [k for k in BYTES if k in names | ({OLLAMA} if "ollama" in formats else set())]


def find_quantize() -> str:
    """Return llama.cpp's program that makes K-quants; DistillError (exit 2) where there is none."""
    program = shutil.which("llama-quantize") or engine_folder("llama.cpp") / "bin/llama-quantize"
    if not Path(program).is_file():
        fix = f"{BY_SCRIPT} llama.cpp builds it, or leave gguf-q4_k_m out of publish.formats"
        raise DistillError(Exit.CONFIG, "llama-quantize", "is not installed", fix)
    return f"{program}"


def write_files(
    model: Path, work: Path, release: Path, name: str, kinds: Sequence[str], old: Mapping[str, str]
) -> list[Path]:
    """Write `model` into `work` as NAME-KIND.gguf for each kind; return the files.

    `old` are hashes of files in `release` that hold this very model: they are not made again.
    Raises DistillError: exit 2 without what makes K-quants, 3 for a model that cannot be converted,
    5 where the disk has no room.
    """
    quantize = find_quantize() if "Q4_K_M" in kinds else ""
    files, missing = [work / f"{name}-{kind}.gguf" for kind in kinds], list[str]()
    for kind, file in zip(kinds, files, strict=True):
        last = release / file.name
        same = file.name in old and last.is_file() and sha256_file(last) == old[file.name]
        if same and not last.is_symlink():
            os.link(last, file)
            say(f"{file.name}: as it was")
        else:
            missing.append(kind)
    weights = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            weights += sum(prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    full = work / f"{name}-F16.gguf"  # which the K-quants are made of
    needed = {kind: BYTES[kind] * weights for kind in missing}
    if "Q4_K_M" in missing and not full.is_file():
        needed["F16"] = BYTES["F16"] * weights
    free = shutil.disk_usage(work).free
    each = ", ".join(f"{kind} {size(amount)}" for kind, amount in needed.items())
    if sum(needed.values()) > free:
        what = f"{each} are needed, and {size(free)} are free"
        raise DistillError(Exit.STATE, release, what, "free space, or name fewer publish.formats")
    if missing:
        say(f"formats: {each}; {size(free)} are free")
    for kind in missing:
        file = work / f"{name}-{kind}.gguf"
        if kind == "F16" or kind == "Q8_0":
            write_gguf(model, file, kind, name)
            continue
        if not full.is_file():
            write_gguf(model, full, "F16", name)
        line = [quantize, f"{full}", f"{file}", kind]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            last = " ".join((done.stderr or done.stdout).split())[-200:]
            fix = "see what llama.cpp says of the file, or leave gguf-q4_k_m out"
            raise DistillError(Exit.PUBLISH, "llama-quantize", f"failed: {last}", fix)
    if full not in files:
        full.unlink(missing_ok=True)
    return files


def turns_of(tokenizer: Tokenizer, date: str) -> Turns:
    """Find what a chat template writes between two turns, by their roles.

    Raises DistillError (exit 9) where that depends on more, as Ollama's form has no words for it.
    """
    turns = dict[tuple[str, str], str]()
    few: tuple[Role, ...] = ("user", "assistant", "user")
    more: tuple[Role, ...] = ("system", "user", "assistant", *few)
    for roles in (more, few):
        texts = [f"sentinel{n}text" for n in range(len(roles))]
        messages = [Message(role=r, content=t) for r, t in zip(roles, texts, strict=True)]
        rest = render(tokenizer, messages, date)
        for before, after, text in zip(("", *roles), (*roles, ""), (*texts, ""), strict=True):
            between, mark, rest = rest.partition(text) if text else (rest, "", "")
            if mark != text or turns.setdefault((before, after), between) != between:
                what = f"what it writes before {after or 'the answer'} depends on more than"
                raise _unlike(f"{what} the turn before", tokenizer)
    return turns


def _unlike(what: str, tokenizer: Tokenizer) -> DistillError:
    where = f"chat template of {Path(tokenizer.name_or_path).name}"
    fix = "leave ollama out of publish.formats; the GGUF files hold the template itself"
    return DistillError(Exit.PUBLISH, where, f"has no form for Ollama: {what}", fix)


def modelfile(
    model: Path, tokenizer: Tokenizer, date: str, name: str, prompts: Sequence[Prompt]
) -> str:
    """Write what `ollama create` reads: the GGUF file, template, stop tokens and context.

    Sampling is that of the evaluation, greedy. Raises DistillError (exit 9) where the template
    renders one of `prompts` otherwise than its turns say.
    """
    turns = turns_of(tokenizer, date)
    for prompt in prompts:
        before, text = "", ""
        for message in prompt.messages:
            text += turns.get((before, message.role), "") + message.content
            before = message.role
        if text + turns[before, ""] != render(tokenizer, prompt.messages, date):
            raise _unlike(f"it changes the prompt {prompt.messages[-1].content[:40]!r}", tokenizer)
    bos = str(tokenizer.bos_token)
    adds = tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # then the runner does it

    def literal(before: str, after: str) -> str:
        text = turns[before, after]
        text = text.removeprefix(bos) if adds and not before else text
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"

    answer, first = literal("user", "assistant"), literal("", "user")
    template = (
        '{{ $before := "" }}{{ range .Messages }}{{ if eq .Role "system" }}'
        f'{literal("", "system")}{{{{ .Content }}}}{{{{ else if eq .Role "assistant" }}}}'
        f'{answer}{{{{ .Content }}}}{{{{ else if eq .Role "user" }}}}'
        f'{{{{ if eq $before "system" }}}}{literal("system", "user")}'
        f'{{{{ else if eq $before "assistant" }}}}{literal("assistant", "user")}'
        f"{{{{ else }}}}{first}{{{{ end }}}}{{{{ .Content }}}}{{{{ end }}}}"
        '{{ $before = .Role }}{{ end }}{{ if ne $before "assistant" }}'
        f"{literal('user', '')}{{{{ end }}}}"
    )
    ends = GenerationConfig.from_pretrained(model).eos_token_id
    ids = {*([ends] if isinstance(ends, int) else ends or ()), *end_of_turn(tokenizer, date)}
    stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ids)]
    context = min(context_length(AutoConfig.from_pretrained(model)), MOST_CONTEXT)
    lines = [f"FROM ./{name}-{OLLAMA}.gguf", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {context}", "PARAMETER temperature 0"]
    return "\n".join([*lines, "PARAMETER repeat_penalty 1", ""])
