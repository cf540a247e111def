"""What a run recorded about its own files, and whether they still are what was recorded.

The manifest's seal covers the hash of every stage's marker, and a marker that of every file of its
stage: one number stands for the run.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.errors import DistillError
from distill.records import LedgerEntry
from distill.storage.files import read_json, sha256_file
from distill.storage.run_folder import SEAL, Stage, sealed

MANIFEST, CONFIG, LEDGER = "manifest.json", "config.json", "ledger.jsonl"
# A lock, what --redo set aside, a release that was not finished
APART = (".lock", ".old", ".release")


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
    """Manifest, markers and ledger of a run's folder; what is damaged counts as nothing."""

    def __init__(self, folder: Path, stages: Sequence[Stage]) -> None:
        def tree(name: str) -> dict[str, Any]:
            try:
                facts = read_json(folder / name)
            except DistillError:
                return {}
            return facts if isinstance(facts, dict) else {}

        self.folder, self.manifest = folder, tree(MANIFEST)
        done = self.manifest.get("stages", {})
        performed = [s for s in stages if s.name in done or (folder / s.marker).exists()]
        self.markers = {stage: tree(stage.marker) for stage in performed}

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
            if marker.get("fingerprint", {}).get(f"file {name}") != evidence.hashes.get(name):
                yield Check(kind, name, "differs", f"{kind} read another file of that name")
        ledger = hashlib.sha256(evidence.ledger_at(kind, after=True) or b"").hexdigest()
        yield verdict(kind, f"{LEDGER} up to {kind}", ledger == marker.get("ledger"))
    for kind, files in evidence.manifest.get("sources", {}).get("external", {}).items():
        yield from (evidence.compared(kind, name) for name in files)
