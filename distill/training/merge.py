"""The student as one model: its adapter is added to the base once, in float32, and cast once to the type of the release.

The last stage that trains writes `merged/`: safetensors, config, tokenizer, chat template and generation config, and in
`source.json` whose adapter it is. Evaluation loads that folder and publishing copies it, so what is measured is what is
released. The folder appears complete or not at all.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from distill.config import Student
from distill.errors import DistillError, Exit
from distill.models import loading, registry
from distill.storage.files import (
    disk_errors,
    fsync_folder,
    read_json,
    sha256_file,
    write_json,
)
from distill.storage.locks import alive
from distill.storage.run_folder import Run
from distill.training.adapters import WEIGHTS

SOURCE = "source.json"  # the one file of merged/ that is no part of the model


def merged_student(student: Student, run: Run) -> Path:
    """Return the folder of the run's merged student.

    A run that an earlier distill trained has none: it is made now, from its adapter. Raises DistillError (exit 7) as
    `write_merged` does.
    """
    adapter, folder = run.trained("adapter"), run.trained("merged")
    source = read_json(folder / SOURCE) if (folder / SOURCE).is_file() else {}
    if source.get("adapter_sha256") != sha256_file(adapter / WEIGHTS):
        write_merged(student, adapter, folder)
    return folder


def write_merged(student: Student, adapter: Path, folder: Path) -> None:
    """Write the student with `adapter` as a model of its own, in the type of its base's files, replacing `folder`.

    Raises DistillError (exit 7) where the adapter belongs to another base or does not fit, 5 where the disk is
    full.
    """
    registry.check_base(adapter, student.model, student.revision)
    flags = {"allow_pickle": student.allow_pickle, "trust_remote_code": student.trust_remote_code}
    model = loading.load_merged(student.model, adapter, student.revision, **flags)
    folder_of_base = registry.fetch(student.model, student.revision, student.allow_pickle)
    config = read_json(folder_of_base / "config.json")
    model = model.to(getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32"))
    model.config.name_or_path = ""  # else the folder of this machine is written into the config
    vars(model.config).pop("_model_name_or_path", None)  # a GGUF's own title, not a model's id
    tokenizer = loading.load_tokenizer(student.model, student.revision, student.trust_remote_code)
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    for old in folder.parent.glob(f".{folder.name}.*"):  # of processes that were killed
        if old == work or not alive(int(old.suffix[1:])):
            shutil.rmtree(old)
    try:
        with disk_errors(folder):
            work.mkdir(parents=True)
            model.save_pretrained(work, max_shard_size="100GB")
            tokenizer.save_pretrained(work)
            write_json(work / SOURCE, {"adapter_sha256": sha256_file(adapter / WEIGHTS)})
            for path in work.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(folder, ignore_errors=True)
            work.replace(folder)
            fsync_folder(folder.parent)
    except SafetensorError as error:  # of a full disk too
        what, fix = f"could not be written: {error}", "free space, then run again"
        raise DistillError(Exit.STATE, folder, what, fix) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
