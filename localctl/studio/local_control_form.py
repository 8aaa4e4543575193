"""The form of the tab Local control: what its fields say, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from localctl.settings import ConditionConfig
from localctl.studio import limits
from localctl.studio.addon_fields import EVERYWHERE, addon_settings
from localctl.studio.config import StudioConfig
from localctl.studio.limits import Scene, SceneRegion
from localctl.studio.local_control_job import MOST_ADAPTERS, Follow, Order, Thresholds, settings_of
from localctl.studio.shared_form import SharedForm, read_shared
from localctl.studio.uploads import read_photo

PHOTO = "a photo"
SOURCES = (PHOTO, "a finished condition")
USUAL = ConditionConfig()
PLACES = (EVERYWHERE, *(f"mask {number}" for number in range(1, MOST_ADAPTERS + 1)))  # of an addon


@dataclass(frozen=True, kw_only=True)
class FollowForm(SharedForm):
    """The fields of the tab, checked. None: what suits the base."""

    order: Order
    unconditional_scale: float | None
    control_guidance_scale: float | None

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of a run but for its inputs. ValueError without a prompt."""
        if not self.prompt:
            raise ValueError("There is no prompt; describe the image.")
        return {
            **super().sampling,
            "prompt": [self.prompt],
            "unconditional_scale": None if self.unconditional_scale is None else [self.unconditional_scale],
            "control_guidance_scale": self.control_guidance_scale,
        }


def first_regions(count: int) -> list[dict[str, Any]]:
    """Return the regions of the canvas before anything is painted: one for each adapter."""
    return [{"id": f"m{index + 1}", "color": index, "phrase": f"adapter {index + 1}"} for index in range(count)]


def read_order(values: Mapping[str, Any]) -> Order:
    """Read what is to be followed. ValueError in one sentence for the first field that is out of bounds."""
    get = values.get
    scene = limits.scene(get("scene"))
    if not 1 <= len(scene.regions) <= MOST_ADAPTERS:
        raise ValueError(f"There must be 1 to {MOST_ADAPTERS} masks, one for each adapter, not {len(scene.regions)}.")
    image = read_photo("The photo", get("photo"))
    is_photo = limits.choice("The image", get("source"), SOURCES) == PHOTO
    low, high = (limits.number(f"The {name} threshold", get(name), 0, 400) for name in ("low", "high"))
    if low > high:
        raise ValueError(f"The low threshold {low:g} is above the high one, {high:g}; raise the high one.")
    sides = {name: limits.optional_side(f"The {name}", get(name)) for name in ("height", "width")}
    return Order(
        photo=image if is_photo else None,
        condition=None if is_photo else image,
        follows=[_follow(values, number, region, scene) for number, region in enumerate(scene.regions, start=1)],
        thresholds=Thresholds(low, high, limits.whole("The colours per side", get("cells"), 2, 32)),
        **sides,
    )


def _follow(values: Mapping[str, Any], number: int, region: SceneRegion, scene: Scene) -> Follow:
    """Read the adapter with this number and its mask."""
    of = f"adapter {number}"
    start, end = limits.window(f"Adapter {number}", of, values.get(f"start{number}"), values.get(f"end{number}"))
    return Follow(
        adapter=limits.text(f"The name of {of}", values.get(f"adapter{number}"), 300),
        weight=limits.number(f"The strength of {of}", values.get(f"weight{number}"), 0, 2),
        start=start,
        end=end,
        mask=mask_of(region, scene),
    )


def mask_of(region: SceneRegion, scene: Scene) -> Image.Image | None:
    """Return the mask of a region at the size of the canvas, white inside; None where nothing is painted."""
    if region.mask is not None:
        return Image.fromarray((region.mask * 255).round().astype("uint8"))
    if region.box is None:
        return None
    mask = Image.new("L", (scene.width, scene.height))
    sides = (scene.width, scene.height) * 2
    left, top, right, bottom = (round(edge * side) for edge, side in zip(region.box, sides, strict=True))
    ImageDraw.Draw(mask).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=255)
    return mask


def read_form(values: Mapping[str, Any], config: StudioConfig) -> FollowForm:
    """Read all fields by name. ValueError in one sentence for the first that is out of bounds."""
    beside = "The control beside the negative prompt"
    of_control = "The guidance scale of the control"
    return FollowForm(
        order=read_order(values),
        unconditional_scale=limits.optional_number(beside, values.get("unconditional_scale"), 0, 1),
        control_guidance_scale=limits.optional_number(of_control, values.get("control_guidance_scale"), 0, 30),
        **read_shared(values, config, PLACES),
    )


def form_settings(form: FollowForm, config: StudioConfig, folder: Path) -> tuple[dict[str, Any], list[Image.Image]]:
    """Return the settings of a run, and the conditions, with the inputs written to ``folder``. ValueError as of
    :func:`~localctl.studio.local_control_job.settings_of`, and for a mask of an addon that is not there."""
    settings, found = settings_of(form.order, config, folder, form.sampling)

    def mask(index: int) -> str:
        masks: list[str] = settings["mask"]
        if index >= len(masks):
            raise ValueError(f"There is no mask {index + 1} for an addon to act in; add an adapter, or choose another.")
        return masks[index]

    return settings | addon_settings(form.addons, mask, [form.prompt, form.negative_prompt], config, folder), found
