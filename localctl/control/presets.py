"""Settings of the controls for the known bases, by base and by the control's name on the command line.

Stable Diffusion's are the published ones; what is not named here has the control's own default. The embedded base has
coarser grids and a text encoder of its own, so its settings come from ``python -m research.layout_benchmark
--tune`` and docs/log.md, on layouts that the benchmark does not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# sites None would be the middle block and the first up block with cross-attention, as published for Stable Diffusion.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "sd15": {"guidance": {"sites": ("mid/8", "up/4")}},
        "sd21": {"guidance": {"sites": ("mid/8", "up/4")}},
        "sdxl": {"guidance": {"sites": ("mid/4", "up/4")}},
        # The first third of its steps is noise (abar 0.01 at t = 670); the layout is settled in the second.
        "micro": {
            "bias": {"strength": 2.0, "outside_strength": 2.0, "hide_phrases": True},
            "dense": {
                "rest": "free",
                "separate_texts": False,
                "hide_phrases": True,
                "decay": 0.0,
                "end": 0.7,
                "w_self": 1.0,
            },
            "guidance": {"sites": ("mid/4", "up/2"), "threshold": 0.02, "start": 0.2, "end": 0.7},
            # Its text encoder has read no "photo", only the names of the scenes' objects.
            "spacetime": {"weight": 1.0, "hide_phrases": True, "end": 0.7, "template": "{}"},
            "spacetime_optimized": {
                "weight": 1.0,
                "hide_phrases": True,
                "end": 0.7,
                "template": "{}",
                "learning_rate": 0.1,
            },
        },
    }
)

# What a control's preset changes beside another control: where attention lies in the regions already, the energy of the
# guidance is low, and it does nothing. So they come one after the other.
BESIDE: Mapping[str, Mapping[tuple[str, str], Mapping[str, Any]]] = MappingProxyType(
    {"micro": {("bias", "guidance"): {"start": 0.6}}}
)

# What pictures are drawn with under a control or a composition, where nothing else is said: ``scheduler``,
# ``guidance_scale``. Controls of attention act through the prompt's rows alone, and against a place that the first
# noise suggests: a higher scale and fresh noise in each step let them through. Guidance moves the latents itself, and
# fresh noise undoes some of it, unless another control holds the objects.
SAMPLING: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "micro": {
            "bias": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "dense": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "spacetime": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "spacetime_optimized": {"guidance_scale": 4.0},  # found with DDIM
            "bias+guidance": {"scheduler": "ddpm", "guidance_scale": 4.0},
        }
    }
)
