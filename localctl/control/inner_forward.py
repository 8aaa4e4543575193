"""Runs of the U-Net that a control makes for itself, beside the pipeline's own call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from localctl.control.attention import Site
from localctl.control.base import BoundControl, CallContext, EndOfRun
from localctl.control.processor import Installation, users_of


@dataclass
class UNetRun:
    """One call of the U-Net, ready to be run again on the prompt rows of some of its pictures (see ``RunUNet``).

    ``args`` and ``kwargs`` are the call's, after all changes but the latents'; ``controls`` steer it, beside those that
    an outer ``attach`` has already put on its layers.
    """

    unet: nn.Module
    sites: Sequence[tuple[Site, Attention]]
    controls: Sequence[BoundControl]
    context: CallContext
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @contextmanager
    def __call__(self, latents: Tensor, images: Sequence[int], reader: BoundControl) -> Iterator[None]:
        first, count = self.context.guided_rows.start, len(self.context.conditional)
        rows = [first + image for image in images]
        installation = Installation()
        # Inside inference mode nothing could be differentiated; what was made there is copied below.
        with torch.inference_mode(False), torch.enable_grad(), without_gradients(self.unet):
            args = _select(self.args, rows, count)
            kwargs = {
                # Masks of an IP-Adapter belong to its pictures, not to rows.
                name: value if name == "cross_attention_kwargs" else _select(value, rows, count)
                for name, value in self.kwargs.items()
            }
            sample = args[0] if args else kwargs["sample"]
            sample = torch.cat([latents.to(sample.dtype), sample[:, latents.shape[1] :]], dim=1)  # inpainting has more
            if args:
                args = (sample, *args[1:])
            else:
                kwargs["sample"] = sample
            try:
                self._steer(installation, images, reader)
                with suppress(EndOfRun):
                    self.unet.forward(*args, **kwargs)  # past the hooks, which are for the pipeline's calls
                yield
            finally:
                installation.undo()

    def _steer(self, installation: Installation, images: Sequence[int], reader: BoundControl) -> None:
        context = self.context.only(images)
        own = [(control, context) for control in self.controls]
        for site, attn in self.sites:
            users = [(user, where.only(images)) for user, where in users_of(attn)] + own
            users = [(user, where) for user, where in users if not user.only_looks and user.attends(where, site)]
            if reader.attends(context, site):
                users.append((reader, context))
            installation.replace(attn, site, users)


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's own weights, which would keep more of the forward pass in memory."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _select(value: Any, rows: list[int], count: int) -> Any:
    """Copies of the ``rows`` of all tensors of ``count`` rows within ``value``."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == count else value
    if isinstance(value, (list, tuple)):
        return type(value)(_select(item, rows, count) for item in value)
    if isinstance(value, Mapping):
        return {name: _select(item, rows, count) for name, item in value.items()}
    return value
