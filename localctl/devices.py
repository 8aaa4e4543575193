"""Move tensors between the host and a device without waiting for either."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return ``tensor`` on ``device``, which fetches it when it gets to it (a CUDA device from pinned memory).

    A plain ``to`` of a tensor of the host waits until the device has finished everything before it.
    """
    kind = torch.device(device).type
    if tensor.device.type == "cpu" and kind == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=kind != "mps")  # which would read memory that is free again


class Readback:
    """A copy of a small tensor for the host, which waits for it only when it reads it: at best a step later, when the
    device has more to do and does not run dry."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._copy.copy_(tensor, non_blocking=tensor.is_cuda)
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Tensor:
        """Return the copy, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy
