"""What the host makes for the device: sent without waiting, so that the next batch is made while the GPU computes."""

from typing import Any

import torch
from torch import Tensor


def send(tensor: Tensor, device: Any) -> Tensor:
    """Return a tensor on a device.

    A plain copy to a GPU first waits for all that it still has to do. From pinned memory it takes its place in the
    queue, and PyTorch keeps that memory until the copy is done.
    """
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
