"""Checkpoints that survive a kill, a full disk and damage, and say so when one does not.

A checkpoint is a folder: safetensors (no pickle anywhere), `state.json`, and last `manifest.json`
with the SHA-256 of each file. It is written under a temporary name, synced, renamed, read back and
compared; only then are old ones removed, and never fewer than two kept. Loading checks every byte
before it is used: a damaged checkpoint is passed over loudly for the one before, and where none is
intact the run stops rather than begin anew.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import DistillError, Exit
from distill.records import digest
from distill.storage.files import replacing, sha256_file
from distill.storage.progress import say
from distill.training.adapters import read_tensors

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
        return read_tensors(path) if path.exists() else {}

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
    """Write and verify a checkpoint, and keep the newest `keep`; raises DistillError (exit 7)."""
    target = parent / f"step-{step:08d}"
    try:
        with replacing(target) as work:
            for name, group in tensors.items():
                save_file(dict(group), work / f"{name}.safetensors")
            (work / "state.json").write_text(json.dumps(dict(state), allow_nan=False))
            files = {path.name: sha256_file(path) for path in sorted(work.iterdir())}
            body = {"format": FORMAT, "files": files, **facts, "step": step}
            manifest = json.dumps({**body, "checksum": digest(body)}, allow_nan=False)
            (work / MANIFEST).write_text(manifest)
    except (OSError, SafetensorError) as error:
        what = f"could not be written: {getattr(error, 'strerror', None) or error}"
        fix = "free space and run again; the checkpoint before it is kept"
        raise DistillError(Exit.TRAINING, target, what, fix) from None
    saved = read(target)
    if isinstance(saved, str):
        raise DistillError(Exit.TRAINING, target, saved, "check the disk; older ones are kept")
    for old in sorted(parent.glob(FOLDERS))[: -max(2, keep)]:
        shutil.rmtree(old)
    return saved


def read(folder: Path) -> Checkpoint | str:
    """Return the checkpoint in `folder` with every file verified, or what is wrong with it."""
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        checksum = body.pop("checksum")
        if digest(body) != checksum:
            return f"{MANIFEST} is damaged"
        for name, sha256 in body["files"].items():
            if sha256_file(folder / name) != sha256:
                return f"{name} is damaged"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} is missing or unreadable"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is damaged"
    if body["format"] != FORMAT:
        return f"format {body['format']}, this is {FORMAT}"
    return Checkpoint(folder, body)


def latest(parent: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None where none was ever saved.

    Raises DistillError (exit 7) where there are checkpoints and all are damaged.
    """
    folders = sorted(parent.glob(FOLDERS))
    for folder in reversed(folders):
        checkpoint = read(folder)
        if isinstance(checkpoint, Checkpoint):
            return checkpoint
        say(f"WARNING: {folder}: {checkpoint}; falling back to the checkpoint before it")
    if folders:
        what = f"none of {len(folders)} checkpoints is intact"
        raise DistillError(Exit.TRAINING, parent, what, "--redo train starts again from step 0")
    return None
