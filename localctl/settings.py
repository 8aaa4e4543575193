"""Settings of conditions, masks and the loss, typed and validated. This module does not load torch, so that programs
start quickly; ``conditions``, ``masks``, ``losses`` and ``diffusion`` implement the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from localctl.records import NotNegative, Positive, Rate, Share, record

AdapterType = Literal["full_adapter", "full_adapter_xl", "light_adapter", "token_adapter"]
ConditionKind = Literal[
    "canny", "sobel", "palette", "depth", "normals", "segmentation", "pose", "hed", "lineart", "column"
]
ChannelsUsed = Literal["gray", "rgb"]
PaletteFilter = Literal["mean", "bicubic"]
MaskResize = Literal["area", "nearest", "inside", "cover"]
BoxLaw = Literal["sides", "corners"]
MaskKind = Literal["box", "fixed", "circle", "square", "strokes", "objects", "full", "mixture"]
LossFilter = Literal["none", "mse", "sobel", "laplacian", "edges"]
Schedule = Literal["constant", "step_unit", "time_unit", "snr", "low_noise"]
Normalise = Literal["map", "mask"]
TimestepSampling = Literal["uniform", "cubic", "logit_normal"]
MixedKind = Literal["box", "fixed", "circle", "square", "strokes", "objects", "full"]  # a mask kind in a mixture
ConditionSpace = Literal["pixels", "latents"]
Quantization = Literal["bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8"]
ReportTo = Literal["tensorboard", "wandb", "all", "none"]

ADAPTER_TYPES: tuple[str, ...] = get_args(AdapterType)
MAX_MARGIN = 4096  # pixels by which an adapter may grow its mask
CHANNELS: dict[str, int] = {
    **{"canny": 1, "sobel": 1, "palette": 3, "depth": 1, "normals": 3, "segmentation": 3, "pose": 3},
    **{"hed": 1, "lineart": 1, "column": 3},
}
FROM_IMAGE = ("canny", "sobel", "palette")  # without a model
EDGE_CONDITIONS = ("canny", "sobel")  # edges that loss.filter=edges compares
DEFAULT = "default"
# The models that condition.model=default stands for.
MODELS = {
    "depth": "depth-anything/Depth-Anything-V2-Small-hf",
    "normals": "depth-anything/Depth-Anything-V2-Small-hf",
    "segmentation": "openmmlab/upernet-convnext-small",
    "pose": "usyd-community/vitpose-base-simple",
    "hed": "lllyasviel/Annotators",
    "lineart": "lllyasviel/Annotators",
}
DETECTOR = "PekingU/rtdetr_r18vd"  # of people, for pose
MASK_RESIZE: tuple[str, ...] = get_args(MaskResize)
MASK_KINDS: tuple[str, ...] = get_args(MaskKind)
LOSS_FILTERS: tuple[str, ...] = get_args(LossFilter)
SCHEDULES: tuple[str, ...] = get_args(Schedule)
NORMALISE: tuple[str, ...] = get_args(Normalise)
TIMESTEP_SAMPLINGS: tuple[str, ...] = get_args(TimestepSampling)
REPORT_TO: tuple[str, ...] = get_args(ReportTo)


@record("condition")
@dataclass(kw_only=True)
class ConditionConfig:
    """Settings of a condition; ValueError for settings that contradict each other.

    kind: ``canny`` binary edges; ``sobel`` gradient magnitude; ``palette`` mean colours of a coarse grid; ``depth``,
        ``normals``, ``segmentation``, ``pose``, ``hed`` (soft edges) and ``lineart`` come with the data, or are
        computed by ``model``; ``column`` takes the data's column of condition images, whatever it holds.
    low: lower hysteresis threshold of canny, on 8-bit values.
    high: upper hysteresis threshold of canny.
    channels_used: input of canny: ``gray`` the brightness; ``rgb`` all three channels, at each pixel the one with the
        strongest gradient, as published. ``rgb`` also finds edges between colours of equal brightness, and more noise.
    cells: the palette has cells x cells colours.
    palette_filter: how the colour of a cell is computed: ``mean`` over its pixels; ``bicubic`` by Pillow's resize to
        cells x cells, as published, which mixes in pixels outside the cell and overshoots at strong edges.
    channels: C of the condition: 1 (brightness) or 3 (colours) for ``column``; ignored for the other kinds, which
        have a fixed number.
    model: folder or hub id of the model that computes depth, normals, segmentation, pose, hed or lineart from images;
        ``default``: the one of ``MODELS``. None: such conditions come with the data.
    detector: for pose, folder or hub id of the model that finds people; None: ``DETECTOR``.
    """

    kind: ConditionKind = "canny"
    low: float = 50
    high: float = 100
    cells: Positive = 8
    channels: int = 0
    channels_used: ChannelsUsed = "gray"
    palette_filter: PaletteFilter = "mean"
    model: str | None = None
    detector: str | None = None

    def __post_init__(self) -> None:
        self._check_model()
        if not 0 <= self.low <= self.high:
            raise ValueError(f"Canny needs 0 <= low <= high, not low={self.low} and high={self.high}.")
        if self.channels not in (0, 1, 3):
            raise ValueError(f"Unknown condition.channels {self.channels}; choose 1 or 3.")
        if self.kind != "column" or not self.channels:  # also after dataclasses.replace(kind=...)
            self.channels = CHANNELS[self.kind]

    def _check_model(self) -> None:
        if self.model is not None and self.kind not in MODELS:
            raise ValueError(f"condition={self.kind} is computed without a model; leave condition.model out.")
        if self.detector is not None and (self.kind != "pose" or self.model is None):
            raise ValueError("condition.detector finds people for condition=pose with condition.model; leave it out.")
        if self.model == DEFAULT:
            self.model = MODELS[self.kind]
        if self.kind == "pose" and self.model is not None and self.detector in (None, DEFAULT):
            self.detector = DETECTOR

    @property
    def from_image(self) -> bool:
        """Whether the condition is computed from the image, rather than read from a file of its own."""
        return self.kind in FROM_IMAGE or self.model is not None

    def recorded(self) -> dict[str, Any]:
        """Return the settings for a record: as earlier versions wrote them, where no model is used."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@record("mask")
