"""Where a run starts and how it ends: from an image, within a mask, and in a second pass at a higher resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localctl.data.geometry import same_shape
from localctl.image_to_image import InitImage
from localctl.images import load_image
from localctl.jobs.addons import Addons
from localctl.jobs.inputs import AdapterJob, Size, size_text
from localctl.jobs.settings import SampleSettings
from localctl.jobs.variants import Variant, optimized_controls
from localctl.layout import Layout
from localctl.masks import load_mask
from localctl.sizes import check_side, near_side

_STRENGTH, _STRENGTH_IN_MASK, _STRENGTH_UPSCALED = 0.6, 1.0, 0.5
_MOST_UPSCALED = 4
_STEPS = 50  # of diffusers' pipelines


@dataclass(frozen=True)
class SecondPass:
    """A second pass, from the enlarged latents of the first, under the same controls.

    size: (height, width) in pixels. layouts, adapters, addons: those of the first pass, at this size. strength: how
    much of the first pass is replaced.
    """

    size: Size
    layouts: list[Layout]
    adapters: list[AdapterJob]
    addons: Addons
    strength: float


def read_init(options: SampleSettings, variants: Sequence[Variant]) -> InitImage | None:
    """Read the image to start from and its mask, of any size, and fill in the strength.

    ValueError for a file that cannot be read, or settings that do not go together.
    """
    if not options.init_image:
        for name in ("strength", "inpaint_mask"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} needs an image to start from; give --init_image.")
        return None
    for name in ("init_image", "inpaint_mask"):
        if len(getattr(options, name) or ["one"]) != 1:
            raise ValueError(f"--{name} takes one file; it is the same for all images of a run.")
    if any(map(optimized_controls, variants)):
        raise ValueError("--init_image does not go together with spacetime_optimized; use spacetime.")
    mask = load_mask(options.inpaint_mask[0]) if options.inpaint_mask else None
    if options.strength is None:
        options.strength = _STRENGTH if mask is None else _STRENGTH_IN_MASK
    return InitImage(load_image(options.init_image[0]), options.strength, mask)


def fit_init(init: InitImage, options: SampleSettings, size: Size, why: str) -> tuple[InitImage, list[str]]:
    """Return the image to start from at ``size``, and a note if it had another one, which ends in ``why``.

    ValueError for a mask of another aspect ratio, or one that is empty after cropping, or a strength without a step.
    """
    assert options.init_image and init.size
    (name,), own = options.init_image, init.size
    if init.mask is not None and options.inpaint_mask:
        of_mask = (init.mask.shape[-2], init.mask.shape[-1])
        if of_mask != size and not same_shape(of_mask, own):
            raise ValueError(
                f"The mask {options.inpaint_mask[0]} is {size_text(of_mask)} pixels but the image {name} is "
                f"{size_text(own)}, another aspect ratio; save the mask with the image's."
            )
    fitted = init.prepared(size, options.num_inference_steps)
    if fitted.mask is not None and not bool((fitted.mask > 0).any()):
        raise ValueError(
            f"The mask of {name} is black everywhere in the part that remains, {size_text(size)}; choose "
            "another --height and --width."
        )
    if own == size:
        return fitted, []
    cropped = "" if same_shape(own, size) else " and cropped"
    return fitted, [f"{name} is {size_text(own)} pixels, scaled{cropped} to {size_text(size)}{why}."]


def check_save_steps(options: SampleSettings) -> None:
    """Raise a ValueError if neither pass has as many steps as ``--save_steps``, so that nothing would be written.

    The strengths are filled in.
    """
    steps = options.num_inference_steps or _STEPS
    most = int(steps * max(options.strength or 1.0, options.upscale_strength or 0.0))
    if options.save_steps is not None and options.save_steps > most:
        raise ValueError(
            f"--save_steps {options.save_steps} is more than the {most} steps of this run, so it would write nothing; "
            f"give at most {most}."
        )


def second_size(options: SampleSettings, variants: Sequence[Variant], size: Size, multiple: int) -> Size | None:
    """Return the (height, width) of the second pass that ``--upscale`` asks for, if any, and fill in its strength.

    size: of the first pass. multiple: of both sides in pixels. ValueError for a factor or strength out of range, or
    settings that do not go together.
    """
    factor = options.upscale
    if factor is None:
        if options.upscale_strength is not None:
            raise ValueError("--upscale_strength is for a second pass; give --upscale.")
        return None
    if not 1 < factor <= _MOST_UPSCALED:
        raise ValueError(f"--upscale must be above 1 and at most {_MOST_UPSCALED}, not {factor}.")
    if options.inpaint_mask:
        raise ValueError("--upscale does not go together with --inpaint_mask, which keeps pixels; use one of them.")
    if any(map(optimized_controls, variants)):
        raise ValueError("--upscale does not go together with spacetime_optimized; use spacetime.")
    if options.upscale_strength is None:
        options.upscale_strength = _STRENGTH_UPSCALED
    strength, steps = options.upscale_strength, options.num_inference_steps or _STEPS
    if not 0 < strength <= 1:
        raise ValueError(f"--upscale_strength must be above 0 and at most 1, not {strength}.")
    if int(steps * strength) < 1:
        raise ValueError(f"An --upscale_strength of {strength} leaves no step of {steps}; raise one of them.")
    height, width = near_side(size[0] * factor, multiple), near_side(size[1] * factor, multiple)
    for name, side in (("height", height), ("width", width)):
        check_side(f"upscaled {name}", side)
    return height, width
