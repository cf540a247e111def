"""`distill verify RUN`: is a finished run what it says it is? Loads no model and writes nothing.

The files have the hashes that were recorded; the stored answers give the same scores, scorecard and
report again, byte for byte; and answers, adapter, model and release belong together. The manifest's
seal covers the hash of every stage's marker, and a marker that of every file of its stage: one
number stands for the run.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Group

from distill.callables import PROVIDED
from distill.errors import DistillError, Exit
from distill.evaluation.evaluate import find_overlap, measure
from distill.evaluation.suites import Suite, held_out_items
from distill.formatting import table
from distill.models.registry import folder_digest
from distill.pipeline import STAGES
from distill.records import LedgerEntry, Response
from distill.report import report
from distill.responders.responder import Request, Sampling
from distill.responders.store import ResponseStore
from distill.storage.environment import environment
from distill.storage.files import read_json, read_records, sha256_file
from distill.storage.run_folder import SEAL, Run, open_run, sealed
from distill.tasks.checkers import KINDS, RUNS_CODE
from distill.tasks.sandbox.programs import allowed
from distill.tasks.task import TASKS_FILE

MANIFEST, CONFIG, LEDGER = "manifest.json", "config.json", "ledger.jsonl"
# A lock, what --redo set aside, a release that was not finished
APART = (".lock", ".old", ".release")
MEASURED = ("scores/", "requests.jsonl", "evaluation.json")
REPORTED = ("scorecard.json", "scorecard.md", "report.html")
WORDED = REPORTED[1:]  # from scorecard.json and samples, in words that may change
# what is made again depends on none of these
NOT_READ = ("adapter/", "checkpoints/", "merged/", "release/", "tranches/")
NOT_READ += ("refined/self-", "refined/round-", "refined/adapter/", "refined/merged/")
WEIGHTS = "adapter/adapter_model.safetensors"
TITLES = {
    "run": "manifest and config",
    "again": "made again from the answers",
    "store": "answers as they came",
    "together": "the adapter that was evaluated",
    "release": "the release",
}


class Check(NamedTuple):
    """One thing that was looked at: its kind, what, how it stands, and where or why it differs."""

    kind: str
    what: str
    state: Literal["same", "differs", "missing", "skipped"]
    where: str = ""


def verdict(kind: str, what: str, same: bool, where: str = "not as recorded") -> Check:
    """Return the check of something that is the same, or differs for the reason given."""
    return Check(kind, what, "same") if same else Check(kind, what, "differs", where)


class RunEvidence:
    """Manifest, markers and ledger of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_tree(folder / MANIFEST)
        done = self.manifest.get("stages", {})
        performed = [s for s in STAGES if s.name in done or (folder / s.marker).exists()]
        self.markers = {stage: read_tree(folder / stage.marker) for stage in performed}

    @cached_property
    def hashes(self) -> dict[str, str | None]:
        """Return the hash that was recorded of every file; None where a file should have one."""
        hashes: dict[str, str | None] = {CONFIG: self.manifest.get("config_sha256")}
        for stage, marker in self.markers.items():
            facts = self.manifest.get("stages", {}).get(stage.name, {})
            hashes |= {stage.marker: facts.get("marker"), **marker.get("outputs", {})}
        for files in self.manifest.get("sources", {}).get("external", {}).values():
            hashes |= files
        return hashes | self.manifest.get("release", {})

    def compared(self, kind: str, name: str) -> Check:
        """Hold one file against the hash that was recorded of it."""
        path, recorded = self.folder / name, self.hashes.get(name)
        if not path.is_file() or not recorded:
            what = "no hash of it was recorded" if path.is_file() else "the file is not there"
            return Check(kind, name, "missing", what)
        return verdict(kind, name, sha256_file(path) == recorded)

    def ledger_at(self, stage: str, after: bool = False) -> bytes | None:
        """Return the ledger as a stage found it, or `after` its entry; None where it has none."""
        path, size, end = self.folder / LEDGER, 0, None
        begun = next((m.get("begun") for s, m in self.markers.items() if s.name == stage), None)
        content = path.read_bytes() if path.is_file() else b""
        for line in content.splitlines(keepends=True):
            try:
                entry = LedgerEntry.model_validate_json(line)
            except ValueError:
                return None
            if (entry.stage, entry.started) == (stage, begun):
                end = size + len(line) * after
            size += len(line)
        return None if end is None else content[:end]

    def outside(self) -> list[str]:
        """Return the run's files of which nothing was recorded: a change in them is not seen."""
        files = [p.relative_to(self.folder) for p in self.folder.rglob("*") if p.is_file()]
        return sorted({f.as_posix() for f in files} - {MANIFEST, LEDGER, *self.hashes})


