"""Generate a set of images in a folder, resumed any number of times, by any number of processes; and read it.

    settings.json      what it was generated with; a folder takes no images of other settings
    ids/ID.json        key, caption, prompt and seed of each image
    masks/ID.png       the mask it was generated with; scores read this one
    timing/ID.json     seconds of the batch that begins with this image
    images/ID.png      written last: an image that is there is finished

Batches are fixed by the settings: one that lacks an image is generated again as a whole, so that a run that was killed
any number of times ends with the same bytes as one that was not.
"""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image

from localctl.adapter import LocalAdapter
from localctl.adapter_files import SavedAdapter, find_adapter
from localctl.architectures import read_shape
from localctl.control.base import Control
from localctl.control.compatible import check_base
from localctl.control.image_controls import LocalAdapterControl, MaskedControlNet
from localctl.data import Example, MaskedSamples, SampleRef, Source, open_data
from localctl.distributed import process_device, processes
from localctl.evaluation.provenance import read_json, versions, write_bytes, write_json, write_json_once
from localctl.evaluation.settings import FidSettings
from localctl.files import first_line
from localctl.images import ImageError, load_image
from localctl.layout import Layout
from localctl.lazy import moved_names
from localctl.masks import load_mask, mask_to_pil
from localctl.metrics.weights import sha256_of_folder
from localctl.pipelines import DTYPES, freeze, load_pipeline, resolve_base
from localctl.quiet import no_progress_bars
from localctl.redaction import recorded
from localctl.sampling import Sampling, generate
from localctl.seeding import key_seed

logger = logging.getLogger(__name__)
_FREE = ("output_dir", "reference", "extractor", "weights", "prompts", "device")  # change no image
__getattr__ = moved_names(
    __name__,
    {
        "Drawn": f"{__name__}:GeneratedImage",
        "draw_set": f"{__name__}:generate_set",
        "picture_id": f"{__name__}:image_id",
        "read_pictures": f"{__name__}:read_images",
    },
)
SAID = ("base", "data", "condition", "mask", "part", "num_images", "seed", "sample", "adapter", "set") + (
    "num_inference_steps",
    "guidance_scale",
    "weights_sha256",
)


def open_source(settings: FidSettings) -> Source:
    """Open the examples of the part that ``settings`` name. ValueError when they cannot be opened."""
    assert settings.part is not None
    return open_data(settings.data, settings.condition, settings.part, settings.num_images, keep=False)


def image_id(index: int) -> str:
    return f"{index:06d}"


@dataclass(frozen=True)
class GeneratedImage:
    """One image of a set. image: uint8 (H,W,3); mask: float (H,W) in [0,1]."""

    id: str
    key: str
    caption: str
    image: np.ndarray
    mask: np.ndarray


