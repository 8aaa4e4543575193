"""Images as prompts, each in its own region: the control of the IP-Adapters (arXiv 2308.06721) on a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from localctl.control.base import BoundControl, CallContext, Control, check_choice, check_strength, check_window
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import AttentionLayer, Denoiser
from localctl.images import condition_to_pil
from localctl.inputs import OptionalImageField, as_condition, as_mask
from localctl.layout import Layout
from localctl.masks import MASK_RESIZE, resize_mask


@dataclass(eq=False)
class ImagePrompt:
    """An image that an IP-Adapter follows inside ``mask``.

    Args:
        image: for all layouts, a PIL image, an array (H, W, C) or a tensor (C, H, W); or a list with one per layout.
        mask: with one channel, of the size of the generated images, 1 or white = controlled; for all layouts or one per
            layout; None: everywhere. Stored as float32 (n, 1, H, W).
        weight: factor of the image's features; 0 = no effect.
        start, end: active in the outer steps from start up to, not including, end (fractions of all steps).
        adapter: which of the pipeline's IP-Adapters reads it, from 0 in the order they were loaded.

    Raises:
        ValueError: an invalid window or weight, or an image or mask of another kind.
    """

    image: Any
    mask: OptionalImageField = OptionalImageField()
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    adapter: int = 0

    def __post_init__(self) -> None:
        check_window(self.start, self.end)
        check_strength("weight", self.weight)
        if not isinstance(self.adapter, int) or self.adapter < 0:
            raise ValueError(f"The adapter of an image prompt is a whole number from 0, not {self.adapter!r}.")
        several = isinstance(self.image, (list, tuple))
        self.images = [_as_image(one) for one in (self.image if several else [self.image])]
        if not self.images:
            raise ValueError("An image prompt has no image; give one, or one per layout.")
        if self.mask is not None:
            self.mask = as_mask(self.mask)


def _as_image(value: Any) -> Image.Image:
    return value.convert("RGB") if isinstance(value, Image.Image) else condition_to_pil(as_condition(value)[0])


@dataclass(eq=False)
class IPAdapterControl(Control):
    """Follow images where their masks are, through the IP-Adapters that ``pipe.load_ip_adapter`` loaded.

    The features of several images are summed. A mask is resized to the cells of each attention layer, so an image has
    no effect at all in cells outside of it. With one image of weight w and no mask the result is the stock
    pipeline's at scale w; a scale that ``pipe.set_ip_adapter_scale`` set is a further factor.

    Args:
        prompts: the images, with their masks and weights.
        mask_resize: how masks are resized to each layer's (h, w), one of ``masks.MASK_RESIZE``.

    Raises:
        ValueError: no prompt, or an unknown mask_resize; when attached, an adapter that is not loaded or numbers of
            images that do not fit the layouts; when sampling, a mask of another size than the image, or images that
            are given to the pipeline, too.
    """

    prompts: Sequence[ImagePrompt]
    mask_resize: str = "area"

    def __post_init__(self) -> None:
        self.prompts = tuple(self.prompts)
        check_choice("mask_resize", self.mask_resize, MASK_RESIZE)
        if not self.prompts or not all(isinstance(prompt, ImagePrompt) for prompt in self.prompts):
            raise ValueError("An IPAdapterControl takes a list of ImagePrompt(image, mask), at least one.")

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        denoiser = denoiser_of(pipe)
        count, last = denoiser.image_adapters, max(prompt.adapter for prompt in self.prompts)
        if last >= count:
            raise ValueError(
                f"The image prompt is for the IP-Adapter {last} but the pipeline has {count} "
                "(they count from 0); call pipe.load_ip_adapter first."
            )
        for prompt in self.prompts:
            for name, given in (
                ("image", len(prompt.images)),
                ("mask", 1 if prompt.mask is None else len(prompt.mask)),
            ):
                if given not in (1, len(layouts)):
                    raise ValueError(
                        f"There are {given} {name}s of a prompt for {len(layouts)} layouts; give one for all or one "
                        "per layout."
                    )
        return _BoundIPAdapter(self, pipe, denoiser)


class _BoundIPAdapter(BoundControl):
    """Encodes each image once."""

    def __init__(self, control: IPAdapterControl, pipe: Any, denoiser: Denoiser) -> None:
        self.control = control
        self.of_adapter = [
            [prompt for prompt in control.prompts if prompt.adapter == index]
            for index in range(denoiser.image_adapters)
        ]
        blank = Image.new("RGB", (8, 8))  # for an adapter without a prompt
        images = [[image for prompt in prompts for image in prompt.images] or [blank] for prompts in self.of_adapter]
        with torch.no_grad():
            found = pipe.prepare_ip_adapter_image_embeds(images, None, denoiser.module.device, 1, True)
        self.embeds = [tensor.to(denoiser.module.dtype) for tensor in found]  # (2, images, ...), without and with image
        self._rows: tuple[object, list[Tensor]] | None = None  # the embeddings of these rows
        self._masks: dict[tuple[object, ...], list[Tensor]] = {}

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        return layer.cross

    def image_embeds(self, context: CallContext) -> list[Tensor]:
        key = (context.layout_of_row, context.conditional)
        if self._rows is None or self._rows[0] != key:
            kinds = torch.tensor([int(row) for row in context.conditional])[:, None]
            chosen = [self._chosen(prompts, context.layout_of_row) for prompts in self.of_adapter]
            self._rows = (key, [tensor[kinds, rows] for tensor, rows in zip(self.embeds, chosen, strict=True)])
        return self._rows[1]

    @staticmethod
    def _chosen(prompts: Sequence[ImagePrompt], layouts: Sequence[int]) -> Tensor:
        """Return for each row the indices (R, n) of its images among all images of an adapter."""
        columns, first = [], 0
        for prompt in prompts:
            columns.append([first + (layout if len(prompt.images) > 1 else 0) for layout in layouts])
            first += len(prompt.images)
        return torch.tensor(columns or [[0] * len(layouts)]).T

    def image_masks(self, context: CallContext, layer: AttentionLayer) -> list[Tensor]:
        weights = tuple(prompt.weight * context.within(prompt.start, prompt.end) for prompt in self.control.prompts)
        key = (layer.size, context.layout_of_row, weights, context.image_size, context.device, context.dtype)
        if key not in self._masks:
            of = dict(zip(map(id, self.control.prompts), weights, strict=True))
            self._masks[key] = [
                torch.stack([self._share(prompt, of[id(prompt)], context, layer) for prompt in prompts], dim=1)
                if prompts
                else torch.zeros(len(context.layout_of_row), 1, *layer.size)
                for prompts in self.of_adapter
            ]
            # One line of cells: diffusers computes (h, w) from their number and the mask's shape, rounded.
            self._masks[key] = [
                mask.flatten(2)[:, :, None].to(context.device, context.dtype) for mask in self._masks[key]
            ]
        return self._masks[key]

    def _share(self, prompt: ImagePrompt, weight: float, context: CallContext, layer: AttentionLayer) -> Tensor:
        """Return the factor (R, h, w) of an image's features in each cell."""
        layouts = context.layout_of_row
        if prompt.mask is None:
            return torch.full((len(layouts), *layer.size), weight)
        size = tuple(prompt.mask.shape[-2:])
        if size != context.image_size:
            raise ValueError(
                f"The mask of an image prompt is {size[1]}x{size[0]} pixels but the image is {context.image_size[1]}x"
                f"{context.image_size[0]}; resize the mask or set height and width."
            )
        cells = resize_mask(prompt.mask, layer.size, self.control.mask_resize)[:, 0] * weight
        return cells.expand(len(layouts), -1, -1) if len(cells) == 1 else cells[list(layouts)]
