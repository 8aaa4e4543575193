"""What `evaluate_fid.py` can be told, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from localctl.bases import BASES, BaseConfig, SchedulerName
from localctl.data.config import DataConfig
from localctl.records import Finite, Positive, record
from localctl.settings import ConditionConfig, MaskConfig

Prompts = Literal["with", "without", "both"]
PROMPTS: tuple[str, ...] = get_args(Prompts)


@record()
@dataclass(kw_only=True)
class FidSettings:
    """One comparison of generated images with photos; ValueError for settings that make no sense.

    output_dir: where images, statistics and figures go.
    part: which examples: ``val`` (held out), ``train``; of the embedded scenes also ``test``; null: test of the
        embedded scenes, else val.
    adapter: folder, run, hub id or file of weights of a trained adapter, as for ``sample.py``; with neither this
        nor controlnet, the base alone.
    controlnet: folder of a diffusers ControlNetModel in place of an adapter, its residuals masked; it must have been
        trained on this kind of condition.
    weight: strength of the adapter or ControlNet.
    extractor: whose features are compared: micro_clip, efficientnet_lite0, fid or clip.
    weights: where the extractor's weights are, if it needs to be told.
    reference: file with the statistics of the photos; null: ref_{extractor}.npz in output_dir.
    num_images: how many are generated, and for ``ref`` how many photos are read at most.
    prompts: generate ``with`` the captions, ``without`` any, or ``both``.
    sample: key of one example, which alone is generated num_images times.
    seed: of masks and noise.
    batch_size: images generated at once; does not change them.
    num_inference_steps: sampling steps of each.
    guidance_scale: of classifier-free guidance; null = the base's own.
    scheduler: ddim, ddpm, pndm, lms, euler, euler_ancestral, heun, dpmpp_2m or unipc; null = the base's own.
    device: auto, cpu, cuda, ...
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
    scheduler: SchedulerName | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        parts = ("train", "val", "test") if self.data.is_micro else ("train", "val")
        self.part = self.part or ("test" if self.data.is_micro else "val")
        if self.part not in parts:
            raise ValueError(f"Unknown part {self.part!r}; choose one of {', '.join(parts)}.")
        if self.adapter is not None and self.controlnet is not None:
            raise ValueError("Give either an adapter or a controlnet, not both; each is a set of its own.")
        if self.guidance_scale is None:
            self.guidance_scale = BASES[self.base.name].guidance_scale if self.base.name in BASES else 7.5

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).expanduser()

    @property
    def reference_file(self) -> Path:
        return Path(self.reference).expanduser() if self.reference else self.folder / f"ref_{self.extractor}.npz"

    @property
    def set_names(self) -> tuple[str, ...]:
        """Which sets are generated; folders in output_dir."""
        names = {"with": ("with_prompts",), "without": ("without_prompts",)}
        return names.get(self.prompts, ("with_prompts", "without_prompts"))