def generate_set(settings: FidSettings, name: str) -> int:
    """Generate what is missing of the set ``name``; returns how many images this process made. ValueError in one
    sentence before anything slow."""
    folder = settings.folder / name
    rank, count = processes()
    resolve_base(settings.base.name)
    adapter = None if settings.adapter is None else find_adapter(settings.adapter, settings.base.local_files_only)
    steering = load_controlnet(settings) if adapter is None else load_adapter(adapter, settings)
    samples = MaskedSamples(open_source(settings), settings.mask, settings.seed)
    single = index_of(samples.source, settings.sample) if settings.sample is not None else None
    claim(folder, settings, name, adapter)
    size = settings.batch_size
    starts = range(0, settings.num_images, size)
    todo = [b for b in starts if any(not image_file(folder, i).is_file() for i in _batch(b, settings))]
    mine = [b for b in todo if b // size % count == rank]
    if not mine:
        return 0
    pipe = load_pipeline(settings.base, device=process_device(settings.device))
    pipe.set_progress_bar_config(disable=True)
    made = 0
    for number, first in enumerate(mine, start=1):
        indices = list(_batch(first, settings))
        began = time.perf_counter()
        examples = [example_of(samples, index, single) for index in indices]
        _generate_batch(pipe, steering, examples, indices, folder, settings)
        spent = {"pictures": len(indices), "seconds": time.perf_counter() - began, "processes": count}
        write_json(folder / "timing" / f"{image_id(first)}.json", {**spent, "device": str(pipe.device)})
        made += len(indices)
        logger.info(f"{name}: batch {number} of {len(mine)}, images {indices[0]} to {indices[-1]}")
    return made


def _batch(first: int, settings: FidSettings) -> range:
    return range(first, min(first + settings.batch_size, settings.num_images))


def image_file(folder: Path, index: int) -> Path:
    return folder / "images" / f"{image_id(index)}.png"


def _generate_batch(
    pipe: Any,
    steering: LocalAdapter | ControlNetModel | None,
    examples: Sequence[Example],
    indices: Sequence[int],
    folder: Path,
    settings: FidSettings,
) -> None:
    prompts = [e.caption if folder.name == "with_prompts" else "" for e in examples]
    seeds = [key_seed(settings.seed, "picture", index) for index in indices]
    images = generate_like(pipe, examples, prompts, seeds, steering, settings.weight, Sampling.of(settings))
    for index, example, prompt, seed, image in zip(indices, examples, prompts, seeds, images, strict=True):
        name = image_id(index)
        about = {"key": example.key, "caption": example.caption, "prompt": prompt, "seed": seed}
        write_json(folder / "ids" / f"{name}.json", about)
        assert example.mask is not None
        write_bytes(folder / "masks" / f"{name}.png", png_bytes(mask_to_pil(example.mask)))
        write_bytes(image_file(folder, index), png_bytes(image))


def generate_like(
    pipe: Any,
    examples: Sequence[Example],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steering: LocalAdapter | ControlNetModel | None,
    weight: float = 1.0,
    sampling: Sampling | None = None,
) -> list[Image.Image]:
    """Generate one image per example, by its condition inside its mask, from a prompt and a seed of its own."""
    masks = torch.stack([example.mask for example in examples if example.mask is not None])
    condition = torch.stack([example.condition for example in examples])
    controls: list[Control] = []
    if isinstance(steering, LocalAdapter):
        controls.append(LocalAdapterControl(steering, condition, masks, weight=weight))
    elif steering is not None:
        controls.append(MaskedControlNet(steering, condition, masks, weight=weight))
    return generate(
        pipe,
        [Layout(prompt, *condition.shape[-2:]) for prompt in prompts],
        controls,
        seeds,
        paired=True,
        sampling=sampling,
    ).images


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def example_of(samples: MaskedSamples, index: int, single: int | None = None) -> Example:
    """Return what image ``index`` follows: the examples in order, again with other masks when they are used up, or
    always the same one. ValueError when example after example cannot be used."""
    ref = SampleRef(index % len(samples), index // len(samples)) if single is None else SampleRef(single, 0)
    example = samples[ref]
    if not isinstance(example, Example) or (single is not None and example.problems):
        problem = example.problems[0]
        raise ValueError(f"The example {problem.key} cannot be used ({problem.detail}); see `localctl.data check`.")
    return example


def index_of(source: Source, key: str) -> int:
    """Find the number of the example called ``key``. ValueError when there is none."""
    known = getattr(source, "key", None)
    for index in range(len(source)):
        if (known(index) if known is not None else source[index].key) == key:
            return index
    raise ValueError(f"There is no example {key!r} among these {len(source)}; check sample and part.")


def load_adapter(adapter: SavedAdapter, settings: FidSettings) -> LocalAdapter:
    """ValueError when the adapter does not fit the base, or was trained on another condition; a warning when it was
    trained on another base of the same shape."""
    if adapter.condition not in (None, settings.condition):
        raise ValueError(
            f"The adapter {adapter.name} was trained on {adapter.condition}, not {settings.condition}; pass condition=."
        )
    if sentence := check_base(adapter, settings.base.name, read_shape(settings.base)):
        warnings.warn(sentence, stacklevel=2)
    return adapter.load()


def load_controlnet(settings: FidSettings) -> ControlNetModel | None:
    """Load the ControlNet that ``settings`` name, frozen. ValueError when there is none in the folder."""
    if settings.controlnet is None:
        return None
    folder = Path(settings.controlnet).expanduser()
    if not folder.is_dir():
        raise ValueError(f"The ControlNet folder {folder} does not exist; give one that diffusers saved.")
    try:
        with no_progress_bars():
            options = {"local_files_only": True, "use_safetensors": True, "dtype": DTYPES[settings.base.dtype]}
            net = ControlNetModel.from_pretrained(str(folder), **options)
    except Exception as error:  # missing or cut files and foreign shapes each raise their own kind
        raise ValueError(
            f"The ControlNet in {folder} cannot be loaded ({first_line(error)}); save it again."
        ) from error
    return freeze(net).to(process_device(settings.device))


def claim(folder: Path, settings: FidSettings, name: str, adapter: SavedAdapter | None) -> None:
    """Write down what the images in ``folder`` are generated with. ValueError when it holds images of other
    settings."""
    content = {k: v for k, v in recorded(settings).items() if k not in _FREE} | {"set": name}
    content["weights_sha256"] = {
        "unet": sha256_of_folder(Path(resolve_base(settings.base.name).id_or_path) / "unet"),
        "adapter": None if adapter is None else sha256_of_folder(adapter.place),
    }
    if settings.controlnet is not None:
        content["weights_sha256"]["controlnet"] = sha256_of_folder(Path(settings.controlnet).expanduser())
    content["versions"] = versions()
    path = folder / "settings.json"
    if not write_json_once(path, content):
        earlier = {"versions": content["versions"]} | _filled(read_json(path, "settings"))  # not said by the first sets
        changed = sorted(k for k in {*earlier, *content} if earlier.get(k) != content.get(k))
        if changed:
            raise ValueError(
                f"{folder} holds images generated with another {', '.join(changed)}; choose another output_dir."
            )


def _filled(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a set with what came up after it: an option that it does not name had its default."""
    defaults = recorded(FidSettings())
    known = [name for name in ("condition", "mask") if isinstance(settings.get(name), dict)]
    return settings | {name: defaults[name] | settings[name] for name in known}


def read_set(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the settings of a set and the ids of its images. ValueError when one is missing, or is not known."""
    settings = _filled(read_json(folder / "settings.json", "settings of the generated images"))
    silent = [name for name in SAID if name not in settings]
    if silent:
        raise ValueError(f"The images in {folder} do not say their {', '.join(silent)}; generate them again.")
    count = settings["num_images"]
    if not isinstance(count, int):
        raise ValueError(f"The images in {folder} say num_images {str(count)[:60]!r}; generate them again.")
    wanted = {image_id(index) for index in range(count)}
    found = {p.stem for p in (folder / "images").glob("*") if not p.name.startswith(".")}
    for what, ids in (("missing", wanted - found), ("not known", found - wanted)):
        if ids:
            raise ValueError(
                f"{len(ids)} of {len(wanted)} images in {folder} are {what} (such as {min(ids)}); "
                f"{'run gen again to generate them' if what == 'missing' else 'remove them'}."
            )
    return settings, sorted(wanted)


@dataclass(frozen=True)
class Speed:
    """How fast a set was generated: images per second of one process, of how many; batch_size images at once."""

    images_per_second: float
    processes: int
    batch_size: int
    device: str

    def __str__(self) -> str:
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return f"{self.images_per_second:.3g} images/s{each} (batches of {self.batch_size}, {self.device})"


def read_speed(folder: Path) -> Speed | None:
    """Read how fast the set in ``folder`` was generated, loading the base left out; None where nothing was noted."""
    noted = [read_json(path, "timing") for path in sorted((folder / "timing").glob("[0-9]*.json"))]
    if not noted:
        return None
    try:
        images, seconds = (sum(item[key] for item in noted) for key in ("pictures", "seconds"))
        return Speed(
            images_per_second=images / seconds,
            processes=max(item["processes"] for item in noted),
            batch_size=max(item["pictures"] for item in noted),
            device=noted[0]["device"],
        )
    except (KeyError, TypeError, ArithmeticError):
        raise ValueError(f"The notes in {folder / 'timing'} are damaged; remove that folder.") from None


def read_images(folder: Path, ids: Sequence[str]) -> Iterator[GeneratedImage]:
    """Read the images of a set with the masks they were generated with. ValueError for a damaged one, or another
    size."""
    size: tuple[int, ...] | None = None
    for name in ids:
        about = read_json(folder / "ids" / f"{name}.json", "record")
        if not {"key", "caption", "seed"} <= set(about):
            raise ValueError(f"The image {name} in {folder} does not say its key, caption and seed; generate it again.")
        path = folder / "images" / f"{name}.png"
        try:
            image = np.asarray(load_image(path))
        except ImageError as error:
            raise ValueError(f"The image {path} is damaged ({error.reason}); remove it and run gen again.") from error
        size = size or image.shape
        if image.shape != size:
            raise ValueError(f"The image {name} in {folder} is {image.shape[1]}x{image.shape[0]}, unlike the others.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about a mask was said when the data was opened
            mask = load_mask(folder / "masks" / f"{name}.png", image.shape[:2])[0].numpy()
        yield GeneratedImage(name, about["key"], about["caption"], image, mask)
