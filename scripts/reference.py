"""Make configs/reference.yaml anew, every config key with its meaning: `python
scripts/reference.py`."""

from pathlib import Path

from distill.config.reference import reference

if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "configs" / "reference.yaml"
    path.write_text(reference(), encoding="utf-8")
