"""The network of a local adapter for transformers: from a condition and its mask to residuals on the grid of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class TokenAdapter(ModelMixin, ConfigMixin):
    """Patches of the condition, and convolutions between them, in ``width`` channels; then one residual per level.

    The last projections begin at 0, so that training starts at the base's own images.

    Args:
        in_channels: of the input, with the mask.
        channels: of each residual, one per block of the transformer that takes one; all are its width.
        num_res_blocks: blocks of convolutions before each residual.
        downscale_factor: side of a patch in pixels, that of a token.
        width: channels between the patches and the residuals.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        channels: Sequence[int] = (1152,) * 7,
        num_res_blocks: int = 1,
        downscale_factor: int = 16,
        width: int = 384,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels * downscale_factor**2, width, 3, padding=1)
        self.body = nn.ModuleList(nn.Sequential(*(_Block(width) for _ in range(num_res_blocks))) for _ in channels)
        self.out = nn.ModuleList(nn.Conv2d(width, channel, 1) for channel in channels)
        for layer in self.out:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return a residual (B, c_i, h, w) per level for (B, C, H, W), with h = H / ``downscale_factor``."""
        tokens = self.embed(F.pixel_unshuffle(x, self.config["downscale_factor"]))
        residuals = []
        for blocks, out in zip(self.body, self.out, strict=True):
            tokens = blocks(tokens)
            residuals.append(out(tokens))
        return residuals


class _Block(nn.Module):
    """A convolution over neighbouring tokens and one over channels, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.near = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.mix(F.silu(self.near(self.norm(tokens))))
