"""Make `release/`: merged model, adapter, card and scorecard, by an allow-list in a fresh folder.

`distill publish RUN [--push OWNER/NAME] [--public] [--override REASON]`. The release holds what was
evaluated and nothing else: adapter and merged model have the scorecard's hashes, links and paths
that lead out are refused, and every file is scanned before anything can be uploaded. A run of an
earlier distill was evaluated by its adapter: its merged model is made now, and the card says so.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from distill.errors import DistillError, Exit
from distill.evaluation.measurements import MetricRow, ModelFacts
from distill.evaluation.scorecard import Scorecard
from distill.evaluation.suites import held_out_items
from distill.formatting import signed
from distill.models import registry
from distill.models.chat_template import folds_system
from distill.models.loading import load_tokenizer
from distill.publishing.card import Facts, make_card
from distill.publishing.formats import MODELFILE, kinds_of, modelfile, write_files
from distill.publishing.obligations import (
    base_of,
    check_names,
    license_of,
    obligations,
    write_notices,
)
from distill.publishing.parity import FileParity, findings, measure
from distill.publishing.secret_scan import scan
from distill.publishing.upload import check_name, push
from distill.storage.files import fsync_folder, read_json, sha256_file, sha256_files, write_json
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training.adapters import WEIGHTS, merged_student

ADAPTER = ("adapter_config.json", WEIGHTS, "base.json")
REPORT = ("scorecard.json", "report.html")
PARITY = "parity.json"
ON_PURPOSE = 'or publish with --override "reason", which the card shows'


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
    add_models(run, work)
    parity = add_formats(run, work, release, name, scorecard)
    overridden += pass_gate(findings(parity, config.evaluation.margin), override)
    for file in REPORT:
        copy_plain(run.path(file), work / file)
    (work / "LICENSE").write_text(license.text, encoding="utf-8")
    student = config.student
    base = load_tokenizer(student.model, student.revision, student.trust)
    released = load_tokenizer(f"{work.resolve()}", trust=student.trust)
    facts = Facts(
        *(run.settled(), name, repository, license),
        terms=verdict.lines(),
        displays=list(dict.fromkeys(o.duties.display for o in owed if o.duties.display)),
        own_template=released.chat_template != base.chat_template,
        folds_system=folds_system(released, config.template_date),
        parity=parity,
        overridden=overridden,
        override=override if overridden else None,
    )
    make_card(facts, scorecard).save(work / "README.md")
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


def evaluated(run: Run) -> Scorecard:
    """Return the scorecard; raises DistillError (exit 9) where another student was evaluated, whose
    figures the card would state: nothing overrides that."""
    adapter, path = run.trained("adapter") / WEIGHTS, run.path("scorecard.json")
    for file in (path, run.path("report.html"), adapter):
        if not file.is_file():
            raise DistillError(Exit.PUBLISH, file, "is missing", "distill run CONFIG first")
    scorecard = Scorecard.model_validate(read_json(path))
    student = scorecard.models.get("student", ModelFacts())
    hashes = [("adapter", student.adapter_sha256, sha256_file(adapter))]
    if student.model_sha256:  # else an earlier distill evaluated the adapter alone
        merged = registry.folder_digest(merged_student(run.config.student, run))
        hashes.append(("model", student.model_sha256, merged))
    for what, measured, here in hashes:
        if measured != here:
            what = f"evaluated was {what} {str(measured)[:12]}, here is {here[:12]}"
            raise DistillError(Exit.PUBLISH, path, what, "--redo evaluate")
    return scorecard


def evidence(card: Scorecard) -> list[DistillError]:
    """Return what speaks against a student: contamination, and that it is worse than its base.

    Worse is over all checks, else by its loss on the teacher's answers. Where the difference is
    undecided by the rule of all claims, the finding says so; it stands all the same.
    """
    findings, part = [], card.contamination
    if part and part.flagged:  # the scores on these items say nothing
        what = f"{part.flagged} of {part.n} items stand in the training data"
        fix = "--redo corpus, which takes them out"
        findings.append(DistillError(Exit.PUBLISH, "contamination", what, fix))
    row = card.overall or MetricRow()
    mean = row.student_minus_base.value
    if mean is not None:
        worse, what = mean < 0, f"{signed(100 * mean, 1)} points over all checks"
    else:
        row = card.agreement.get("nats_per_token", MetricRow())
        mean = row.student_minus_base.value or 0.0
        worse, what = mean > 0, f"{signed(mean, 3)} nats a token on the teacher's answers"
    if worse:
        decided = row.conclude("base")
        what = f"is worse than its base: {what}"
        if decided.verdict == "undecided":
            what = what.replace("is worse", "measured worse") + f" (undecided: {decided.reason})"
        fix = "train longer, on more answers, or on other settings"
        findings.append(DistillError(Exit.PUBLISH, "the student", what, fix))
    return findings


def pass_gate(findings: Sequence[DistillError], override: str | None) -> list[str]:
    """Return the findings that the card shows as overridden; without an override raise (exit 9)."""
    if findings and override is None:
        first, others = findings[0], len(findings) - 1
        more = f" (and {others} more)" if others else ""
        fix = f"{first.fix}; {ON_PURPOSE}"
        raise DistillError(first.code, first.where, first.what + more, fix)
    lines = [f"{finding.where} {finding.what}" for finding in findings]
    for line in lines:
        say(f"overridden: {line}")
    return lines


def add_models(run: Run, work: Path) -> None:
    """Put adapter and merged model into `work`."""
    adapter, about = run.trained("adapter"), work / "adapter/adapter_config.json"
    for name in ADAPTER:
        copy_plain(adapter / name, work / "adapter" / name)
    base = base_of(run.config.student.model)  # whatever folder the adapter was trained from
    write_json(about, {**json.loads(about.read_bytes()), "base_model_name_or_path": base})
    merged = merged_student(run.config.student, run)
    for name in ("model.safetensors", *registry.parts(f"{merged.resolve()}")):
        (work / name).parent.mkdir(exist_ok=True)
        copy_plain(merged / name, work / name)


def add_formats(
    run: Run, work: Path, release: Path, name: str, scorecard: Scorecard
) -> list[FileParity]:
    """Add the files for other runners, compared with the student."""
    config, kinds = run.config, kinds_of(run.config.publish.formats)
    if not kinds:
        return []
    model = merged_student(config.student, run)
    if "ollama" in config.publish.formats:  # before the files, as it may be impossible
        tokenizer = load_tokenizer(f"{model.resolve()}")
        prompts = [pair.prompt for pair in held_out_items(run.folder)[0]]
        text = modelfile(model, tokenizer, config.template_date, name, prompts)
        (work / MODELFILE).write_text(text, encoding="utf-8")
    files = write_files(model, work, name, kinds)
    flagged = scorecard.contamination.items if scorecard.contamination else ()
    rows = measure(run, model, files, release / PARITY, flagged)
    for row in rows:
        say(f"{row.file}: {row.conclusion}")
    write_json(work / PARITY, [row.model_dump(mode="json") for row in rows])
    return rows


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