def read_tree(path: Path) -> dict[str, Any]:
    """Read a file of a run, of which what is damaged counts as nothing: its hash has shown it."""
    try:
        facts = read_json(path)
    except DistillError:
        return {}
    return facts if isinstance(facts, dict) else {}


def check_files(evidence: RunEvidence) -> Iterator[Check]:
    """Hold all files against what was recorded, and what stages read against what others wrote."""
    path = evidence.folder / MANIFEST
    if path.is_file():
        facts = {key: value for key, value in evidence.manifest.items() if key != SEAL}
        yield verdict("run", MANIFEST, path.read_bytes() == sealed(facts).encode(), "not as sealed")
    else:
        yield Check("run", MANIFEST, "missing", "the file is not there")
    yield evidence.compared("run", CONFIG)
    for stage, marker in evidence.markers.items():
        kind = stage.name
        yield evidence.compared(kind, stage.marker)
        if not marker.get("outputs"):
            yield Check(kind, kind, "missing", "no finished stage says what it wrote")
            continue
        for name in marker["outputs"]:
            yield evidence.compared(kind, name)
        for name in stage.inputs:
            sha256 = marker.get("fingerprint", {}).get(f"file {name}")
            left = not sha256 and name.startswith("refined/")  # by a config that refined
            if not left and sha256 != evidence.hashes.get(name):
                yield Check(kind, name, "differs", f"{kind} read another file of that name")
        ledger = hashlib.sha256(evidence.ledger_at(kind, after=True) or b"").hexdigest()
        yield verdict(kind, f"{LEDGER} up to {kind}", ledger == marker.get("ledger"))
    for kind, files in evidence.manifest.get("sources", {}).get("external", {}).items():
        yield from (evidence.compared(kind, name) for name in files)


def verify(folder: Path) -> list[Check]:
    """Look at all of a run; raises DistillError (exit 5) where the folder holds no finished run."""
    if not (folder / "stages/report.json").is_file():
        fix = "finish it: distill run CONFIG"
        raise DistillError(Exit.STATE, folder, "has no report to verify", fix)
    evidence = RunEvidence(folder)
    checks = list(check_files(evidence))
    unread = (*NOT_READ, *MEASURED, *REPORTED)  # which nothing that is made again depends on
    bad = [check.what for check in failures(checks) if not check.what.startswith(unread)]
    if not bad:
        return [*checks, *_again(evidence), *_stored(evidence), *_together(evidence)]
    why = f"{bad[0]} is not what was recorded"
    checks.append(Check("again", "scores, scorecard and report", "skipped", why))
    if CONFIG not in bad:  # which says where the store is; that names the line of a damaged answer
        checks += _stored(evidence)
    return checks


def failures(checks: Sequence[Check]) -> list[Check]:
    """Return what differs or is missing."""
    return [check for check in checks if check.state not in ("same", "skipped")]


def _again(evidence: RunEvidence) -> Iterator[Check]:
    """Make scores and report again elsewhere, and compare every byte, or other code's figures."""
    here, other_code = environment(), False
    for stage in ("evaluate", "report"):
        there = evidence.manifest.get("stages", {}).get(stage, {}).get("environment", {})
        if there.get("code_sha256") != here["code_sha256"]:
            before, now = (f"{e.get('distill')} {e.get('revision')}" for e in (there, here))
            why = f"made by distill {before}, this is {now}: other code may give other bytes"
            yield Check("again", f"the code of {stage}", "skipped", why)
            other_code = True
    with tempfile.TemporaryDirectory() as place:
        run = _linked(evidence, Path(place))
        try:
            stored = read_json(run.path("answers/suites.json"))
            if not (skipped := _why_not_measured(run, stored)):
                suites, items = [*map(Suite.model_validate, stored)], held_out_items(run.folder)[1]
                measure(run, suites, find_overlap(run, items, suites))
            report.main(run)
        except DistillError as error:
            yield Check("again", "evaluation.json", "differs", str(error))
            return
        for name in evidence.hashes:
            if name.startswith(MEASURED) and skipped:
                yield Check("again", name, "skipped", skipped)
            elif name.startswith((*MEASURED, *REPORTED)):
                yield _compared(evidence.folder / name, run.path(name), name, other_code)


