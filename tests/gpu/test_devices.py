"""GPUs by name and memory, and what is said where one is here that nothing computes on."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.economics.costs import NO_TIME
from distill.errors import DistillError
from distill.evaluation.scorers import HeldOutRequest
from distill.models import devices as gpus_module
from distill.models.devices import find_gpu, gpus, other_processes, unused_gpu
from distill.pipeline import STAGES, from_stage
from distill.planning import machine, preflight
from distill.records import Usage
from distill.storage import environment
from distill.storage.files import write_records
from distill.storage.run_folder import open_run
from tests.economics.test_run_economics import accounts, make_run
from tests.planning.test_pilot import write_config
from tests.support.fake_teacher import FakeTeacher
from tests.support.gpu import Gpu, patch_gpu

GIB = 2**30
NAMES = {  # what the driver says, and the row that this is
    ("Tesla T4", 14.75): "t4",
    ("Tesla V100-SXM2-16GB", 15.77): "v100-16gb",
    ("Tesla V100-PCIE-32GB", 31.74): "v100-32gb",
    ("NVIDIA A10", 22.1): "a10",
    ("NVIDIA A10G", 22.19): "gpu-24gb",
    ("NVIDIA L4", 22.16): "l4",
    ("NVIDIA L40", 44.39): "l40",
    ("NVIDIA L40S", 44.4): "l40s",
    ("NVIDIA RTX A6000", 47.41): "a6000",
    ("NVIDIA A100-SXM4-40GB", 39.39): "a100-40gb",
    ("NVIDIA A100-PCIE-40GB", 39.39): "a100-40gb",
    ("NVIDIA A100-SXM4-80GB", 79.14): "a100-80gb",
    ("NVIDIA A100 80GB PCIe", 79.14): "a100-80gb",
    ("NVIDIA H100 PCIe", 79.1): "h100-pcie",
    ("NVIDIA H100 80GB HBM3", 79.1): "h100",
    ("NVIDIA H100 NVL", 93.1): "h100-nvl",
    ("NVIDIA H200", 139.8): "h200",
    ("NVIDIA GH200 480GB", 94.5): "gh200",
    ("NVIDIA B200", 178.4): "b200",
    ("NVIDIA GeForce RTX 3090", 23.69): "rtx-3090",
    ("NVIDIA GeForce RTX 4090", 23.65): "rtx-4090",
    ("NVIDIA GeForce RTX 5090", 31.36): "rtx-5090",
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.99): "rtx-4090-laptop",
    ("NVIDIA GeForce RTX 5090 Laptop GPU", 23.9): "rtx-5090-laptop",
    ("NVIDIA GeForce RTX 4060 Laptop GPU", 7.99): "rtx-4060-laptop",
    # what is another device than its name's words make it look like
    ("NVIDIA GeForce RTX 3090 Ti", 23.69): None,
    ("NVIDIA GeForce RTX 4090 D", 23.65): None,
    ("NVIDIA H200 NVL", 139.8): None,
    ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.5): None,
    ("NVIDIA T4G", 14.75): None,
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 11.99): None,
    ("NVIDIA GeForce GTX 1080", 7.92): None,
}


@pytest.mark.parametrize(("device", "row"), NAMES.items(), ids=lambda v: str(v))
def test_a_gpu_is_known_by_the_words_of_its_name_and_its_memory(
    device: tuple[str, float], row: str | None
) -> None:
    gpu = find_gpu(device[0], device[1] * GIB)
    assert (gpu and gpu.machine) == row


def test_every_row_has_a_name_of_its_own_and_a_source() -> None:
    assert {row for row in NAMES.values() if row} <= {row.machine for row in gpus()}
    assert len({row.machine for row in gpus()}) == len(gpus())
    assert all(row.source and row.tflops > 0 for row in gpus())
    assert {row.machine for row in gpus() if not row.bf16} == {"t4", "v100-16gb", "v100-32gb"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a machine's PCI devices, of which there are none, and no driver."""
    monkeypatch.setattr(gpus_module, "PCI", tmp_path / "pci")
    monkeypatch.setattr(gpus_module, "NVIDIA", tmp_path / "driver")
    monkeypatch.setattr(gpus_module, "KFD", str(tmp_path))
    monkeypatch.setattr(gpus_module.shutil, "which", lambda name: None)
    for variable in gpus_module.HIDING:
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def plug(folder: Path, vendor: str) -> None:
    (folder / "pci/0000:01:00.0").mkdir(parents=True)
    (folder / "pci/0000:01:00.0/vendor").write_text(f"{vendor}\n")
    (folder / "pci/0000:01:00.0/class").write_text("0x030200\n")


DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\n"


@pytest.mark.parametrize(
    ("vendor", "driver", "cuda", "hidden", "words"),
    [
        ("0x10de", "", "13.0", None, "an NVIDIA GPU is here and is not used: no driver is loaded"),
        ("0x10de", DRIVER, "13.0", None, "driver 470.82.01 is too old for torch"),
        ("0x10de", DRIVER, None, None, "is a build without CUDA: install the one with it"),
        ("0x10de", DRIVER, "13.0", "", "CUDA_VISIBLE_DEVICES='' hides it"),
        ("0x10de", DRIVER, "13.0", "-1", "CUDA_VISIBLE_DEVICES='-1' hides it"),
        ("0x1002", "", None, None, "an AMD GPU is here and is not used: torch"),
        ("0x8086", "", None, None, None),
    ],
)
def test_a_gpu_that_is_not_used_is_named_with_the_reason(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    vendor: str,
    driver: str,
    cuda: str | None,
    hidden: str | None,
    words: str | None,
) -> None:
    plug(here, vendor)
    if driver:
        (here / "driver").write_text(driver)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    line = unused_gpu()
    assert (words is None and line is None) or (words and line and words in line), line


