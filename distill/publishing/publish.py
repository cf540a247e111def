"""Make `release/`: the merged model, the adapter, the card and the scorecard, from an allow-list into a fresh folder.

`python scripts/publish.py RUN [--push OWNER/NAME] [--public] [--override REASON]`. The release holds what was
evaluated and nothing else: the adapter's hash is the scorecard's, links and paths that lead out are refused, and every file is scanned before
anything can be uploaded.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.config_file import find_config
from distill.errors import DistillError, Exit
from distill.models import registry
from distill.publishing.card import Facts, make_card
from distill.publishing.gate import evidence, pass_gate, weights
from distill.publishing.merge import Conversation, Fidelity, merge_and_compare
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

ADAPTER = ("adapter_config.json", WEIGHTS, "base.json")
MODEL = (
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
    told = scorecard["models"]["student"]
    fidelity = add_models(config, run, work, told.get("dtype", config.student.dtype))
    overridden += pass_gate(weights(fidelity, told.get("merged_sha256")), override)
    for name in REPORT:
        copy_plain(run.path(name), work / name)
    write_json(work / "fidelity.json", fidelity.model_dump())
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
    scan(work, (str(run.folder.resolve()), str(Path.cwd())))
    release = put_in_place(work, run.path("release"))
    run.note("release", sha256_files(run.folder, ["release"]))
    say(f"release: {release} ({', '.join(sorted(p.name for p in release.iterdir()))})")
    if repository:
        push(release, repository, public)
    return release


def evaluated(run: Run) -> dict[str, Any]:
    """Return the scorecard, after checking that it speaks of this adapter; raises DistillError (exit 9)."""
    adapter = run.trained("adapter") / WEIGHTS
    for path in (run.path("scorecard.json"), run.path("report.html"), adapter):
        if not path.is_file():
            raise DistillError(Exit.PUBLISH, path, "is missing", "distill run CONFIG first")
    scorecard = read_json(run.path("scorecard.json"))
    measured = scorecard.get("models", {}).get("student", {}).get("adapter_sha256")
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


def add_models(config: Config, run: Run, work: Path, dtype: str) -> Fidelity:
    """Put adapter, merged model and tokenizer into `work`; return how far merged and adapter are apart.

    `dtype` is that of the evaluation.
    """
    student, adapter = config.student, run.trained("adapter")
    for name in ADAPTER:
        copy_plain(adapter / name, work / "adapter" / name)
    name_base(work / "adapter" / "adapter_config.json", base_of(config))
    fidelity = merge_and_compare(
        student.model,
        student.revision,
        work / "adapter",
        work,
        conversations(config, run),
        dtype,
        allow_pickle=student.allow_pickle,
        trust_remote_code=student.trust_remote_code,
    )
    say(fidelity.line())
    missing = [name for name in MODEL if not (work / name).is_file()]
    if missing:
        raise DistillError(Exit.PUBLISH, work, f"{missing[0]} was not written", "report this")
    keep_only(work)
    return fidelity


def conversations(config: Config, run: Run) -> list[Conversation]:
    """Return a few validation (else training) samples as token ids; held-out ones are evaluation's alone."""
    tokenizer = registry.load_tokenizer(
        config.student.model, config.student.revision, config.student.trust_remote_code
    )
    tokenizer.save_pretrained(run.path(".release"))
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
    shutil.copyfile(source, target)


def keep_only(work: Path) -> None:
    """Remove what saving wrote beside the files of the allow-list."""
    for path in work.iterdir():
        if path.is_file() and path.name not in (*MODEL, *NOTICES):
            path.unlink()


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
