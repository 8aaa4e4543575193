"""The settings of a run of ``sample.py``, from flags or from the ``sample.json`` of an earlier run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from localctl.bases import DtypeName, SchedulerName
from localctl.files import first_line, read_json
from localctl.records import record
from localctl.sizes import typed_size

RECORD = "sample.json"
# Settings that name files, which are copied beside the record.
INPUTS = ("image", "condition_image", "mask", "layout", "init_image", "inpaint_mask") + (
    "controlnet_image", "controlnet_condition_image", "controlnet_mask", "ip_adapter_image", "ip_adapter_mask"
)  # fmt: skip
# Settings that name models: known ones, files, folders or hub ids; some with a name of their own, NAME=PLACE.
PLACES = ("base", "vae", "adapter", "predictor") + (
    "controlnet", "ip_adapter", "ip_adapter_encoder", "lora", "textual_inversion",
    "condition_model", "condition_detector", "controlnet_condition_model", "controlnet_condition_detector",
)  # fmt: skip
HERE = ("output_dir", "device", "local_files_only", "from_json", "embed_record")  # matter only where the run is
AUTO = "auto"  # instead of a layout: one predicted from the prompt
REGION = "region:"  # begins a mask that is the region with the phrase after it
_SEED_BITS = 64


def seed_in_bounds(value: int) -> int:
    """Return ``value``. ValueError if it has more than 64 bits."""
    if abs(value) >= 2**_SEED_BITS:
        raise PydanticCustomError("seed", "a whole number of no more than 64 bits")
    return value


def names_file(value: str) -> bool:
    """Return whether a value of one of the ``INPUTS`` is a file, rather than a word in place of one."""
    return value != AUTO and not value.startswith(REGION)


def _several(value: Any) -> Any:
    """Return a single value as a list of one."""
    return value if value is None or isinstance(value, (list, tuple)) else [value]


def _size(value: Any) -> Any:
    """Return (height, width) of a size that is given as text, such as 512x768."""
    return typed_size(value) if isinstance(value, str) else value


# Strict, as JSON has its own types: text is not a number, and true is not 1.
_Text = Annotated[str, Field(strict=True)]
_Whole = Annotated[int, Field(strict=True)]
_Number = Annotated[float, Field(strict=True)]
_Texts = Annotated[list[_Text] | None, BeforeValidator(_several)]
_Numbers = Annotated[list[_Number], BeforeValidator(_several)]
Presets = dict[str, list[_Text]]  # of controls, joined by +: NAME=VALUE as in ``set``, and of their sampling


@record()
@dataclass(kw_only=True)
class SampleSettings:
    """One run of ``sample.py``; the help of the flag of the same name explains each setting. None: not given.

    presets: what acted in the run of a record without being given.

    ValueError for a value of another type.
    """

    prompt: _Texts = None
    adapter: _Texts = None
    image: _Texts = None
    condition_image: _Texts = None
    mask: _Texts = None
    condition: _Texts = None
    condition_model: _Texts = None
    condition_detector: _Texts = None
    weight: _Numbers = field(default_factory=lambda: [1.0])
    start: _Numbers = field(default_factory=lambda: [0.0])
    end: _Numbers = field(default_factory=lambda: [1.0])
    level_weights: _Texts = None
    unconditional_scale: Annotated[list[_Number] | None, BeforeValidator(_several)] = None
    control_guidance_scale: _Number | None = None
    controlnet: _Texts = None
    controlnet_image: _Texts = None
    controlnet_condition_image: _Texts = None
    controlnet_condition: _Texts = None
    controlnet_condition_model: _Texts = None
    controlnet_condition_detector: _Texts = None
    controlnet_mask: _Texts = None
    controlnet_scale: _Numbers = field(default_factory=lambda: [1.0])
    controlnet_start: _Numbers = field(default_factory=lambda: [0.0])
    controlnet_end: _Numbers = field(default_factory=lambda: [1.0])
    guess_mode: bool | None = None
    ip_adapter: _Texts = None
    ip_adapter_encoder: _Text | None = None
    ip_adapter_image: _Texts = None
    ip_adapter_mask: _Texts = None
    ip_adapter_scale: _Numbers = field(default_factory=lambda: [1.0])
    ip_adapter_start: _Numbers = field(default_factory=lambda: [0.0])
    ip_adapter_end: _Numbers = field(default_factory=lambda: [1.0])
    lora: _Texts = None
    lora_scale: _Numbers = field(default_factory=lambda: [1.0])
    lora_per_prompt: _Texts = None
    textual_inversion: _Texts = None
    layout: _Texts = None
    color: _Texts = None
    layout_seed: _Whole | None = None
    region_negatives: bool = True
    predictor: _Text | None = None
    control: _Texts = None
    set: _Texts = None
    presets: Presets | None = None
    sweep: _Texts = None
    compare: _Texts = None
    init_image: _Texts = None
    strength: _Number | None = None
    inpaint_mask: _Texts = None
    upscale: _Number | None = None
    upscale_strength: _Number | None = None
    resolution: Annotated[tuple[_Whole, _Whole] | None, BeforeValidator(_size)] = None
    height: _Whole | None = None
    width: _Whole | None = None
    seeds: Annotated[list[Annotated[_Whole, AfterValidator(seed_in_bounds)]], BeforeValidator(_several)] = field(
        default_factory=lambda: [0]
    )
    num_inference_steps: _Whole = 30
    guidance_scale: _Number | None = None
    true_cfg_scale: _Number | None = None
    guidance_rescale: _Number | None = None
    negative_prompt: _Text | None = None
    prompt_weighting: bool | None = None
    max_sequence_length: _Whole | None = None
    clip_skip: _Whole | None = None
    scheduler: SchedulerName | None = None
    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_beta_sigmas: bool | None = None
    batch_size: _Whole = 4
    base: _Text | None = None
    vae: _Text | None = None
    variant: _Text | None = None
    revision: _Text | None = None
    local_files_only: bool | None = None
    dtype: DtypeName = "float32"
    device: _Text = "auto"
    output_dir: _Text = "outputs/sample"
    embed_record: bool = True
    save_steps: _Whole | None = None
    from_json: _Text | None = None


def read_record(path: Path) -> dict[str, Any]:
    """Read the settings in a record that are not None; paths of input files in it are relative to its folder.

    path: the record, or its folder. ValueError in one sentence for a file that is not a record, an unknown setting, or
    a value of another type.
    """
    path = path.expanduser()
    path = path / RECORD if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"The record {path} cannot be read (no such file); give the {RECORD} of an earlier run.")
    try:
        content = read_json(path, "The record")
    except ValueError as error:
        raise ValueError(f"{path} is not a record of sample.py ({first_line(error)}); give a {RECORD}.") from error
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise ValueError(f"{path} is not a record of sample.py; give the {RECORD} of an earlier run.")
    settings = checked_settings(options, f"The record {path}")
    if "prompt_weighting" not in options:  # of an earlier version, which read marks as text
        settings["prompt_weighting"] = False
    settings |= earlier_regions(options)
    for name in INPUTS:
        if name in settings:
            settings[name] = [str(path.parent / item) if names_file(item) else item for item in settings[name]]
    return settings


def earlier_regions(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a record of a layout lacks if it is of a version in which the negative prompts of
    regions did nothing."""
    return {"region_negatives": False} if options.get("layout") and "region_negatives" not in options else {}


