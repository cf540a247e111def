"""Open a finished run's release in the runners that people use, and compare what they answer.

    python scripts/interop.py runs/NAME [--prompts 20] [--dtype float32] [--only RUNNER ...]

Each runner is a process of its own in its own environment (`bash scripts/engines.sh`). It renders
held-out prompts by the release's template and answers greedily; held against it are our answers of
the same files in the same type. Where one differs, `nats` says how far apart our first two tokens
are there. Prints a Markdown table, then what broke a rule; exits with 1 where anything did.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import torch

from distill.config.teachers import Engine
from distill.errors import DistillError
from distill.evaluation.suites import answer_limit, held_out_items
from distill.formatting import markdown_table
from distill.models import loading, registry
from distill.models.chat_template import encode_prompt
from distill.models.download import cache_folder
from distill.models.gguf_file import write_gguf
from distill.models.weights import add_adapter
from distill.records import Prompt, Response
from distill.responders.engines import EngineServer, engine_version, find_engine, require_engine
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling
from distill.storage.files import read_records
from distill.storage.run_folder import Run, open_run

# How many answers may differ in a type, and how near our first two tokens must then be, in nats
RULES = {"float32": (0, 0.0), "float16": (1, 0.1), "bfloat16": (2, 0.2)}
CONTEXT = 2048  # tokens of a prompt and its answer
RUNNERS = {
    **{"transformers": "safetensors", "transformers4": "safetensors", "peft": "adapter"},
    **{"llama.cpp": "gguf", "vllm": "safetensors", "vllm-lora": "adapter"},
    **{"lm-eval": "safetensors", "mlx": "safetensors"},
}
ENGINES: dict[str, Engine] = {"llama.cpp": "llama.cpp", "vllm": "vllm", "vllm-lora": "vllm"}
HEAD = "format,runner,loads,answers as ours,ids as ours,as merged,as scored,nats".split(",")
Row = tuple[list[int], str]  # a prompt's ids as a runner renders it, and its answer


class Job(NamedTuple):
    """What every runner is given; `turns` are the prompts as its user writes them."""

    run: Run
    release: Path
    base: Path
    prompts: Sequence[Prompt]
    turns: list[list[dict[str, str]]]
    dtype: str
    tokens: int


class Ours:
    """Our own answers, of the release, or of its adapter on the base without merging."""

    def __init__(self, job: Job, adapter: Path | None = None) -> None:
        date, greedy = job.run.config.template_date, Sampling(max_new_tokens=job.tokens)
        self.tokenizer: Any = loading.load_tokenizer(f"{job.release}")
        reference = f"{job.base if adapter else job.release}"
        self.model: Any = loading.load_model(reference, job.dtype, on_cpu=True)
        if adapter:
            self.model = add_adapter(self.model, adapter).eval().get_base_model()
        responder = LocalResponder(self.model, self.tokenizer, "student", "o", date, 1)
        requests = [Request.make("o", prompt.id, prompt.messages, greedy) for prompt in job.prompts]
        raws = {raw.key: raw for raw in responder.ask(requests)}
        self.ids = [list[int](raws[request.key].body["ids"]) for request in requests]
        asked = (encode_prompt(self.tokenizer, prompt.messages, date) for prompt in job.prompts)
        self.rows = list(zip(asked, map(self.text, self.ids), strict=True))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's ids."""
        return self.tokenizer.decode(ids, True, clean_up_tokenization_spaces=False)

    def gap(self, number: int, other: str) -> float:
        """Return how far our first two tokens are apart where another's answer leaves ours."""
        ids = self.ids[number]
        same = max(k for k in range(len(ids)) if other.startswith(self.text(ids[:k])))
        with torch.inference_mode():
            before = torch.tensor([[*self.rows[number][0], *ids[:same]]])
            first, second = self.model(before).logits[0, -1].float().topk(2).values.tolist()
        return first - second


def python_of(runner: str) -> Path | None:
    """Return the Python that has a library, None where it is not installed."""
    folder = cache_folder() / "engines" / runner
    if runner in ("mlx", "transformers4"):
        return folder / "bin/python" if (folder / "package").exists() else None
    return Path(sys.executable) if runner != "lm-eval" or find_spec("lm_eval") else None


