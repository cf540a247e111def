"""Hand the student to EleutherAI's lm-eval: `distill evaluate RUN --lm-eval TASKS`.

lm-eval is an extra (`pip install 'distill[eval]'`). It gets the merged student and the model's own
chat template. Its results are in `lm_eval.json` and on the scorecard as those of another harness:
they are not paired with ours, and their standard errors are lm-eval's.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.errors import DistillError, Exit
from distill.evaluation.scorecard import HarnessMetric, HarnessResult, HarnessTask
from distill.storage.files import write_json
from distill.storage.run_folder import Run, require_made

FILE = "lm_eval.json"
ERRORS = (KeyError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def main(run: Run, tasks: str, limit: int | None, include: Path | None) -> HarnessResult:
    """Measure the run's student on at most `limit` items of each task, and write `lm_eval.json`.

    `tasks` are names with commas between; `include` is a folder of further task files. Raises
    DistillError: exit 2 where lm-eval is not installed or no task is named, 5 where nothing is
    trained, 8 where it fails.
    """
    try:
        harness = import_module("lm_eval")
    except ImportError:
        fix = "pip install 'lm-eval[hf]>=0.4.13', or this package with its extra eval"
        raise DistillError(Exit.CONFIG, "--lm-eval", "lm-eval is not installed", fix) from None
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise DistillError(Exit.CONFIG, "--lm-eval", "names no task", "such as --lm-eval arc_easy")
    require_made(run.trained("adapter"), "train")
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from distill.evaluation.answering import student_responder

    with run.lock():
        responder, facts = student_responder(run, "student")
        try:
            model = HFLM(pretrained=responder.network, tokenizer=responder.tokenizer, batch_size=8)
            results = harness.simple_evaluate(
                model=model,
                tasks=names,
                limit=limit,
                apply_chat_template=True,
                task_manager=TaskManager(include_path=str(include.absolute()) if include else None),
                log_samples=False,
                bootstrap_iters=1000,
            )
        except ERRORS as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            fix = "lm-eval ls tasks names its tasks; most fetch their data from the Hub"
            raise DistillError(Exit.EVALUATION, "lm-eval", what, fix) from None
        result = HarnessResult(
            harness=f"lm-eval {version('lm_eval')}",
            adapter_sha256=facts.adapter_sha256,
            dtype=str(responder.network.dtype).removeprefix("torch."),
            chat_template=True,
            limit=limit,
            tasks=read_results(results or {"results": {}}),
        )
        write_json(run.path(FILE), result.tree())
    return result


def read_results(results: Mapping[str, Any]) -> dict[str, HarnessTask]:
    """Return each task's version, number of items, and metrics with their standard errors.

    lm-eval names a metric `acc,none` and its error `acc_stderr,none`; the second word is the filter
    of the answer. An error of 0 is no certainty, and is read as None.
    """
    counts, versions, tasks = results.get("n-samples", {}), results.get("versions", {}), {}
    for task, row in results["results"].items():
        metrics = {}
        for key, value in row.items():
            name, comma, how = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, int | float):
                error = row.get(f"{name}_stderr,{how}")
                stderr = error if isinstance(error, int | float) and error > 0 else None
                label = name if how == "none" else f"{name} ({how})"
                metrics[label] = HarnessMetric(value=value, stderr=stderr)
        n = counts.get(task, {}).get("effective")
        tasks[task] = HarnessTask(version=versions.get(task), n=n, metrics=metrics)
    return tasks
