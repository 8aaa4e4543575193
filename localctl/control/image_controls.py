"""Controls that follow a condition inside a mask: the trained LocalAdapter, and a ControlNet (arXiv 2302.05543) as
baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ControlNetModel, DiffusionPipeline
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.base import BoundControl, CallContext, Control, check_choice, check_strength, check_window
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import BlockResiduals, Denoiser, DenoiserInputs
from localctl.diffusion import encode
from localctl.inputs import ImageField, as_condition, as_mask
from localctl.layout import Layout
from localctl.masks import MASK_RESIZE, mask_feature, resize_mask

_ADDED = ("text_embeds", "time_ids")  # SDXL's inputs; ControlNets do not take an IP-Adapter's images


@dataclass(eq=False)
class LocalAdapterControl(Control):
    """Follow ``condition`` inside ``mask``.

    Args:
        adapter: the trained adapter; it stays on its own device and in its own dtype.
        condition: for all layouts, a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W); or one per layout,
            as a list or a tensor (n, C, H, W). Values in [0, 1]; stored as float32 (n, C, H, W).
        mask: the same with one channel, 1 or white = controlled; stored as float32 (n, 1, H, W). n is 1 or the number
            of layouts.
        weight: factor of the features, or one factor per level, finest first. The features of several controls on one
            base are summed.
        start, end: active in the outer steps from start up to, not including, end (fractions of all steps).
        unconditional_scale: factor of the features on the rows of the negative prompt; 1 = as on those of the prompt,
            0 = none. Classifier-free guidance multiplies what differs between the two, so 0 makes control stronger.
            None: the adapter's own, where there is guidance.
        guidance_scale: a guidance scale of the control's own, c, beside the pipeline's, g. The model output is then
            negative + g (prompt - negative) + c (control - prompt), where only ``control`` has the features: with
            c = g as with ``unconditional_scale=0``, and for other c one run more of the denoiser, on the rows of the
            prompt. None: the features take part in the pipeline's guidance alone.

    Raises:
        ValueError: an invalid window, or shapes, sizes, channels or ranges that do not fit; both an
            ``unconditional_scale`` and a ``guidance_scale``.
    """

    adapter: LocalAdapter
    condition: ImageField = ImageField()
    mask: ImageField = ImageField()
    weight: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    unconditional_scale: float | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, LocalAdapter):
            raise ValueError(
                f"The adapter is a {type(self.adapter).__name__}, not a LocalAdapter; "
                "wrap a T2IAdapter with LocalAdapter.from_t2iadapter."
            )
        check_window(self.start, self.end)
        self.weight = _checked_weight(self.weight, self.adapter.levels)
        check_control_guidance(self.unconditional_scale, self.guidance_scale)
        channels = self.adapter.channels_of_condition
        self.condition, self.mask = as_condition(self.condition, channels), as_mask(self.mask)
        if self.condition.shape[1] != channels:
            raise ValueError(
                f"The condition has {self.condition.shape[1]} channels but the adapter takes {channels}; "
                "use the kind of condition it was trained with."
            )
        _check_mask(self.mask, self.condition)

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        _check_counts(self.condition, self.mask, layouts)
        return _BoundLocalAdapter(self, denoiser_of(pipe))


def check_control_guidance(unconditional_scale: float | None, guidance_scale: float | None) -> None:
    """Raise a ValueError unless both are finite, and at most one of them is set."""
    if unconditional_scale is not None:
        check_strength("unconditional_scale", unconditional_scale)
    if guidance_scale is None:
        return
    check_strength("guidance_scale", guidance_scale)
    if unconditional_scale not in (None, 0, 1):
        raise ValueError(
            f"A guidance scale of its own, {guidance_scale:g}, leaves the negative prompt without features, so "
            f"unconditional_scale={unconditional_scale:g} has no meaning; give one of the two."
        )


def _checked_weight(weight: float | Sequence[float], levels: int) -> float | tuple[float, ...]:
    """Return the weight, or the tuple of one weight per level. ValueError unless all are finite, one per level."""
    if not isinstance(weight, Sequence):
        check_strength("weight", weight)
        return weight
    weights = tuple(weight)
    if len(weights) != levels:
        raise ValueError(
            f"There are {len(weights)} weights for {levels} levels of features; give one weight for all levels or one "
            "per level."
        )
    for one in weights:
        check_strength("weight", one)
    return weights


class _BoundLocalAdapter(BoundControl):
    """Runs the adapter once and caches the features as long as the layouts stay the same."""

    def __init__(self, control: LocalAdapterControl, denoiser: Denoiser) -> None:
        self.control = control
        self.denoiser = denoiser
        self.guidance_scale = control.guidance_scale
        self.shared = control.condition.shape[0] == control.mask.shape[0] == 1  # one set of features for all layouts
        self._key: tuple[object, ...] | None = None
        self._features: list[Tensor] = []
        self._index: tuple[tuple[object, ...], Tensor] | None = None  # rows and device; which features each row takes

    def down_residuals(self, context: CallContext) -> Sequence[Tensor | None] | None:
        asked = self.control.unconditional_scale
        if asked not in (None, 1) and self.guidance_scale is None and not context.has_negative:
            raise ValueError(
                f"unconditional_scale={asked:g} acts on the rows of the negative prompt, but without classifier-free "
                "guidance there are none; set guidance_scale above 1, or leave unconditional_scale out."
            )
        if not context.within(self.control.start, self.control.end) or self.guidance_scale == 0:
            return None
        layouts = self._needed(context)
        key = (layouts, context.device, context.dtype, context.image_size, self.control.weight)
        if key != self._key:
            self._features = self._compute(layouts, context)
            self._key = key
        rows = (context.layout_of_row, context.device)
        if self._index is None or self._index[0] != rows:
            chosen = [0 if self.shared else layouts.index(layout) for layout in context.layout_of_row]
            self._index = (rows, torch.tensor(chosen, device=context.device))
        index = self._index[1]
        found = [feature.index_select(0, index) for feature in self._features]  # always a copy
        scale = self._unconditional_scale()
        if scale != 1:
            guided = context.guided_rows
            for feature in found:
                feature[: guided.start] *= scale
                feature[guided.stop :] *= scale
        return self.denoiser.placed(found)

    def _unconditional_scale(self) -> float:
        if self.guidance_scale is not None:
            return 0.0
        asked = self.control.unconditional_scale
        return self.control.adapter.config["unconditional_scale"] if asked is None else asked

    def _needed(self, context: CallContext) -> tuple[int, ...]:
        """Return the layouts whose features this call needs."""
        return (0,) if self.shared else tuple(sorted(set(context.layout_of_row)))

    @torch.no_grad()
    def _compute(self, layouts: tuple[int, ...], context: CallContext) -> list[Tensor]:
        control, adapter = self.control, self.control.adapter
        _check_size(control.condition, context.image_size)
        condition, mask = (_rows_of(tensor, layouts) for tensor in (control.condition, control.mask))
        x = adapter.inputs(condition, mask, lambda pixels: encode(self.denoiser.pipe.vae, pixels))
        x = x.to(adapter.device, adapter.dtype)  # (n, C+1, H, W)
        features = adapter(x)
        self._check_shapes([tuple(feature.shape[1:]) for feature in features], context.latent_size)
        weights = control.weight if isinstance(control.weight, tuple) else [control.weight] * len(features)
        return [
            (feature * weight).to(context.device, context.dtype)
            for feature, weight in zip(features, weights, strict=True)
        ]

    def _check_shapes(self, features: list[tuple[int, ...]], latent_size: tuple[int, int]) -> None:
        wanted = self.denoiser.residual_shapes(latent_size)
        if features != wanted[: len(features)]:
            raise ValueError(
                f"The adapter makes features of shapes {features} but the {self.denoiser.name} takes {wanted}; "
                "use an adapter that was trained for this kind of base."
            )


@dataclass(eq=False)
class MaskedControlNet(Control):
    """Follow ``condition`` inside ``mask`` with a ControlNet.

    Each of the ControlNet's residuals is multiplied by the mask resized to the residual's (h, w). A full mask gives the
    result of diffusers' ``StableDiffusionControlNetPipeline``, an all-zero mask that of the base alone.

    Args:
        controlnet: a diffusers ``ControlNetModel`` for the pipeline's base; it stays on its own device.
        condition: a PIL image, an array or a tensor, or one per layout, as for :class:`LocalAdapterControl`. A single
            channel is repeated for all channels that the ControlNet takes.
        mask: the same with one channel, 1 or white = controlled.
        weight: factor of the residuals.
        start, end: active in the outer steps from start up to, not including, end (fractions of all steps).
        mask_resize: how the mask is resized to each residual's (h, w), one of ``masks.MASK_RESIZE``.
        guess_mode: as diffusers' ControlNet pipelines define it, for conditions that need no prompt: only the rows of
            the prompt are controlled, and the residuals are scaled by 0.1 at the finest level up to 1 in the middle.

    Raises:
        ValueError: an invalid window; shapes, sizes, channels, ranges or a base that do not fit; a ControlNet that
            pools its residuals over the image, so that they cannot be masked.
    """

    controlnet: ControlNetModel
    condition: ImageField = ImageField()
    mask: ImageField = ImageField()
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask_resize: str = "area"
    guess_mode: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.controlnet, ControlNetModel):
            raise ValueError(
                f"The controlnet is a {type(self.controlnet).__name__}, not a diffusers ControlNetModel; load it with "
                "ControlNetModel.from_pretrained."
            )
        if self.controlnet.config.global_pool_conditions:
            raise ValueError(
                "This ControlNet pools its residuals over the image, so they cannot be masked; use another one."
            )
        check_choice("mask_resize", self.mask_resize, MASK_RESIZE)
        check_window(self.start, self.end)
        self.condition, self.mask = as_condition(self.condition), as_mask(self.mask)
        wanted, channels = self.controlnet.config.conditioning_channels, self.condition.shape[1]
        if channels not in (1, wanted):
            raise ValueError(
                f"The condition has {channels} channels but this ControlNet takes {wanted}; use the kind of condition "
                "it was trained with."
            )
        self.condition = self.condition.expand(-1, wanted, -1, -1)  # (n,C,H,W)
        _check_mask(self.mask, self.condition)

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        _check_counts(self.condition, self.mask, layouts)
        denoiser_of(pipe).check_controlnet(self.controlnet.config)
        return _BoundControlNet(self)


class _BoundControlNet(BoundControl):
    def __init__(self, control: MaskedControlNet) -> None:
        self.control = control
        self._inputs: tuple[object, Tensor, Tensor] | None = None  # layouts, condition and mask, on the net's device
        self._cells: dict[tuple[int, ...], Tensor] = {}  # the mask at each size of residuals

    def _placed(self, layouts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return condition (r,C,H,W) and mask (r,1,H,W) of these layouts on the net's device, moved there once."""
        net, control = self.control.controlnet, self.control
        key = (layouts, net.device, net.dtype)
        if self._inputs is None or self._inputs[0] != key:
            self._cells = {}
            condition = _rows_of(control.condition, layouts).to(net.device, net.dtype)
            self._inputs = (key, condition, _rows_of(control.mask, layouts).to(net.device))
        return self._inputs[1:]

    def _masked(self, residual: Tensor, mask: Tensor) -> Tensor:
        """Return a residual (r,c,h,w) within the mask."""
        size = residual.shape[-2], residual.shape[-1]
        if size not in self._cells:
            self._cells[size] = resize_mask(mask.float(), size, self.control.mask_resize)
        return mask_feature(residual, self._cells[size])

    @torch.no_grad()
    def block_residuals(self, context: CallContext, inputs: DenoiserInputs) -> BlockResiduals | None:
        control, net = self.control, self.control.controlnet
        if not context.within(control.start, control.end):
            return None
        _check_size(control.condition, context.image_size)
        place = {"device": net.device, "dtype": net.dtype}
        rows = context.guided_rows if control.guess_mode else slice(None)  # r of the R rows
        layouts = context.layout_of_row[rows]
        condition, mask = self._placed(layouts)
        timestep = inputs.timestep
        down, middle = net(
            inputs.sample[rows, : net.config.in_channels].to(**place),  # an inpainting U-Net has more channels
            timestep[rows] if isinstance(timestep, Tensor) and timestep.ndim else timestep,
            inputs.text[rows].to(**place),
            condition,
            conditioning_scale=control.weight,
            guess_mode=control.guess_mode,
            added_cond_kwargs={
                name: inputs.added[name][rows].to(net.device) for name in _ADDED if name in inputs.added
            },
            return_dict=False,
        )
        masked = [self._masked(residual, mask).to(context.device, context.dtype) for residual in (*down, middle)]
        skipped = len(context.layout_of_row) - len(layouts)  # rows of the negative prompt, which come first
        if skipped:
            masked = [torch.cat([residual.new_zeros(skipped, *residual.shape[1:]), residual]) for residual in masked]
        return BlockResiduals(masked[:-1], masked[-1])


