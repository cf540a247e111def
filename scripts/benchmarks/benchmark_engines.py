"""Measure tokens per second of a local teacher in each engine, at 1, 8 and 32 requests at once.

    python scripts/benchmarks/benchmark_engines.py RUN [--engines distill llama.cpp vllm] [--json F]

RUN has made its prompts; its teacher answers as many of them as are asked for, the same in every
engine, after a warm-up of two. A second is one from the first request to the last answer; tokens
are those of the answers. Engines that are not installed are left out, with a line.
"""

import argparse
import time
from pathlib import Path

from rich.table import Table

from distill.config.teachers import LocalTeacher
from distill.errors import DistillError
from distill.records import Prompt
from distill.responders.kinds import make_responder
from distill.responders.responder import Request, Sampling
from distill.storage.environment import cpu_facts
from distill.storage.files import read_records, write_json
from distill.storage.progress import console, say
from distill.storage.run_folder import open_run

LOADS = {1: 8, 8: 24, 32: 64}  # requests at once, and how many are asked in all
WARM = 2


def main() -> None:
    """Measure the engines one after the other, each started anew for each load."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--engines", nargs="*", default=["distill", "llama.cpp", "vllm"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = open_run(arguments.run)
    settings, config = run.config.teacher, run.config
    assert isinstance(settings, LocalTeacher)
    prompts = read_records(run.path("prompts.jsonl"), Prompt)
    sampling, table = Sampling.of(settings), Table("engine", *(f"{n} at once" for n in LOADS))
    results: dict[str, dict[int, float]] = {}
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
