"""distill: turn a teacher model and a corpus into a small open student, and say honestly what came out."""

__version__ = "0.1.0"
