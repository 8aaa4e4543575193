"""Weights by their content, and the one way images are brought to a network's size."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from localctl.files import sha256

RESIZE = "torch interpolate, bicubic, antialias, clipped to 0..255, not rounded"


def sha256_of_folder(folder: str | Path) -> str:
    """Of all weights in a model folder, by name; of a single file of weights; for a hub id, which is neither, the id
    itself."""
    if Path(folder).is_file():
        return sha256(Path(folder))
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("*.bin"))
    if not files:
        return str(folder)
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def resize(images: np.ndarray, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Resize uint8 (B,H,W,3) -> float32 (B,3,side,side) in [0,255], antialiased bicubic; images of that size stay as
    they are. What is not square is squeezed."""
    pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float()
    if tuple(pixels.shape[-2:]) == (side, side):
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
