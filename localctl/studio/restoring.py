"""What both tabs share when an image brings its settings back: seeds, values for each model, what has no field."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from localctl.jobs.settings import HERE, PLACES, SampleSettings
from localctl.sizes import shown
from localctl.studio import limits
from localctl.studio.shared_form import AUTO

# Both tabs have a field for these; or the server decides them, or they do not change an image.
_EVERYWHERE = frozenset(
    (*HERE, *PLACES, "variant", "revision", "dtype", "batch_size", "save_steps", "prompt", "negative_prompt")
    + ("height", "width", "seeds", "num_inference_steps", "guidance_scale", "true_cfg_scale", "scheduler")
    + ("max_sequence_length", "presets")
    + tuple(f"controlnet_{name}" for name in ("image", "condition_image", "condition", "mask", "scale", "start", "end"))
    + tuple(f"ip_adapter_{name}" for name in ("image", "mask", "scale", "start", "end"))
    + ("guess_mode", "lora_scale", "lora_per_prompt")
)


def refuse_others(options: Mapping[str, Any], known: Collection[str], tab: str) -> None:
    """Raise a ValueError that names the settings of a run which ``tab`` has no field for: beside those of both tabs, it
    has ``known``."""
    usual = vars(SampleSettings())
    known = {*_EVERYWHERE, *known, "prompt_weighting"}
    others = [name for name, value in options.items() if name not in known and value and value != usual.get(name)]
    if options.get("prompt_weighting") is False:
        others.append("prompt_weighting=false")
    if others:
        names = " and ".join(f"--{name}" for name in others)
        raise ValueError(
            f"The image was made with {names}, which the tab {tab} does not have; repeat it with sample.py --from_json."
        )


def seed_values(options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the fields of the seed and of the number of images, and a sentence on seeds that the page does not have.

    ValueError for a seed out of its bounds.
    """
    seeds = options.get("seeds") or [0]
    limits.seed(seeds[0])
    count = next((index for index, seed in enumerate(seeds) if seed != seeds[0] + index), len(seeds))
    count = min(count, limits.MAX_IMAGES)
    values = {"seed": str(seeds[0]), "images": count}
    if count == len(seeds):
        return values, ""
    others = shown(seeds[count:])
    return values, f"The run had the seeds {others}, too, which do not follow: the page takes up to 8 in a row."


def shared_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the fields of sampling that both tabs have, seeds included."""
    texts = {name: number_text(options.get(name)) for name in ("guidance_scale", "true_cfg_scale")}
    given = {"scheduler": options.get("scheduler") or AUTO, "steps": options.get("num_inference_steps", 30)}
    return {"negative_prompt": options.get("negative_prompt") or "", **given, **texts, **seed_values(options)[0]}


def number_text(value: float | None) -> str:
    """Return what a field for a number or nothing shows."""
    return "" if value is None else f"{value:g}"


def each(values: Sequence[Any], count: int) -> list[Any]:
    """Return one value for each adapter; a single value is for all. ValueError for another number of values."""
    if len(values) not in (1, count):
        raise ValueError(
            f"The record in the image has {len(values)} values for {count} models ({shown(list(values))}); give "
            "another image."
        )
    return list(values) * count if len(values) == 1 else list(values)


def check_bounds(values: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raise a ValueError for a number that the field of its name cannot show, as ``sample.py`` takes more."""
    for name, value in values.items():
        low, high = (getattr(fields.get(name), bound, None) for bound in ("minimum", "maximum"))
        if low is not None and high is not None and not low <= value <= high:
            raise ValueError(
                f"The image was made with {value:g} for {fields[name].label!r}, and the page has {low:g} to {high:g}; "
                "repeat it with sample.py --from_json."
            )