@pytest.mark.parametrize(("backend", "name"), [("backends.mps", "MPS"), ("xpu", "XPU")])
def test_a_gpu_of_another_interface_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, backend: str, name: str
) -> None:
    assert unused_gpu() is None
    monkeypatch.setattr(f"torch.{backend}.is_available", lambda: True)
    line = unused_gpu()
    assert line and name in line and "is not used" in line


LISTED = """Failed to look up a process
123, /usr/bin/python3, 20480
{pid}, python, 500
77, [Insufficient Permissions], [N/A]
"""


def test_a_gpu_that_others_fill_is_planned_with_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"NVIDIA L4": 24 * GIB, "NVIDIA A100-SXM4-40GB": 40 * GIB}
    two = [SimpleNamespace(name=name, total_memory=size) for name, size in sizes.items()]
    place = torch.device("cuda", 0)
    monkeypatch.setattr("distill.models.devices.device", lambda: place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: two[getattr(n, "index", n)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (3 * GIB, 24 * GIB))

    def listed(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        text = LISTED.format(pid=gpus_module.os.getpid())
        return subprocess.CompletedProcess([], 0, text)

    monkeypatch.setattr(gpus_module.subprocess, "run", listed)
    assert other_processes() == ["/usr/bin/python3 (pid 123) 21.5 GB"]
    found = machine.measure(())
    assert (found.name, found.memory, found.free) == ("NVIDIA L4", 24 * GIB, 3 * GIB)
    assert "3.2 GB of 25.8 GB are free" in found.notes[0] and "pid 123" in found.notes[0]
    assert "2 GPUs" in found.notes[1] and "NVIDIA A100-SXM4-40GB with 42.9 GB" in found.notes[1]

    def no_room(place: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", no_room)
    assert machine.measure(()).free == 0 and "pid 123" in machine.measure(()).notes[0]


def test_the_gpu_that_computes_stands_in_the_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(DRIVER)
    monkeypatch.setattr(environment, "DRIVERS", (tmp_path / "version",))
    assert environment.gpu_facts() == {}  # a driver alone computes nothing
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="L4", total_memory=5)
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    facts = {"gpu": "L4", "gpu_memory": 5, "driver": "470.82.01", "cuda": "13.0"}
    assert environment.gpu_facts() == facts and facts.items() <= environment.environment().items()


@pytest.mark.parametrize(
    ("gpu", "memory", "why"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, None),
        ("NVIDIA H100 PCIe", 79.1, "this was measured on NVIDIA H100 PCIe"),
        (None, 0, "evaluation.machine is h100 (H100 HBM3), and this was measured on a Xeon"),
    ],
)
def test_a_gpu_s_price_is_that_of_the_gpu_that_ran(
    tmp_path: Path, gpu: str | None, memory: float, why: str | None
) -> None:
    run = make_run(tmp_path, {"model": "a/teacher"}, machine="h100")
    made = {"processor": "a Xeon", **({"gpu": gpu, "gpu_memory": memory * GIB} if gpu else {})}
    run.note("stages", {"evaluate": {"environment": made}})
    usage = {"student": Usage(seconds=0.5, output_tokens=60, device=gpu or "")}
    requests = [HeldOutRequest(item=f"i{n}", cluster="d", usage=usage) for n in range(3)]
    write_records(run.path("requests.jsonl"), requests)
    cost = accounts(run, None)["cost"]["student"]
    assert (cost["dollars_per_1k"] is None) == (why is not None)
    assert why is None or why in cost["reasons"]["dollars_per_1k"]


def test_a_run_says_that_a_gpu_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeTeacher() as teacher:
        run = open_run(write_config(tmp_path, teacher))
    there = "an NVIDIA GPU is here and is not used: x"
    monkeypatch.setattr(preflight, "unused_gpu", lambda: there)
    preflight.require(run, from_stage("generate")[:1])  # which loads nothing
    assert not capsys.readouterr().err
    preflight.require(run, from_stage("train")[:1])
    line = "device: the CPU; an NVIDIA GPU is here and is not used: x\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("key", ["student.dtype", "train.bf16"])
def test_a_type_that_a_gpu_emulates_is_refused_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    with FakeTeacher() as teacher:
        value = "bfloat16" if key == "student.dtype" else "true"
        run = open_run(write_config(tmp_path, teacher), [f"{key}={value}"])
    preflight.require(run, STAGES)
    patch_gpu(monkeypatch, Gpu("Tesla T4", (7, 5)))
    with pytest.raises(DistillError, match=f"{key}: Tesla T4 does not compute in bfloat16"):
        preflight.require(run, STAGES)


def test_seconds_of_another_device_are_no_part_of_a_gpu_s_cost(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"model": "a/teacher"})
    assert accounts(run, None)["cost"]["student"]["dollars_per_1k"] is not None
    run.note("stages", {"evaluate": {"environment": {"gpu": "NVIDIA L4", "gpu_memory": 1}}})
    cost = accounts(run, None)["cost"]["student"]  # which the CPU of an earlier run answered
    assert cost["dollars_per_1k"] is None and cost["reasons"]["dollars_per_1k"] == NO_TIME
    usage = Usage(seconds=1.5, device="NVIDIA L4")
    assert (
        Usage.model_validate_json(usage.model_dump_json()) == usage
        and "device" not in Usage().model_dump_json()
    )
