"""Addons in a run: ControlNets, IP-Adapters with their images, LoRAs by prompt, learned words; found and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from localctl.addons.controlnets import SavedControlNet, find_controlnet
from localctl.addons.embeddings import SavedEmbedding, find_embedding
from localctl.addons.ip_adapters import SavedIPAdapter, check_one_encoder, find_ip_adapter
from localctl.addons.loras import SavedLora, check_names, find_lora, parse_use
from localctl.architectures import BaseShape
from localctl.control.base import check_window
from localctl.data.geometry import geometry, same_shape
from localctl.images import load_image
from localctl.jobs.inputs import AdapterJob, Size, Source, prepare_inputs, read_sources, value_for
from localctl.jobs.settings import REGION, SampleSettings
from localctl.layout import Layout, texts_of
from localctl.masks import load_mask

_INPUTS = (
    *("image", "condition_image", "condition", "mask", "condition_model", "condition_detector"),
    *("scale", "start", "end"),
)
# The flags that belong to each addon; those with one value for each of its images.
_OF = {
    "controlnet": tuple(f"controlnet_{name}" for name in _INPUTS),
    "ip_adapter": ("ip_adapter_image", "ip_adapter_mask", "ip_adapter_scale", "ip_adapter_start", "ip_adapter_end"),
    "lora": ("lora_scale",),
    "textual_inversion": (),
}
_ONLY_WITH = {
    "controlnet": ("guess_mode", *_OF["controlnet"]),
    "ip_adapter": ("ip_adapter_encoder", *_OF["ip_adapter"]),
    "lora": ("lora_per_prompt", *_OF["lora"]),
}


@dataclass(frozen=True)
class ImagePromptJob:
    """An image for an IP-Adapter. mask: (1 or n layouts, 1, H, W) in [0, 1]; None: everywhere."""

    image: Image.Image
    mask: Tensor | None
    scale: float
    start: float
    end: float
    adapter: int


@dataclass(frozen=True)
class Addons:
    """The addons of a run; their weights are not loaded.

    controlnets: with condition and mask, which has one row, or one per layout. uses: of each layout, the scales of its
    LoRAs by name, sorted.
    """

    nets: tuple[SavedControlNet, ...] = ()
    controlnets: tuple[AdapterJob, ...] = ()
    ip_adapters: tuple[SavedIPAdapter, ...] = ()
    images: tuple[ImagePromptJob, ...] = ()
    loras: tuple[SavedLora, ...] = ()
    uses: tuple[tuple[tuple[str, float], ...], ...] = ()
    guess_mode: bool = False
    embeddings: tuple[SavedEmbedding, ...] = ()

    def groups(self, count: int) -> list[tuple[dict[str, float], list[int]]]:
        """Return the layouts, of ``count``, that are generated together, as they use the same LoRAs."""
        if not self.loras:
            return [({}, list(range(count)))]
        return [
            (dict(use), [index for index, other in enumerate(self.uses) if other == use])
            for use in dict.fromkeys(self.uses)
        ]

    def recorded(self) -> dict[str, Any]:
        """Return the settings that find them again from any folder."""
        return {
            "controlnet": [net.place for net in self.nets] or None,
            "ip_adapter": [item.place for item in self.ip_adapters] or None,
            "ip_adapter_encoder": self.ip_adapters[0].encoder if self.ip_adapters else None,
            "lora": [item.place for item in self.loras] or None,
            "textual_inversion": [item.place for item in self.embeddings] or None,
        }


def find_addons(options: SampleSettings) -> Addons:
    """Find the addons that the options name. ValueError for one that is not there, for flags of an addon without it,
    or for another number of values than addons."""
    plain = SampleSettings()
    for addon, names in _ONLY_WITH.items():
        for name in names if not getattr(options, addon) else ():
            if getattr(options, name) and getattr(options, name) != getattr(plain, name):
                raise ValueError(f"--{name} is for a --{addon}, but there is none; give --{addon}.")
    for addon, several in _OF.items():
        count = len(getattr(options, "ip_adapter_image" if addon == "ip_adapter" else addon) or ())
        for name in several if count else ():
            given = len(getattr(options, name) or [None])
            if given not in (1, count):
                what = "images" if addon == "ip_adapter" else f"{addon}s"
                raise ValueError(f"--{name} has {given} values for {count} {what}; give one, or one each.")
    _check_images(options)
    here = bool(options.local_files_only)
    encoder = options.ip_adapter_encoder
    found = Addons(
        nets=tuple(find_controlnet(place, here) for place in options.controlnet or ()),
        ip_adapters=tuple(find_ip_adapter(place, encoder, here) for place in options.ip_adapter or ()),
        loras=tuple(find_lora(place, here) for place in options.lora or ()),
        guess_mode=bool(options.guess_mode),
        embeddings=tuple(find_embedding(place, here) for place in options.textual_inversion or ()),
    )
    check_one_encoder(found.ip_adapters)
    check_names(found.loras)
    return found


def _check_images(options: SampleSettings) -> None:
    """Raise a ValueError for an addon without an image to follow, or for images that belong to no addon."""
    if options.controlnet and bool(options.controlnet_image) == bool(options.controlnet_condition_image):
        raise ValueError(
            "A ControlNet follows one image; give either --controlnet_condition_image (its condition), or "
            "--controlnet_image with --controlnet_condition (a photo, and what to compute from it)."
        )
    if options.controlnet_image and not options.controlnet_condition:
        raise ValueError("A ControlNet does not say what it follows; give --controlnet_condition, such as canny.")
    if options.ip_adapter and not options.ip_adapter_image:
        raise ValueError("The IP-Adapter has no image to follow; give --ip_adapter_image.")
    adapters, images = len(options.ip_adapter or ()), len(options.ip_adapter_image or ())
    if adapters > 1 and images != adapters:
        raise ValueError(
            f"There are {images} values of --ip_adapter_image for {adapters} IP-Adapters; give one image for each, or "
            "one IP-Adapter for all images."
        )


def check_addons(addons: Addons, shape: BaseShape, layouts: Sequence[Layout], negative_prompt: str | None) -> None:
    """Raise a ValueError for an addon that does not fit the base, or a learned word that no text has."""
    items: list[SavedControlNet | SavedIPAdapter | SavedLora] = [*addons.nets, *addons.ip_adapters, *addons.loras]
    for item in items:
        item.check(shape)
    texts = texts_of(layouts)
    for embedding in addons.embeddings:
        embedding.check(shape, [*texts, negative_prompt or ""])


def controlnet_sources(options: SampleSettings, addons: Addons) -> list[Source]:
    """Read the images of the ControlNets. ValueError as for adapters."""
    return read_sources(_controlnet_options(options), addons.nets)


def _controlnet_options(options: SampleSettings) -> Any:
    """Return the settings of the ControlNets by the names of the adapters' ones; masks that are regions as None."""
    values = {name: getattr(options, f"controlnet_{name}") for name in _INPUTS}
    values["weight"] = values.pop("scale")
    values["mask"] = [None if _is_region(mask) else mask for mask in values["mask"] or ()]
    return SimpleNamespace(**values, prefix="controlnet_", local_files_only=options.local_files_only)


