"""Move tensors between the host and a device without waiting for either."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return ``tensor`` on ``device``; a CUDA device fetches it from pinned memory when it gets to it.

    A plain ``to`` of a tensor of the host waits until the device has finished everything before it.
    """
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
