"""Two processes that believe to have different GPUs; each writes what it prepares to RANK.json.

`accelerate launch --multi_gpu --num_processes 2 tests/support/two_gpus.py FOLDER`
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from distill.errors import DistillError
from distill.training import prepare, processes
from tests.support.training import make_run

BYTES = (3 * 10**9, 10**9)
TYPES = (torch.bfloat16, torch.float32)


def main(folder: Path) -> None:
    """Write the micro-batch, the facts, and the errors where they cannot compute alike."""
    rank, run = int(os.environ["RANK"]), make_run(folder, tokens_per_step=200_000)
    accelerator, loading = processes.start("none", None, folder), cast("Any", prepare.loading)
    prepare.processor = lambda: f"CPU {rank}"
    parts = prepare.Preparation(run, 2)
    report: dict[str, Any] = {"facts": parts.facts, "errors": []}
    make, pick, device = prepare.make_student, loading.pick_dtype, loading.device

    # the student stays where it is
    loading.device = lambda: torch.device("cuda", rank)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=BYTES[rank])
    report["alone"] = prepare.micro_batch_tokens(run.config, parts.model)
    report["limit"] = prepare.micro_batch_tokens(run.config, parts.model, 2)
    loading.device = device

    auto = make_run(folder, bf16="auto")
    loading.pick_dtype = lambda name="auto": TYPES[rank]
    report["errors"].append(error_of(auto))
    loading.pick_dtype = pick
    prepare.make_student = lambda model, packing, fused: make(model, rank == 0)
    report["errors"].append(error_of(run))
    (folder / f"{rank}.json").write_text(json.dumps(report))
    accelerator.end_training()


def error_of(run: Any) -> str:
    """Return the error of a preparation."""
    try:
        prepare.Preparation(run, 2)
    except DistillError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
