"""Make `release/`: the merged model, the adapter, the card and the scorecard, from an allow-list into a fresh folder.

`python scripts/publish.py RUN [--push OWNER/NAME] [--public] [--override REASON]`. The release holds what was
evaluated and nothing else: adapter and merged model have the scorecard's hashes, links and paths that lead out are
refused, and every file is scanned before anything can be uploaded. A run of an earlier distill was evaluated by its
adapter, and has no merged model: it is made from the adapter, and compared with it.
"""

import gc
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from distill.config import Config
from distill.config_file import find_config
from distill.errors import DistillError, Exit
from distill.evaluation.measurements import ModelFacts
from distill.evaluation.scorecard import Scorecard
from distill.models import loading, registry
from distill.models.weights import add_adapter
from distill.publishing.card import Facts, make_card
from distill.publishing.fidelity import Conversation, Fidelity, answer_logits, compare_models
from distill.publishing.gate import evidence, pass_gate, weights
from distill.publishing.obligations import (
    Owed,
    check_names,
    licensing,
    obligations,
    owed_license,
    write_notices,
)
from distill.publishing.secret_scan import scan
from distill.publishing.upload import check_name, push
from distill.records import Pair
from distill.storage.files import (
    fsync_folder,
    read_json,
    read_records,
    sha256_file,
    sha256_files,
    write_json,
)
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training.adapters import WEIGHTS
from distill.training.encode import encode_pairs
from distill.training.merge import merged_student

