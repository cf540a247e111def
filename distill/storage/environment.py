"""What a run is made with and by: code, versions, processor, GPU, threads, processes."""

import hashlib
import os
import platform
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from distill import TABLES, __version__
from distill.errors import DistillError, Exit

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch transformers accelerate peft datasets safetensors gguf numpy scipy sacrebleu".split()
)
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/kfd"), Path("/dev/dxg"))
LAUNCHED = re.compile(r"accelerate.*--num[_-]processes[\0=](\d+)")  # torchrun starts what it says
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def environment() -> dict[str, object]:
    """Return the facts that a result may depend on, as plain JSON values."""
    return {
        "distill": __version__,
        "revision": revision(),
        "code_sha256": code_hash(),
        "python": platform.python_version(),
        "libraries": {name: installed(name) for name in LIBRARIES if installed(name)},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        **gpu_facts(),
    }


def gpu_facts() -> dict[str, object]:
    """Return the GPU that this process computes on, its driver and CUDA; {} where it has none."""
    if not any(path.exists() for path in DRIVERS):  # so that torch need not be imported
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    properties = torch.cuda.get_device_properties(place)
    return {
        "gpu": properties.name,
        "gpu_memory": properties.total_memory,
        "driver": driver_version(DRIVERS[0]),
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
    }


def driver_version(path: Path) -> str | None:
    """Return the version of NVIDIA's driver by the file in which it says it, if it is loaded."""
    match = re.search(r"\d+\.\d+[.\d]*", path.read_text()) if path.exists() else None
    return match and match[0]


@cache
def installed(name: str) -> str | None:
    """Return the version of an installed package without importing it, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def code_hash() -> str:
    """Hash names and contents of the package's files, the same in a checkout and installed."""
    code = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".j2", ".css")]
    code.append(PACKAGE / "tasks/sandbox/refused_calls.txt")
    files = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(code)}
    files |= {path.name: path for path in sorted(TABLES.glob("*.yaml"))}
    parts = [f"{n}\n".encode() + hashlib.sha256(p.read_bytes()).digest() for n, p in files.items()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@cache
def revision() -> str | None:
    """Return the source tree's commit, with `+` where it has changes; None outside a checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    words = "git --no-optional-locks describe --always --exclude=* --abbrev=12 --dirty=+".split()
    try:
        done = subprocess.run(words, cwd=PACKAGE.parent, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode().strip() or None


def cpu_facts() -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor() -> str:
    """Return the processor's name."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launcher_command() -> str:
    """Return the parent's command line, its words separated by NUL; empty where it is unknown."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def check_world(stated: Mapping[str, int | None], world: int) -> None:
    """Stop (exit 7) where `world` processes run, and a source of `stated` says another number.

    `accelerate launch --cpu --num_processes 2` starts one and says nothing: so the launcher's
    command line is such a source too, and Slurm's step where nothing else launched its tasks.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        stated = {**stated, "srun": tasks}
    match = LAUNCHED.search(launcher_command())
    for source, number in {**stated, "launcher": match and int(match[1])}.items():
        if number and number != world:
            what = f"{number} processes were asked for, {world} came"
            fix = f"accelerate launch --multi_gpu --num_processes {number} scripts/train.py CONFIG"
            raise DistillError(Exit.TRAINING, source, what, fix)


class Interrupt:
    """Whether a stop was requested: the running step is saved first; a second signal ends it."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Catch Ctrl-C, SIGTERM and SIGHUP in the block, in the main thread; nohup keeps its SIGHUP."""
    interrupt = Interrupt()
    main = threading.current_thread() is threading.main_thread()
    before = {kind: signal.getsignal(kind) for kind in STOPS if main}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:
        del before[signal.SIGHUP]
    try:
        for kind in before:
            signal.signal(kind, interrupt)
        yield interrupt
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
