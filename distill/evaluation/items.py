"""The held-out items: the one place that reads `dataset/heldout.jsonl`."""

from collections.abc import Sequence
from pathlib import Path

from distill.errors import DistillError, Exit
from distill.records import Document, Item, Pair, Response
from distill.storage.files import read_records
from distill.storage.run_folder import Run


def held_out(path: Path) -> list[Pair]:
    """Read the held-out pairs, one a prompt; raises DistillError (exit 8) where there are none."""
    pairs: dict[str, Pair] = {}
    for pair in read_records(path, Pair):
        pairs.setdefault(pair.prompt.id, pair)
    if not pairs:
        fix = "raise corpus.split.heldout or prompts.heldout"
        raise DistillError(Exit.EVALUATION, path, "no held-out items", fix)
    return list(pairs.values())


def items_of(pairs: Sequence[Pair], documents: Path) -> list[Item]:
    """Make the items; chunks of one original document are one cluster."""
    known = read_records(documents, Document) if documents.exists() else []
    parent = {d.id: str(d.meta.get("parent") or d.id) for d in known}
    items = [Item.make(pair.prompt) for pair in pairs]
    return [i.model_copy(update={"cluster": parent.get(i.cluster, i.cluster)}) for i in items]


def held_out_items(run: Run) -> tuple[list[Pair], list[Item]]:
    """Return the held-out pairs and their items, in one order."""
    pairs = held_out(run.path("dataset/heldout.jsonl"))
    return pairs, items_of(pairs, run.path("documents.jsonl"))


def by_item(items: Sequence[Item], responses: Sequence[Response]) -> dict[str, Response]:
    """Index answers, given in the order of the items, by item."""
    return {item.id: response for item, response in zip(items, responses, strict=True)}
