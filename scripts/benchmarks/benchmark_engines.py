"""Measure tokens per second of a local teacher in each engine, at 1, 8 and 32 requests at once.

    python scripts/benchmarks/benchmark_engines.py RUN [--engines distill llama.cpp vllm] [--json F]

RUN has made its prompts; its teacher answers as many of them as are asked for, the same in every
engine, after a warm-up of two. A second is one from the first request to the last answer; tokens
are those of the answers. Engines that are not installed are left out, with a line.

With `--timing` it is instead checked how a scorecard's timing of the teacher, 8 at once, agrees
with a bare HTTP client that puts the same prompts to the same server, before and after it: the
ratio of their seconds of an output token.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from rich.table import Table

from distill.config.teachers import LocalTeacher
from distill.errors import DistillError
from distill.evaluation.answering import LEAST, TOKENS, timed
from distill.formatting import figure
from distill.records import HEADLINE, Prompt
from distill.responders.kinds import make_responder
from distill.responders.local.served_model import EngineResponder
from distill.responders.responder import Request, Sampling
from distill.storage.environment import cpu_facts
from distill.storage.files import read_records, write_json
from distill.storage.progress import console, say
from distill.storage.run_folder import open_run

LOADS = {1: 8, 8: 24, 32: 64}  # requests at once, and how many are asked in all
WARM = 2


def bare_pace(engine: EngineResponder, prompts: Sequence[Prompt]) -> float:
    """Return the seconds of an output token that a client sees which knows nothing of distill."""
    assert engine.server
    address, keys = engine.server.url, {"authorization": f"Bearer {engine.server.key}"}
    fields = {**engine.sampled_from_all(), "temperature": 0, "max_tokens": TOKENS}

    def asked(prompt: Prompt) -> int:
        turns = [{"role": m.role, "content": m.content} for m in prompt.asked_of_teacher()]
        body = {"model": engine.model, "messages": turns, **fields}
        reply = client.post(f"{address}/chat/completions", json=body, headers=keys)
        return int(reply.raise_for_status().json()["usage"]["completion_tokens"])

    with httpx2.Client(timeout=900, trust_env=False) as client, ThreadPoolExecutor(HEADLINE) as at:
        started = time.perf_counter()
        tokens = sum(at.map(asked, prompts))
        return (time.perf_counter() - started) / tokens


def check_timing(engine: EngineResponder, prompts: Sequence[Prompt], path: Path) -> float | None:
    """Return a timing's seconds of an output token as a share of a bare client's."""
    found = timed(path, engine, prompts, teacher=True)
    if not found:
        return None
    same = prompts[:: max(1, len(prompts) // LEAST)][:LEAST]  # as the timing takes them
    before = bare_pace(engine, same)
    path.unlink()
    again = timed(path, engine, prompts, teacher=True)
    assert again
    after = bare_pace(engine, same)
    paces = [one.loads[0].pace for one in (found, again)]
    say(f"{engine.engine}: seconds of a token, timing {paces}, bare client {[before, after]}")
    return sum(paces) / (before + after)


def main() -> None:
    """Measure the engines one after the other, each started anew for each load."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--engines", nargs="*", default=["distill", "llama.cpp", "vllm"])
    parser.add_argument("--timing", action="store_true", help="check a scorecard's timing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = open_run(arguments.run)
    settings, config = run.config.teacher, run.config
    assert isinstance(settings, LocalTeacher)
    prompts = read_records(run.path("prompts.jsonl"), Prompt)
    sampling, table = Sampling.of(settings), Table("engine", *(f"{n} at once" for n in LOADS))
    results: dict[str, dict[int, float]] = {}
    if arguments.timing:
        for engine in arguments.engines:
            responder = make_responder(settings.model_copy(update={"engine": engine}), config)
            if isinstance(responder, EngineResponder):
                with tempfile.TemporaryDirectory() as work:
                    share = check_timing(responder, prompts, Path(work) / "timing.jsonl")
                say(f"{engine}: a timing is {figure(share, 3)} of a bare client's")
                responder.close()
        return
    for engine in arguments.engines:
        speeds = results[engine] = {}
        for load, count in LOADS.items():
            changes = {"engine": engine, "concurrency": load}
            try:
                responder = make_responder(settings.model_copy(update=changes), config)
            except DistillError as error:
                say(f"{engine}: left out: {error}")
                break
            messages = [prompt.asked_of_teacher() for prompt in (prompts * count)[: count + WARM]]
            requests = [
                Request.make(responder.origin, f"p{n}", turns, sampling, n)
                for n, turns in enumerate(messages)
            ]
            for _ in responder.ask(requests[-WARM:]):
                pass
            started = time.perf_counter()
            tokens = sum(raw.reply.usage.output_tokens for raw in responder.ask(requests[:-WARM]))
            speeds[load] = round(tokens / (time.perf_counter() - started), 1)
            say(f"{engine}, {load} at once: {speeds[load]} tokens/s")
            if close := getattr(responder, "close", None):
                close()
        table.add_row(engine, *(str(speeds.get(load, "")) for load in LOADS))
    console.print(table)
    facts = cpu_facts()
    kinds = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts["flags"]
    ]
    cpu = f"{facts['model name']}: {' '.join(kinds)}"
    say(cpu)
    if arguments.json:
        write_json(arguments.json, {"cpu": cpu, "tokens_per_second": results})


if __name__ == "__main__":
    main()
