"""Hand the student to EleutherAI's lm-eval and read its results back: `distill evaluate RUN --lm-eval TASKS`.

lm-eval is an extra (`pip install 'distill[eval]'`). It gets the merged student, as evaluation does, and the model's
own chat template. What it finds stands in `lm_eval.json` and on the scorecard as results of another harness: they
are not paired with ours, and their standard errors are lm-eval's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.errors import DistillError, Exit
from distill.evaluation.scorecard import HarnessMetric, HarnessResult, HarnessTask
from distill.formatting import count, figure
from distill.storage.files import read_json, write_json
from distill.storage.run_folder import Run

FILE = "lm_eval.json"
FAULTS = (KeyError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Order:
    """What lm-eval is to do: its tasks, at most `limit` items of each, and a folder of further task files."""

    tasks: tuple[str, ...]
    limit: int | None = None
    include: Path | None = None


def main(config: Config, run: Run, order: Order) -> HarnessResult:
    """Measure the run's student, write `lm_eval.json` and return it.

    Raises DistillError: exit 2 where lm-eval is not installed or nothing is asked of it, 5 where nothing is trained,
    8 where it fails.
    """
    harness = _installed()
    if not order.tasks:
        raise DistillError(Exit.CONFIG, "--lm-eval", "names no task", "such as --lm-eval arc_easy")
    if not run.trained("adapter").is_dir():
        fix = "make it: distill train CONFIG"
        raise DistillError(Exit.STATE, run.trained("adapter"), "is missing", fix)
    from distill.evaluation.answering import student_responder

    responder, told = student_responder(config, run, "student")
    found = _measured(harness, responder.network, responder.tokenizer, order)
    result = HarnessResult(
        harness=f"lm-eval {version('lm_eval')}",
        adapter_sha256=told["adapter_sha256"],
        dtype=str(responder.network.dtype).removeprefix("torch."),
        chat_template=True,
        limit=order.limit,
        tasks=read_results(found),
    )
    write_json(run.path(FILE), result.tree())
    return result


def _installed() -> Any:
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
    except ImportError:
        fix = "pip install 'lm-eval[hf]>=0.4.13', or this package with its extra eval"
        raise DistillError(Exit.CONFIG, "--lm-eval", "lm-eval is not installed", fix) from None
    return lm_eval


def _measured(harness: Any, network: Any, tokenizer: Any, order: Order) -> Mapping[str, Any]:
    """Run lm-eval on a loaded model; its faults become one line."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    include = str(order.include.absolute()) if order.include else None
    try:
        found = harness.simple_evaluate(
            model=HFLM(pretrained=network, tokenizer=tokenizer, batch_size=8),
            tasks=list(order.tasks),
            limit=order.limit,
            apply_chat_template=True,
            task_manager=TaskManager(include_path=include),
            log_samples=False,
            bootstrap_iters=1000,
        )
    except FAULTS as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fix = "lm-eval ls tasks names its tasks; most fetch their data from the Hub"
        raise DistillError(Exit.EVALUATION, "lm-eval", what, fix) from None
    return found or {"results": {}}


def read_results(found: Mapping[str, Any]) -> dict[str, HarnessTask]:
    """Return each task's version, number of items, and metrics with value and standard error (None where it has none).

    lm-eval names a metric `acc,none` and its error `acc_stderr,none`, the second word being the answer's filter.
    """
    counts, versions = found.get("n-samples", {}), found.get("versions", {})
    return {
        task: HarnessTask(
            version=versions.get(task),
            n=counts.get(task, {}).get("effective"),
            metrics=dict(_metrics(row)),
        )
        for task, row in found["results"].items()
    }


def _metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, HarnessMetric]]:
    for key, value in row.items():
        name, comma, how = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{name}_stderr,{how}")
        known = error if isinstance(error, int | float) and error > 0 else None  # 0 is no certainty
        label = name if how == "none" else f"{name} ({how})"
        yield label, HarnessMetric(value=value, stderr=known)


def of_this_student(run: Run, adapter_sha256: str | None) -> HarnessResult | None:
    """Return the results that lm-eval found for the evaluated adapter; those of another are not shown."""
    path = run.path(FILE)
    result = HarnessResult.model_validate(read_json(path)) if path.is_file() else None
    return result if result and result.adapter_sha256 == adapter_sha256 else None


def table_of(result: HarnessResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of a table of what another harness found."""
    head = (result.harness, "n", "metric", "student", "standard error")
    rows = [
        (task, count(found.n), metric, figure(row.value, 4), figure(row.stderr, 4))
        for task, found in result.tasks.items()
        for metric, row in found.metrics.items()
    ]
    return head, rows
