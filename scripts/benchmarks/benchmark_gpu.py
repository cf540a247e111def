"""Measure on a GPU how near the training is to its limit, and what a loss costs beside TRL's and
Liger's.

    python scripts/benchmarks/benchmark_gpu.py train --model Qwen/Qwen2.5-1.5B-Instruct \\
        --json train.json
    python scripts/benchmarks/benchmark_gpu.py losses --tokens 4096 --json losses.json

Models have the shapes of configs/models.yaml and random weights, for speed does not depend on them,
and nothing is downloaded. TRL (`pip install 'trl==1.16.*'`) and Liger (`pip install liger-kernel`)
are measured where they are installed. A side is alone on the GPU, so its peak of memory is its own.
`--tiny` does the same with a tiny model on any machine, a CPU too: it shows that the script works,
and its figures mean nothing.

train: LoRA (r 32, alpha 64, all-linear) in bfloat16 on samples of random tokens, half of each
supervised. A round is one step; the first of each side warms it up. MFU is what the real tokens
need (4 operations a frozen weight, the head at supervised positions only, attention; padding counts
for nothing) over the time and the GPU's dense bfloat16 rate in configs/devices.yaml. `compiled` has
its MLPs and norms compiled. TRL's SFTTrainer has no gradient checkpointing. losses: forward and
backward at both heads in bfloat16, the student's frozen; times by CUDA events, memory what a pass
adds. `compiled` has what follows our logits compiled; Liger compiles itself. JSD has beta 0.5.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_losses import OURS, Pass, Problem, make
from benchmark_losses import TRL as TRL_LOSSES
from benchmark_losses import Shape as Heads
from benchmark_soft_labels import spread
from benchmark_train import RANK, Ours, Side, measure, plain, trl
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from distill.errors import DistillError, Exit, exit_code
from distill.formatting import table
from distill.models.loading import quiet
from distill.models.registry import Shape, shape_of
from distill.planning.machine import adapter_parameters, devices, training_flops
from distill.records import Example
from distill.storage.environment import environment, installed
from distill.storage.files import write_json
from distill.storage.progress import console, say
from distill.training import divergences, losses

NAMES = {  # of a shape's fields in a Qwen2's config
    "vocab": "vocab_size", "hidden": "hidden_size", "intermediate": "intermediate_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}  # fmt: skip
SIZES = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 64}
TINY = Shape(**SIZES, vocab=300, tied=True, context=1024, parameters=30_000)
LENGTHS = (256, 1024)  # of samples, in tokens
WARM = 3  # passes of a loss before the clock starts
CUDA = torch.cuda.is_available()


def gpu_name() -> str:
    """Return what is measured."""
    return torch.cuda.get_device_name() if CUDA else "CPU"


def peak_rate() -> float | None:
    """Return the GPU's operations a second in bfloat16, if configs/devices.yaml has it."""
    row = next((row for row in devices() if CUDA and row["match"] in gpu_name()), None)
    return row["tflops"] * 1e12 if row else None


def start_memory() -> int:
    """Begin to watch the GPU's memory; returns the bytes in use."""
    gc.collect()
    if not CUDA:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(before: int = 0) -> int | None:
    """Return the peak since `start_memory`, less what was in use; None on a CPU."""
    return torch.cuda.max_memory_allocated() - before if CUDA else None


def gibibytes(value: int | None) -> str:
    """Write bytes."""
    return "not known" if value is None else f"{value / 2**30:.2f}"


# Training


def save_model(folder: Path, shape: Shape) -> str:
    """Save a model of `shape` with random weights, and a tokenizer that TRL can load; returns its
    reference."""
    config = Qwen2Config(**{name: getattr(shape, own) for own, name in NAMES.items()})
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({"end": 0, "pad": 1}, unk_token="end"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="pad")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


def draw(shape: Shape, tokens: int, lengths: tuple[int, int], seed: int) -> list[Example]:
    """Draw samples of about `tokens` in all, the latter half of each supervised."""
    random, made = torch.Generator().manual_seed(seed), []
    while (left := tokens - sum(len(e.input_ids) for e in made)) > 0:
        length = min(int(torch.randint(*lengths, (1,), generator=random)), max(left, lengths[0]))
        ids = torch.randint(2, shape.vocab, (length,), generator=random).tolist()
        half = length // 2
        weights = (0.0,) * half + (1.0,) * (length - half)
        name = f"{seed}-{len(made)}"
        made.append(Example(id=name, response_id=name, input_ids=tuple(ids), weights=weights))
    return made


