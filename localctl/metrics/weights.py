"""Resize images to the size of a network."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RESIZE = "torch interpolate, bicubic, antialias, clipped to 0..255, not rounded"


def resize(images: np.ndarray, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Resize images uint8 (B,H,W,3) to float32 (B,3,side,side) in [0,255], antialiased bicubic.

    Images of that size are not changed; images that are not square are squeezed.
    """
    pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float()
    if tuple(pixels.shape[-2:]) == (side, side):
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