@dataclass(kw_only=True)
class MaskConfig:
    """Settings of sampled masks; ValueError for settings that contradict each other.

    kind: ``box`` a random rectangle; ``fixed`` the rectangle ``box``; ``circle`` / ``square`` of radius 10-25 % of the
        short side, clipped by the border; ``strokes`` thick random polylines; ``objects`` some of the sample's objects;
        ``full``; ``mixture`` samples a kind with the weights of ``mixture``.
    min_area: smallest share of pixels that are 1, before the soft edge is added; ``objects`` are dilated until they
        reach it; ``fixed`` and ``full`` ignore it.
    max_area: largest share of pixels that are 1; applies to the random shapes, not to ``objects``.
    count: number of circles, squares, strokes or objects, or a pair (fewest, most).
    soft_edge: width in pixels of a linear ramp added outside the mask.
    box_law: distribution of the random rectangle: ``sides`` samples its height uniformly among those that allow the
        area, then its width; ``corners``, as published, samples one corner uniformly, then the other one uniformly
        beyond it, which makes smaller boxes (mean area 0.135 with the published minimum, not 0.28).
    box: x0, y0, x1, y1 in [0, 1], for ``fixed``.
    mixture: kind -> weight, for ``mixture``, such as {box: 2, full: 1}.
    """

    kind: MaskKind = "box"
    min_area: Share = 0.038
    max_area: Share = 1.0
    count: int | tuple[int, int] = (1, 2)
    soft_edge: Rate = 0.0
    box: tuple[float, float, float, float] | None = None
    mixture: Mapping[MixedKind, Rate] | None = None
    box_law: BoxLaw = "sides"

    def __post_init__(self) -> None:
        if self.min_area > self.max_area:
            raise ValueError(f"Masks need mask.min_area <= mask.max_area, not {self.min_area} and {self.max_area}.")
        fewest, most = self.counts
        if not 1 <= fewest <= most:
            raise ValueError(f"The mask count must be at least 1 and ordered (fewest, most), not {self.count}.")
        _check_box(self.box, needed=self.kind == "fixed" or "fixed" in (self.mixture or {}))
        _check_mixture(self.mixture, needed=self.kind == "mixture")

    @property
    def counts(self) -> tuple[int, int]:
        """``count`` as (fewest, most)."""
        if isinstance(self.count, int):
            return self.count, self.count
        return self.count


def _check_box(box: tuple[float, float, float, float] | None, needed: bool) -> None:
    if box is None and not needed:
        return
    if box is None or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"A fixed mask needs box=(x0, y0, x1, y1) in [0,1] with x0 < x1 and y0 < y1, not {box}.")


def _check_mixture(mixture: Mapping[MixedKind, float] | None, needed: bool) -> None:
    if not mixture:
        if needed:
            raise ValueError("A mask mixture needs at least one kind with its weight, such as {box: 1, circle: 1}.")
        return
    if not sum(mixture.values()) > 0:
        raise ValueError("The weights of the mask mixture are all zero; give at least one kind a positive weight.")