class Compiled(Ours):
    """Our loop with the MLPs and norms compiled, for rows of any length."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        for layer in self.student.decoder().layers:
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.compile(dynamic=True)


def training_sides(reference: str, asked: argparse.Namespace) -> dict[str, Callable[[], Side]]:
    """Return how each side is made."""
    own = (reference, asked.step_tokens, asked.micro_batch_tokens)
    sides: dict[str, Callable[[], Side]] = {"ours": partial(Ours, *own)}
    if asked.compile:
        sides["ours, compiled"] = partial(Compiled, *own)
    sides["plain, sorted"] = partial(plain, reference, True, asked.batch)
    if importlib.util.find_spec("trl"):
        sides["trl"] = partial(trl, reference, False, asked.batch)
        sides["trl packing"] = partial(trl, reference, True, max(1, asked.batch // 4))
    return sides


def train(asked: argparse.Namespace) -> dict[str, Any]:
    """Train every side on the same rounds; returns the raw figures."""
    shape = TINY if asked.tiny else shape_of(asked.model)
    lengths = (8, 32) if asked.tiny else LENGTHS
    rounds = [draw(shape, asked.step_tokens, lengths, seed) for seed in range(asked.repeats + 1)]
    adapter, needed = adapter_parameters(shape, RANK, "all-linear"), []
    for samples in rounds[1:]:
        halves = [(len(e.input_ids) - sum(e.weights), sum(e.weights)) for e in samples]
        needed.append(sum(training_flops(shape, adapter, p, a, False) for p, a in halves))
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make_side in training_sides(save_model(Path(folder), shape), asked).items():
            start_memory()
            rows = measure({name: make_side()}, rounds)[name]
            for row, flops in zip(rows, needed, strict=True):
                row["flops"] = flops / row["seconds"]
            found[name] = {"rounds": rows, "bytes": peak_memory()}
    console.print(training_table(found, asked))
    return {"shape": shape.model_dump(), "peak_rate": peak_rate(), "sides": found}


def training_table(found: dict[str, dict[str, Any]], asked: argparse.Namespace) -> Table:
    """Return rates, MFU, peaks and ratios."""
    shown = table(
        title("LoRA training", asked),
        *("side", ">real tokens/s", ">TFLOP/s", ">MFU", ">GiB at most", ">ours is"),
    )
    middle = {
        name: statistics.median(row["rate"] for row in side["rounds"])
        for name, side in found.items()
    }
    peak = peak_rate()
    for name, side in found.items():
        flops = [row["flops"] for row in side["rounds"]]
        used = f"{statistics.median(flops) / peak:.1%}" if peak else "not known"
        shown.add_row(
            name,
            spread([row["rate"] for row in side["rounds"]], ",.0f"),
            f"{statistics.median(flops) / 1e12:.3g}",
            used,
            gibibytes(side["bytes"]),
            f"{middle['ours'] / middle[name]:.2f} times",
        )
    return shown


def title(what: str, asked: argparse.Namespace) -> str:
    """Return a table's title, which says where it was measured and when it means nothing."""
    return f"{what}, {gpu_name()}" + (" (tiny: these figures mean nothing)" if asked.tiny else "")


# Losses


def liger(problem: Problem, beta: float) -> Pass:
    """Return Liger's fused loss, which at beta 0 is the forward KL; its gradient of the head is
    made in any case."""
    from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearJSDLoss,
    )

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    labels = torch.where(problem.counts_S, problem.targets_S, -100)
    heads = (problem.teacher_SE, problem.teacher_VE)
    return lambda: loss(problem.hidden_SD, problem.head_VD, *heads, labels)


LIGER = {"Liger, kl": partial(liger, beta=0), "Liger, jsd": partial(liger, beta=0.5)}