def prepare_addons(
    options: SampleSettings, found: Addons, sources: Sequence[Source], layouts: Sequence[Layout], size: Size, why: str
) -> tuple[Addons, list[str]]:
    """Return the addons with their inputs of ``size``, and notes on images that had another size, as
    :func:`~localctl.jobs.inputs.prepare_inputs` does. ValueError for a region that a layout does not have, a mask of
    another aspect ratio, or LoRAs that do not fit the prompts."""
    jobs, notes = prepare_inputs(_controlnet_options(options), found.nets, sources, size, why)
    for index, job in enumerate(jobs):
        mask = value_for(options, "controlnet_mask", index)
        if _is_region(mask):
            jobs[index] = replace(job, mask=region_masks(layouts, mask.removeprefix(REGION), size))
    images = [_image_prompt(options, index, layouts, size) for index in range(len(options.ip_adapter_image or ()))]
    uses = _uses(options, found.loras, len(layouts))
    return replace(found, controlnets=tuple(jobs), images=tuple(images), uses=uses), notes


def _is_region(mask: str | None) -> bool:
    return mask is not None and mask.startswith(REGION)


def region_masks(layouts: Sequence[Layout], phrase: str, size: Size) -> Tensor:
    """Return the mask (n, 1, H, W) of the region with this phrase in each of the n layouts. ValueError without one."""
    masks = []
    for layout in layouts:
        names = [region.phrase or "" for region in layout.regions]
        if phrase not in names:
            known = ", ".join(repr(name) for name in names if name) or "none"
            raise ValueError(f"There is no region {phrase!r} in the layout {layout.prompt!r}; its phrases are {known}.")
        masks.append(layout.masks(size)[names.index(phrase)])
    return torch.stack(masks)


def _image_prompt(options: SampleSettings, index: int, layouts: Sequence[Layout], size: Size) -> ImagePromptJob:
    path = (options.ip_adapter_image or [])[index]
    place = value_for(options, "ip_adapter_mask", index)
    if place is None:
        mask = None
    elif _is_region(place):
        mask = region_masks(layouts, place.removeprefix(REGION), size)
    else:
        mask = _mask_of_size(place, size)
    window = value_for(options, "ip_adapter_start", index), value_for(options, "ip_adapter_end", index)
    check_window(*window)
    adapter = index if len(options.ip_adapter or ()) > 1 else 0
    return ImagePromptJob(load_image(path), mask, value_for(options, "ip_adapter_scale", index), *window, adapter)


def _mask_of_size(path: str, size: Size) -> Tensor:
    """Return the mask (1, 1, H, W) in a file, scaled to ``size``. ValueError for another aspect ratio, or one that is
    black after scaling."""
    mask = load_mask(path)
    own = (mask.shape[-2], mask.shape[-1])
    if own == size:
        return mask[None]
    if not same_shape(own, size):
        raise ValueError(
            f"The mask {path} is {own[1]}x{own[0]} pixels but the images are {size[1]}x{size[0]}, another aspect "
            "ratio; save the mask with theirs."
        )
    scaled = torch.from_numpy(geometry(own, size).apply_to_mask(mask[0].numpy()).clip(0, 1))[None, None]
    if not scaled.any():
        raise ValueError(
            f"The mask {path} is black everywhere in the part that remains at {size[1]}x{size[0]}; choose another "
            "--height and --width, or paint more of it white."
        )
    return scaled


def _uses(options: SampleSettings, loras: Iterable[SavedLora], count: int) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Return the LoRAs that each of the ``count`` layouts uses. ValueError for another number, or an idle LoRA."""
    known = {lora.name: value_for(options, "lora_scale", index) for index, lora in enumerate(loras)}
    texts = options.lora_per_prompt or ["all"] * count
    if len(texts) != count:
        raise ValueError(f"--lora_per_prompt has {len(texts)} values for {count} prompts; give one each.")
    uses = [parse_use(text, known) for text in texts] if known else []
    for name in known:
        if not any(name in use for use in uses):
            raise ValueError(f"The LoRA {name!r} is used by no prompt; leave it out, or name it in --lora_per_prompt.")
    return tuple(tuple(sorted(use.items())) for use in uses)
