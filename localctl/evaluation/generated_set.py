"""Generate a set of images in a folder, and read it. Runs may be interrupted, and shared by processes and machines.

    settings.json      what the images were generated with; images of other settings are refused
    ids/ID.json        key, caption, prompt and seed of the image
    masks/ID.png       the mask that the image was generated with; scores use this file
    timing/ID.json     seconds that the batch took which starts with this image
    images/ID.png      written last: an image that exists is complete

The settings determine the batches, and a batch with a missing image is generated again as a whole: an interrupted run
ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import logging
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import ControlNetModel

from localctl.adapter import LocalAdapter
from localctl.adapter_files import SavedAdapter, find_adapter
from localctl.architectures import read_shape
from localctl.data import Example, MaskedSamples, SampleRef, Source, open_data
from localctl.denoisers.abilities import Abilities
from localctl.distributed import process_device, processes
from localctl.evaluation.provenance import read_json, versions, write_bytes, write_json, write_json_once
from localctl.evaluation.settings import FidSettings
from localctl.evaluation.steered import generate_like, load_adapter, load_controlnet, suited
from localctl.evaluation.workers import spread
from localctl.files import sha256_of_folder
from localctl.images import ImageError, load_image, png_bytes
from localctl.lazy import moved_names
from localctl.masks import load_mask, mask_to_pil
from localctl.pipelines import load_pipeline, resolve_base
from localctl.redaction import recorded
from localctl.sampling import Sampling
from localctl.seeding import key_seed

logger = logging.getLogger(__name__)
# do not change the images
_NOT_RECORDED = ("output_dir", "reference", "extractor", "weights", "prompts", "device", "num_workers")
__getattr__ = moved_names(
    __name__,
    {
        "Drawn": f"{__name__}:GeneratedImage",
        "draw_set": f"{__name__}:generate_set",
        "picture_id": f"{__name__}:image_id",
        "read_pictures": f"{__name__}:read_images",
    },
)
REQUIRED_SETTINGS = ("base", "data", "condition", "mask", "part", "num_images", "seed", "sample", "adapter", "set") + (
    "num_inference_steps",
    "guidance_scale",
    "weights_sha256",
)


def open_source(settings: FidSettings) -> Source:
    """Open the examples of ``settings.part``. ValueError when the data cannot be opened."""
    assert settings.part is not None
    return open_data(settings.data, settings.condition, settings.part, settings.num_images, keep=False)


def image_id(index: int) -> str:
    """Return the id of image ``index``, six digits, which names its files."""
    return f"{index:06d}"


@dataclass(frozen=True)
class GeneratedImage:
    """One image of a set. image: uint8 (H,W,3); mask: float (H,W) in [0,1]."""

    id: str
    key: str
    caption: str
    image: np.ndarray
    mask: np.ndarray


class SetGenerator:
    """Generates batches of the set ``name``.

    Settings, data, adapter and the folder are checked when it is created: ValueError in one sentence. The base is
    loaded for the first batch.
    """

    def __init__(self, settings: FidSettings, name: str) -> None:
        settings, self.negative_prompt = suited(settings)
        self.settings, self.folder = settings, settings.folder / name
        adapter = None if settings.adapter is None else find_adapter(settings.adapter, settings.base.local_files_only)
        self.steering = load_controlnet(settings) if adapter is None else load_adapter(adapter, settings)
        self.samples = MaskedSamples(open_source(settings), settings.mask, settings.seed)
        self.single = index_of(self.samples.source, settings.sample) if settings.sample is not None else None
        self.pipe: Any = None
        claim(self.folder, settings, name, adapter)

    @classmethod
    def in_worker(cls, settings: FidSettings, name: str) -> SetGenerator:
        """Create one in another process, for a folder that is claimed already. ValueError if it is not seen from
        there, or if another version of a library would generate other images there."""
        folder = settings.folder / name
        if not (folder / "settings.json").is_file():
            raise ValueError(
                f"The machine {socket.gethostname()} does not see {folder}; choose an output_dir on a disk that all "
                "machines share."
            )
        return cls(settings, name)

    def __call__(self, batch: range) -> int:
        """Generate the images with these numbers, and return how many there are."""
        if self.pipe is None:
            self.pipe = load_pipeline(self.settings.base, device=process_device(self.settings.device))
            self.pipe.set_progress_bar_config(disable=True)
        began = time.perf_counter()
        examples = [example_of(self.samples, index, self.single) for index in batch]
        _generate_batch(self.pipe, self.steering, examples, batch, self.folder, self.settings, self.negative_prompt)
        count = self.settings.num_workers or processes()[1]
        timing = {"pictures": len(batch), "seconds": time.perf_counter() - began, "processes": count}
        path = self.folder / "timing" / f"{image_id(batch[0])}.json"
        write_json(path, {**timing, "device": str(self.pipe.device)})
        return len(batch)


def generate_set(settings: FidSettings, name: str) -> int:
    """Generate the missing images of the set ``name``, and return how many this process or its workers generated.

    Settings, data, adapter and the folder are checked before the base is loaded: ValueError in one sentence.
    """
    generator, folder = SetGenerator(settings, name), settings.folder / name
    rank, count = processes()
    batches = [_batch(first, settings) for first in range(0, settings.num_images, settings.batch_size)]
    mine = [
        batch
        for number, batch in enumerate(batches)
        if number % count == rank and any(not image_file(folder, index).is_file() for index in batch)
    ]
    if not mine:
        return 0
    work = partial(SetGenerator.in_worker, settings, name)
    made = spread(generator, work, mine, settings.num_workers, settings.device)
    generated = 0
    for number, (batch, images) in enumerate(zip(mine, made, strict=True), start=1):
        generated += images
        logger.info(f"{name}: batch {number} of {len(mine)}, images {batch[0]} to {batch[-1]}")
    return generated


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
    negative_prompt: str | None,
) -> None:
    prompts = [e.caption if folder.name == "with_prompts" else "" for e in examples]
    seeds = [key_seed(settings.seed, "picture", index) for index in indices]
    guidance: dict[str, Any] = {
        "unconditional_scale": settings.unconditional_scale,
        "guidance_scale": settings.control_guidance_scale,
        "arguments": {} if negative_prompt is None else {"negative_prompt": negative_prompt},
    }
    images = generate_like(pipe, examples, prompts, seeds, steering, settings.weight, Sampling.of(settings), **guidance)
    for index, example, prompt, seed, image in zip(indices, examples, prompts, seeds, images, strict=True):
        name = image_id(index)
        record = {"key": example.key, "caption": example.caption, "prompt": prompt, "seed": seed}
        write_json(folder / "ids" / f"{name}.json", record)
        assert example.mask is not None
        write_bytes(folder / "masks" / f"{name}.png", png_bytes(mask_to_pil(example.mask)))
        write_bytes(image_file(folder, index), png_bytes(image))


def example_of(samples: MaskedSamples, index: int, single: int | None = None) -> Example:
    """Return the example that image ``index`` is generated from.

    Examples follow in order, and from the start with other masks when all are used. single: index of one example that
    all images are generated from. ValueError when no usable example is found.
    """
    ref = SampleRef(index % len(samples), index // len(samples)) if single is None else SampleRef(single, 0)
    example = samples[ref]
    if not isinstance(example, Example) or (single is not None and example.problems):
        problem = example.problems[0]
        raise ValueError(f"The example {problem.key} cannot be used ({problem.detail}); see `localctl.data check`.")
    return example


def index_of(source: Source, key: str) -> int:
    """Return the index of the example with this key. ValueError when there is none."""
    known = getattr(source, "key", None)
    for index in range(len(source)):
        if (known(index) if known is not None else source[index].key) == key:
            return index
    raise ValueError(f"There is no example {key!r} among the {len(source)} examples; check sample and part.")


def claim(folder: Path, settings: FidSettings, name: str, adapter: SavedAdapter | None) -> None:
    """Record in settings.json what the images in ``folder`` are generated with. ValueError when the folder holds images
    of other settings."""
    content = {k: v for k, v in recorded(settings).items() if k not in _NOT_RECORDED} | {"set": name}
    base = Path(resolve_base(settings.base.name).id_or_path)
    part = "transformer" if (base / "transformer").is_dir() else "unet"
    content["weights_sha256"] = {
        part: sha256_of_folder(base / part),
        "adapter": None if adapter is None else sha256_of_folder(adapter.place),
    }
    if settings.controlnet is not None:
        content["weights_sha256"]["controlnet"] = sha256_of_folder(Path(settings.controlnet).expanduser())
    if settings.unconditional_scale is None:  # as a number, so that the set stays known when a default changes
        guided = Abilities(settings.base, read_shape(settings.base)).guidance.is_on(settings)
        used = guided and settings.control_guidance_scale is None
        content["unconditional_scale"] = adapter.unconditional_scale if adapter is not None and used else 1.0
    content["versions"] = versions()
    path = folder / "settings.json"
    if not write_json_once(path, content):
        # the first sets did not record versions
        earlier = {"versions": content["versions"]} | _with_defaults(read_json(path, "settings"))
        changed = sorted(k for k in {*earlier, *content} if earlier.get(k) != content.get(k))
        if changed:
            raise ValueError(
                f"{folder} holds images generated with another {', '.join(changed)}; choose another output_dir."
            )


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of options that were introduced after the set was generated."""
    defaults = recorded(FidSettings())
    known = [name for name in ("condition", "mask") if isinstance(settings.get(name), dict)]
    newer = ("control_guidance_scale", "true_cfg_scale", "max_sequence_length")
    settings = {"unconditional_scale": 1.0} | {name: defaults[name] for name in newer} | settings
    return settings | {name: defaults[name] | settings[name] for name in known}


