"""A ControlNet (arXiv 2302.05543) that only speaks inside a mask: the baseline beside the trained local adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ControlNetModel, DiffusionPipeline
from torch import Tensor

from localctl.control.base import BoundControl, CallContext, Control, check_choice, check_window
from localctl.control.control_images import check_counts, check_mask, check_size, rows_of
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import BlockResiduals, DenoiserInputs
from localctl.inputs import ImageField, as_condition, as_mask
from localctl.layout import Layout
from localctl.masks import MASK_RESIZE, resize_mask

_ADDED = ("text_embeds", "time_ids")  # of SDXL; an IP-Adapter's pictures are not for ControlNets


@dataclass(eq=False)
class MaskedControlNet(Control):
    """Follow ``condition`` inside ``mask``: each of the ControlNet's residuals is multiplied by the mask resized to its
    own (h, w). A full mask is diffusers' ``StableDiffusionControlNetPipeline``, an all-zero one the base alone.

    Args:
        controlnet: a diffusers ``ControlNetModel`` for the pipeline's base; it stays on its own device.
        condition: a PIL image, an array or a tensor, or one per layout, as for
            :class:`~localctl.control.local_adapter.LocalAdapterControl`. One channel stands for as many as the
            ControlNet takes.
        mask: the same with one channel, 1 or white = controlled.
        weight: factor of the residuals.
        start, end: active in the outer steps from start up to, not including, end (fractions of all steps).
        mask_resize: how the mask comes to each residual's size (``masks.MASK_RESIZE``).
        guess_mode: as diffusers' ControlNet pipelines define it, for conditions that need no words: only the rows of
            the prompt are controlled, and the residuals are scaled by 0.1 at the finest level up to 1 in the middle.

    Raises:
        ValueError: shapes, sizes, channels, ranges, the window or the base do not fit, or the ControlNet pools its
            residuals over the picture, which leaves them no place to be masked.
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
            raise ValueError(f"The ControlNet is a {type(self.controlnet).__name__}, not diffusers' ControlNetModel.")
        if self.controlnet.config.global_pool_conditions:
            raise ValueError("This ControlNet pools its residuals over the picture, so no mask applies; use another.")
        check_choice("mask_resize", self.mask_resize, MASK_RESIZE)
        check_window(self.start, self.end)
        self.condition, self.mask = as_condition(self.condition), as_mask(self.mask)
        wanted, channels = self.controlnet.config.conditioning_channels, self.condition.shape[1]
        if channels not in (1, wanted):
            raise ValueError(f"The condition has {channels} channels but this ControlNet was made for {wanted}.")
        self.condition = self.condition.expand(-1, wanted, -1, -1)  # (n,C,H,W)
        check_mask(self.mask, self.condition)

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        check_counts(self.condition, self.mask, layouts)
        denoiser_of(pipe).check_controlnet(self.controlnet.config)
        return _BoundControlNet(self)


class _BoundControlNet(BoundControl):
    def __init__(self, control: MaskedControlNet) -> None:
        self.control = control

    @torch.no_grad()
    def block_residuals(self, context: CallContext, inputs: DenoiserInputs) -> BlockResiduals | None:
        control, net = self.control, self.control.controlnet
        if not context.within(control.start, control.end):
            return None
        check_size(control.condition, context.image_size)
        place = {"device": net.device, "dtype": net.dtype}
        rows = context.guided_rows if control.guess_mode else slice(None)  # r of the R rows
        layouts = context.layout_of_row[rows]
        condition = rows_of(control.condition, layouts).to(**place)  # (r,C,H,W)
        timestep = inputs.timestep
        down, middle = net(
            inputs.sample[rows, : net.config.in_channels].to(**place),  # inpainting has more
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
        mask = rows_of(control.mask, layouts).to(net.device)  # (r,1,H,W)
        masked = [self._masked(residual, mask).to(context.device, context.dtype) for residual in (*down, middle)]
        left_out = len(context.layout_of_row) - len(layouts)  # rows of the negative prompt, which come first
        if left_out:
            masked = [torch.cat([residual.new_zeros(left_out, *residual.shape[1:]), residual]) for residual in masked]
        return BlockResiduals(masked[:-1], masked[-1])

    def _masked(self, residual: Tensor, mask: Tensor) -> Tensor:
        """residual (R,c,h,w) times mask (R,1,H,W), and 0 outside even where the residual is not finite."""
        cells = resize_mask(mask, (residual.shape[-2], residual.shape[-1]), self.control.mask_resize)
        cells = cells.to(residual.dtype)  # (R,1,h,w)
        return torch.where(cells > 0, residual * cells, torch.zeros_like(residual))
