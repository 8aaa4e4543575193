"""The settings of a run of ``sample.py``, from flags or from the ``sample.json`` of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass, field
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
INPUTS = ("image", "condition_image", "mask", "layout") + (
    "controlnet_image", "controlnet_condition_image", "controlnet_mask", "ip_adapter_image", "ip_adapter_mask"
)  # fmt: skip
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


@record()
@dataclass(kw_only=True)
class SampleSettings:
    """One run of ``sample.py``; the help of the flag of the same name explains each setting. None: not given.

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
    predictor: _Text | None = None
    control: _Texts = None
    set: _Texts = None
    sweep: _Texts = None
    compare: _Texts = None
    resolution: Annotated[tuple[_Whole, _Whole] | None, BeforeValidator(_size)] = None
    height: _Whole | None = None
    width: _Whole | None = None
    seeds: Annotated[list[Annotated[_Whole, AfterValidator(seed_in_bounds)]], BeforeValidator(_several)] = field(
        default_factory=lambda: [0]
    )
    num_inference_steps: _Whole = 30
    guidance_scale: _Number | None = None
    guidance_rescale: _Number | None = None
    negative_prompt: _Text | None = None
    prompt_weighting: bool | None = None
    clip_skip: _Whole | None = None
    scheduler: SchedulerName | None = None
    use_karras_sigmas: bool | None = None
    batch_size: _Whole = 4
    base: _Text | None = None
    vae: _Text | None = None
    variant: _Text | None = None
    revision: _Text | None = None
    local_files_only: bool | None = None
    dtype: DtypeName = "float32"
    device: _Text = "auto"
    output_dir: _Text = "outputs/sample"
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
    given = {name: value for name, value in options.items() if value is not None and name != "from_json"}
    try:
        read = vars(SampleSettings(**given))
    except ValueError as error:
        raise ValueError(f"The record {path} cannot be used: {error}") from None
    settings = {name: read[name] for name in given}
    if "prompt_weighting" not in options:  # of an earlier version, which read marks as text
        settings["prompt_weighting"] = False
    for name in INPUTS:
        if name in settings:
            settings[name] = [str(path.parent / item) if names_file(item) else item for item in settings[name]]
    return settings