def _check_mask(mask: Tensor, condition: Tensor) -> None:
    """Raise a ValueError unless ``mask`` (n,1,H,W) has the size of ``condition`` (n,C,H,W)."""
    if mask.shape[-2:] != condition.shape[-2:]:
        raise ValueError(
            f"The mask is {mask.shape[-1]}x{mask.shape[-2]} pixels but the condition is "
            f"{condition.shape[-1]}x{condition.shape[-2]}; resize one to the size of the other."
        )


def _check_counts(condition: Tensor, mask: Tensor, layouts: Sequence[Layout]) -> None:
    """Raise a ValueError unless there is one condition and one mask for all layouts, or one per layout."""
    for name, tensor in (("condition", condition), ("mask", mask)):
        if tensor.shape[0] not in (1, len(layouts)):
            raise ValueError(
                f"There are {tensor.shape[0]} {name}s for {len(layouts)} layouts; give one for all or one per layout."
            )


def _check_size(condition: Tensor, image_size: tuple[int, int]) -> None:
    """Raise a ValueError unless the image, (H, W) in pixels, has the condition's size."""
    if tuple(condition.shape[-2:]) != image_size:
        raise ValueError(
            f"The condition is {condition.shape[-1]}x{condition.shape[-2]} pixels but the image is "
            f"{image_size[1]}x{image_size[0]}; resize the condition or set height and width."
        )


def _rows_of(tensor: Tensor, layouts: Sequence[int]) -> Tensor:
    """Return the rows of these layouts; a single row is used for every layout."""
    return tensor.expand(len(layouts), -1, -1, -1) if tensor.shape[0] == 1 else tensor[list(layouts)]
