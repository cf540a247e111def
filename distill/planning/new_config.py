"""`distill init`: a commented config from a corpus and a teacher, which `distill run` takes."""

import re
from itertools import islice
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from distill.config.tree import Corpus
from distill.config.yaml_file import load_config
from distill.corpus.readers import SourceRow, list_files, read_file
from distill.corpus.rows import interpret
from distill.errors import DistillError, Exit
from distill.storage.files import write_atomic

LOOKED_AT = 100  # rows of a file in which a first readable one is looked for


def write_config(
    folder: Path,
    corpus: Path | None,
    teacher: str,
    student: str,
    base_url: str | None,
    api_key_env: str | None,
) -> Path:
    """Write FOLDER/config.yaml and return its path; `corpus` is what lies in the folder by default.

    Raises DistillError: exit 2 for a file that is there or a wrong value, 3 for the corpus.
    """
    path, source = folder / "config.yaml", corpus or folder
    if path.exists():
        what, fix = "is there already", f"change it, or remove it; distill plan {path}"
        raise DistillError(Exit.CONFIG, path, what, fix)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "mine"
    values = {"name": plain[:60], "path": path, "corpus": str(source), "teacher": teacher}
    values |= {"student": student, "base_url": base_url, "api_key_env": api_key_env}
    values |= {"prompts": _holds_prompts(source)}
    template = Path(__file__).parent / "templates/config.yaml.j2"
    text = Environment(  # YAML; values are written as JSON, which YAML reads
        undefined=StrictUndefined, trim_blocks=True, autoescape=False, keep_trailing_newline=True
    ).from_string(template.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.render(values))
    try:
        load_config(path)
    except DistillError:
        path.unlink()  # what cannot be read again is not left behind
        raise
    return path


def _holds_prompts(source: Path) -> bool:
    """Tell whether the first readable row is a prompt; raises DistillError (exit 3)."""
    columns = Corpus(path=source).columns
    for file in list_files(source)[0]:
        for row in islice(read_file(file, str(file)), LOOKED_AT):
            try:
                if isinstance(row, SourceRow):
                    return "messages" in interpret(row.value, row.where, columns).meta
            except ValueError:  # a bad row, which the corpus stage counts
                pass
    what, fix = "holds no row that can be read", "check the files, or corpus.columns"
    raise DistillError(Exit.INPUT, source, what, fix)