def _linked(evidence: RunEvidence, place: Path) -> Run:
    """Return a run elsewhere of links to what was recorded, with the report's ledger and name; what
    is written takes a link's place."""
    config = open_run(evidence.folder).config
    name = read_tree(evidence.folder / "scorecard.json").get("name") or config.name
    run = Run(config.model_copy(update={"name": name, "runs": place}), place / "run")
    for file in (MANIFEST, *evidence.hashes):
        if not file.startswith(("release/", *REPORTED)) and (evidence.folder / file).is_file():
            run.path(file).parent.mkdir(parents=True, exist_ok=True)
            run.path(file).symlink_to((evidence.folder / file).resolve())
    run.path(LEDGER).write_bytes(evidence.ledger_at("report") or b"")
    return run


def _why_not_measured(run: Run, suites: Sequence[dict[str, Any]]) -> str | None:
    """Return why stored answers cannot be scored: that needs programs of models, which may not run,
    or a function of the user's."""
    tasks = {item.task for item in held_out_items(run.folder)[1]}
    rows = [row for name, row in read_json(run.path(TASKS_FILE)).items() if name in tasks]
    rows += [part["task"] for suite in suites for part in suite["parts"]]
    kinds = {row["checker"]["kind"] for row in rows if row.get("checker")}
    if unknown := sorted(kinds - KINDS.keys() - PROVIDED["checker"].keys()):
        return f"checker {unknown[0]} is a function that this process was not given"
    programs = bool(kinds & RUNS_CODE) and allowed() == "no"
    return "its task runs programs: --allow-code makes it again" if programs else None


def _compared(old: Path, new: Path, name: str, other_code: bool) -> Check:
    """Compare a file with the same one made again: every byte, or of other code every figure."""
    if not (old.is_file() and new.is_file()):
        return Check("again", name, "differs", "only one of the two is there")
    with old.open("rb") as one, new.open("rb") as other:
        lines = enumerate(zip_longest(one, other), 1)
        where = next((f"line {n}" for n, (a, b) in lines if a != b), "")
    if where and other_code and name in WORDED:
        why = "worded by another distill; scorecard.json is compared"
        return Check("again", name, "skipped", why)
    if where and other_code and name.endswith(".json"):
        before, now = (figures(read_json(path)) for path in (old, new))
        # six digits of those that both state: more were written once
        differ = [k for k in before if k in now and f"{before[k]:.6g}" != f"{now[k]:.6g}"]
        where = ", ".join(differ[:3])
    return verdict("again", name, not where, where)


