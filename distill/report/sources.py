"""Where every number of the scorecard comes from: for each of its parts the stages and the files, with their hashes.

The table stands in the manifest under `sources`, as `part -> stage -> file -> SHA-256`. A part that nobody listed here
fails a test.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.evaluation.lm_eval import FILE
from distill.storage.files import sha256_files

Files = Mapping[str, Sequence[str]]  # stage -> files and folders

ITEMS: Files = {
    "corpus": ("documents.jsonl",),
    "prompts": ("tasks.json",),
    "filter": ("dataset/heldout.jsonl",),
}
QUALITY: Files = {**ITEMS, "evaluate": ("answers", "scores", "evaluation.json")}
MONEY: Files = {
    "generate": ("responses.jsonl",),
    "evaluate": ("requests.jsonl", "timings", "evaluation.json"),
    "report": ("prices.json",),
    "all": ("ledger.jsonl",),  # as it was when the report began
}
SOURCES: dict[str, Files] = {
    "name": {},
    "models": {
        "train": ("adapter",),
        "refine": ("refined/adapter",),
        "evaluate": ("answers/models.json",),
    },
    **dict.fromkeys(("tasks", "overall", "agreement", "lengths", "suites", "failures"), QUALITY),
    "judge": {**ITEMS, "evaluate": ("answers", "evaluation.json")},
    "contamination": {
        **QUALITY,
        "filter": ("dataset/train.jsonl", "dataset/validation.jsonl", "dataset/heldout.jsonl"),
    },
    "external": {"evaluate --lm-eval": (FILE,)},
    "cost": MONEY,
    "economics": MONEY,
    "corpus": {"corpus": ("documents.jsonl", "rejects.jsonl")},
    "funnel": {"filter": ("funnel.json",)},
    "training": {"train": ("training.json",), "refine": ("refined/training.json",)},
    "environment": {"evaluate": ("evaluation.json",)},
    "reasons": {},  # beside what they explain
}


def sources(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Return the table of a run's folder; what a run does not have is left out."""
    known: dict[str, dict[str, str]] = {}

    def hashes(name: str) -> dict[str, str]:
        if name not in known:
            known[name] = sha256_files(folder, [name])
        return known[name]

    found = {}
    for part, stages in SOURCES.items():
        rows = {
            s: {k: v for n in names for k, v in hashes(n).items()} for s, names in stages.items()
        }
        found[part] = {stage: files for stage, files in rows.items() if files}
    return found
