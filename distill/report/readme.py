"""What README.md and docs/*.md show of scorecards, written between comments that name the file and the parts.

`python eval/readme.py` writes it:

    <!-- scorecard: eval/results/quickstart-scorecard.json answer quality cost -->
    <!-- end of scorecard -->

The parts are those of `report.parts`; what an old scorecard lacks is left out. The same files give the same text.
"""

import re
from pathlib import Path

from distill.errors import DistillError, Exit
from distill.evaluation.scorecard import Scorecard
from distill.report.report import parts
from distill.storage.files import read_json, write_atomic

BLOCK = re.compile(
    r"(?P<head><!-- scorecard: (?P<path>\S+)(?P<names>(?: \w+)+) -->\n).*?(?P<end><!-- end of scorecard -->)",
    re.S,
)


def filled(text: str, root: Path) -> str:
    """Return a Markdown text with its scorecards written anew; paths start at `root`.

    Raises DistillError (exit 3) for a scorecard that is missing or a part that there is not.
    """
    return BLOCK.sub(lambda block: _block(block, root), text)


def _block(block: re.Match[str], root: Path) -> str:
    card = root / block["path"]
    if not card.is_file():
        raise DistillError(Exit.INPUT, card, "is missing", "name a scorecard.json of a run")
    found = parts(Scorecard.model_validate(read_json(card)))
    names = block["names"].split()
    if unknown := [name for name in names if name not in found]:
        raise DistillError(Exit.INPUT, f"the part {unknown[0]}", "is none", ", ".join(found))
    quoted = "\n\n".join(found[name] for name in names if found[name])
    lines = "\n".join(f"> {line}".rstrip() for line in quoted.split("\n"))
    return f"{block['head']}{lines}\n{block['end']}"


def pages(root: Path) -> list[Path]:
    """Return the Markdown files that may show scorecards: the README and the files of docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def write(root: Path) -> None:
    """Write the scorecards of all pages anew; none is touched if one of them cannot be written."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages(root)}
    for page, text in {page: filled(text, root) for page, text in texts.items()}.items():
        write_atomic(page, text)
