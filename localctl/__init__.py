"""Local control of text-to-image diffusion models.

Vocabulary (one word, one meaning):

- *pixels*: float (B, 3, H, W) in [-1, 1]. *condition*: control image, float (B, C, H, W) in [0, 1].
- *mask*: float (B, 1, H, W) in [0, 1], 1 = controlled. White = controlled in every file, flag and image.
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
    from localctl.adapter_files import find_adapter as find_adapter
    from localctl.adapter_files import load_adapter as load_adapter
    from localctl.api import compare_sets as compare_sets
    from localctl.api import evaluate_fid as evaluate_fid
    from localctl.api import generate_set as generate_set
    from localctl.api import train as train
    from localctl.api import train_settings as train_settings
    from localctl.bases import BaseConfig as BaseConfig
    from localctl.control.attach import attach as attach
    from localctl.control.attention_maps import AttentionMaps as AttentionMaps
    from localctl.control.base import BoundControl as BoundControl
    from localctl.control.base import CallContext as CallContext
    from localctl.control.base import Control as Control
    from localctl.control.dense import DenseModulation as DenseModulation
    from localctl.control.forward_guidance import ForwardGuidance as ForwardGuidance
    from localctl.control.image_controls import LocalAdapterControl as LocalAdapterControl
    from localctl.control.image_controls import MaskedControlNet as MaskedControlNet
    from localctl.control.layout_guidance import LayoutGuidance as LayoutGuidance
    from localctl.control.negative_prompts import NegativePrompts as NegativePrompts
    from localctl.control.presets import controls as controls
    from localctl.control.presets import sampling_of as sampling_of
    from localctl.control.region_bias import RegionBias as RegionBias
    from localctl.control.serialization import load_control as load_control
    from localctl.control.serialization import load_controls as load_controls
    from localctl.control.serialization import save_controls as save_controls
    from localctl.control.spacetime import SpaceTimeAttention as SpaceTimeAttention
    from localctl.data.config import DataConfig as DataConfig
    from localctl.denoisers.base import AttentionLayer as AttentionLayer
    from localctl.drawing import grid as grid
    from localctl.drawing import outline as outline
    from localctl.drawing import render_layout as render_layout
    from localctl.evaluation.settings import FidSettings as FidSettings
    from localctl.images import condition_to_pil as condition_to_pil
    from localctl.images import load_image as load_image
    from localctl.layout import Layout as Layout
    from localctl.layout import Region as Region
    from localctl.layout_io import load_layout as load_layout
    from localctl.layout_io import save_layout as save_layout
    from localctl.layout_predictor.model import LayoutPredictor as LayoutPredictor
    from localctl.layout_predictor.model import load_predictor as load_predictor
    from localctl.masks import load_mask as load_mask
    from localctl.metrics.extractors import load_extractor as load_extractor
    from localctl.pipelines import load_pipeline as load_pipeline
    from localctl.sampling import generate as generate
    from localctl.sampling_settings import Sampling as Sampling
    from localctl.settings import ConditionConfig as ConditionConfig
    from localctl.settings import LossConfig as LossConfig
    from localctl.settings import MaskConfig as MaskConfig
    from localctl.training.loop import TrainResult as TrainResult
    from localctl.training.settings import AdapterConfig as AdapterConfig
    from localctl.training.settings import TrainSettings as TrainSettings
    from localctl.training.watch_settings import EarlyStoppingConfig as EarlyStoppingConfig
    from localctl.training.watch_settings import ValidationConfig as ValidationConfig
    from localctl.weight_search.weights import OptimizedSpaceTime as OptimizedSpaceTime
    from localctl.weight_search.weights import generate_optimized as generate_optimized
    from localctl.weight_search.weights import optimize_weights as optimize_weights

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "adapter": ["LocalAdapter"],
        "adapter_files": ["find_adapter", "load_adapter"],
        "api": ["compare_sets", "evaluate_fid", "generate_set", "train", "train_settings"],
        "bases": ["BaseConfig"],
        "control.attach": ["attach"],
        "control.attention_maps": ["AttentionMaps"],
        "control.base": ["BoundControl", "CallContext", "Control"],
        "control.dense": ["DenseModulation"],
        "control.forward_guidance": ["ForwardGuidance"],
        "control.image_controls": ["LocalAdapterControl", "MaskedControlNet"],
        "control.layout_guidance": ["LayoutGuidance"],
        "control.negative_prompts": ["NegativePrompts"],
        "control.presets": ["controls", "sampling_of"],
        "control.region_bias": ["RegionBias"],
        "control.serialization": ["load_control", "load_controls", "save_controls"],
        "control.spacetime": ["SpaceTimeAttention"],
        "data.config": ["DataConfig"],
        "denoisers.base": ["AttentionLayer"],
        "drawing": ["grid", "outline", "render_layout"],
        "evaluation.settings": ["FidSettings"],
        "images": ["condition_to_pil", "load_image"],
        "layout": ["Layout", "Region"],
        "layout_io": ["load_layout", "save_layout"],
        "layout_predictor.model": ["LayoutPredictor", "load_predictor"],
        "masks": ["load_mask"],
        "metrics.extractors": ["load_extractor"],
        "pipelines": ["load_pipeline"],
        "sampling": ["generate"],
        "sampling_settings": ["Sampling"],
        "settings": ["ConditionConfig", "LossConfig", "MaskConfig"],
        "training.loop": ["TrainResult"],
        "training.settings": ["AdapterConfig", "TrainSettings"],
        "training.watch_settings": ["EarlyStoppingConfig", "ValidationConfig"],
        "weight_search.weights": ["OptimizedSpaceTime", "generate_optimized", "optimize_weights"],
    },
)
