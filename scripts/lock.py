"""Make requirements.lock and requirements-dev.lock anew: `python scripts/lock.py [--upgrade]`.

Every package but torch and what only its GPU builds need is pinned with hashes, for Linux and macOS
and Python 3.11 to 3.13. The dev lock holds what the `dev` extra adds. Versions stay as they are,
unless `--upgrade` or pyproject.toml moves them. Needs `uv` (any recent one) beside this Python or
on the path.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_TO_PIP = re.compile(r"(?:torch|triton|nvidia-.*|cuda-.*)==")
BUILD = ("pip", "hatchling", "editables")  # the installer itself, and what builds the package
HEAD = "# Made by scripts/lock.py: all but torch, for Linux and macOS, Python 3.11 to 3.13.\n"


def compiled(target: Path, extras: list[str], options: list[str]) -> list[str]:
    """Return the blocks (a requirement with its hashes) that uv resolves; `target` holds the
    versions to keep."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if not uv:
        sys.exit("error: uv: not found (pip install uv)")
    command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version=3.11"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--constraint=constraints.txt"]
    command += [f"--output-file={target}", *extras, *options, "pyproject.toml", "-"]
    subprocess.run(command, cwd=ROOT, check=True, text=True, input="\n".join(BUILD))
    return re.findall(r"^\S.*?(?=^\S|\Z)", target.read_text(encoding="utf-8"), re.M | re.S)


def write_lock(target: Path, blocks: list[str]) -> None:
    """Write the blocks that are not left to pip."""
    kept = [block for block in blocks if not LEFT_TO_PIP.match(block)]
    target.write_text(HEAD + "".join(kept), encoding="utf-8")
    print(f"{target.name}: {len(kept)} packages")


def main(options: list[str]) -> None:
    """Resolve both locks; what the main lock pins does not stand in the dev lock again."""
    core, dev = ROOT / "requirements.lock", ROOT / "requirements-dev.lock"
    write_lock(core, blocks := compiled(core, [], options))
    locked = {block.split()[0] for block in blocks}  # without the marker, which may be wider in dev
    found = compiled(dev, ["--extra=dev"], [*options, f"--constraint={core}"])
    write_lock(dev, [block for block in found if block.split()[0] not in locked])


if __name__ == "__main__":
    main(sys.argv[1:])
