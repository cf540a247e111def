"""Measure on a GPU how near training is to the hardware's limit, beside plain PEFT, TRL and Liger.

    python scripts/benchmarks/benchmark_gpu.py --json gpu.json
    python scripts/benchmarks/benchmark_gpu.py train --sizes 1.5B --repeats 20
    python scripts/benchmarks/benchmark_gpu.py --device cpu      # tiny: shows that the script works

It needs torch, transformers and PEFT, and none of distill's other libraries, so that it runs on a
machine that has no more. TRL, Liger and bitsandbytes are measured where they are installed. Models
have the shapes of real ones and random weights, for speed does not depend on them; nothing is
downloaded.

train: LoRA (r 32, alpha 64, all-linear) in the GPU's own type on samples of random tokens, half of
each supervised: the adapter, the student and the steps of `distill train`, with micro-batches as
large as memory holds. A round is one step; the first of each side warms it up. MFU is what the real
tokens need (4 operations a frozen weight, the head at supervised positions only, attention; padding
counts for nothing) over the time and the GPU's dense rate in configs/devices.yaml. Beside the peak
of memory stands what `distill plan` predicts, its share for CUDA itself left out. `plain` pads
batches of similar length; TRL's SFTTrainer has no gradient checkpointing. A side is alone on the
GPU. losses: forward and backward at both heads in bfloat16, the student's frozen; memory is what a
pass adds. JSD has beta 0.5.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from benchmark_losses import OURS, Pass, Problem, make
from benchmark_losses import TRL as TRL_LOSSES
from benchmark_losses import Shape as Heads
from benchmark_train import RANK, Ours, Side, measure, plain, trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from distill.errors import DistillError, Exit, exit_code
from distill.models.arithmetic import LoraTraining, adapter_parameters, training_flops
from distill.models.devices import Gpu, device, find_gpu, pick_dtype, release_memory
from distill.storage.environment import environment, installed
from distill.training.batches import Example

DEVICES = Path(__file__).resolve().parents[2] / "configs/devices.yaml"


def _config(kind: type[PreTrainedConfig], sizes: Sequence[int], tied: bool) -> PreTrainedConfig:
    """Return a model's config by layers, hidden, heads, key heads, intermediate, vocabulary."""
    names = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads"
    keys = f"{names} intermediate_size vocab_size".split()
    settings: dict[str, Any] = dict(zip(keys, sizes, strict=True))
    settings |= {"max_position_embeddings": 8192, "tie_word_embeddings": tied}
    return kind(**settings)


SIZES = {  # shapes of SmolLM2-135M and of Qwen2.5
    "135M": _config(LlamaConfig, (30, 576, 9, 3, 1536, 49_152), True),
    "0.5B": _config(Qwen2Config, (24, 896, 14, 2, 4864, 151_936), True),
    "1.5B": _config(Qwen2Config, (28, 1536, 12, 2, 8960, 151_936), True),
    "7B, 4 bit": _config(Qwen2Config, (28, 3584, 28, 4, 18_944, 152_064), False),
}
TINY = _config(Qwen2Config, (2, 32, 4, 2, 64, 300), True)
LENGTHS = (256, 1024)  # of samples, in tokens
WARM = 3  # passes of a loss before the clock starts


