"""Checkpoints that survive a kill, a full disk and damage, and say so when one does not.

A checkpoint is a folder of safetensors, `state.json`, and last `manifest.json` with the SHA-256 of
each file. It is renamed into its place and read back before old ones are removed, never fewer than
two kept. A damaged one is passed over loudly; where none is intact the run stops.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from distill.errors import DistillError, Exit
from distill.records import digest
from distill.storage.files import disk_errors, replacing, sha256_file
from distill.storage.progress import say

FORMAT = 1
MANIFEST = "manifest.json"
FOLDERS = "step-[0-9]*"


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint: its folder, and the facts of its manifest."""

    folder: Path
    facts: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read the tensors saved under `name`; empty where there are none."""
        path = self.folder / f"{name}.safetensors"
        return load(path.read_bytes()) if path.exists() else {}

    def state(self) -> dict[str, Any]:
        """Read the state that was saved as JSON."""
        return json.loads((self.folder / "state.json").read_bytes())


def save(
    parent: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    facts: Mapping[str, Any],
    keep: int,
) -> Checkpoint:
    """Write and verify a checkpoint, and keep the newest `keep`.

    Raises DistillError: exit 5 where the disk is full, 7 where other bytes are read back.
    """
    target = parent / f"step-{step:08d}"
    with disk_errors(target), replacing(target) as work:
        for name, group in tensors.items():
            save_file(dict(group), work / f"{name}.safetensors")
        (work / "state.json").write_text(json.dumps(dict(state), allow_nan=False))
        files = {path.name: sha256_file(path) for path in sorted(work.iterdir())}
        body = {"format": FORMAT, "files": files, **facts, "step": step}
        manifest = json.dumps({**body, "checksum": digest(body)}, allow_nan=False)
        (work / MANIFEST).write_text(manifest)
    saved = read(target)
    for old in sorted(parent.glob(FOLDERS))[: -max(2, keep)]:
        shutil.rmtree(old)
    return saved


def read(folder: Path) -> Checkpoint:
    """Return an intact checkpoint; raises DistillError (exit 7) for one that is not."""
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        if body.pop("checksum") != digest(body) or body["format"] != FORMAT:
            raise ValueError
        files = body["files"].items()
        damage = [name for name, sha256 in files if sha256_file(folder / name) != sha256]
        if not damage:
            return Checkpoint(folder, body)
    except OSError as error:
        damage = [Path(error.filename or MANIFEST).name]
    except (ValueError, KeyError, AttributeError, TypeError):
        damage = [MANIFEST]
    what, fix = f"{damage[0]} is missing or damaged", "check the disk; other ones are kept"
    raise DistillError(Exit.TRAINING, folder, what, fix)


def latest(parent: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint, None where none was saved; exit 7 if none is intact."""
    folders = sorted(parent.glob(FOLDERS))
    for folder in reversed(folders):
        try:
            return read(folder)
        except DistillError as error:
            say(f"WARNING: {folder}: {error.what}; falling back to the checkpoint before it")
    if folders:
        what = f"none of {len(folders)} checkpoints is intact"
        raise DistillError(Exit.TRAINING, parent, what, "--redo train starts again from step 0")
    return None