def checked_settings(options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the settings of a record that are not None, by name, each of its type. ValueError, with ``what`` as its
    subject, for an unknown setting, or a value of another type."""
    given = {name: value for name, value in options.items() if value is not None and name != "from_json"}
    try:
        read = vars(SampleSettings(**given))
    except ValueError as error:
        raise ValueError(f"{what} cannot be used: {error}") from None
    return {name: read[name] for name in given}


def command_line(settings: SampleSettings, program: str = "sample.py") -> str:
    """Return the command that repeats a run with these settings, quoted for a POSIX shell: flags whose values are not
    the default."""
    words = [program]
    for item in fields(settings):
        value = getattr(settings, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if value == default or value is None or item.name == "presets":  # which the command has again
            continue
        flag = f"--{item.name}"
        if item.name == "embed_record":
            words.append("--no_record")
        elif item.name == "prompt":
            words += [f"{flag}={text}" for text in value]  # each its own, as it may begin with a dash
        elif item.name == "resolution":
            words += [flag, f"{value[1]}x{value[0]}"]
        elif isinstance(value, list) and len(value) == 1 and item.name not in INPUTS:
            words += [f"{flag}={value[0]}"] if str(value[0]).startswith("-") else [flag, str(value[0])]
        elif isinstance(value, list):
            words += [
                flag,
                *(f"./{one}" if str(one).startswith("-") and isinstance(one, str) else str(one) for one in value),
            ]
        else:
            words.append(f"{flag}={str(value).lower() if isinstance(value, bool) else value}")
    return shlex.join(words)
