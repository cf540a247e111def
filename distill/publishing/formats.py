"""The files of a release for other runners: GGUF of several sizes, and Ollama's Modelfile.

The Modelfile's template is Go's: the texts that stand between two turns, found by rendering the
chat template with sentinels.
"""

import json
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import get_args

from transformers import AutoConfig, GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from distill.config.release import Format
from distill.errors import DistillError, Exit
from distill.formatting import size
from distill.models.chat_template import render
from distill.models.gguf_file import write_gguf
from distill.models.loading import context_length
from distill.models.registry import shape_of
from distill.records import Message, Prompt, Role
from distill.responders.engines import BY_SCRIPT, engine_folder
from distill.responders.local.local_model import end_of_turn
from distill.storage.progress import say

KINDS: dict[Format, str]
KINDS = {"gguf-f16": "F16", "gguf-q8_0": "Q8_0", "gguf-q4_k_m": "Q4_K_M", "ollama": "Q8_0"}
BYTES = {"F16": 2.0, "Q8_0": 34 / 32, "Q4_K_M": 0.7}  # of a weight, about
MODELFILE = "Modelfile"
MOST_CONTEXT = 8192  # tokens that Ollama reserves memory for, unless the user wants more
# Go's text/template: what stands between two turns by their roles, the turns, what begins an answer
BETWEEN = '{{ if and (eq $before "%s") (eq .Role "%s") }}{{ %s }}{{ end }}'
TEMPLATE = (
    '{{ $before := "" }}{{ range .Messages }}%s{{ .Content }}{{ $before = .Role }}{{ end }}'
    '{{ if ne $before "assistant" }}{{ %s }}{{ end }}'
)
Turns = Mapping[tuple[str, str], str]  # the text between the turns of two roles; "" is either end


def kinds_of(formats: Collection[Format]) -> list[str]:
    """Return the kinds of GGUF file that formats need, in the order in which they are made."""
    names = {KINDS.get(one) for one in formats}
    return [kind for kind in BYTES if kind in names]


def find_quantize() -> str:
    """Return llama.cpp's program that makes K-quants; DistillError (exit 2) where there is none."""
    program = shutil.which("llama-quantize") or engine_folder("llama.cpp") / "bin/llama-quantize"
    if not Path(program).is_file():
        fix = f"{BY_SCRIPT} llama.cpp builds it, or leave gguf-q4_k_m out of publish.formats"
        raise DistillError(Exit.CONFIG, "llama-quantize", "is not installed", fix)
    return f"{program}"


def write_files(model: Path, work: Path, name: str, kinds: Sequence[str]) -> list[Path]:
    """Write `model` into `work` as NAME-KIND.gguf for each kind; return the files.

    Raises DistillError: exit 2 without what makes K-quants, 3 for a model that cannot be converted,
    5 where the disk has no room.
    """
    quantize = find_quantize() if "Q4_K_M" in kinds else ""
    files = {kind: work / f"{name}-{kind}.gguf" for kind in kinds}
    full = work / f"{name}-F16.gguf"  # which K-quants are made of
    needed = [*kinds, "F16"] if quantize and "F16" not in kinds else kinds
    weights, free = shape_of(f"{model.resolve()}").parameters, shutil.disk_usage(work).free
    each = ", ".join(f"{kind} {size(BYTES[kind] * weights)}" for kind in needed)
    say(f"formats: {each}; {size(free)} are free")
    if sum(BYTES[kind] * weights for kind in needed) > free:
        what = f"{each} are needed, and {size(free)} are free"
        raise DistillError(Exit.STATE, work, what, "free space, or name fewer publish.formats")
    for kind, file in files.items():
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
    if "F16" not in kinds:
        full.unlink(missing_ok=True)
    return [*files.values()]


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


def modelfile(
    model: Path, tokenizer: Tokenizer, date: str, name: str, prompts: Sequence[Prompt]
) -> str:
    """Write what `ollama create` reads: the GGUF file, template, stop tokens and context.

    Sampling is that of the evaluation, greedy. Raises DistillError (exit 9) where the template
    renders one of `prompts` otherwise than its turns say.
    """
    turns = dict(turns_of(tokenizer, date))
    for prompt in prompts:
        roles = pairwise(["", *(m.role for m in prompt.messages), ""])
        contents = [*(m.content for m in prompt.messages), ""]
        parts = (turns.get(pair, "") + text for pair, text in zip(roles, contents, strict=True))
        if "".join(parts) != render(tokenizer, prompt.messages, date):
            raise _unlike(f"it changes the prompt {prompt.messages[-1].content[:40]!r}", tokenizer)
    if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:  # then the runner writes it
        bos = str(tokenizer.bos_token)
        turns = {p: t if p[0] else t.removeprefix(bos) for p, t in turns.items()}
    for before, after in product(("", *get_args(Role)), get_args(Role)):  # others may have more
        usual = turns.get(("user", "assistant") if after == "assistant" else ("", after))
        turns.setdefault((before, after), usual or "")
    quoted = {pair: json.dumps(text, ensure_ascii=False) for pair, text in turns.items()}
    between = "".join(BETWEEN % (*pair, text) for pair, text in quoted.items() if pair[1])
    ends = GenerationConfig.from_pretrained(model).eos_token_id
    ids = {*([ends] if isinstance(ends, int) else ends or ()), *end_of_turn(tokenizer, date)}
    stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ids)]
    lines = [
        f"FROM ./{name}-{KINDS['ollama']}.gguf",
        f'TEMPLATE """{TEMPLATE % (between, quoted["user", ""])}"""',
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
        f"PARAMETER num_ctx {min(context_length(AutoConfig.from_pretrained(model)), MOST_CONTEXT)}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    return "\n".join([*lines, ""])


def _unlike(what: str, tokenizer: Tokenizer) -> DistillError:
    where = f"chat template of {Path(tokenizer.name_or_path).name}"
    fix = "leave ollama out of publish.formats; the GGUF files hold the template itself"
    return DistillError(Exit.PUBLISH, where, f"has no form for Ollama: {what}", fix)