def by_library(runner: str, job: Job, adapter: Path | None) -> tuple[str, list[Row]]:
    """Ask a library in the Python that has it."""
    given = {
        "runner": runner,
        "release": f"{job.release}",
        "model": f"{job.base if adapter else job.release}",
    }
    given |= {"adapter": adapter and f"{adapter}", "dtype": job.dtype}
    asked = json.dumps({**given, "turns": job.turns, "tokens": job.tokens})
    alone = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [f"{python_of(runner)}", f"{Path(__file__).with_name('ask_model.py')}"]
    done = subprocess.run(line, input=asked, capture_output=True, text=True, env=alone, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def by_server(engine: Engine, job: Job, adapter: Path | None) -> tuple[str, list[Row]]:
    """Ask vLLM, of the release or its adapter, or llama.cpp, of a GGUF that is made here."""
    command, work = require_engine(engine, job.run.config.engines), tempfile.TemporaryDirectory()
    if engine == "llama.cpp":
        file = Path(work.name, "student-F16.gguf")
        write_gguf(job.release, file, "F16", "student")
        model, options = file, list[str]()
    else:
        model = job.base if adapter else job.release
        options = ["--dtype", job.dtype, "--tokenizer", f"{job.release}", "--enforce-eager"]
    if adapter:
        rank = json.loads((adapter / "adapter_config.json").read_bytes())["r"]
        options += ["--enable-lora", "--max-lora-rank", f"{max(8, rank)}"]
        options += ["--lora-modules", f"student={adapter}"]
    name, rows = "base" if adapter else "student", list[Row]()
    server = EngineServer(engine, command, model, name, 1, CONTEXT, options)

    def post(path: str, **body: Any) -> Any:
        return server.post(path, **body).raise_for_status().json()

    try:
        for turns in job.turns:
            texts: dict[str, Any] = {"model": "student", "messages": turns}
            if engine == "llama.cpp":
                text = post("/apply-template", messages=turns)["prompt"]
                texts = {"content": text, "add_special": True, "parse_special": True}
            ids = post("/tokenize", **texts)["tokens"]
            asked = {"model": "student", "prompt": ids, "max_tokens": job.tokens}
            made = post("/v1/completions", temperature=0, **asked)
            rows.append((ids, made["choices"][0]["text"]))
    finally:
        server.close()
        work.cleanup()
    return f"{engine} {engine_version(tuple(command))}", rows


def main(run: Run, count: int, dtype: str, only: Sequence[str]) -> int:
    """Print the table; return 1 where a rule is broken."""
    prompts, student = [p.prompt for p in held_out_items(run.folder)[0]][:count], run.config.student
    release, n = run.path("release").resolve(), len(prompts)
    base = registry.fetch(student.model, student.revision, student.trust).resolve()
    turns = [[{"role": m.role, "content": m.content} for m in p.messages] for p in prompts]
    job = Job(run, release, base, prompts, turns, dtype, answer_limit(run.config))
    answers = read_records(run.path("answers/student.jsonl"), Response)
    scored = {response.prompt_id: response.text.strip() for response in answers}
    merged, unmerged = Ours(job), Ours(job, release / "adapter")
    lines, broken = list[tuple[str, ...]](), list[str]()
    for name in only:
        form, engine = RUNNERS[name], ENGINES.get(name)
        kind = "float16" if form == "gguf" else dtype
        ours, adapter = (unmerged, release / "adapter") if form == "adapter" else (merged, None)
        if not (find_engine(engine, run.config.engines) if engine else python_of(name)):
            lines.append((f"{form}, {kind}", name, "not installed", *[""] * 5))
            continue
        try:
            asked = by_server(engine, job, adapter) if engine else by_library(name, job, adapter)
        except (DistillError, RuntimeError, httpx2.HTTPError) as error:
            lines.append((f"{form}, {kind}", name, "no", *[""] * 5))
            broken.append(f"{name}: {error}")
            continue
        version, rows = asked
        pairs = list(zip(rows, ours.rows, merged.rows, prompts, strict=True))
        gaps = [ours.gap(k, row[1]) for k, (row, own, *_) in enumerate(pairs) if row[1] != own[1]]
        ids = sum(row[0] == own[0] for row, own, *_ in pairs)
        as_merged = sum(row[1] == whole[1] for row, _, whole, _ in pairs)
        as_scored = sum(row[1].strip() == scored.get(prompt.id) for row, *_, prompt in pairs)
        (most, near), counts = RULES[kind], (n - len(gaps), ids, as_merged, as_scored)
        if ids < n:
            broken.append(f"{name}: renders {n - ids} prompts to other ids")
        if len(gaps) > most or max(gaps, default=0.0) > near:
            broken.append(f"{name}: {len(gaps)} answers differ; {most} may, within {near} nat")
        shown = (*(f"{k} of {n}" for k in counts), " ".join(f"{gap:.3f}" for gap in gaps))
        lines.append((f"{form}, {kind}", version, "yes", *shown))
    print(markdown_table(HEAD, lines))
    print("".join(f"\nBROKEN {line}\n" for line in broken), end="")
    return bool(broken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    o = parser.parse_args()
    sys.exit(main(open_run(o.run), o.prompts, o.dtype, o.only))
