"""What is sent arrives, and a GPU is not waited for."""

from unittest.mock import MagicMock

import pytest
import torch

from distill.training.sharding import send


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.arange(3)
    assert send(tensor, "cpu") is tensor


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 1)])
def test_a_gpu_gets_it_from_pinned_memory_in_its_queue(device):
    tensor = MagicMock()
    send(tensor, device)
    tensor.pin_memory.return_value.to.assert_called_once_with(device, non_blocking=True)
    tensor.to.assert_not_called()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_what_a_gpu_gets_is_equal():
    values = torch.randn(1000, 1000)
    assert torch.equal(send(values, "cuda").cpu(), values)
