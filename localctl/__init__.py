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

from typing import TYPE_CHECKING

from localctl.lazy import lazy_names

if TYPE_CHECKING:
    from localctl.adapter import LocalAdapter as LocalAdapter
    from localctl.control.attention_maps import AttentionMaps as AttentionMaps
    from localctl.control.dense import DenseModulation as DenseModulation
    from localctl.control.forward_guidance import ForwardGuidance as ForwardGuidance
    from localctl.control.layout_guidance import LayoutGuidance as LayoutGuidance
    from localctl.control.local_adapter import LocalAdapterControl as LocalAdapterControl
    from localctl.control.masked_controlnet import MaskedControlNet as MaskedControlNet
    from localctl.control.negative_prompts import NegativePrompts as NegativePrompts
    from localctl.control.region_bias import RegionBias as RegionBias
    from localctl.control.spacetime import SpaceTimeAttention as SpaceTimeAttention
    from localctl.layout import Layout as Layout
    from localctl.layout import Region as Region
    from localctl.layout_io import load_layout as load_layout
    from localctl.layout_io import save_layout as save_layout
    from localctl.layout_predictor.model import LayoutPredictor as LayoutPredictor
    from localctl.layout_predictor.model import load_predictor as load_predictor
    from localctl.pipelines import load_pipeline as load_pipeline
    from localctl.sampling import attach as attach
    from localctl.sampling import generate as generate
    from localctl.weight_search.weights import OptimizedSpaceTime as OptimizedSpaceTime
    from localctl.weight_search.weights import generate_optimized as generate_optimized
    from localctl.weight_search.weights import optimize_weights as optimize_weights

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "adapter": ["LocalAdapter"],
        "pipelines": ["load_pipeline"],
        "control.attention_maps": ["AttentionMaps"],
        "control.dense": ["DenseModulation"],
        "control.forward_guidance": ["ForwardGuidance"],
        "control.layout_guidance": ["LayoutGuidance"],
        "control.local_adapter": ["LocalAdapterControl"],
        "control.masked_controlnet": ["MaskedControlNet"],
        "control.negative_prompts": ["NegativePrompts"],
        "control.region_bias": ["RegionBias"],
        "control.spacetime": ["SpaceTimeAttention"],
        "layout": ["Layout", "Region"],
        "layout_io": ["load_layout", "save_layout"],
        "layout_predictor.model": ["LayoutPredictor", "load_predictor"],
        "weight_search.weights": ["OptimizedSpaceTime", "generate_optimized", "optimize_weights"],
        "sampling": ["attach", "generate"],
    },
)