def shape_of(config: Any) -> Any:
    """Return a config's sizes under the names that `distill.models.arithmetic` reads."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters, tied = sum(p.numel() for p in model.parameters()), config.tie_word_embeddings
    head = config.vocab_size * config.hidden_size
    return SimpleNamespace(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        parameters=parameters,
        head=head,
        body=parameters - head * (1 if tied else 2),
    )


def make_model(config: Any, four_bit: bool) -> Any:
    """Return a model with random weights on the device, in its own type or in 4 bits."""
    torch.manual_seed(0)
    with torch.device(device()):
        # of a copy: a side writes its kind of attention into its model's config
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=pick_dtype())
    if four_bit:
        quantise(model)
    return model.eval()


def quantise(model: Any) -> None:
    """Put NF4 modules, doubly quantised, in place of the layers' linear ones, as QLoRA has them."""
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    layers: nn.Module = model.model.layers
    for name, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            sizes, bias = (module.in_features, module.out_features), module.bias
            packed = bitsandbytes.nn.Linear4bit(
                *sizes, bias is not None, pick_dtype(), True, "nf4", device="meta"
            )
            weight = bitsandbytes.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
            packed.weight, packed.bias = weight.to(module.weight.device), bias
            layers.set_submodule(name, packed)
    model.is_loaded_in_4bit = True


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that TRL can work with; it is never asked for a text."""
    words = Tokenizer(WordLevel({"end": 0, "pad": 1}, unk_token="end"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="pad")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def sample(vocabulary: int, tokens: int, lengths: tuple[int, int], seed: int) -> list[Example]:
    """Draw samples of about `tokens` in all, the latter half of each supervised."""
    random, examples = torch.Generator().manual_seed(seed), list[Example]()
    while (left := tokens - sum(len(e.input_ids) for e in examples)) > 0:
        length = min(int(torch.randint(*lengths, (1,), generator=random)), max(left, lengths[0]))
        ids = torch.randint(2, vocabulary, (length,), generator=random).tolist()
        half, name = length // 2, f"{seed}-{len(examples)}"
        weights = (0.0,) * half + (1.0,) * (length - half)
        examples.append(Example(name, name, tuple(ids), weights))
    return examples


def gpu() -> tuple[str, int | None, Gpu | None]:
    """Return what is measured, its bytes of memory, and its row of configs/devices.yaml."""
    if device().type == "cpu":
        return "CPU", None, None
    facts = torch.cuda.get_device_properties(device())
    rows = [Gpu(**row) for row in yaml.safe_load(DEVICES.read_text())]
    return facts.name, facts.total_memory, find_gpu(facts.name, facts.total_memory, rows)


def start_memory() -> int:
    """Begin to watch the GPU's memory; return the bytes in use."""
    release_memory()
    if device().type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(before: int = 0) -> int | None:
    """Return the peak since `start_memory`, less what was in use; None on a CPU."""
    return None if device().type == "cpu" else torch.cuda.max_memory_allocated() - before


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train every size on every side, on the same rounds; return the raw figures."""
    name, memory, row = gpu()
    lengths = LENGTHS if memory else (8, 32)
    results: dict[str, Any] = {}
    for size in options.sizes:
        config: Any = SIZES[size] if memory else TINY
        four_bit, shape = "4 bit" in size and memory is not None, shape_of(config)
        if four_bit and installed("bitsandbytes") is None:
            print(f"{size}: needs bitsandbytes, and is left out", file=sys.stderr)
            continue
        rounds = [
            sample(shape.vocab, options.step_tokens, lengths, seed)
            for seed in range(options.repeats + 1)
        ]
        kind, width = device().type, pick_dtype().itemsize
        plan = LoraTraining(shape, RANK, kind=kind, width=width, four_bit=four_bit)
        limit = plan.micro_batch(memory or 0, options.step_tokens)
        parts = plan.parts(min(limit, options.step_tokens))
        predicted = sum(value for part, value in parts.items() if part != "CUDA")
        adapter, needed = adapter_parameters(shape, RANK, "all-linear"), list[float]()
        for samples in rounds[1:]:
            halves = [(len(e.input_ids) - sum(e.weights), sum(e.weights)) for e in samples]
            needed.append(sum(training_flops(shape, adapter, p, a, False) for p, a in halves))
        model = partial(make_model, config, four_bit)
        sides: dict[str, Callable[[], Side]] = {
            "ours": lambda m=model, limit=limit: Ours(m(), options.step_tokens, limit),
            "plain": lambda m=model: plain(m(), True, options.batch),
        }
        if importlib.util.find_spec("trl"):
            batches = {"trl": options.batch, "trl packing": max(1, options.batch // 4)}
            for side, batch in batches.items():
                packing = side == "trl packing"
                sides[side] = partial(trl, model, make_tokenizer(), packing, batch)
        figures: dict[str, Any] = {}
        for side, make_side in sides.items():
            try:
                trained = make_side()
                start_memory()  # the model may have been larger while it was made
                measured = measure({side: trained}, rounds)[side]
            except torch.OutOfMemoryError:
                measured = []  # its frames hold memory until this block ends
            for figure, flops in zip(measured, needed, strict=False):
                figure["flops"] = flops / figure["seconds"]
            figures[side] = {"rounds": measured, "bytes": peak_memory() if measured else None}
            trained = None
            gc.collect()
        facts = {"limit": limit, "predicted": predicted, "parts": parts, "sides": figures}
        results[size] = {"parameters": shape.parameters, **facts}
    rate = row.tflops * 1e12 if row else None
    heads = "size side tokens/s (range) TFLOP/s MFU GiB GiB,planned ours,times".split()
    print_table(f"LoRA training, {name}", heads, training_rows(results, rate))
    return {"peak_rate": rate, "sizes": results}


def training_rows(results: dict[str, Any], rate: float | None) -> Iterable[list[str]]:
    """Yield what each side reached: rates, MFU, peaks, how many times as fast ours is."""
    for size, result in results.items():
        sides = result["sides"]
        for side, figures in sides.items():
            if not (rounds := figures["rounds"]):
                yield [size, side, "out of memory", *[""] * 6]
                continue
            rates, flops = ([row[key] for row in rounds] for key in ("rate", "flops"))
            middle = statistics.median(rates)
            yield [
                *(size, side, f"{middle:,.0f}", f"({min(rates):,.0f} to {max(rates):,.0f})"),
                f"{statistics.median(flops) / 1e12:.3g}",
                f"{statistics.median(flops) / rate:.1%}" if rate else "not known",
                gibibytes(figures["bytes"]),
                f"{result['predicted'] / 2**30:.2f}" if side == "ours" else "",
                ratio([row["rate"] for row in sides["ours"]["rounds"]], middle),
            ]


def ratio(values: Sequence[float], other: float) -> str:
    """Return how many times as large the median of some values is."""
    return f"{statistics.median(values) / other:.2f}" if values else ""


def gibibytes(value: int | None) -> str:
    """Write bytes."""
    return "not known" if value is None else f"{value / 2**30:.2f}"


def liger(problem: Problem, beta: float) -> Pass:
    """Return Liger's fused loss, at beta 0 the forward KL; it makes the head's gradient too."""
    from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearJSDLoss,
    )

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    labels = torch.where(problem.counts_S, problem.targets_S, -100)
    heads = (problem.teacher_SE, problem.teacher_VE)
    return lambda: loss(problem.hidden_SD, problem.head_VD, *heads, labels)


LIGER = {"Liger, kl": partial(liger, beta=0), "Liger, jsd": partial(liger, beta=0.5)}


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that work takes, on a GPU by its own events."""
    if device().type == "cpu":
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
        with torch.device(device()):  # which the loss itself must not have as its default
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
        return {"loss": value, "bytes": extra, "seconds": [timed(both) for _ in range(repeats)]}
    except torch.OutOfMemoryError:
        return None


