"""What is shipped and how it is set up: the wheel, the locks, the scripts, and the words about
torch's build."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from scripts import torch_size

ROOT = Path(__file__).parent.parent
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)")


def blocks(name: str) -> dict[str, str]:
    """Return the requirements of a lock by name, each with its hashes."""
    text = (ROOT / name).read_text()
    found = re.findall(r"^\S.*?(?=^\S|\Z)", text, re.M | re.S)
    return {m[1]: block for block in found if (m := PINNED.match(block))}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel without network, from a copy so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("distill-*.whl"))


def test_the_wheel_carries_configs_and_license(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "eval/suites").glob("*.yaml")]
    files += (ROOT / "data/forgetting").iterdir()
    templates = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "distill/report/templates").iterdir()
    }
    shipped = {path.relative_to(ROOT).as_posix() for path in files}
    assert {f"distill/_data/{name}" for name in shipped} | templates <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "runs/"))]


def test_the_wheel_plans_in_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import distill; from distill.cli import main\n"
        f"assert distill.__file__.startswith({str(site)!r}), distill.__file__\n"
        "sys.exit(main(['plan', 'configs/quickstart.yaml']))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=empty)
    assert done.returncode == 0, done.stderr
    assert "96 prompts" in done.stdout
    assert not list(empty.iterdir())


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_every_locked_package_has_hashes_and_torch_is_left_out(name):
    locked = blocks(name)
    assert len(locked) > 10
    assert all("--hash=sha256:" in block for block in locked.values())
    assert not [n for n in locked if n == "torch" or n.startswith(("nvidia", "cuda", "triton"))]


def test_the_locks_and_constraints_cover_the_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, dev = blocks("requirements.lock"), blocks("requirements-dev.lock")
    plain = re.compile(r"[A-Za-z0-9_.-]+")
    for wanted, locked in (
        (project["dependencies"], core),
        (project["optional-dependencies"]["dev"], dev),
    ):
        names = {plain.match(line)[0].replace("_", "-").lower() for line in wanted}  # pyright: ignore
        assert names - {"torch"} <= {name.lower() for name in locked}
    assert not core.keys() & dev.keys()
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


def test_no_committed_file_names_a_registry_s_host():
    hosts = re.compile(
        "pypi" r"\.org|python" r"hosted|download\.pytorch|--(?:extra-)?index-url=?\s*http"
    )
    for name in ("requirements.lock", "requirements-dev.lock", "constraints.txt", "pyproject.toml"):
        assert not hosts.search((ROOT / name).read_text()), name
    for path in [*(ROOT / "scripts").glob("*"), ROOT / ".ci/run"]:
        if path.is_file():
            assert not hosts.search(path.read_text()), path.name


@pytest.mark.parametrize("script", ["setup.sh", "quickstart.sh", "test.sh", "engines.sh"])
def test_scripts_are_bash_that_parses(script):
    path = ROOT / "scripts" / script
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.fixture
def clone(tmp_path) -> Path:
    """Return a folder with what the set-up reads, and a python3 that is too old."""
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("requirements.lock", "requirements-dev.lock", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def set_up(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": "/usr/bin:/bin", "HOME": str(clone)}
    command = ["bash", "scripts/test.sh"]
    return subprocess.run(
        command, cwd=clone, env=base | environment, capture_output=True, text=True
    )


def test_an_old_python_is_refused_in_one_line(clone):
    (clone / "bin").mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        fake = clone / "bin" / name
        fake.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n'
        )
        fake.chmod(0o755)
    done = set_up(clone, PATH=f"{clone}/bin:/usr/bin:/bin")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "3.11 or later is needed, found Python 3.9.2" in done.stderr


def test_a_matching_stamp_means_no_pip(clone):
    (clone / ".venv/bin").mkdir(parents=True)
    calls = clone / "calls"
    python = clone / ".venv/bin/python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ "$2" = pip ] && exit 0\n[ "$2" = pytest ] && exit 0\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    assert set_up(clone).returncode != 0  # no pip report of torch: stops, and leaves no stamp
    stamp = clone / ".venv/installed.sha256"
    assert not stamp.exists()
    hashed = subprocess.run(
        [
            *("bash", "-c"),
            "source scripts/setup.sh; wanted_packages requirements.lock requirements-dev.lock",
        ],
        cwd=clone, capture_output=True, text=True, check=True,
    )  # fmt: skip
    stamp.write_text(hashed.stdout)
    calls.unlink()
    assert set_up(clone).returncode == 0
    assert "install" not in calls.read_text()
    (clone / "requirements.lock").write_text("# changed\n")
    assert set_up(clone).returncode != 0
    assert "install" in calls.read_text()


def test_the_build_of_torch_and_its_size_are_said(tmp_path, capsys):
    def said(*files: tuple[str, str, str]) -> str:
        rows = [
            {"metadata": {"name": n, "version": v}, "download_info": {"url": u}}
            for n, v, u in files
        ]
        (tmp_path / "report.json").write_text(json.dumps({"install": rows}))
        torch_size.main(tmp_path / "report.json")
        return capsys.readouterr().out

    wheel, gone = tmp_path / "torch-2.13.0%2Bcpu-cp311-linux.whl", "http://127.0.0.1:9/x.whl"
    Path(str(wheel).replace("%2B", "+")).write_bytes(b"x" * 3_000_000)
    text = said(("torch", "2.13.0+cpu", f"file://{wheel}"))
    assert "torch-2.13.0+cpu-cp311-linux.whl" in text and "3 MB" in text and "TORCH_INDEX" in text
    text = said(("torch", "2.13.0", gone), ("nvidia-cudnn-cu13", "9.20", gone))
    assert "CUDA build" in text and "size not known" in text, "an unknown size is no zero"
    assert "installed already" in said()
