"""localctl: local control of text-to-image diffusion.

Vocabulary (one word, one meaning):

- *pixels*: float (B, 3, H, W) in [-1, 1]. *condition*: control image, float (B, C, H, W) in [0, 1].
- *mask*: float (B, 1, H, W) in [0, 1], 1 = controlled. White = controlled in every file, flag and picture.
- *latents* z0, *noisy latents* z_t, *model output* (epsilon, v or sample), *predicted z0'*.
- *region*: a phrase of the prompt (or its own prompt) with a box or a mask, a strength, a start and an end
  (fractions of the outer sampling steps).
- *layout*: one prompt, size and regions. Boxes are xyxy in [0, 1]. Several prompts = a list of layouts.
- *control*: anything that steers the frozen U-Net while sampling. *base*: the frozen pipeline.
- *step*: one optimizer update.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AttentionMaps": "localctl.control.attention_maps",
    "DenseModulation": "localctl.control.dense",
    "ForwardGuidance": "localctl.control.forward_guidance",
    "Layout": "localctl.layout",
    "LayoutPredictor": "localctl.layout_predictor.model",
    "LayoutGuidance": "localctl.control.layout_guidance",
    "LocalAdapter": "localctl.adapter",
    "LocalAdapterControl": "localctl.control.local_adapter",
    "MaskedControlNet": "localctl.control.masked_controlnet",
    "NegativePrompts": "localctl.control.negative_prompts",
    "OptimizedSpaceTime": "localctl.optimization.weights",
    "Region": "localctl.layout",
    "RegionBias": "localctl.control.region_bias",
    "SpaceTimeAttention": "localctl.control.spacetime",
    "attach": "localctl.sampling",
    "generate": "localctl.sampling",
    "load_layout": "localctl.layout_io",
    "generate_optimized": "localctl.optimization.weights",
    "load_pipeline": "localctl.base",
    "optimize_weights": "localctl.optimization.weights",
    "load_predictor": "localctl.layout_predictor.model",
    "save_layout": "localctl.layout_io",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Load public names on first use, so that importing localctl stays cheap."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'localctl' has no attribute {name!r}")
