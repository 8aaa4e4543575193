"""The controls on one pipeline while they are attached: what happens at each call of the pipeline and the denoiser."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from localctl.control.base import CallContext, Control
from localctl.control.compatible import MaskCheck, check_gradients, check_no_skipping
from localctl.control.compiled import EAGER_MODE, is_compiled
from localctl.control.latents import (
    Schedule,
    SchedulerShift,
    Visits,
    check_shiftable,
    outer_step,
    sigma_at,
    steps_of_call,
)
from localctl.control.own_guidance import OwnGuidance, residuals_of
from localctl.control.processor import has_hook
from localctl.control.twins import with_twins, without_twins
from localctl.control.wrapping import InnerForward, Installation, has_settings
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import RESIDUALS, Arguments, AttentionLayer, DenoiserInputs
from localctl.diffusion import is_flow
from localctl.layout import Layout
from localctl.sizes import shown


class Attachment:
    """The controls on one pipeline, while they are attached."""

    def __init__(self, pipe: DiffusionPipeline, layouts: Sequence[Layout], controls: Sequence[Control]) -> None:
        self.pipe, self.denoiser = pipe, denoiser_of(pipe)
        self.layouts = tuple(layouts)
        self.bound = [control.bind(pipe, self.layouts) for control in controls]
        self._names = [type(control).__name__ for control in controls]
        self._movers = [control for control in self.bound if control.moves_latents]
        self.guidance = OwnGuidance(pipe, self.denoiser, self.bound)
        self._check_pipe()
        self.thread = threading.get_ident()
        self._installation = Installation(MaskCheck(self.denoiser))
        self._scheduler_shift = SchedulerShift()
        self._shift: Tensor | None = None  # the last one of the latents, (n, c, h, w)
        self._running = ExitStack()  # of the running call of the denoiser
        self._rows: int | None = None  # of the running call, if this attachment runs the denoiser: without twins
        self._schedule = Schedule()
        self._layers: dict[tuple[int, int], list[tuple[AttentionLayer, Any]]] = {}
        self._visits: Visits = (None, None)  # of the running call
        self._steps: tuple[int, int] | None = None  # of the running call: its first outer step, and their number
        self._dtype: torch.dtype | None = None  # of the running call; slow to find, the denoiser looks at all layers
        self._compiled = False
        self._selected: tuple[int, ...] | None = None
        self._layout_of_image: tuple[int, ...] | None = None  # of the running call; None between calls

    def select(self, indices: Sequence[int] | None) -> None:
        """Set which layouts the next calls generate, one index per prompt; None = all of them, in order."""
        assert indices is None or all(0 <= index < len(self.layouts) for index in indices)
        self._selected = None if indices is None else tuple(indices)

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        """Find the layout of each image from the arguments of ``encode_prompt``, which a pipeline calls first."""
        if not self.denoiser.begins_call():
            return
        self._layout_of_image = self._steps = self._dtype = None
        self._visits = (None, None)
        if threading.get_ident() != self.thread:
            raise ValueError(
                "The pipeline was called from another thread than the one that attached to it; use one thread for both."
            )
        self.restore()  # an error in the previous call may have left wrappers behind
        self._check_pipe()
        self._compiled = is_compiled(self.denoiser.module)
        prompt = arguments["prompt"]
        if prompt is None:  # then there are prompt embeddings; the pipeline has checked that
            chosen = self._chosen(len(arguments["prompt_embeds"]))
            prompts = [self.layouts[index].prompt for index in chosen]
        else:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            chosen = self._chosen(len(prompts))
        for given, index in zip(prompts, chosen, strict=True):
            if given != self.layouts[index].prompt:
                raise ValueError(
                    f"The pipeline was called with the prompt {given!r} but the attached layout has the prompt "
                    f"{self.layouts[index].prompt!r}; call it with layout.prompt."
                )
        for name, which in (("prompt_2", "second"), ("prompt_3", "third")):  # for further text encoders
            other = arguments.get(name)
            if other not in (None, prompt) and any(hasattr(control, "regions") for control in self.bound):
                raise ValueError(
                    f"Phrases are found in the layout's prompt, but the {which} text encoder would read "
                    f"{shown(other)}; leave {name} out."
                )
        if self.bound:
            self.denoiser.check_call(arguments, [self.layouts[index] for index in chosen])
        copies = arguments.get("num_images_per_prompt") or 1
        for control in self.bound:
            control.begin_call(arguments)
        self._layout_of_image = tuple(index for index in chosen for _ in range(copies))  # as repeat_interleave

    def begin_steps(self, arguments: Mapping[str, Any]) -> None:
        """Note how many timesteps this call visits: image-to-image skips the first ones, ``denoising_end`` the last."""
        if self.bound and self._layout_of_image is None and not self.denoiser.encodes_always:
            raise ValueError(
                f"{type(self.pipe).__name__} was called with prompt embeddings alone, which do not tell the layout of "
                "an image; pass prompts as text."
            )
        self._visits = getattr(self.pipe, "_num_timesteps", None), arguments.get("total")

    def end_call(self, arguments: Mapping[str, Any]) -> None:
        """End a call of the pipeline: calls of the denoiser are not steered until the next one begins."""
        self._layout_of_image = None

    def restore(self) -> None:
        """Remove what an interrupted call of the denoiser or the scheduler may have left behind."""
        self._running.close()
        self._shift = None
        self._scheduler_shift.undo()
        self._installation.undo()
        self.guidance.applied(None)

    def _check_pipe(self) -> None:
        """Raise a ValueError if something in the pipeline would keep the controls from acting.

        Checked at each call, because it may have been added after ``attach``.
        """
        if self._movers:
            check_shiftable(self.pipe.scheduler)
        if self.bound:
            check_no_skipping(self.denoiser)
        if any(has_hook(control, "attends") for control in self.bound):
            self.denoiser.check_attention()
        for name, control in zip(self._names, self.bound, strict=True):
            absent = next((hook for hook in self.denoiser.absent_hooks if has_hook(control, hook)), None)
            if absent is not None:
                raise ValueError(
                    f"{name} acts by {absent}, for which a {self.denoiser.name} has no place; leave it out."
                )
            if control.takes_gradients:
                check_gradients(self.denoiser, name)

    def _chosen(self, prompts: int) -> tuple[int, ...]:
        """Return the index of the layout of each of the prompts."""
        if self._selected is not None and len(self._selected) == prompts:
            return self._selected
        if self._selected is None and prompts == len(self.layouts):
            return tuple(range(prompts))
        if self._selected is None and len(self.layouts) == 1:
            return (0,) * prompts
        expected = len(self.layouts if self._selected is None else self._selected)
        raise ValueError(
            f"The pipeline was called with {prompts} prompts for {expected} layouts; give one prompt per layout."
        )

    def before_denoiser(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Apply the controls to the arguments of this call and steer its attention; a forward pre-hook."""
        arguments: Arguments = (args, kwargs)
        return self._run(arguments if self._layout_of_image is None else self._steered(arguments))

    def _steered(self, arguments: Arguments) -> Arguments:
        assert self._layout_of_image is not None
        if threading.get_ident() != self.thread:
            raise ValueError(
                f"Another thread uses this {self.denoiser.name} while it is steered; load a pipeline per thread."
            )
        inputs = self.denoiser.read(*arguments)
        context = self._context(inputs, self.denoiser.copied(self._layout_of_image))
        arguments = self._add_residuals(context, inputs, arguments)
        arguments = self._add_images(context, inputs, arguments)
        arguments = unguided = self._replace_text(context, inputs.text, arguments)
        residuals = residuals_of(self.guidance.controls, context)
        arguments = self.denoiser.write(arguments, residuals=residuals)
        arguments = self._shift_latents(context, inputs.latents, arguments)
        if residuals is not None:
            own = self.denoiser.write(unguided, latents=self.denoiser.read(*arguments).latents)
            self.guidance.run(context, self._inner(context, own))
        self._installation.eager = has_settings(self.denoiser, arguments)
        self._steer_attention(context)
        return arguments

    def _run(self, arguments: Arguments) -> Arguments:
        """Return the arguments that the denoiser's ``forward`` takes, until :meth:`after_denoiser`; of nested
        attachments, the innermost does so for all."""
        owners = [getattr(hook, "__self__", None) for hook in self.denoiser.module._forward_pre_hooks.values()]
        if [owner for owner in owners if isinstance(owner, Attachment)][-1] is not self:
            return arguments
        inputs = self.denoiser.read(*arguments)
        rows = inputs.sample.shape[0]
        height, width = inputs.latents.shape[-2:]
        arguments = with_twins(self.denoiser, arguments, self._layers_at((height, width)), rows)
        self._rows = rows
        if RESIDUALS in arguments[1]:  # by hooks, for each of which compiled blocks would be compiled again
            self._running.enter_context(EAGER_MODE.used())
        return self._running.enter_context(self.denoiser.running(arguments))

    def after_denoiser(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Restore the denoiser after this call, leave twins out, and apply the controls' own guidance; a forward hook,
        called after errors as well."""
        self._running.close()
        self._installation.undo()
        rows, self._rows = self._rows, None
        return self.guidance.applied(output if rows is None or output is None else without_twins(output, rows))

    def _add_residuals(self, context: CallContext, inputs: DenoiserInputs, arguments: Arguments) -> Arguments:
        """Add the controls' residuals to those already among the arguments, but for those with their own guidance."""
        arguments = self.denoiser.write(arguments, residuals=residuals_of(self.guidance.others, context))
        for control in self.bound:
            arguments = self.denoiser.write(arguments, skips=control.block_residuals(context, inputs))
        return arguments

    def _add_images(self, context: CallContext, inputs: DenoiserInputs, arguments: Arguments) -> Arguments:
        """Add the images of an IP-Adapter, of one control at most."""
        given = [images for control in self.bound if (images := control.image_embeds(context)) is not None]
        if len(given) + ("image_embeds" in inputs.added) > 1:
            raise ValueError(
                "The images of an IP-Adapter are given twice; put all of them into one IPAdapterControl, and leave "
                "ip_adapter_image out of the call."
            )
        return self.denoiser.write(arguments, images=given[0]) if given else arguments

    def _replace_text(self, context: CallContext, text: Tensor, arguments: Arguments) -> Arguments:
        for control in self.bound:
            replaced = control.text(context, text)
            text = text if replaced is None else replaced
        return self.denoiser.write(arguments, text=text)

    def _shift_latents(self, context: CallContext, given: Tensor, arguments: Arguments) -> Arguments:
        """Shift the ``given`` latents (R, c, h, w): here for the denoiser, and in the scheduler's next step.

        The shift is computed in the first call of a step that has rows of the prompt; further calls get the same.
        """
        if not self._movers:
            return arguments
        if self._shift is None or not self._scheduler_shift.pending:
            self._shift = self._compute_shift(context, given, arguments)
        if self._shift is None:
            return arguments
        total = self._shift.repeat(given.shape[0] // self._shift.shape[0], 1, 1, 1).to(given)  # both halves of guidance
        return self.denoiser.write(arguments, latents=given + total)

    def _compute_shift(self, context: CallContext, given: Tensor, arguments: Arguments) -> Tensor | None:
        latents = given[context.guided_rows].float()
        run = self._inner(context, arguments)
        moved = latents
        for control in self._movers:
            shift = control.shift_latents(context, moved, run)
            moved = moved if shift is None else moved + shift
        if moved is latents:
            return None
        total = moved - latents
        self._scheduler_shift.add(self.pipe.scheduler, self.denoiser.packed(total), context.sigma)
        return total

    def _inner(self, context: CallContext, arguments: Arguments) -> InnerForward:
        return InnerForward(self.denoiser, self._layers_at(context.latent_size), self.bound, context, arguments)

    def _layers_at(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Any]]:
        if latent_size not in self._layers:
            self._layers = {latent_size: self.denoiser.attention_layers(latent_size)}
        return self._layers[latent_size]

    def _steer_attention(self, context: CallContext) -> None:
        for layer, attn in self._layers_at(context.latent_size):
            for half in layer.halves:
                for control in self.bound:
                    if control.attends(context, half):
                        self._installation.add(attn, layer, half, control, context)
        if self._compiled:
            self._installation.complete(self._layers_at(context.latent_size))

    def _context(self, inputs: DenoiserInputs, layout_of_image: tuple[int, ...]) -> CallContext:
        images = len(layout_of_image)
        conditional = self.denoiser.conditional(inputs.sample.shape[0], images)
        scheduler = self.pipe.scheduler
        times = self._schedule.times(scheduler)
        time = self._schedule.time(scheduler, inputs.timestep)
        step, _ = outer_step(scheduler, time, times)
        if self._steps is None:
            self._steps = steps_of_call(scheduler, time, self._visits, times)
        first, num_steps = self._steps
        dtype = self._dtype = self.denoiser.module.dtype if self._dtype is None else self._dtype
        height, width = inputs.latents.shape[-2:]
        factor = self.pipe.vae_scale_factor
        image_size = (height * factor, width * factor)
        for layout in self.layouts:
            if layout.size not in (None, image_size):
                raise ValueError(
                    f"The pipeline generates {image_size[1]}x{image_size[0]} pixels but the layout is "
                    f"{layout.width}x{layout.height}; pass height and width of the layout."
                )
        return CallContext(
            step=step - first,
            num_steps=num_steps,
            timestep=time,
            layout_of_row=layout_of_image * (len(conditional) // images),
            conditional=conditional,
            latent_size=(height, width),
            image_size=image_size,
            device=inputs.sample.device,
            dtype=dtype,
            sigma=functools.partial(sigma_at, scheduler, time, times),
            flow=is_flow(scheduler),
            has_negative=self.denoiser.has_negative(conditional),
            again=self.denoiser.repeats,
        )