def check_own_guidance(
    unconditional_scale: float | None, own_scale: float | None, guidance_scale: float | None
) -> None:
    """Raise a ValueError for settings of an adapter's part in guidance that would have no effect or no meaning."""
    if unconditional_scale in (None, 1):
        return
    if guidance_scale is not None and guidance_scale <= 1 and own_scale is None:
        raise ValueError(
            f"unconditional_scale={unconditional_scale:g} does nothing without guidance; set guidance_scale above 1, "
            "or leave it out."
        )
    if unconditional_scale != 0 and own_scale is not None:
        raise ValueError(
            f"control_guidance_scale={own_scale:g} leaves the negative prompt without features, so "
            f"unconditional_scale={unconditional_scale:g} has no meaning; give one of the two."
        )


@record("loss")
@dataclass(kw_only=True)
class LossConfig:
    """Settings of both loss terms; ValueError for settings that contradict each other.

    filter: compared inside the mask: ``sobel`` or ``laplacian`` edges of the latents, ``mse`` the latents themselves;
        ``edges`` the edges of the decoded image, with those of the condition (canny or sobel); ``none`` switches the
        local term off.
    schedule: the weight w(t): ``constant`` 1; ``step_unit`` 1 for t in [t_min, t_max] and 0 elsewhere; ``time_unit``
        1 - abar; ``snr`` min(abar / (1 - abar), snr_cap), which cancels the growth of the z0' error with t;
        ``low_noise`` 1 where abar / (1 - abar) >= snr_min and 0 elsewhere, where nothing is decoded for ``edges``.
    normalise: ``mask`` divides the local term by the mask's area, so that small and large masks count equally; ``map``
        by the area of the whole image, as published.
    weight: factor of the local term; published value 1e-3.
    start: share of the training after which the local term begins; before, nothing is computed for it.
    t_min: first timestep of ``step_unit``.
    t_max: last timestep of ``step_unit``.
    snr_cap: the largest weight of ``snr``.
    snr_min: the smallest ratio of ``low_noise``.
    tolerances: of ``edges``, how many pixels an edge may lie beside its place; the term is the mean over them.
    margin: of ``edges``, how many pixels at the mask's border do not count.
    mask_resize: how the mask is resized to the latents: ``area`` the mean over a latent pixel, ``nearest`` one pixel
        of it, ``inside`` the minimum, ``cover`` the maximum.
    squared_mask: weight by m^2, as published: (m F(z0') - m F(z0))^2. This matters where m is neither 0 nor 1: for soft
        masks, and at the border of every mask with mask_resize=area. False weights by m, so that a half covered latent
        pixel counts half.
    denoising_weight: factor of the denoising term.
    mask_denoising: restrict the denoising term to the mask, too. Then nothing is learned about the image outside, and
        nothing at all from all-zero masks.
    masked_denoising_weight: how much the denoising term counts inside the mask, relative to outside.
    """

    filter: LossFilter = "sobel"
    schedule: Schedule = "constant"
    normalise: Normalise = "mask"
    weight: Rate = 1e-3
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    t_min: NotNegative = 500
    t_max: int = 999
    snr_cap: Annotated[float, Field(gt=0)] = 5.0
    snr_min: Rate = 0.02
    tolerances: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4)
    margin: NotNegative = 0
    mask_resize: MaskResize = "area"
    squared_mask: bool = False
    denoising_weight: Rate = 1.0
    mask_denoising: bool = False
    masked_denoising_weight: Rate = 1.0

    def __post_init__(self) -> None:
        if self.filter == "edges" and self.normalise != "mask":
            raise ValueError(
                "loss.filter=edges compares shares of the edges, whatever the mask's area; leave loss.normalise=mask."
            )
        if self.filter != "edges" and (self.margin or self.tolerances != (1, 2, 4)):
            raise ValueError(
                f"loss.margin and loss.tolerances are of loss.filter=edges, not {self.filter}; leave them out."
            )
        if self.schedule != "low_noise" and self.snr_min != 0.02:
            raise ValueError(f"loss.snr_min is of loss.schedule=low_noise, not {self.schedule}; leave it out.")
        if self.filter == "edges" and self.squared_mask and not self.mask_denoising:
            raise ValueError("loss.squared_mask has no effect on loss.filter=edges; leave it out.")
        if self.filter == "none" and self.start:
            raise ValueError("loss.start is of a local term, and loss.filter=none has none; leave it out.")
        if self.mask_denoising and self.masked_denoising_weight != 1:
            raise ValueError(
                "With loss.mask_denoising only the mask counts, so loss.masked_denoising_weight has no effect; leave "
                "one of them out."
            )
        if not self.denoising_weight and self.start:
            raise ValueError("Before loss.start, only the denoising term counts, and its weight is 0; leave one out.")
        if not self.denoising_weight and (self.filter == "none" or not self.weight):
            raise ValueError("The loss is always 0; set loss.denoising_weight, or loss.filter and loss.weight.")
        if self.t_min > self.t_max:
            raise ValueError(f"The loss needs t_min <= t_max, not t_min={self.t_min} and t_max={self.t_max}.")
