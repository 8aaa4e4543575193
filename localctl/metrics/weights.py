"""Weights by their content, and the one way images are brought to a network's size."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from localctl.files import sha256_of_folder as sha256_of_folder

RESIZE = "torch interpolate, bicubic, antialias, clipped to 0..255, not rounded"


def resize(images: np.ndarray, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Resize uint8 (B,H,W,3) -> float32 (B,3,side,side) in [0,255], antialiased bicubic; images of that size stay as
    they are. What is not square is squeezed."""
    pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float()
    if tuple(pixels.shape[-2:]) == (side, side):
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
