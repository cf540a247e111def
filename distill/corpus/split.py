"""Which documents are trained on, which choose the settings, and which are held out.

The place of a document follows from its content and the seed alone: with shares, new documents never move old ones;
with counts, the documents of the lowest hashes are taken.
"""

import hashlib

from distill.errors import DistillError, Exit
from distill.records import Split


def rank(identity: str, seed: int, salt: str = "") -> float:
    """Return a number in [0, 1) that depends on content and seed only."""
    key = hashlib.sha256(f"{seed} {salt} {identity}".encode()).digest()
    return int.from_bytes(key[:7], "big") / 2**56


def split(ids: list[str], seed: int, validation: float, heldout: float) -> dict[str, Split]:
    """Assign each id; sizes of 1 and more are counts, below 1 shares of all. At least one document is left to train.

    A share above 0 gets a document at least. Raises DistillError (exit 3) where there are too few documents.
    """
    splits: dict[str, Split] = dict.fromkeys(ids, "train")
    sizes: list[tuple[Split, float, float]] = [
        ("heldout", heldout, heldout),
        # of what heldout leaves, so that it is a share of all
        ("validation", validation, validation / (1 - heldout) if heldout < 1 else validation),
    ]
    for name, size, share in sizes:
        train = [identity for identity, current in splits.items() if current == "train"]
        ranks = {identity: rank(identity, seed, name) for identity in train}
        ranked = sorted(train, key=lambda identity: (ranks[identity], identity))
        below = sum(number < share for number in ranks.values())
        picked = ranked[: int(size) if size >= 1 else max(below, int(share > 0))]
        if len(picked) < size or len(picked) >= len(train):
            what = (
                f"{len(splits)} documents cannot give {size:g} for {name} and leave some to train"
            )
            fix = "give more documents, or smaller corpus.split sizes"
            raise DistillError(Exit.INPUT, "corpus.split", what, fix)
        splits |= dict.fromkeys(picked, name)
    return splits