def figures(tree: object, path: str = "") -> dict[str, float]:
    """Return the numbers in a tree of JSON by their paths, and how long its lists are."""
    if isinstance(tree, int | float):
        return {path: tree}
    if not isinstance(tree, dict | list):
        return {}
    numbers: dict[str, float] = {path: len(tree)} if isinstance(tree, list) else {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        numbers |= figures(value, f"{path}.{key}" if path else f"{key}")
    return numbers


def _stored(evidence: RunEvidence) -> Iterator[Check]:
    """Hold every answer against the raw one in the store that runs share, where that is at hand."""
    store = open_run(evidence.folder).config.store_folder() / "responses"
    if not store.is_dir():
        yield Check("store", str(store), "skipped", "the store is not at hand")
        return
    try:
        with ResponseStore(store, writable=False) as log:
            for name in evidence.hashes:
                # the teacher's answers, and what an evaluation asked
                parts = set(name.split("/"))
                asking = name.startswith("answers/") and name.endswith(".jsonl")
                if name == "responses.jsonl" or (asking and not {"readings", "judge"} & parts):
                    yield _answers(log, evidence.folder, name)
    except DistillError as error:
        yield Check("store", error.where, "differs", error.what)


def _answers(log: ResponseStore, folder: Path, name: str) -> Check:
    """Read every answer of a file again from its raw bytes, and compare.

    Tokens that were estimated may have been counted since, and what failed may have been asked
    again.
    """
    responses, lost = read_records(folder / name, Response), list[int]()
    for line, response in enumerate(responses, 1):
        key = ("response", Response.make_id(response.request_key, response.sample))
        if response.stop != "error" and key not in log:
            lost.append(line)
            continue
        facts = {
            "key": response.request_key,
            **response.model_dump(include={"sample", "prompt_id"}),
        }
        request = Request(**facts, messages=(), sampling=Sampling())
        if not any(
            came.model_copy(update={"usage": response.usage} if came.usage.estimated else {})
            == response
            for came in log.responses(request)
        ):
            return Check("store", name, "differs", f"line {line}")
    if not lost:
        return Check("store", name, "same")
    if len(lost) == len(responses):
        return Check("store", name, "skipped", "the store holds none of these answers")
    return Check("store", name, "missing", f"line {lost[0]}: the store does not hold it")


def _together(evidence: RunEvidence) -> Iterator[Check]:
    """Look whether adapter, merged model and release are the evaluated ones and as recorded."""
    folder, release = evidence.folder, evidence.folder / "release"
    student = read_json(folder / "answers/models.json")["student"]
    adapter, model = student.get("adapter_sha256"), student.get("model_sha256")
    read = next(m for s, m in evidence.markers.items() if s.name == "evaluate")["fingerprint"]
    last = "refined/" if f"file refined/{WEIGHTS}" in read else ""
    in_card = read_tree(folder / "scorecard.json").get("models", {}).get("student", {})
    trained = read_json(folder / f"{last}training.json")
    for what, sha256 in (
        (f"adapter of {last}training.json", trained.get("adapter_sha256")),
        ("adapter of scorecard.json", in_card.get("adapter_sha256")),
        (f"{last}{WEIGHTS}", evidence.hashes.get(f"{last}{WEIGHTS}")),
    ):
        yield verdict("together", what, sha256 == adapter, "is not the evaluated one")
    if model:
        same = _hash(folder / f"{last}merged") == model
        yield verdict("together", f"{last}merged", same, "is not the evaluated model")
    if not release.is_dir():
        return
    for name in evidence.manifest.get("release", {"release/README.md": None}):
        yield evidence.compared("release", name)
    if (release / "adapter").is_dir() or not (release / "parity.json").is_file():
        same = _hash(release / WEIGHTS) == adapter
        yield verdict("release", "its adapter", same, "not the evaluated one")
    for name in REPORTED[::2]:
        same = _hash(release / name) == _hash(folder / name)
        yield verdict("release", f"its {name}", same, "is not the run's: publish again")
    if model and (release / "parity.json").is_file() and not any(release.glob("*.safetensors")):
        yield Check("release", "its model", "skipped", "it has other formats only")
    elif model:
        where = "evaluated and released model differ"
        yield verdict("release", "its model", _hash(release) == model, where)
    else:
        why = "an earlier distill evaluated the adapter, of which it was made"
        yield Check("release", "its model", "skipped", why)


def _hash(path: Path) -> str | None:
    """Return the hash of a file, or of the model in a folder; None where there is none."""
    if (path / "config.json").is_file():
        return folder_digest(path)
    return sha256_file(path) if path.is_file() else None


def show(folder: Path, checks: Sequence[Check]) -> Group:
    """Return a row for each kind of check, one for each thing it found, and what nobody watches."""
    rows = table(f"{folder}", "what", "state", "where")
    for kind in dict.fromkeys(check.kind for check in checks):
        mine = [check for check in checks if check.kind == kind]
        if same := sum(check.state == "same" for check in mine):
            rows.add_row(TITLES.get(kind, kind), "same", f"{same} of {len(mine)}")
        for check in mine:
            if check.state != "same":
                rows.add_row(check.what, check.state, check.where)
    evidence = RunEvidence(folder)
    free = [name for name in evidence.outside() if name.split("/")[0] not in APART]
    outside = [f"outside the evidence: {', '.join(free)}"] if free else []
    return Group(rows, *outside, f"seal: {evidence.manifest.get(SEAL)}")


def as_facts(folder: Path, checks: Sequence[Check]) -> dict[str, object]:
    """Return the outcome for a script."""
    evidence = RunEvidence(folder)
    return {
        "run": folder.name,
        "seal": evidence.manifest.get(SEAL),
        "whole": not failures(checks),
        "checks": [check._asdict() for check in checks],
        "outside": evidence.outside(),
    }


def require_intact(folder: Path, checks: Sequence[Check]) -> None:
    """Raise DistillError (exit 8) with the first thing that differs or is missing."""
    if bad := failures(checks):
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        what = f"{bad[0].what}: {bad[0].state}, {bad[0].where}{more}"
        fix = "restore the files, or make them again with --redo STAGE"
        raise DistillError(Exit.EVALUATION, folder, what, fix)
