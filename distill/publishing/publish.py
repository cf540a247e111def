"""Make `release/`: merged model, adapter, card and scorecard, by an allow-list in a fresh folder.

`distill publish RUN [--push OWNER/NAME] [--public] [--override REASON]`. The release holds what was
evaluated and nothing else: adapter and merged model have the scorecard's hashes, links and paths
that lead out are refused, and every file is scanned before anything can be uploaded. A run of an
earlier distill was evaluated by its adapter, and has no merged model: it is made from the adapter,
and compared with it.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.evaluation.measurements import ModelFacts
from distill.evaluation.scorecard import Scorecard
from distill.evaluation.suites import held_out_items
from distill.models import registry
from distill.models.chat_template import folds_system
from distill.models.loading import load_tokenizer
from distill.publishing.card import Facts, corpus_name, hub_dataset, make_card, teacher_name
from distill.publishing.fidelity import Fidelity, compare_with_adapter
from distill.publishing.formats import MODELFILE, kinds_of, modelfile, write_files
from distill.publishing.gate import evidence, pass_gate
from distill.publishing.obligations import (
    ReleaseLicense,
    base_of,
    check_names,
    license_of,
    obligations,
    write_notices,
)
from distill.publishing.parity import Parity, measure
from distill.publishing.secret_scan import scan
from distill.publishing.upload import check_name, push
from distill.storage.files import fsync_folder, read_json, sha256_file, sha256_files, write_json
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training.adapters import WEIGHTS, merged_student

ADAPTER = ("adapter_config.json", WEIGHTS, "base.json")
MODEL = (  # at least
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
REPORT = ("scorecard.json", "report.html")
PARITY = "parity.json"


def main(
    run: Run, repository: str | None = None, public: bool = False, override: str | None = None
) -> Path:
    """Build the release, and push it where `repository` (OWNER/NAME) is given; return its folder.

    Raises DistillError: exit 9 for what must not be published, unless `override` gives a reason for
    the card to show; 10 where license or terms do not allow it.
    """
    if repository:
        check_name(repository)
    config, scorecard = run.config, evaluated(run)
    overridden = pass_gate(evidence(scorecard), override)
    verdict, owed = obligations(config.teacher, config.student.model, config.terms.basis)
    name = config.publish.model_name or (repository or config.name).split("/")[-1]
    check_names(owed, [name, *([repository] if repository else [])])
    license = license_of(config.student.model, config.publish.license, owed)
    work, release = run.path(".release"), run.path("release")
    shutil.rmtree(work, ignore_errors=True)
    (work / "adapter").mkdir(parents=True)
    write_notices(owed, config.terms.agreement, work)
    fidelity = add_models(run, work, scorecard.models["student"])
    if fidelity:
        say(f"merged model against adapter: {fidelity.line()}")
        what = f"is not the adapter that was evaluated: {fidelity.line()}"
        differs = DistillError(Exit.PUBLISH, "the merged model", what, "--redo evaluate")
        overridden += pass_gate([] if fidelity.same else [differs], override)
        write_json(work / "fidelity.json", fidelity.model_dump())
    parity = add_formats(run, work, release, name, scorecard)
    if parity:
        overridden += pass_gate(parity.findings(), override)
    for file in REPORT:
        copy_plain(run.path(file), work / file)
    (work / "LICENSE").write_text(license.text, encoding="utf-8")
    facts = facts_of(config, name, repository, license).model_copy(
        update={
            "terms": tuple(verdict.lines()),
            "template": template_lines(config, work),
            "displays": tuple(dict.fromkeys(o.duties.display for o in owed if o.duties.display)),
            "formats": config.publish.formats,
            "parity": parity,
            "overridden": tuple(overridden),
            "override": override if overridden else None,
        }
    )
    make_card(facts, scorecard, fidelity).save(work / "README.md")
    if "safetensors" not in config.publish.formats:
        for weights in work.glob("*.safetensors*"):
            weights.unlink()
    if "adapter" not in config.publish.formats:
        shutil.rmtree(work / "adapter")
    scan(work, (str(run.folder.resolve()), str(Path.cwd())), config.publish.allow_secrets)
    if release.is_symlink():
        raise DistillError(Exit.PUBLISH, release, "is a link", "remove it")
    if release.exists():
        shutil.rmtree(release)
    work.rename(release)
    fsync_folder(release.parent)
    run.note("release", sha256_files(run.folder, ["release"]))
    say(f"release: {release} ({', '.join(sorted(p.name for p in release.iterdir()))})")
    if repository:
        push(release, repository, public)
    return release


def add_formats(
    run: Run, work: Path, release: Path, name: str, scorecard: Scorecard
) -> Parity | None:
    """Add the files for other runners, compared with the student; None where none is asked for."""
    config, kinds = run.config, kinds_of(run.config.publish.formats)
    if not kinds:
        return None
    model, path = merged_student(config.student, run), release / PARITY
    parity = Parity(model_sha256=registry.folder_digest(model), margin=config.evaluation.margin)
    old = parity
    with suppress(DistillError, ValidationError):  # where it is damaged, all is made again
        old = Parity.model_validate(read_json(path)) if path.is_file() else parity
    rows = {row.file: row for row in old.files} if old.model_sha256 == parity.model_sha256 else {}
    if "ollama" in config.publish.formats:  # before the files, as it may be impossible
        tokenizer = load_tokenizer(f"{model.resolve()}")
        prompts = [pair.prompt for pair in held_out_items(run.folder)[0]]
        text = modelfile(model, tokenizer, config.template_date, name, prompts)
        (work / MODELFILE).write_text(text, encoding="utf-8")
    hashes = {file: row.sha256 for file, row in rows.items()}
    files = write_files(model, work, release, name, kinds, hashes)
    flagged = scorecard.contamination.items if scorecard.contamination else ()
    parity = parity.model_copy(update={"files": measure(run, model, files, rows, flagged)})
    for row in parity.files:
        say(row.line())
    write_json(work / PARITY, parity.model_dump(mode="json"))
    return parity


def template_lines(config: Config, release: Path) -> tuple[str, ...]:
    """Return what a reader of the card has to know of the release's chat template."""
    student = config.student
    base = load_tokenizer(student.model, student.revision, student.trust)
    released, lines = load_tokenizer(f"{release.resolve()}", trust=student.trust), list[str]()
    if released.chat_template != base.chat_template:
        how = "at once" if config.reasoning == "drop" else "after a thought"
        values = ", ".join(f"{k}: {json.dumps(v)}" for k, v in student.chat_template_kwargs.items())
        more = f" (student.chat_template_kwargs: {values})" if values else ""
        lines.append(
            "Its chat template is the base's with the form of the training as the default: the"
            f" model answers {how}{more}. Render with it as above, and set none of its switches."
        )
    if folds_system(released, config.template_date):
        lines.append(
            "Its chat template has no system turn: in training a system text stood at the beginning"
            " of the first user turn, followed by a blank line."
        )
    return tuple(lines)


