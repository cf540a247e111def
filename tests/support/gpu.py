"""What torch says on a GPU, for tests on a machine without one."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from transformers import AttentionInterface


class Gpu(NamedTuple):
    """A GPU by its data sheet, and how full it is."""

    name: str = "NVIDIA A10"
    capability: tuple[int, int] = (8, 6)
    total: int = 24 << 30
    free: int = 24 << 30
    reserved: int = 0
    allocated: int = 0


def patch_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None = None) -> None:
    """Let torch report a GPU; it emulates bfloat16 where it does not compute in it, as all do."""
    gpu = gpu or Gpu()
    (major, minor), memory = gpu.capability, gpu.total
    facts = SimpleNamespace(name=gpu.name, major=major, minor=minor, total_memory=memory)
    values = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": facts,
        "mem_get_info": (gpu.free, gpu.total),
        "memory_reserved": gpu.reserved,
        "memory_allocated": gpu.allocated,
        "_check_bf16_tensor_supported": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # which then is not set for the process
    functions = AttentionInterface._global_mapping
    monkeypatch.setitem(functions, "sdpa", functions["sdpa"])  # put back after the test
