"""The form of the tab Place: what its fields say, checked, and from there the settings of a run and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from localctl.bases import SIGMAS
from localctl.control.presets import NONE, control_names
from localctl.images import MAX_PIXELS
from localctl.layout import Layout
from localctl.layout_io import save_layout
from localctl.masks import mask_to_pil
from localctl.studio import limits
from localctl.studio.addon_fields import addon_settings, region_of
from localctl.studio.config import StudioConfig
from localctl.studio.limits import Scene
from localctl.studio.methods import COMPARED, COMPARED_LABELS, METHODS, changed_settings, settings_of
from localctl.studio.scenes import layout_of, prompt_of
from localctl.studio.shared_form import AUTO, SharedForm, read_shared
from localctl.studio.uploads import read_photo

PHOTO_USES = {"Behind the regions": "behind", "Image to image": "image", "Repaint the regions": "inpaint"}
MAX_SWEEP = 16  # images


@dataclass(frozen=True, kw_only=True)
class PlaceForm(SharedForm):
    """The fields of the tab, checked. ``method``: names joined by +. None: what suits base and method."""

    scene: Scene
    method: str
    settings: tuple[str, ...]
    sigmas: str | None
    guidance_rescale: float
    clip_skip: int
    overlap: str
    photo: Image.Image | None
    photo_use: str
    photo_strength: float
    upscale: float
    upscale_strength: float
    compared: tuple[str, ...] = COMPARED

    @property
    def texts(self) -> list[str]:
        """All prompts, those of the regions included."""
        own = [text for region in self.scene.regions for text in (region.prompt, region.negative_prompt)]
        return [prompt_of(self.scene, self.prompt), self.negative_prompt, *own]

    def layout(self) -> Layout:
        """Return the layout. ValueError for a region without a place, or a phrase that is not in the prompt."""
        return layout_of(self.scene, self.prompt, self.overlap)


def read_form(values: Mapping[str, Any], config: StudioConfig) -> PlaceForm:
    """Read the fields by name. ValueError in one sentence for the first that is out of bounds."""
    get = values.get
    method = METHODS[limits.choice("The method", get("method"), METHODS)]
    sigmas = limits.choice("The noise levels", get("sigmas"), (AUTO, *SIGMAS))
    compared = get("compared", COMPARED_LABELS)
    scene, upscale = limits.scene(get("scene")), limits.number("The second pass", get("upscale"), 1, 4)
    if scene.width * scene.height * upscale**2 > MAX_PIXELS:
        raise ValueError(
            f"The second pass makes {scene.width * upscale:.0f}x{scene.height * upscale:.0f} pixels, more than "
            f"{MAX_PIXELS:,}; choose a smaller factor or canvas."
        )
    return PlaceForm(
        scene=scene,
        method=method,
        settings=tuple(changed_settings(method, config.base, values)),
        sigmas=None if sigmas == AUTO else sigmas,
        guidance_rescale=limits.number("The guidance rescale", get("guidance_rescale"), 0, 1),
        clip_skip=limits.whole("CLIP skip", get("clip_skip"), 0, 12),
        overlap=limits.choice("The overlap policy", get("overlap"), ("share", "first", "last", "smallest")),
        photo=read_photo("The photo", get("photo")),
        photo_use=PHOTO_USES[limits.choice("The use of the photo", get("photo_use"), PHOTO_USES)],
        photo_strength=limits.number("The strength of the change", get("photo_strength"), 0, 1),
        upscale=upscale,
        upscale_strength=limits.number("The strength of the second pass", get("upscale_strength"), 0, 1),
        **read_shared(values, config),
        compared=tuple(METHODS[label] for label in limits.choices("The methods to compare", compared, METHODS)),
    )


@dataclass(frozen=True)
class Sweep:
    """A grid: ``columns`` and ``rows`` are the values of the settings ``column`` and ``row``; no rows: one line."""

    column: str
    columns: tuple[float, ...]
    row: str | None = None
    rows: tuple[float, ...] = ()


def read_sweep(values: Mapping[str, Any], form: PlaceForm) -> Sweep:
    """Read the fields of the sweep. ValueError for settings that the method does not have, or too many images."""
    known = sweepable(form.method)
    if not known:
        raise ValueError("The method has no settings to sweep; choose another method.")
    column = limits.choice("The setting of the columns", values.get("sweep_column"), known)
    row = limits.choice("The setting of the rows", values.get("sweep_row"), (*known, NONE))
    columns = limits.numbers("The values of the columns", values.get("sweep_columns"), -1000, 1000, MAX_SWEEP)
    rows: list[float] = []
    if row != NONE:
        rows = limits.numbers("The values of the rows", values.get("sweep_rows"), -1000, 1000, MAX_SWEEP)
    if row == column:
        raise ValueError("The rows and the columns sweep the same setting; choose two different ones, or none.")
    count = len(columns) * max(1, len(rows)) * len(form.seeds)
    if count > MAX_SWEEP:
        raise ValueError(f"The sweep asks for {count} images, more than {MAX_SWEEP}; give fewer values or images.")
    return Sweep(column, tuple(columns), None if row == NONE else row, tuple(rows))


def sweepable(method: str) -> list[str]:
    """Return the settings of a method that are numbers, those that matter most first."""
    every = [setting for name in control_names(method) for setting in settings_of(name)]
    return [setting.name for setting in every if setting.kind.startswith("float")]


def settings_for(
    form: PlaceForm, folder: Path, config: StudioConfig, *, compare: bool = False, sweep: Sweep | None = None
) -> dict[str, Any]:
    """Return the settings of a run of ``sample.py``, with the inputs written to ``folder``.

    compare: the methods to compare, each with its presets, instead of the form's one. ValueError as for
    :meth:`PlaceForm.layout`.
    """
    settings: dict[str, Any] = {
        **config.run_settings,
        **form.sampling,
        "guidance_rescale": form.guidance_rescale or None,
        "clip_skip": form.clip_skip or None,
        **({f"use_{form.sigmas}_sigmas": True} if form.sigmas else {}),
        "output_dir": str(folder),
        **addon_settings(form.addons, partial(region_of, form.scene), form.texts, config, folder),
        **_start_and_end(form, folder),
    }
    if not form.scene.regions:
        if compare or sweep:
            raise ValueError("There are no regions to compare methods on; drag one on the canvas.")
        if not form.prompt:
            raise ValueError("There is no prompt; type one, or drag a region and give it a phrase.")
        return settings | {"prompt": [form.prompt], "height": form.scene.height, "width": form.scene.width}
    settings["layout"] = [str(save_layout(form.layout(), folder / "layout.json"))]
    if compare:
        if len(form.compared) < 2:
            raise ValueError("A comparison needs two methods or more; choose them above the button.")
        return settings | {"compare": list(form.compared)}
    names = control_names(form.method)
    swept = {sweep.column, sweep.row} if sweep else set()
    fixed = [item for item in form.settings if item.partition("=")[0] not in swept]
    settings |= {"control": names or [NONE], "set": fixed or None}
    if sweep:
        settings["sweep"] = [f"{sweep.column}={_joined(sweep.columns)}"]
        if sweep.row is not None:
            settings["sweep"].append(f"{sweep.row}={_joined(sweep.rows)}")
    return settings


def _start_and_end(form: PlaceForm, folder: Path) -> dict[str, Any]:
    """Return the settings of what a run starts from, and of its second pass."""
    settings: dict[str, Any] = {}
    if form.upscale > 1:
        settings |= {"upscale": form.upscale, "upscale_strength": form.upscale_strength}
    if form.photo_use == "behind":
        return settings
    if form.photo is None:
        raise ValueError("There is no photo to start from; upload one, or choose to show it behind the regions only.")
    form.photo.save(folder / "photo.png")
    settings |= {"init_image": [str(folder / "photo.png")], "strength": form.photo_strength}
    if form.photo_use == "inpaint":
        if not form.scene.regions:
            raise ValueError("There are no regions to repaint; drag or brush one over the photo.")
        masks = form.layout().masks((form.scene.height, form.scene.width))
        mask_to_pil(masks.amax(dim=0)).save(folder / "repainted.png")
        settings["inpaint_mask"] = [str(folder / "repainted.png")]
    return settings


def _joined(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
