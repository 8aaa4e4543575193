"""What ``sample.py`` does around ``generate``: flags, and checks before anything slow.

:func:`parse` -> :func:`prepare` (everything checked, nothing loaded) -> :func:`build_controls`; files are written by
``sampling_files``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.adapter import ADAPTERS, check_config, load_adapter
from localctl.base import DTYPES, SCHEDULERS, BaseConfig, lasting_name, resolve_base, same_base
from localctl.conditions import CHANNELS, ConditionConfig, extract
from localctl.control.base import check_window
from localctl.control.local_adapter import LocalAdapterControl
from localctl.files import parse_json
from localctl.images import load_image
from localctl.layout import Layout, check_side
from localctl.masks import load_mask
from localctl.prompt_syntax import warn_of_syntax
from localctl.run.processes import process_device
from localctl.sampling_files import INPUTS, RECORD
from localctl.sampling_regions import Variant, add_flags, layout_paths, load_layouts, plan

_COLOUR_TOLERANCE = 32  # of 255; JPEG tints gray pictures a little


@dataclass(frozen=True)
class AdapterJob:
    """One adapter with what it shall follow, checked but not loaded."""

    folder: Path
    is_local: bool
    condition: Tensor  # (C, H, W) in [0, 1]
    mask: Tensor  # (1, H, W)
    weight: float
    start: float
    end: float


@dataclass(frozen=True)
class Job:
    """Everything a run needs; ``options`` are the flags that reproduce it, ``variants`` the ways to draw them."""

    layouts: list[Layout]
    adapters: list[AdapterJob]
    base: BaseConfig
    device: torch.device
    options: argparse.Namespace
    variants: list[Variant]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}; see --help.")


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of ``sample.py``; dashes and underscores are the same."""
    parser = _Parser(
        prog="sample.py",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", nargs="+", help="one or more prompts")
    group = parser.add_argument_group("adapters", "one value for all adapters, or one for each")
    group.add_argument("--adapter", nargs="+", metavar="DIR", help="folders of trained (or plain T2I-) adapters")
    group.add_argument("--image", nargs="+", metavar="FILE", help="photos the conditions are computed from")
    group.add_argument("--condition_image", nargs="+", metavar="FILE", help="ready conditions, in place of --image")
    group.add_argument("--mask", nargs="+", metavar="FILE", help="white = controlled; default: everywhere")
    group.add_argument("--condition", nargs="+", metavar="KIND", help=f"{', '.join(CHANNELS)}; default: as trained")
    group.add_argument("--weight", nargs="+", type=float, default=[1.0], help="strength (default 1)")
    group.add_argument("--start", nargs="+", type=float, default=[0.0], help="active from this fraction of the steps")
    group.add_argument("--end", nargs="+", type=float, default=[1.0], help="active up to this fraction of the steps")
    add_flags(parser)
    add("--base", help="micro, sd15, sd21, sdxl, a folder or a hub id; default: the adapter's; without any, micro")
    add("--seeds", nargs="+", type=int, default=[0], help="one picture per prompt and seed")
    add("--num_inference_steps", type=int, default=30)
    add("--guidance_scale", type=float, help="default: what suits base and control (micro 2 or 4, others 7.5)")
    add("--negative_prompt")
    add("--height", type=int, help="default, and with a condition the only one: the condition's or the layout's own")
    add("--width", type=int, help="as --height")
    add("--scheduler", choices=sorted(SCHEDULERS), help="default: what suits base and control")
    add("--batch_size", type=int, default=4, help="pictures at once; does not change them")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--output_dir", default="outputs/sample")
    add("--from_json", metavar="FILE", help=f"repeat a run from its {RECORD}; further flags replace what it says")
    return parser


def parse(argv: Sequence[str], description: str | None = None) -> argparse.Namespace:
    """Flags as a namespace; a record given with ``--from_json`` is put in front of them. ValueError for bad flags."""
    parser = new_parser(description)
    argv = [_underscored(token) for token in argv]
    options = parser.parse_args(argv)
    if options.from_json is not None:
        options = parser.parse_args([*_recorded_flags(Path(options.from_json), parser), *argv])
    if not options.prompt and not options.layout:
        raise ValueError("There is no prompt; give --prompt, or --layout for a scene with regions.")
    if not options.adapter and not options.layout:
        raise ValueError("There is no adapter; give --adapter, or --layout for a scene with regions.")
    return options


def _underscored(token: str) -> str:
    name, equals, value = token.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if token.startswith("--") else token


def _recorded_flags(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The flags in a record; relative input files are looked up beside it."""
    try:
        options = json.loads(path.read_text(encoding="utf-8"))["options"]
        assert isinstance(options, dict)
    except OSError as error:
        raise ValueError(f"The record {path} cannot be read ({error.strerror}); check the path.") from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is not a record of sample.py; give the {RECORD} of an earlier run.") from error
    flags: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if name in INPUTS:
            values = [path.parent / item for item in values]  # absolute paths stay as they are
        # A single value goes behind "=", where it may begin with a dash.
        flags += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *map(str, values)]
    return flags


def prepare(options: argparse.Namespace) -> Job:
    """Check everything that can be checked without loading a model. ValueError in one sentence."""
    scenes = load_layouts(options)
    _check_numbers(options)
    device = process_device(options.device)
    folders = [find_adapter(path) for path in options.adapter or ()]
    configs = [_adapter_config(folder) for folder in folders]
    base = _base_name(options.base, folders, configs) if folders else options.base or "micro"
    variants = plan(options, base)
    _say_sampling(options, variants, resolve_base(base).guidance_scale)
    adapters = [_adapter_job(options, index, *pair) for index, pair in enumerate(zip(folders, configs, strict=True))]
    size = _common_size(options, adapters) if adapters else (options.height, options.width)
    scenes = scenes or [Layout(prompt) for prompt in options.prompt]
    layouts = [_sized(scene, size) for scene in scenes]
    warn_of_syntax([*(layout.prompt for layout in layouts), options.negative_prompt or ""])
    return Job(layouts, adapters, BaseConfig(name=base, dtype=options.dtype), device, options, variants)


def _say_sampling(options: argparse.Namespace, variants: Sequence[Variant], guidance_scale: float) -> None:
    """Guidance scale and scheduler are recorded where they are one for all variants, so that a later default changes no
    picture."""
    scales = {variant.sampling.guidance_scale or guidance_scale for variant in variants}
    schedulers = {variant.sampling.scheduler for variant in variants}
    if options.guidance_scale is None and len(scales) == 1:
        options.guidance_scale = scales.pop()
    if options.scheduler is None and len(schedulers) == 1:
        options.scheduler = schedulers.pop()


def _sized(layout: Layout, size: tuple[int | None, int | None]) -> Layout:
    """The layout in the size (height, width) of the run, as far as that is said. ValueError when it has another."""
    height, width = size[0] or layout.height, size[1] or layout.width
    if layout.size not in (None, (height, width)):
        raise ValueError(
            f"The layout is {layout.width}x{layout.height} pixels but the picture is to be {width}x{height}; "
            "change the layout, or leave its size out."
        )
    return replace(layout, height=height, width=width)


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("height", "width"):
        check_side(name, getattr(options, name))
    for name in ("num_inference_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(options, name)}.")
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError("A seed is given twice in --seeds; give each one once.")
    if not all(map(math.isfinite, [options.guidance_scale or 0.0, *options.weight])):
        raise ValueError("--guidance_scale and --weight must be finite numbers.")
    if not options.adapter:
        for name in (*(item for item in INPUTS if item != "layout"), "condition"):
            if getattr(options, name):
                raise ValueError(f"--{name} is for an adapter, and there is none; give --adapter.")
        return
    if options.image and options.condition_image:
        raise ValueError("Give either --image or --condition_image, not both.")
    if not options.image and not options.condition_image:
        raise ValueError("There is nothing to follow; give --image or --condition_image.")
    for name in (*(item for item in INPUTS if item != "layout"), "condition", "weight", "start", "end"):
        count = len(getattr(options, name) or [None])
        if count not in (1, len(options.adapter)):
            raise ValueError(f"--{name} has {count} values for {len(options.adapter)} adapters; give one, or one each.")


def find_adapter(path: str | Path) -> Path:
    """The folder of an adapter: ``path`` itself, or ``adapter`` within the folder of a training run."""
    path = Path(path)
    for folder in (path, path / "adapter"):
        if (folder / "config.json").is_file():
            return folder.resolve()
    what = "has no adapter in it" if path.is_dir() else "does not exist"
    raise ValueError(f"The adapter folder {path} {what}; give the folder that training saved.")


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = parse_json((folder / "config.json").read_bytes())
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json is damaged; save the adapter again.") from error
    if kind not in tuple(ADAPTERS):
        raise ValueError(f"{folder} holds a {kind}, not an adapter; give the folder that training saved.")
    return check_config(config, folder)


def _base_name(asked: str | None, folders: Sequence[Path], configs: Sequence[dict[str, Any]]) -> str:
    """The base to load: all adapters must have been trained on it, as far as they say."""
    named = [(folder, config["base"]) for folder, config in zip(folders, configs, strict=True) if config.get("base")]
    if asked is None and not named:
        raise ValueError("The adapter does not say which base it was trained on; give --base.")
    base = asked or named[0][1]
    for folder, own in named:
        if not same_base(own, base):
            other = "--base" if asked else "another adapter"
            raise ValueError(
                f"The adapter {folder} was trained on the base {own!r} but {other} says {base!r}; "
                f"if they are one model, change 'base' in the adapter's config.json."
            )
    return base


def _adapter_job(options: argparse.Namespace, index: int, folder: Path, config: dict[str, Any]) -> AdapterJob:
    def nth(name: str) -> Any:
        values = getattr(options, name)
        return None if not values else values[0] if len(values) == 1 else values[index]

    settings = _condition_config(nth("condition"), config, folder, computed=bool(options.image))
    channels = config.get("in_channels", 3)  # T2IAdapter's default
    if options.image:
        assert settings is not None
        condition, path = extract(settings, np.asarray(load_image(nth("image")))), nth("image")
    else:
        condition, path = _load_condition(nth("condition_image"), channels), nth("condition_image")
    height, width = condition.shape[-2:]
    multiple = math.lcm(8, config.get("downscale_factor", 8))
    if height % multiple or width % multiple:
        raise ValueError(f"{path} is {width}x{height} pixels, no multiple of {multiple}; resize or crop it first.")
    mask = load_mask(nth("mask"), (height, width)) if options.mask else torch.ones(1, height, width)
    window = nth("start"), nth("end")
    check_window(*window)
    return AdapterJob(folder, config["_class_name"] == "LocalAdapter", condition, mask, nth("weight"), *window)


def _condition_config(kind: str | None, config: dict[str, Any], folder: Path, computed: bool) -> ConditionConfig | None:
    """How to compute the condition; as trained, unless another kind is asked. None: nobody knows, nor needs to."""
    trained = config.get("condition") or {}
    kind = kind or trained.get("kind")
    if kind is None:
        if computed:
            raise ValueError(f"The adapter {folder} does not say which condition it was trained on; give --condition.")
        return None
    try:
        settings = ConditionConfig(**(trained if kind == trained.get("kind") else {"kind": kind}))
    except TypeError as error:
        raise ValueError(f"'condition' in {folder}/config.json is damaged ({error}); repair it.") from error
    channels = config.get("in_channels", 3)
    if settings.channels != channels:
        raise ValueError(
            f"A {kind} condition has {settings.channels} channels but the adapter {folder} takes {channels}; "
            "give the --condition it was trained on."
        )
    return settings


def _load_condition(path: str, channels: int) -> Tensor:
    """A ready condition (C,H,W) in [0,1] from a picture."""
    picture = np.asarray(load_image(path))  # (H,W,3)
    if channels == 1 and int(np.ptp(picture.astype(np.int16), axis=2).max()) > _COLOUR_TOLERANCE:
        raise ValueError(f"{path} is in colour but the adapter takes 1 channel; give a gray one, or --image.")
    if channels not in (1, 3):
        raise ValueError(f"The adapter takes {channels} channels, which no picture has; use it from Python.")
    if channels == 1:
        picture = np.asarray(Image.fromarray(picture).convert("L"))[..., None]
    return torch.from_numpy(picture.transpose(2, 0, 1).copy()).float() / 255


def _common_size(options: argparse.Namespace, adapters: Sequence[AdapterJob]) -> tuple[int, int]:
    height, width = adapters[0].condition.shape[-2:]
    for job in adapters[1:]:
        if job.condition.shape[-2:] != (height, width):
            raise ValueError(
                f"The conditions are {width}x{height} and {job.condition.shape[-1]}x{job.condition.shape[-2]} pixels; "
                "resize them to one size."
            )
    if (options.height or height, options.width or width) != (height, width):
        raise ValueError(
            f"The condition is {width}x{height} pixels but --width and --height ask for {options.width or width}x"
            f"{options.height or height}; resize the picture first, or leave them out."
        )
    return height, width


def build_controls(job: Job) -> list[LocalAdapterControl]:
    """Load the adapters. ValueError when a file is missing or damaged."""
    controls = []
    for item in job.adapters:
        adapter = load_adapter(item.folder, "LocalAdapter" if item.is_local else "T2IAdapter")
        adapter = adapter.to(job.device).eval().requires_grad_(False)
        controls.append(LocalAdapterControl(adapter, item.condition, item.mask, item.weight, item.start, item.end))
    return controls


def reproducing_options(job: Job) -> dict[str, Any]:
    """The flags that repeat this run from anywhere: defaults that came from the adapter spelled out, paths absolute."""
    return {
        **vars(job.options),
        "from_json": None,
        "base": lasting_name(job.base.name),
        "adapter": [str(item.folder) for item in job.adapters] or None,
        "layout": layout_paths(job.options) or None,
    }
