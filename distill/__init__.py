"""Turn a teacher model and a corpus into a small open student, and say honestly what came out."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.api import run as run

__version__ = "0.1.0"

# Where configs/, eval/ and data/ lie: inside an installed package, or at the root of a checkout
SHIPPED = (Path(__file__).parent / "_data", Path(__file__).parents[1])

# No telemetry, whichever command imports what.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Tables that are part of the code: no other replaces them, and its hash covers them
TABLES = next(folder for root in SHIPPED if (folder := root / "configs/tables").is_dir())


def shipped_table(name: str) -> Any:
    """Read a table of `TABLES`."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is built
    return loader((TABLES / name).read_text(encoding="utf-8")).get_single_data()


def __getattr__(name: str) -> object:
    """Load `distill.run` where it is used: the command and its stages need little of it."""
    if name == "run":
        from distill.api import run

        return run
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
