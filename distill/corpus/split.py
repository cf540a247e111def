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
    chosen: dict[str, Split] = dict.fromkeys(ids, "train")
    left = list(chosen)
    sizes: list[tuple[Split, float, float]] = [
        ("heldout", heldout, heldout),
        # of what heldout leaves, so that it is a share of all
        ("validation", validation, validation / (1 - heldout) if heldout < 1 else validation),
    ]
    for name, size, share in sizes:
        picked = _pick(left, seed, name, size if size >= 1 else share, size >= 1)
        if len(picked) < size or len(picked) >= len(left):
            what = (
                f"{len(chosen)} documents cannot give {size:g} for {name} and leave some to train"
            )
            fix = "give more documents, or smaller corpus.split sizes"
            raise DistillError(Exit.INPUT, "corpus.split", what, fix)
        chosen |= dict.fromkeys(picked, name)
        left = [identity for identity in left if chosen[identity] == "train"]
    return chosen


def _pick(ids: list[str], seed: int, salt: str, size: float, is_count: bool) -> list[str]:
    ranked = sorted(ids, key=lambda identity: (rank(identity, seed, salt), identity))
    if is_count:
        return ranked[: int(size)]
    share = [identity for identity in ranked if rank(identity, seed, salt) < size]
    return share or ranked[: size > 0]
