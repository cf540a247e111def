"""What of the items stands in the training data, and what the scores are without them.

The headline is measured on the items that were not found; the same with all of them stands beside it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from distill.corpus.contamination import KINDS, NOT_FOUND, Match, flag_training, of_item
from distill.errors import DistillError, Exit
from distill.evaluation import results
from distill.evaluation.measurements import Contamination
from distill.evaluation.results import Measured
from distill.evaluation.statistics import Certainty, estimate_mean
from distill.evaluation.suites import Suite
from distill.records import Document, Item, Pair
from distill.storage.files import read_records
from distill.storage.run_folder import Run

SHOWN = 5  # examples in evaluation.json
T = TypeVar("T")


@dataclass(frozen=True)
class Leaks:
    """Where items were found, by item id; and those that have no words of their own, so that none could be found."""

    matches: Mapping[str, Sequence[Match]]
    unsearchable: Collection[str]

    def __contains__(self, item: str) -> bool:
        return item in self.matches


def find_leaks(run: Run, items: Sequence[Item], suites: Sequence[Suite] = ()) -> Leaks:
    """Look for the items, and those of suites, in the documents, prompts and answers that are not held out."""
    known = [run.path(f"dataset/{split}.jsonl") for split in ("train", "validation")]
    pairs = [pair for path in known if path.exists() for pair in read_records(path, Pair)]
    path = run.path("documents.jsonl")
    documents = read_records(path, Document) if path.exists() else []
    looked_for = [of_item(item) for item in items]
    for part in (part for suite in suites for part in suite.parts):
        looked_for += [of_item(item, part.task.student.user) for item in part.items]
    return Leaks(*flag_training(looked_for, documents, pairs))


def refuse_all_leaked(items: Sequence[Item], leaks: Leaks) -> None:
    """Raise DistillError (exit 8) where no item is left that was not found."""
    if items and all(item.id in leaks for item in items):
        what = f"all {len(items)} held-out items stand in the training data"
        fix = "--redo corpus, which leaves documents with their text out"
        raise DistillError(Exit.EVALUATION, "contamination", what, fix)


def without(rows: Mapping[str, Measured], leaks: Leaks) -> dict[str, Measured]:
    """Return the rows on the items that were not found; a task without any is left out."""
    clean = {}
    for task, row in rows.items():
        items = tuple(item for item in row.items if item.id not in leaks)
        scores = {
            model: [score for score in of_model if score.item_id not in leaks]
            for model, of_model in row.scores.items()
        }
        if items:
            clean[task] = replace(row, items=items, scores=scores)
    return clean


def contamination(
    items: Sequence[Item], leaks: Leaks, rows: Mapping[str, Measured], certainty: Certainty
) -> Contamination:
    """Return how many items stand in the training data, by kind, examples, and the results on all items."""
    flagged = {item.id: leaks.matches[item.id] for item in items if item.id in leaks}
    share = [float(item.id in flagged) for item in items]
    rate = estimate_mean(share, [item.cluster for item in items], certainty, results.SHARE)
    matches = [match for of_item in flagged.values() for match in of_item]
    return Contamination(
        n=len(items),
        flagged=len(flagged),
        unsearchable=sum(item.id in leaks.unsearchable for item in items),
        kinds={kind: sum(match.kind == kind for match in matches) for kind in KINDS},
        rate=results.difference_of(rate),
        items=tuple(sorted(flagged)),
        examples=tuple(match._asdict() for match in matches[:SHOWN]),
        method=NOT_FOUND,
        all_items=results.results_of(rows, certainty) if flagged else None,
    )


def kept(items: Sequence[Item], values: Iterable[T], leaks: Leaks) -> list[T]:
    """Return those of the values, given in the order of the items, whose item was not found."""
    return [value for item, value in zip(items, values, strict=True) if item.id not in leaks]
