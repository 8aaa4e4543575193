"""The networks of soft edges and of line art, with the names of the published weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Level(nn.Module):
    """Convolutions of one resolution, and their edges."""

    def __init__(self, before: int, channels: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(nn.Conv2d(channels if index else before, channels, 3, padding=1) for index in range(depth))
        )
        self.projection = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for convolution in self.convs:
            x = F.relu(convolution(x))
        return x, self.projection(x)


class HED(nn.Module):
    """Holistically nested edge detection (arXiv 1504.06375), of the weights that come with ControlNet: the mean of the
    edges at five resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        before = 3
        for index, (channels, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1):
            setattr(self, f"block{index}", _Level(before, channels, depth))
            before = channels

    def forward(self, pixels: Tensor) -> Tensor:
        """Return edges (B,1,H,W) in [0,1], white on black, of RGB ``pixels`` (B,3,H,W) in [0,255]."""
        x, size, total = pixels - self.norm, pixels.shape[-2:], torch.zeros_like(pixels[:, :1])
        for index in range(1, 6):
            if index > 1:
                x = F.max_pool2d(x, 2, ceil_mode=min(x.shape[-2:]) < 2)
            x, edges = getattr(self, f"block{index}")(x)
            total = total + F.interpolate(edges, size, mode="bilinear", align_corners=False)
        return torch.sigmoid(total / 5)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        rest = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        self.conv_block = nn.Sequential(*half, nn.ReLU(), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class LineArt(nn.Module):
    """Informative drawings (arXiv 2203.12691): an encoder, three residual blocks and a decoder."""

    def __init__(self) -> None:
        super().__init__()

        def normed(convolution: nn.Module, channels: int) -> list[nn.Module]:
            return [convolution, nn.InstanceNorm2d(channels), nn.ReLU()]

        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), *normed(nn.Conv2d(3, 64, 7), 64))
        self.model1 = nn.Sequential(
            *normed(nn.Conv2d(64, 128, 3, 2, 1), 128), *normed(nn.Conv2d(128, 256, 3, 2, 1), 256)
        )
        self.model2 = nn.Sequential(*(_Residual(256) for _ in range(3)))
        self.model3 = nn.Sequential(
            *normed(nn.ConvTranspose2d(256, 128, 3, 2, 1, 1), 128), *normed(nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), 64)
        )
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())

    def forward(self, pixels: Tensor) -> Tensor:
        """Return lines (B,1,H,W) in [0,1], white on black, of RGB ``pixels`` (B,3,H,W) in [0,255]."""
        x = pixels / 255
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 4, 0, -height % 4), mode="replicate")
        for part in (self.model0, self.model1, self.model2, self.model3, self.model4):
            x = part(x)
        return 1 - x[..., :height, :width]
