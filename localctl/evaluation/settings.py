"""The settings of `evaluate_fid.py`, typed and validated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from localctl.bases import BASES, BaseConfig, SchedulerName
from localctl.data.config import DataConfig
from localctl.records import Finite, Positive, record
from localctl.settings import ConditionConfig, MaskConfig, check_own_guidance

Prompts = Literal["with", "without", "both"]
PROMPTS: tuple[str, ...] = get_args(Prompts)


@record()
@dataclass(kw_only=True)
class FidSettings:
    """Settings for comparing generated images with photos. ValueError for settings that contradict each other.

    output_dir: folder of images, statistics and scores.
    part: which examples to use: ``val`` (held out) or ``train``, of the embedded scenes also ``test``; null: ``test``
        of the embedded scenes, ``val`` of other data.
    adapter: folder, run, hub id or weights file of a trained adapter, as for ``sample.py``; without this and without
        controlnet, the base alone is evaluated.
    controlnet: folder of a diffusers ControlNetModel to use instead of an adapter, with its residuals masked; it must
        have been trained on this kind of condition.
    weight: strength of the adapter or ControlNet.
    unconditional_scale: factor of the adapter's features beside the empty prompt; 0 makes control stronger; null: the
        adapter's own.
    control_guidance_scale: a guidance scale of the adapter's own, beside guidance_scale; null: none.
    extractor: network whose features are compared: micro_clip, efficientnet_lite0, fid or clip.
    weights: path of the extractor's weights, where it has no default; for clip, a folder or hub id.
    reference: file with the statistics of the photos; null: ref_{extractor}.npz in output_dir.
    num_images: how many images to generate; for ``ref``, how many photos to read at most.
    prompts: generate ``with`` the captions, ``without`` prompts, or ``both``.
    sample: key of one example, from which all images are generated.
    seed: seed of masks and noise.
    batch_size: images generated at once; does not change them beyond rounding.
    num_inference_steps: sampling steps per image.
    guidance_scale: scale of classifier-free guidance; null = the default of the base.
    true_cfg_scale: the same by a second call, on FLUX (default: none) and Qwen-Image (4).
    max_sequence_length: tokens of T5's or Qwen's that a transformer reads; null = its pipeline's default.
    scheduler: ddim, ddpm, pndm, lms, euler, euler_ancestral, heun, dpmpp_2m, unipc, kdpm2, kdpm2_ancestral,
        dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, dpmpp_2s, dpmpp_sde, deis, sa_solver, lcm or tcd; null = the base's own.
    device: auto, cpu, cuda, ...
    num_workers: number of Ray workers to share the images of gen and the batches of ref and score, each with a GPU or a
        CPU of this machine, or of the cluster at RAY_ADDRESS; null: none, this process does the work.
    """

    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)

    output_dir: str = "outputs/fid"
    part: str | None = None
    adapter: str | None = None
    controlnet: str | None = None
    weight: Finite = 1.0
    unconditional_scale: Finite | None = None
    control_guidance_scale: Finite | None = None
    extractor: str = "micro_clip"
    weights: str | None = None
    reference: str | None = None
    num_images: Annotated[int, Field(ge=2)] = 2048
    prompts: Prompts = "with"
    sample: str | None = None
    seed: int = 0
    batch_size: Positive = 16
    num_inference_steps: Positive = 30
    guidance_scale: Finite | None = None
    true_cfg_scale: Finite | None = None
    max_sequence_length: Annotated[int, Field(ge=0)] | None = None
    scheduler: SchedulerName | None = None
    device: str = "auto"
    num_workers: Positive | None = None

    def __post_init__(self) -> None:
        parts = ("train", "val", "test") if self.data.is_micro else ("train", "val")
        self.part = self.part or ("test" if self.data.is_micro else "val")
        if self.part not in parts:
            raise ValueError(f"Unknown part {self.part!r}; choose one of {', '.join(parts)}.")
        if self.adapter is not None and self.controlnet is not None:
            raise ValueError("Give either an adapter or a controlnet, not both; generate a set with each.")
        for name, without in (("unconditional_scale", (None, 1)), ("control_guidance_scale", (None,))):
            if self.adapter is None and getattr(self, name) not in without:
                raise ValueError(f"{name} is for an adapter, but there is none; give adapter, or leave it out.")
        known = BASES.get(self.base.name)
        if self.guidance_scale is None and known is not None and not known.pipelines:
            self.guidance_scale = known.guidance_scale
        check_own_guidance(self.unconditional_scale, self.control_guidance_scale, self.guidance_scale)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).expanduser()

    @property
    def reference_file(self) -> Path:
        return Path(self.reference).expanduser() if self.reference else self.folder / f"ref_{self.extractor}.npz"

    @property
    def set_names(self) -> tuple[str, ...]:
        """The names of the sets to generate, which are folders in output_dir."""
        names = {"with": ("with_prompts",), "without": ("without_prompts",)}
        return names.get(self.prompts, ("with_prompts", "without_prompts"))