def read_set(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the settings of a set and the ids of its images. ValueError when either is incomplete or unknown."""
    settings = _with_defaults(read_json(folder / "settings.json", "settings of the generated images"))
    missing = [name for name in REQUIRED_SETTINGS if name not in settings]
    if missing:
        raise ValueError(f"{folder / 'settings.json'} does not record {', '.join(missing)}; generate the set again.")
    count = settings["num_images"]
    if not isinstance(count, int):
        raise ValueError(
            f"{folder / 'settings.json'} has num_images {str(count)[:60]!r}, not a number; generate the set again."
        )
    wanted = {image_id(index) for index in range(count)}
    found = {p.stem for p in (folder / "images").glob("*") if not p.name.startswith(".")}
    for what, ids in (("missing", wanted - found), ("unknown", found - wanted)):
        if ids:
            raise ValueError(
                f"{len(ids)} of {len(wanted)} images in {folder} are {what} (such as {min(ids)}); "
                f"{'run gen again to generate them' if what == 'missing' else 'remove them'}."
            )
    return settings, sorted(wanted)


@dataclass(frozen=True)
class Speed:
    """How fast a set was generated: images per second of each process, number of processes, images per batch."""

    images_per_second: float
    processes: int
    batch_size: int
    device: str

    def __str__(self) -> str:
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return f"{self.images_per_second:.3g} images/s{each} (batches of {self.batch_size}, {self.device})"


def read_speed(folder: Path) -> Speed | None:
    """Read how fast the set in ``folder`` was generated, not counting the time to load the base.

    None where no timing was recorded. ValueError for damaged timing files.
    """
    timings = [read_json(path, "timing") for path in sorted((folder / "timing").glob("[0-9]*.json"))]
    if not timings:
        return None
    try:
        images, seconds = (sum(item[key] for item in timings) for key in ("pictures", "seconds"))
        return Speed(
            images_per_second=images / seconds,
            processes=max(item["processes"] for item in timings),
            batch_size=max(item["pictures"] for item in timings),
            device=timings[0]["device"],
        )
    except (KeyError, TypeError, ArithmeticError):
        raise ValueError(f"The timings in {folder / 'timing'} are damaged; remove that folder.") from None


def read_images(folder: Path, ids: Sequence[str]) -> Iterator[GeneratedImage]:
    """Read the images of a set with the masks that they were generated with.

    ValueError when a record or an image is damaged, or when an image has another size than the first.
    """
    size: tuple[int, ...] | None = None
    for name in ids:
        record = read_json(folder / "ids" / f"{name}.json", "record")
        if not {"key", "caption", "seed"} <= set(record):
            raise ValueError(f"The record of image {name} in {folder} has no key, caption or seed; generate it again.")
        path = folder / "images" / f"{name}.png"
        try:
            image = np.asarray(load_image(path))
        except ImageError as error:
            raise ValueError(f"The image {path} is damaged ({error.reason}); remove it and run gen again.") from error
        size = size or image.shape
        if image.shape != size:
            raise ValueError(f"The image {name} in {folder} is {image.shape[1]}x{image.shape[0]}, unlike the others.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opening the data has already warned of unusual masks
            mask = load_mask(folder / "masks" / f"{name}.png", image.shape[:2])[0].numpy()
        yield GeneratedImage(name, record["key"], record["caption"], image, mask)
