"""Where every number of the scorecard comes from: of each part the stages and files, with hashes.

The table stands in the manifest under `sources`, as `part -> stage -> file -> SHA-256`.
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
SOURCES: dict[str, Files] = {  # a part of the scorecard that is not listed here fails a test
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
    """Return the hashes of a run's files by part and stage; missing files are left out."""
    names = {n for stages in SOURCES.values() for files in stages.values() for n in files}
    hashes = {name: sha256_files(folder, [name]) for name in names}
    return {
        part: {
            stage: row
            for stage, files in stages.items()
            if (row := {k: v for name in files for k, v in hashes[name].items()})
        }
        for part, stages in SOURCES.items()
    }