ADAPTER = ("adapter_config.json", WEIGHTS, "base.json")
MODEL = (  # at least
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
NOTICES = ("NOTICE", "AGREEMENT.txt")  # where the terms of teacher or base ask for them
REPORT = ("scorecard.json", "report.html")
COMPARED = 8  # prompts on which merged and adapter are compared


def main(
    config: Config,
    run: Run,
    repository: str | None = None,
    public: bool = False,
    override: str | None = None,
) -> Path:
    """Build the release, and push it where `repository` (OWNER/NAME) is given; return its folder.

    Raises DistillError: exit 9 for what must not be published, unless `override` gives a reason for the card to show;
    10 where license or terms do not allow it.
    """
    if repository:
        check_name(repository)
    scorecard = evaluated(run)
    overridden = pass_gate(evidence(scorecard), override)
    terms = obligations(config)
    names = [model_name(config, repository), *([repository] if repository else [])]
    check_names(terms.owed, names)
    own, stated = license_of(config)
    license = owed_license(terms.owed, config.publish.license, own)
    work = run.path(".release")
    shutil.rmtree(work, ignore_errors=True)
    (work / "adapter").mkdir(parents=True)
    write_notices(terms.owed, config.terms.agreement, work)
    fidelity = add_models(config, run, work, scorecard.models["student"])
    if fidelity:
        overridden += pass_gate(weights(fidelity), override)
        write_json(work / "fidelity.json", fidelity.model_dump())
    for name in REPORT:
        copy_plain(run.path(name), work / name)
    text = license_text(own, base_of(config)) + also_under(terms.owed, own)
    (work / "LICENSE").write_text(text, encoding="utf-8")
    facts = facts_of(config, run, repository, license, stated).model_copy(
        update={
            "terms": tuple(terms.verdict.lines()),
            "displays": tuple(terms.displays()),
            "license_owed": licensing(terms.owed) is not None,
            "overridden": tuple(overridden),
            "override": override if overridden else None,
        }
    )
    make_card(facts, scorecard, fidelity).save(work / "README.md")
    private = (str(run.folder.resolve()), str(Path.cwd()))
    scan(work, private, config.publish.allow_secrets)
    release = put_in_place(work, run.path("release"))
    run.note("release", sha256_files(run.folder, ["release"]))
    say(f"release: {release} ({', '.join(sorted(p.name for p in release.iterdir()))})")
    if repository:
        push(release, repository, public)
    return release


def evaluated(run: Run) -> Scorecard:
    """Return the scorecard, after checking that it speaks of this adapter; raises DistillError (exit 9)."""
    adapter = run.trained("adapter") / WEIGHTS
    for path in (run.path("scorecard.json"), run.path("report.html"), adapter):
        if not path.is_file():
            raise DistillError(Exit.PUBLISH, path, "is missing", "distill run CONFIG first")
    scorecard = Scorecard.model_validate(read_json(run.path("scorecard.json")))
    measured = scorecard.models["student"].adapter_sha256 if scorecard.models else None
    found = sha256_file(adapter)
    if measured != found:
        what = f"evaluated was adapter {str(measured)[:12]}, here is {found[:12]}"
        raise DistillError(Exit.PUBLISH, run.path("scorecard.json"), what, "--redo evaluate")
    return scorecard


def base_of(config: Config) -> str:
    """Return the Hub id of the student's base; raises DistillError (exit 9) where it has none."""
    base = registry.hub_id(config.student.model)
    if base is None:
        raise DistillError(
            Exit.PUBLISH,
            f"student.model {Path(config.student.model).name}",
            "is a folder, and a published model names its base by Hub id",
            "train on a Hub id or a name of models.yaml",
        )
    return base


def license_of(config: Config) -> tuple[str, bool]:
    """Return the license, and whether the publisher stated it; raises DistillError (exit 10) where it is not known."""
    info = registry.lookup(config.student.model)
    if config.publish.license:
        return config.publish.license, True
    if info is None:
        raise DistillError(
            Exit.TERMS,
            f"student.model {config.student.model}",
            "its license is not in configs/models.yaml",
            "read it on the model's page, then state publish.license=SPDX-ID",
        )
    return info.license, False


def license_text(license: str, base: str) -> str:
    """Return the license's own text where it ships with the package, else its name and where to read it."""
    shipped = find_config(Path("configs/licenses") / f"{license.lower()}.txt")
    if shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    return f"{license}\n\nThe license of the base model: https://huggingface.co/{base}\n"


def also_under(owed: Sequence[Owed], own: str) -> str:
    """Return what LICENSE adds to the base's license, where the terms of the teacher name another."""
    asking = licensing(owed)
    if asking is None or asking.duties.license == own:
        return ""
    return f"\n\nThe model is distributed under {asking.duties.license}: {asking.text.line()}\n"


def model_name(config: Config, repository: str | None) -> str:
    """Return what the release is called."""
    return config.publish.model_name or (repository or config.name).split("/")[-1]


def add_models(config: Config, run: Run, work: Path, evaluated: ModelFacts) -> Fidelity | None:
    """Put adapter and merged model into `work`, as the student of the scorecard's row `evaluated`.

    Returns how far merged and adapter are apart where the adapter was evaluated, by an earlier distill. Raises
    DistillError (exit 9) where another model was evaluated.
    """
    adapter = run.trained("adapter")
    for name in ADAPTER:
        copy_plain(adapter / name, work / "adapter" / name)
    name_base(work / "adapter" / "adapter_config.json", base_of(config))
    merged, measured = merged_student(config.student, run), evaluated.model_sha256
    found = registry.folder_digest(merged)
    if measured and measured != found:
        what = f"evaluated was model {measured[:12]}, here is {found[:12]}"
        raise DistillError(Exit.PUBLISH, merged, what, "--redo evaluate")
    for name in sorted({*MODEL, *registry.parts(f"{merged.resolve()}")}):
        (work / name).parent.mkdir(exist_ok=True)
        copy_plain(merged / name, work / name)
    return None if measured else compared(config, run, merged, evaluated)


def compared(config: Config, run: Run, merged: Path, evaluated: ModelFacts) -> Fidelity:
    """Compare the merged model with the adapter on its base, in the type of the evaluation.

    Raises DistillError (exit 9) where there is nothing to compare on. One model is in memory at a time.
    """
    student, dtype = config.student, evaluated.dtype or config.student.dtype
    rows = conversations(config, run)
    if not rows:
        raise DistillError(Exit.PUBLISH, run.path("dataset"), "holds no pairs", "make the dataset")
    flags = (student.allow_pickle, student.trust_remote_code)
    base = loading.load_model(student.model, dtype, student.revision, *flags)
    before = answer_logits(add_adapter(base, run.trained("adapter")), rows)
    del base
    gc.collect()
    model = loading.load_model(f"{merged.resolve()}", dtype, None, False, flags[1])
    fidelity = compare_models(before, answer_logits(model, rows))
    say(f"merged model against adapter: {fidelity.line()}")
    return fidelity


def conversations(config: Config, run: Run) -> list[Conversation]:
    """Return a few validation (else training) samples as token ids; held-out ones are evaluation's alone."""
    tokenizer = loading.load_tokenizer(
        config.student.model, config.student.revision, config.student.trust_remote_code
    )
    pairs = [
        pair
        for split in ("validation", "train")
        for pair in read_records(run.path(f"dataset/{split}.jsonl"), Pair)
    ][:COMPARED]
    where = run.path("dataset")
    examples = encode_pairs(tokenizer, pairs, config.template_date, config.train.max_length, where)
    return [
        Conversation(ids=example.input_ids, answer=sum(w == 0 for w in example.weights))
        for example in examples
    ]


def name_base(path: Path, base: str) -> None:
    """Let the adapter's config name its base by Hub id, whatever folder it was trained from."""
    write_json(path, {**json.loads(path.read_bytes()), "base_model_name_or_path": base})


def copy_plain(source: Path, target: Path) -> None:
    """Copy one regular file; a link could publish a file from anywhere, so it is refused (exit 9)."""
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


def facts_of(config: Config, run: Run, repository: str | None, license: str, stated: bool) -> Facts:
    """Collect what the card says beside the figures."""
    info, teacher = registry.lookup(config.student.model), registry.lookup(config.teacher.model)
    corpus = config.corpus
    name = model_name(config, repository)
    place = corpus.path.name if corpus.path else corpus.dataset
    hub = corpus.dataset if corpus.dataset and not corpus.path else None
    return Facts(
        model_name=name,
        repository=repository or f"OWNER/{name}",
        base=base_of(config),
        base_revision=config.student.revision or (info.revision if info else None),
        license=license,
        license_stated=stated,
        language=config.publish.language,
        teacher=registry.hub_id(config.teacher.model) or Path(config.teacher.model).name,
        teacher_license=config.teacher.license or (teacher.license if teacher else None),
        corpus=place or corpus.source,
        dataset=None if hub is None or registry.is_folder(hub) else hub,
        converted_from=info.gguf.quantisation if info and info.gguf else None,
        lora=config.train.lora.model_dump(mode="json"),
    )


def put_in_place(work: Path, release: Path) -> Path:
    """Replace the last release by the new one."""
    if release.is_symlink():
        raise DistillError(Exit.PUBLISH, release, "is a link", "remove it")
    if release.exists():
        shutil.rmtree(release)
    work.rename(release)
    fsync_folder(release.parent)
    return release