def evaluated(run: Run) -> Scorecard:
    """Return the scorecard; raises DistillError (exit 9) where it is of another adapter."""
    adapter = run.trained("adapter") / WEIGHTS
    for path in (run.path("scorecard.json"), run.path("report.html"), adapter):
        if not path.is_file():
            raise DistillError(Exit.PUBLISH, path, "is missing", "distill run CONFIG first")
    scorecard = Scorecard.model_validate(read_json(run.path("scorecard.json")))
    measured = scorecard.models["student"].adapter_sha256 if scorecard.models else None
    digest = sha256_file(adapter)
    if measured != digest:
        what = f"evaluated was adapter {str(measured)[:12]}, here is {digest[:12]}"
        raise DistillError(Exit.PUBLISH, run.path("scorecard.json"), what, "--redo evaluate")
    return scorecard


def add_models(run: Run, work: Path, evaluated: ModelFacts) -> Fidelity | None:
    """Put adapter and merged model into `work`, as the student of the scorecard's row `evaluated`.

    Returns how far merged and adapter are apart where the adapter was evaluated, by an earlier
    distill. Raises DistillError (exit 9) where another model was evaluated.
    """
    adapter, about = run.trained("adapter"), work / "adapter/adapter_config.json"
    for name in ADAPTER:
        copy_plain(adapter / name, work / "adapter" / name)
    base = base_of(run.config.student.model)  # whatever folder the adapter was trained from
    write_json(about, {**json.loads(about.read_bytes()), "base_model_name_or_path": base})
    merged, measured = merged_student(run.config.student, run), evaluated.model_sha256
    digest = registry.folder_digest(merged)
    if measured and measured != digest:
        what = f"evaluated was model {measured[:12]}, here is {digest[:12]}"
        raise DistillError(Exit.PUBLISH, merged, what, "--redo evaluate")
    for name in sorted({*MODEL, *registry.parts(f"{merged.resolve()}")}):
        (work / name).parent.mkdir(exist_ok=True)
        copy_plain(merged / name, work / name)
    return None if measured else compare_with_adapter(run, merged, evaluated.dtype)


def copy_plain(source: Path, target: Path) -> None:
    """Copy one regular file; a link could publish any file, so it is refused (exit 9)."""
    if source.is_symlink() or source.parent.is_symlink():
        raise DistillError(Exit.PUBLISH, source, "is a link", "put the file itself there")
    if not source.is_file():
        raise DistillError(Exit.PUBLISH, source, "is missing", "distill run CONFIG first")
    try:
        if source.suffix != ".safetensors":  # small, and somebody may edit it in place
            raise OSError
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def facts_of(config: Config, name: str, repository: str | None, license: ReleaseLicense) -> Facts:
    """Collect what the card says beside the figures."""
    info, teacher = registry.lookup(config.student.model), registry.lookup(config.teacher.model)
    return Facts(
        model_name=name,
        repository=repository or f"OWNER/{name}",
        base=base_of(config.student.model),
        base_revision=config.student.revision or (info.revision if info else None),
        license=license.name,
        license_stated=license.stated,
        license_owed=license.owed,
        language=config.publish.language,
        teacher=teacher_name(config.teacher),
        teacher_license=config.teacher.license or (teacher.license if teacher else None),
        corpus=corpus_name(config.corpus),
        dataset=hub_dataset(config.corpus),
        converted_from=info.gguf.quantisation if info and info.gguf else None,
        lora=config.train.lora.model_dump(mode="json"),
    )
