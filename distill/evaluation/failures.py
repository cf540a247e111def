"""Where the student fails: its worst answers, as the model card shows them, cut short.

They hold text of documents, which is masked before a prompt is made. Where the corpus is used as it is
(`corpus.private_text: keep`), nothing of them goes into what is published: neither here nor into the report.
"""

from collections.abc import Iterable, Mapping
from typing import Any

MOST = 3
LONGEST = 400  # characters of a text
WITHHELD = "corpus.private_text is keep: samples could hold private text, so they are left out"
NONE = "every worst sample passes its check"


def withheld(private_text: str) -> bool:
    """Tell whether samples must stay out of what is published."""
    return private_text == "keep"


def bare(tree: Any) -> Any:
    """Return a tree without what may quote documents: examples of what was found, and reasons of failed checks."""
    if not isinstance(tree, Mapping):
        return tree
    return {k: bare(v) for k, v in tree.items() if k not in ("examples", "failures")}


def failures(samples: Iterable[Mapping[str, Any]], private_text: str) -> dict[str, Any]:
    """Return at most three of the student's worst answers, one a task; those that fail their check come first."""
    if withheld(private_text):
        return {"worst": [], "reason": WITHHELD}
    worst = [s for s in samples if s["rank"] == "worst" and _fails(s)]
    worst.sort(key=lambda sample: sample["metric"] == "chrF")
    found = [_short(sample) for sample in worst[:MOST]]
    return {"worst": found} if found else {"worst": [], "reason": NONE}


def _fails(sample: Mapping[str, Any]) -> bool:
    value = sample["scores"].get("student")
    return value is not None and (value < 1 or sample["metric"] == "chrF")


def _short(sample: Mapping[str, Any]) -> dict[str, Any]:
    metric, value = sample["metric"], sample["scores"]["student"]
    reason = f"chrF {value:.0f} against the teacher" if metric == "chrF" else None
    return {
        "task": sample["task"],
        "asked": cut(sample["messages"][-1]["content"]),
        "student": cut(sample["answers"].get("student", "")),
        "teacher": cut(sample["answers"].get("teacher", "")),
        "reason": reason or sample["reasons"]["student"],
    }


def cut(text: str) -> str:
    """Cut a text that is too long, and say so."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} […]"
