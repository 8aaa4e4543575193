"""Where sampling starts: from an image, in all of it (image-to-image) or within a mask (inpainting)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from localctl.data.geometry import IMAGE, geometry, same_shape
from localctl.masks import mask_to_pil


@dataclass(frozen=True)
class InitImage:
    """An image to start from.

    Args:
        image: an RGB image of any size, scaled and cropped to that of the run; or the clean latents (c, h, w) of each
            image of the run.
        strength: how much of it is replaced, in (0, 1]: sampling begins at this fraction of the noise, and takes this
            fraction of the steps.
        mask: (1, H, W) in [0, 1], 1 = generate anew; of any size, scaled and cropped as the image. Pixels where it is 0
            stay exactly as they are, and those in between are mixed.

    Raises:
        ValueError: a strength out of range, latents with a mask, or a mask that is 0 everywhere.
    """

    image: Image.Image | Sequence[Tensor]
    strength: float = 0.6
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"The strength must be above 0 and at most 1, not {self.strength}.")
        if self.mask is not None and not isinstance(self.image, Image.Image):
            raise ValueError("A mask needs an image, not latents, whose pixels outside it stay as they are.")
        if self.mask is not None and not bool((self.mask > 0).any()):
            raise ValueError("The mask is black everywhere, so that nothing would change; make a part of it white.")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the image in pixels; None for latents."""
        return (self.image.height, self.image.width) if isinstance(self.image, Image.Image) else None

    def prepared(self, size: tuple[int, int], steps: int | None = None, output_type: str = "pil") -> InitImage:
        """Return it scaled and cropped to this (height, width); latents, and an image of this size, are unchanged.

        ValueError if the strength leaves no step of so many (None: 50), if the mask has another aspect ratio than the
        image, or if pixels outside the mask cannot be kept in what the pipeline returns.
        """
        if int((steps or 50) * self.strength) < 1:
            raise ValueError(f"A strength of {self.strength} leaves no step of {steps or 50}; raise one of them.")
        if self.mask is not None and output_type != "pil":
            raise ValueError("Inpainting returns images; leave output_type out.")
        if not isinstance(self.image, Image.Image):
            return self
        crop, image, mask = geometry((self.image.height, self.image.width), size), self.image.convert("RGB"), self.mask
        if mask is not None and tuple(mask.shape[-2:]) != size:
            height, width = mask.shape[-2:]
            if not same_shape((height, width), (self.image.height, self.image.width)):
                raise ValueError(
                    f"The mask is {width}x{height} pixels but the image to start from is {self.image.width}x"
                    f"{self.image.height}, another aspect ratio; save the mask with the image's."
                )
            mask = torch.from_numpy(crop.apply_to_mask(mask[0].numpy()).clip(0, 1))[None]
        return replace(self, image=image if self.size == size else crop.apply(image, IMAGE), mask=mask)

    def pipeline(self, pipe: DiffusionPipeline, given: Iterable[str] = ()) -> DiffusionPipeline:
        """Return the stock pipeline for this task, of the same components as ``pipe``.

        ValueError for an argument among those ``given`` that it does not take.
        """
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting  # slow, and loads image processors

        check_task(type(pipe), self.mask is not None, given)
        kind: Any = AutoPipelineForImage2Image if self.mask is None else AutoPipelineForInpainting
        other = kind.from_pipe(pipe)
        channels = getattr(other.vae.config, "latent_channels", None)
        if channels is not None:  # by which latents are told from pixels; Z-Image's pipeline leaves it at 4
            other.image_processor.register_to_config(vae_latent_channels=channels)
        other.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return other

    def arguments(self, first: int, count: int, size: tuple[int, int], factor: int) -> dict[str, Any]:
        """Return the arguments of the pipeline for ``count`` images of a run, from the one with the index ``first``.

        size: (height, width) in pixels. factor: pixels per latent. The mask covers every latent that it touches.
        """
        if not isinstance(self.image, Image.Image):
            return {"image": torch.stack(list(self.image[first : first + count])), "strength": self.strength}
        found: dict[str, Any] = {"image": [self.image] * count, "strength": self.strength}
        if self.mask is not None:
            cells = torch.nn.functional.max_pool2d((self.mask > 0).float()[None], factor)
            cover = mask_to_pil(torch.nn.functional.interpolate(cells, size=size)[0])
            found |= {"mask_image": [cover] * count, "height": size[0], "width": size[1]}
        return found

    def finish(self, image: Any) -> Any:
        """Return a generated image with the pixels of the given one outside the mask."""
        if self.mask is None or not isinstance(self.image, Image.Image):
            return image
        share = self.mask[0].numpy()[..., None]  # (H, W, 1)
        mixed = np.asarray(image, np.float32) * share + np.asarray(self.image, np.float32) * (1 - share)
        return Image.fromarray(mixed.round().astype(np.uint8))


def check_task(pipeline: type[Any], repaints: bool, given: Iterable[str] = ()) -> None:
    """Raise a ValueError if diffusers has no pipeline that starts from an image beside this class of pipelines, or for
    an argument among those ``given`` that it does not take. ``repaints``: whether within a mask."""
    from diffusers.pipelines import auto_pipeline as known  # slow, and loads image processors

    images, repainted = known.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, known.AUTO_INPAINT_PIPELINES_MAPPING
    tables = (known.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, images, repainted)
    families = [name for table in tables for name, kind in table.items() if kind.__name__ == pipeline.__name__]
    found = (repainted if repaints else images).get(families[0]) if families else None
    taken = () if found is None else inspect.signature(found.__call__).parameters
    if found is None or "strength" not in taken:  # FLUX.2's edits images
        task = "inpainting" if repaints else "image-to-image"
        raise ValueError(
            f"diffusers has no {task} pipeline beside {pipeline.__name__}; start from noise, without init."
        )
    for name in given:
        if name not in taken:
            raise ValueError(f"{found.__name__} has no {name}; leave it out, or start from noise.")
