"""A base in one file of weights, in the layout of the original Stable Diffusion code, as other programs share them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from localctl.files import first_line

# A tensor of the U-Net whose last side is the width of the text.
_ATTENTION = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"


def text_width(path: Path) -> int:
    """Return the width of the text that the U-Net in a file reads, from its header alone: 768 for Stable Diffusion 1.x,
    1024 for 2.x, 2048 for XL. ValueError for a file that is no such checkpoint."""
    if path.suffix != ".safetensors":
        raise ValueError(f"The base {path} is not a .safetensors file; other kinds are pickles or not read.")
    try:
        with safe_open(path, "pt") as weights:
            if _ATTENTION in set(weights.keys()):
                return int(weights.get_slice(_ATTENTION).get_shape()[-1])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The base {path} is damaged or cut off: {first_line(error)}; fetch it again.") from error
    raise ValueError(f"The base {path} is no Stable Diffusion checkpoint; choose another, or a diffusers folder.")