def losses(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every loss that is installed; return the raw figures."""
    name, memory, _ = gpu()
    heads = Heads(options.tokens) if memory else Heads(16, 512, 32, 48)
    others = {"trl": TRL_LOSSES, "liger_kernel": LIGER}
    there = [sides for library, sides in others.items() if importlib.util.find_spec(library)]
    results, rows = dict[str, Any](), list[list[str]]()
    for side, loss in [item for sides in (OURS, *there) for item in sides.items()]:
        results[side] = row = time_loss(loss, heads, options.repeats)
        if row is None:
            rows.append([side, "out of memory", "", "", ""])
            continue
        live = results.get(f"live, {side.rpartition(', ')[2]}") or row
        middle = statistics.median(row["seconds"])
        times = f"{middle / statistics.median(live['seconds']):.2f}"
        cells = [f"{row['loss']:.4f}", f"{1000 * middle:.2f}", gibibytes(row["bytes"]), times]
        rows.append([side, *cells])
    print_table(f"loss at both heads, {name}", "side nats ms GiB ours,times".split(), rows)
    return {"heads": heads._asdict(), "sides": results}


def print_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns."""
    lines = [[head.replace(",", ", ") for head in heads], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    tiny = " (tiny: these figures mean nothing)" if device().type == "cpu" else ""
    print(f"\n{title}{tiny}", file=sys.stderr)
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  ".join(cell.rjust(width) for cell, width in cells), file=sys.stderr)


MODES = {"train": train, "losses": losses}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and measure; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modes", nargs="*", metavar="MODE", help="train, losses; both by default")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="all by default")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--step-tokens", type=int, default=16_384)
    parser.add_argument("--batch", type=int, default=8, help="samples of a batch of other sides")
    parser.add_argument("--tokens", type=int, default=4096, help="positions of a loss")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    def work() -> None:
        cpu = device().type == "cpu"
        if cpu and options.device == "cuda":
            fix = "run it where there is one, or try it with --device cpu"
            raise DistillError(Exit.TRAINING, Path(__file__).name, "needs a GPU", fix)
        if not cpu and options.device == "cpu":
            fix = "CUDA_VISIBLE_DEVICES= hides the GPU"
            raise DistillError(Exit.CONFIG, "--device cpu", "a GPU is visible", fix)
        options.sizes = options.sizes or (["135M"] if cpu else list(SIZES))
        if cpu:
            options.step_tokens = min(options.step_tokens, 100)
        torch.set_flush_denormal(True)
        results = {mode: MODES[mode](options) for mode in options.modes or MODES}
        if options.json:
            others = {name: installed(name) for name in ("trl", "liger-kernel", "bitsandbytes")}
            facts = {"environment": environment(), "gpu": gpu()[0], "others": others}
            settings = {key: value for key, value in vars(options).items() if key != "json"}
            text = json.dumps({**facts, "settings": settings, **results}, indent=2)
            options.json.write_text(text + "\n", encoding="utf-8")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
