"""The guidance scale that controls may have of their own, beside that of the pipeline.

With g the pipeline's scale and c the controls', the model output becomes

    negative + g (prompt - negative) + c (control - prompt),

a form of guidance by two conditions (arXiv 2211.09800, eq. 3). Pipelines compute negative + g (row - negative) from the
rows of a call, so the rows of the prompt become prompt + c / g (control - prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.control.base import BoundControl, CallContext
from localctl.control.wrapping import InnerForward
from localctl.denoisers.base import Denoiser, Residuals, add_residuals


class OwnGuidance:
    """The controls of one attachment that have a guidance scale of their own.

    Raises:
        ValueError: they have several, or an outer ``attach`` has such controls, of which these would become a part.
    """

    def __init__(self, pipe: DiffusionPipeline, denoiser: Denoiser, bound: Sequence[BoundControl]) -> None:
        self.pipe = pipe
        self.controls = [control for control in bound if control.guidance_scale is not None]
        self.others = [control for control in bound if control.guidance_scale is None]
        self._unguided: tuple[float, Tensor] | None = None  # of the running call: c / g, and the rows of the prompt
        scales = sorted({control.guidance_scale for control in self.controls if control.guidance_scale is not None})
        if len(scales) > 1:
            raise ValueError(
                f"The controls have guidance scales of their own, {' and '.join(f'{scale:g}' for scale in scales)}; "
                "give all of them one."
            )
        if self.controls:
            denoiser.check_one_call()
        owners = (getattr(hook, "__self__", None) for hook in denoiser.module._forward_pre_hooks.values())
        if any(own.controls for owner in owners if isinstance(own := getattr(owner, "guidance", None), OwnGuidance)):
            raise ValueError(
                "A control with a guidance scale of its own is attached already, and others would be taken for a part "
                "of it; give all controls to one attach."
            )

    def run(self, context: CallContext, without: InnerForward) -> None:
        """Run the prompt's rows of this call ``without`` these controls. Where c = g all that they change is taken,
        which needs no run. ValueError for a pipeline that has no guidance scale."""
        share = self.controls[0].guidance_scale
        assert share is not None
        if not context.guided_layouts:
            return
        if context.has_negative:
            scale = getattr(self.pipe, "guidance_scale", None)
            if not scale:
                raise ValueError(
                    f"A {type(self.pipe).__name__} has no guidance_scale, so a control cannot have one of its own; "
                    "leave the control's guidance_scale out."
                )
            share /= scale
        if share != 1:
            self._unguided = share, without.output()

    def applied(self, output: Any) -> Any:
        """Return the ``output`` of the call with this guidance; None after an error."""
        unguided, self._unguided = self._unguided, None
        if unguided is None or output is None:
            return output
        share, without = unguided
        found, first = output[0], len(output[0]) - len(without)
        mixed = torch.cat([found[:first], torch.lerp(without, found[first:], share)])
        return (mixed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=mixed)


def residuals_of(controls: Sequence[BoundControl], context: CallContext) -> Residuals | None:
    """Return the sum of the controls' residuals; None without any."""
    added: Residuals | None = None
    for control in controls:
        added = add_residuals(added, control.down_residuals(context))
    return added
