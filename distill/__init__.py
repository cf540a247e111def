"""distill: turn a teacher model and a corpus into a small open student, and say honestly what came out."""

import os

__version__ = "0.1.0"

# No telemetry, whichever command imports what.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
