"""Write the scorecards anew that README.md and docs/*.md show: `python scripts/tables.py`.

They stand between comments that name a scorecard's file and its parts:

    <!-- scorecard: eval/results/quickstart-scorecard.json answer quality cost -->
    <!-- end of scorecard -->
"""

import re
from pathlib import Path

from distill.errors import DistillError, Exit
from distill.evaluation.scorecard import Scorecard
from distill.report.render import parts
from distill.storage.files import read_json, write_atomic

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(?P<head><!-- scorecard: (?P<path>\S+)(?P<names>(?: \w+)+) -->\n)"
    r".*?(?P<end><!-- end of scorecard -->)",
    re.S,
)


def fill(text: str, root: Path) -> str:
    """Return a Markdown text with its scorecards written anew; paths start at `root`.

    Raises DistillError (exit 3) for a scorecard that is missing or a part that does not exist.
    """

    def written(block: re.Match[str]) -> str:
        card, names = root / block["path"], block["names"].split()
        if not card.is_file():
            raise DistillError(Exit.INPUT, card, "is missing", "name a scorecard.json of a run")
        texts = parts(Scorecard.model_validate(read_json(card)))
        if unknown := [name for name in names if name not in texts]:
            where = f"the part {unknown[0]}"
            raise DistillError(Exit.INPUT, where, "does not exist", f"use {', '.join(texts)}")
        quoted = "\n\n".join(texts[name] for name in names if texts[name])
        lines = "\n".join(f"> {line}".rstrip(" ") for line in quoted.split("\n"))
        return f"{block['head']}{lines}\n{block['end']}"

    return BLOCK.sub(written, text)


def pages(root: Path) -> list[Path]:
    """Return the Markdown files that may show scorecards: the README and the files of docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def write_pages(root: Path) -> None:
    """Write the scorecards of all pages anew; none is touched if one of them cannot be written."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages(root)}
    for page, text in {page: fill(text, root) for page, text in texts.items()}.items():
        write_atomic(page, text)


if __name__ == "__main__":
    write_pages(ROOT)
