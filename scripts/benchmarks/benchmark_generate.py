"""Measure the local responder against transformers' `generate`: tokens a second, and whether the
answers are equal.

    python scripts/benchmarks/benchmark_generate.py --repeats 5 --json generate.json

The prompts are the quickstart's, drawn evenly over their lengths; greedy, in the dtype that the
machine computes in. `generate` answers padded batches sorted by length, at each size of
`--batches`; the first is the reference for equality. All sides are interleaved. A rate counts the
tokens of answers only, end tokens included. Where an answer differs, the log-probabilities of the
two tokens at which they part are compared, as a float32 copy of the model gives them; the last
check answers 16 prompts in float32 on both sides.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from distill.config.yaml_file import load_config
from distill.models.chat_template import encode_prompt
from distill.pipeline import STAGES
from distill.records import Prompt
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling
from distill.storage.files import read_records, write_json
from distill.storage.progress import console, say
from distill.storage.run_folder import Run

Answers = dict[str, list[int]]  # by prompt id
DATE = "2026-01-01"


def quickstart_prompts(count: int) -> list[Prompt]:
    """Make the quickstart's prompts in a temporary folder, and return `count` spread evenly over
    their lengths."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(load_config(Path("configs/quickstart.yaml"), [f"runs={folder}"]))
        for stage in STAGES[:2]:
            run.perform(stage)
        prompts = read_records(run.path("prompts.jsonl"), Prompt)
    prompts.sort(key=lambda p: (len(p.messages[-1].content), p.id))
    return [prompts[place * len(prompts) // count] for place in range(count)]


@torch.inference_mode()
def generate(responder: LocalResponder, requests: list[Request], batch: int) -> Answers:
    """Answer with `generate`, in left-padded batches sorted by length, its neutral config spelled
    out."""
    model: Any = responder.network
    tokenizer = responder.tokenizer
    prompts = {r.prompt_id: encode_prompt(tokenizer, r.messages, DATE) for r in requests}
    names = sorted(prompts, key=lambda name: -len(prompts[name]))
    answers: Answers = {}
    for start in range(0, len(names), batch):
        mine = names[start : start + batch]
        longest = len(prompts[mine[0]])
        gaps = [longest - len(prompts[name]) for name in mine]
        ids = torch.tensor([[0] * g + prompts[n] for g, n in zip(gaps, mine, strict=True)])
        mask = torch.tensor([[0] * g + [1] * (longest - g) for g in gaps])
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=requests[0].sampling.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=sorted(responder.stop_ids),
            pad_token_id=0,
        )
        for name, row in zip(mine, out[:, longest:].tolist(), strict=True):
            answers[name] = cut(row, responder.stop_ids)
    return answers


def cut(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    """Return the ids up to and with the first end token."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]


def stream(responder: LocalResponder, requests: list[Request]) -> Answers:
    """Answer with the responder."""
    prompts = {request.key: request.prompt_id for request in requests}
    return {prompts[raw.key]: raw.body["ids"] for raw in responder.ask(requests)}


def partings(ours: Answers, theirs: Answers) -> dict[str, int]:
    """Return the place at which two answers part, for those that differ."""
    places = {}
    for name, answer in theirs.items():
        pairs = zip(ours[name], answer, strict=False)
        if ours[name] != answer:
            places[name] = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
    return places


@torch.inference_mode()
def tie(model: Any, prompt: list[int], ours: list[int], theirs: list[int], place: int) -> float:
    """Return how far apart, in nats, the two tokens are at which answers part."""
    ids = torch.tensor([prompt + theirs[:place]], device=model.device)
    chances = model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
    return abs(float(chances[ours[place]] - chances[theirs[place]]))


def timed(work: Callable[[], Answers]) -> tuple[Answers, float]:
    """Return what the work answered, and its tokens a second."""
    started = time.perf_counter()
    answers = work()
    return answers, sum(map(len, answers.values())) / (time.perf_counter() - started)


def measure(responder: LocalResponder, requests: list[Request], given: Any) -> dict[str, Any]:
    """Time all sides in turn, and compare their answers."""
    sides: dict[str, Callable[[], Answers]] = {
        f"generate, batches of {size}": lambda size=size: generate(responder, requests, size)
        for size in given.batches
    }
    sides["distill"] = lambda: stream(responder, requests)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, Answers] = {}
    for repeat in range(given.repeats):
        for name, work in sides.items():
            found, rate = timed(work)
            if answers.setdefault(name, found) != found:
                raise SystemExit(f"{name}: the answers of a repeat differ")
            rates[name].append(rate)
            say(f"repeat {repeat + 1}: {name}: {rate:.1f} tokens/s")
    reference = answers[next(iter(sides))]
    different = {name: partings(found, reference) for name, found in answers.items()}
    return {"tokens_per_second": rates, "different": different, "answers": answers}


def ties(reference: str, requests: list[Request], result: dict[str, Any]) -> dict[str, float]:
    """Return, for each answer of ours that differs, how near a tie it parted at, in a float32 copy
    of the model."""
    exact = LocalResponder.load(reference, "float32", date=DATE)
    asked = {r.prompt_id: encode_prompt(exact.tokenizer, r.messages, DATE) for r in requests}
    ours, theirs = result["answers"]["distill"], next(iter(result["answers"].values()))
    return {
        name: tie(exact.network, asked[name], ours[name], theirs[name], place)
        for name, place in result["different"]["distill"].items()
    }


def equal_in_float32(reference: str, requests: list[Request], max_batch_size: int | None) -> int:
    """Return how many of the requests have equal answers on both sides in float32."""
    responder = LocalResponder.load(reference, "float32", date=DATE, max_batch_size=max_batch_size)
    ours, theirs = stream(responder, requests), generate(responder, requests, len(requests))
    return len(requests) - len(partings(ours, theirs))


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    rates = result["tokens_per_second"]
    base = statistics.median(next(iter(rates.values())))
    table = Table("", "tokens/s, median", "range", "times", "answers that differ")
    for name, row in rates.items():
        middle = statistics.median(row)
        span = f"{min(row):.0f} to {max(row):.0f}"
        count = str(len(result["different"][name]))
        table.add_row(name, f"{middle:.0f}", span, f"{middle / base:.2f}", count)
    console.print(table)
    gaps = sorted(result["ties_nats"].values())
    say(f"at the partings, nats between the two tokens: {[round(gap, 3) for gap in gaps]}")
    say(f"float32: {result['float32_equal']} of {result['float32_prompts']} equal")


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--max-batch-size", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--float32-prompts", type=int, default=16)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    responder = LocalResponder.load(given.model, date=DATE, max_batch_size=given.max_batch_size)
    sampling = Sampling(max_new_tokens=given.max_new_tokens)
    requests = [
        Request.make(responder.origin, p.id, p.messages, sampling)
        for p in quickstart_prompts(given.prompts)
    ]
    result = measure(responder, requests, given)
    del responder.network
    result["ties_nats"] = ties(given.model, requests, result)
    few = requests[:: max(1, len(requests) // given.float32_prompts)][: given.float32_prompts]
    result["float32_prompts"] = len(few)
    result["float32_equal"] = equal_in_float32(given.model, few, given.max_batch_size)
    result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    result["threads"] = torch.get_num_threads()
    show(result)
    if given.json:
        write_json(given.json, result)


if __name__ == "__main__":
    main()
