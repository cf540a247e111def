"""Models on a GPU: their type, where they are loaded, how an adapter is merged."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from distill.errors import DistillError, Exit
from distill.models import loading
from distill.models.devices import pick_dtype
from distill.models.registry import record_base
from distill.responders.local import local_model
from distill.responders.local.local_model import LocalResponder
from tests.support.gpu import Gpu, patch_gpu
from tests.support.tiny import make_tiny
from tests.support.training import adapted

ALLOC = "PYTORCH_ALLOC_CONF"
T4, V100, RTX_2080 = (
    Gpu("Tesla T4", (7, 5)),
    Gpu("Tesla V100-SXM2-16GB", (7, 0)),
    Gpu("NVIDIA GeForce RTX 2080", (7, 5)),
)


@pytest.mark.parametrize("gpu", [T4, V100, RTX_2080], ids=lambda gpu: gpu.name)
def test_what_is_emulated_is_not_used(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_gpu(monkeypatch, gpu)
    assert pick_dtype() == torch.float16 and pick_dtype("float32") == torch.float32
    with pytest.raises(DistillError, match=f"{gpu.name} does not compute in bfloat16") as caught:
        pick_dtype("bfloat16")
    assert caught.value.code == Exit.TRAINING and "auto" in caught.value.fix


def test_the_type_of_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_gpu(monkeypatch, Gpu())
    assert pick_dtype() == pick_dtype("bfloat16") == torch.bfloat16
    patch_gpu(monkeypatch, Gpu("NVIDIA GeForce GTX 1080", (6, 1)))  # float16 at 1/64 of the speed
    assert pick_dtype() == torch.float32


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Pretend a GPU; list the options of every `from_pretrained`, which loads on the CPU."""
    patch_gpu(monkeypatch)
    kind: Any = AutoModelForCausalLM
    load, calls = kind.from_pretrained, list[dict[str, Any]]()

    def spied(*folder: object, **options: Any) -> Any:
        calls.append(options)
        return load(*folder, **{**options, "device_map": None})

    monkeypatch.setattr(kind, "from_pretrained", spied)
    monkeypatch.setattr(local_model, "device", lambda: torch.device("cpu"))
    return calls


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_merging_takes_the_bytes_of_the_base_once_and_no_gpu(
    stored: torch.dtype, loads: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A base in float32 took twice the memory of training, on the GPU or in main memory."""
    base = make_tiny(tmp_path / "base", "qwen2", tied=False)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=stored)
    model.save_pretrained(base)
    adapter = tmp_path / "adapter"
    adapted(base).save_pretrained(adapter)
    record_base(adapter, str(base))
    loads.clear()
    merged = LocalResponder.load(str(base), "bfloat16", adapter=adapter).network
    (options,) = loads
    assert "device_map" not in options, "the base is loaded in main memory"
    assert options["dtype"] == "auto", "and in the type of its files"
    model = loading.load_model(str(base), "float32")
    whole: Any = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    expected = whole.merge_and_unload().to(torch.bfloat16).state_dict()
    assert merged.dtype == torch.bfloat16
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def test_a_model_goes_straight_to_the_gpu_in_its_type(
    loads: list[dict[str, Any]], tmp_path: Path
) -> None:
    loading.load_model(str(make_tiny(tmp_path)))
    (options,) = loads
    assert options["device_map"] == {"": torch.device("cuda", 0)}
    assert options["dtype"] == torch.bfloat16


def test_out_of_memory_while_loading_is_not_a_broken_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130.00 MiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        loading.load_model(str(folder))


def test_attention_and_memory_are_set_up_before_the_first_model(
    loads: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN builds a graph for each new shape, and each step of decoding has one."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    loading.load_model(str(make_tiny(tmp_path)))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    # PyTorch reads it once, at the first word with a GPU, which is before the first stage
    program = "import os, distill.pipeline as p; print(os.environ['PYTORCH_ALLOC_CONF'])"
    for own, expected in [({}, "expandable_segments:True"), ({ALLOC: "x:1"}, "x:1")]:
        environment = {k: v for k, v in os.environ.items() if k != ALLOC}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, **own},
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == [expected], done.stderr