@contextmanager
def compiled() -> Iterator[None]:
    """Compile what turns logits into values and slopes."""
    before = divergences.Mixture.diverge, losses.score_tokens, divergences.score_tokens
    divergences.Mixture.diverge = torch.compile(before[0], dynamic=True)
    losses.score_tokens = divergences.score_tokens = torch.compile(before[1], dynamic=True)
    try:
        yield
    finally:
        divergences.Mixture.diverge, losses.score_tokens, divergences.score_tokens = before


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that work takes, on a GPU by its own events."""
    if not CUDA:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def time_loss(side: Callable[[Problem], Pass], heads: Heads, repeats: int) -> dict[str, Any] | None:
    """Return a side's loss, times and memory; None where the GPU's memory is not enough."""
    try:
        with torch.device("cuda" if CUDA else "cpu"):
            problem = make(heads, half=False)
            run = side(problem)

            def both() -> torch.Tensor:
                problem.hidden_SD.grad = None
                loss = run()
                loss.backward()
                return loss.detach()

            value = [both() for _ in range(WARM)][-1].item()
            before = start_memory()
            both()
            extra = peak_memory(before)
            seconds = [timed(both) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        return None
    return {"loss": value, "bytes": extra, "seconds": seconds}


def loss_sides() -> dict[str, Callable[[Problem], Pass]]:
    """Return the sides that are installed."""
    others = {"trl": TRL_LOSSES, "liger_kernel": LIGER}
    found = [sides for name, sides in others.items() if importlib.util.find_spec(name)]
    return {name: side for sides in (OURS, *found) for name, side in sides.items()}


def at_heads(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure every loss, ours with its arithmetic compiled too; returns the raw figures."""
    heads = Heads(16, 512, 32, 48) if asked.tiny else Heads(asked.tokens)
    found: dict[str, dict[str, Any]] = {}
    for name, side in loss_sides().items():
        if row := time_loss(side, heads, asked.repeats):
            found[name] = row
        if row and asked.compile and name in OURS:
            with compiled():
                row["compiled"] = time_loss(side, heads, asked.repeats)
        say(f"{name}: {row or 'out of memory'}")
    console.print(loss_table(found, asked))
    return {"heads": heads._asdict(), "sides": found}


def loss_table(found: dict[str, dict[str, Any]], asked: argparse.Namespace) -> Table:
    """Return losses, times, memory, and how many times as long as ours each takes."""
    shown = table(
        title("loss at both heads", asked),
        *("side", ">nats", ">ms", ">ms compiled", ">GiB", ">live is", ">cached is"),
    )
    for name, row in found.items():
        kind, other = name.rpartition(", ")[2], row.get("compiled")
        middle = statistics.median(row["seconds"])
        shown.add_row(
            name,
            f"{row['loss']:.4f}",
            spread([1000 * s for s in row["seconds"]], ".2f"),
            spread([1000 * s for s in other["seconds"]], ".2f") if other else "",
            gibibytes(row["bytes"]),
            *(
                f"{middle / statistics.median(found[own]['seconds']):.2f} times"
                if own in found
                else ""
                for own in (f"live, {kind}", "cached, kl")
            ),
        )
    return shown


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = made.add_subparsers(required=True)
    for name, mode in (("train", train), ("losses", at_heads)):
        own = modes.add_parser(name, help=(mode.__doc__ or "").split(";")[0])
        own.set_defaults(mode=mode)
        own.add_argument("--repeats", type=int, default=20)
        own.add_argument("--compile", action=argparse.BooleanOptionalAction, default=CUDA)
        own.add_argument("--tiny", action="store_true", help="a tiny model, without a GPU too")
        own.add_argument("--json", type=Path)
    own = modes.choices["train"]
    own.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct")
    own.add_argument("--step-tokens", type=int, default=16384)
    own.add_argument("--micro-batch-tokens", type=int, default=8192)
    own.add_argument("--batch", type=int, default=8, help="samples of a batch of the other sides")
    modes.choices["losses"].add_argument("--tokens", type=int, default=4096)
    return made


def work(asked: argparse.Namespace) -> None:
    """Measure, and store the result; raises DistillError (exit 7) where there is no GPU."""
    if not (CUDA or asked.tiny):
        fix = "run it where there is one, or try it with --tiny"
        raise DistillError(Exit.TRAINING, Path(__file__).name, "needs a GPU with CUDA", fix)
    quiet()
    torch.set_flush_denormal(True)
    found = asked.mode(asked)
    if asked.json:
        others = {name: installed(name) for name in ("trl", "liger-kernel")}
        settings = {name: value for name, value in vars(asked).items() if name != "mode"}
        facts = {"environment": environment(), "gpu": gpu_name(), "others": others}
        write_json(asked.json, {**facts, "settings": settings | {"json": str(asked.json)}, **found})


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and measure; returns the exit code."""
    asked = parser().parse_args(arguments)
    return exit_code(lambda: work(asked))


if __name__ == "__main__":
    sys.exit(main())
