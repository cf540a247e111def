"""`distill init`: a commented config from a corpus and a teacher, which `distill run` takes as it is."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill.config import Config, Corpus
from distill.config_file import load_config
from distill.corpus.readers import SourceRow, list_files, read_file
from distill.corpus.rows import interpret
from distill.errors import DistillError, Exit
from distill.responders.terms import judge_teacher
from distill.storage.files import write_atomic

LOOKED_AT = 100  # rows of the corpus in which a first readable one is looked for


def write_config(
    folder: Path,
    corpus: Path | None,
    teacher: str,
    student: str,
    base_url: str | None,
    api_key_env: str | None,
) -> Path:
    """Write FOLDER/config.yaml and return its path; `corpus` is what lies in the folder by default.

    Raises DistillError: exit 2 where the file is there already or a value is not allowed, 3 where the corpus cannot be
    read.
    """
    path = folder / "config.yaml"
    if path.exists():
        what, fix = "is there already", f"change it, or remove it; distill plan {path}"
        raise DistillError(Exit.CONFIG, path, what, fix)
    source = corpus or folder
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "mine"
    values = {
        "name": plain[:60],
        "path": path,
        "corpus": str(source),
        "prompts": holds_prompts(source),
        "teacher": teacher,
        "student": student,
        "base_url": base_url,
        "api_key_env": api_key_env,
    }
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=False,  # YAML; values are written as JSON, which YAML reads
        keep_trailing_newline=True,
    )
    template = templates.get_template("config.yaml.j2")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, template.render(values, open_terms=""))
    try:
        config = load_config(path)
        reason = open_terms(config)
    except DistillError:
        path.unlink()  # what cannot be read again is not left behind
        raise
    if reason:
        write_atomic(path, template.render(values, open_terms=reason))
    return path


def holds_prompts(source: Path) -> bool:
    """Tell whether the first readable row of a corpus is a prompt that is there already.

    Raises DistillError (exit 3) where nothing there can be read.
    """
    columns = Corpus(path=source).columns
    for file in list_files(source)[0]:
        for number, row in enumerate(read_file(file, str(file))):
            if isinstance(row, SourceRow):
                try:
                    return "messages" in interpret(row.value, row.where, columns).meta
                except ValueError:  # a bad row, which the corpus stage counts
                    pass
            if number >= LOOKED_AT:
                break
    what, fix = "holds no row that can be read", "check the files, or corpus.columns"
    raise DistillError(Exit.INPUT, source, what, fix)


def open_terms(config: Config) -> str:
    """Return why the teacher's answers may not train a model as things stand; empty where they may."""
    verdict = judge_teacher(config.teacher, config.terms.basis)
    if verdict.allowed:
        return ""
    forbidden = next((text for text in verdict.texts if text.may_train == "no"), None)
    return (
        f"forbidden by {forbidden.title}"
        if forbidden
        else "no terms are known of " + ", ".join(verdict.unknown)
    )
