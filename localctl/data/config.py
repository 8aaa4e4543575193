"""Settings of the data: which examples to train on, and how their images are brought to the training size."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from localctl.data.bucket_sizes import AUTO, Size, automatic_buckets, parse_buckets
from localctl.records import Positive, Share, record
from localctl.sizes import PHOTO_PIXELS, check_side, typed_size

MICRO_COUNT, MICRO_SIDE, FILE_SIDE = 3000, 128, 512
LOCAL_FORMATS = ("imagefolder", "parquet", "folder")
Interpolation = Literal["bilinear", "nearest"]
Profile = Literal["basic", "rich"]  # of the embedded scenes
PROFILES: tuple[str, ...] = get_args(Profile)
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)
MOST_PIXELS = 178_956_970  # Pillow opens no larger image


def _size(value: Any) -> Any:
    """Read a size typed as WIDTHxHEIGHT into (height, width); return any other value unchanged."""
    if not isinstance(value, str) or value.strip().isdecimal():
        return value
    if (size := typed_size(value)) is None:
        raise PydanticCustomError("size", "a number, WIDTHxHEIGHT like 512x768, or [height, width]")
    return size


@record("data")
@dataclass(kw_only=True)
class DataConfig:
    """Which examples to train on; ValueError for settings that contradict each other. ``docs/data.md`` describes the
    formats.

    name: ``micro`` the embedded scenes; ``imagefolder`` images with a metadata.jsonl (or .csv, .parquet); ``parquet``;
        ``folder`` a folder per example (original.jpg, <condition>.png, caption.txt); or the id of a dataset on the
        Hugging Face hub.
    path: where an imagefolder, parquet or folder dataset lies. A path alone means ``imagefolder``, as in diffusers.
    split: which split to train on. Names of folders and files such as ``train``, ``val2017`` or ``Testing`` denote
        splits by the rules of `datasets`.
    validation_split: which split is held out; null holds out ``validation_share`` of the examples, at least one, chosen
        by a hash of each example's key, so that no example changes sides when the dataset grows.
    dataset_config_name: configuration of a hub dataset that has several, as for ``datasets.load_dataset``.
    revision: branch, tag or commit of a hub dataset.
    cache_dir: where a hub dataset is cached; null = the default cache.
    image_column: name of the column of images.
    conditioning_image_column: name of the column of condition images; null = ``conditioning_image``, or in a ``folder``
        the file named like the condition.
    mask_column: name of the column of masks; if the data has no such column, masks are sampled.
    caption_column: name of the column of captions; null = no captions, every prompt is empty.
    key_column: name of a column of permanent names of the examples; null = the path of each image, or else its row
        number.
    resolution: size to train at in pixels: a number, WIDTHxHEIGHT, or [height, width]; multiples of 8; null = 512, or
        128 for the embedded scenes. An image is scaled to cover this size, then cropped.
    aspect_ratio_buckets: train at several sizes: "HEIGHT,WIDTH;HEIGHT,WIDTH;...", or ``auto`` for sizes of the area of
        ``resolution`` with ratios from 1:2 to 2:1, and smaller ones for smaller images. Each image goes to the size at
        which most of it is seen; all images of a batch have one size. Validation is at ``resolution``, or the squarest
        of the sizes.
    max_upscaling: with ``aspect_ratio_buckets``, the largest factor by which an image may be enlarged. Images that are
        too small for all buckets are left out and counted.
    center_crop: crop the centre; false crops at a position sampled for each epoch.
    random_flip: mirror each image with probability 1/2 in each epoch; off by default, as captions with "left" and
        "right" become wrong.
    conditioning_interpolation: how condition images are resized, ``bilinear`` or ``nearest``; null = nearest for
        segmentation, bilinear for the rest.
    validation_share: share of the examples to hold out when ``validation_split`` is null.
    max_pixels: images with more pixels are bad rows; this is checked before they are decoded. Images over 16 million
        pixels are read at reduced size, not below twice the resolution; such JPEGs are never decoded in full.
    max_bad_fraction: the run stops when more than this share of the examples, and more than one, is unusable; 0 = at
        the first one.
    profile: kind of embedded scenes: ``basic``, or ``rich`` with textures, overlap and more objects.
    count: largest number of examples; null = all, or 3000 embedded scenes.
    keep_latents: keep the VAE's encoding of each image in memory, so that each image is encoded once, if those of all
        images fit in 512 MiB (8 kB each at 128 px, 131 kB at 512 px). Without effect with random crops.
    encodings_dir: folder of encodings that `localctl cache` wrote; null = encode while training.
    """

    name: str = "micro"
    path: str | None = None
    split: str = "train"
    validation_split: str | None = None
    dataset_config_name: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    image_column: str = "image"
    conditioning_image_column: str | None = None
    mask_column: str | None = "mask"
    caption_column: str | None = "text"
    key_column: str | None = None
    resolution: Annotated[int | tuple[int, int] | None, BeforeValidator(_size)] = None
    aspect_ratio_buckets: str | None = None
    max_upscaling: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    center_crop: bool = True
    random_flip: bool = False
    conditioning_interpolation: Interpolation | None = None
    validation_share: Share = 0.05
    max_pixels: Annotated[int, Field(ge=1, le=MOST_PIXELS)] = PHOTO_PIXELS
    max_bad_fraction: Share = 0.01
    profile: Profile = "basic"
    count: Positive | None = None
    keep_latents: bool = True
    encodings_dir: str | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.name == "micro":
            self.name = "imagefolder"
        for side in (self.resolution,) if isinstance(self.resolution, int) else self.resolution or ():
            check_side("data.resolution", side)
        self._check_buckets()
        self._check_micro() if self.is_micro else self._check_name()

    @property
    def is_micro(self) -> bool:
        """Whether the data are the embedded scenes."""
        return self.name == "micro"

    @property
    def size(self) -> tuple[int, int]:
        """Training size (height, width) in pixels."""
        if self.resolution is None and self.aspect_ratio_buckets not in (None, AUTO):
            return min(self.buckets, key=lambda size: (max(size) / min(size), -size[0]))
        side = self.resolution or (MICRO_SIDE if self.is_micro else FILE_SIDE)
        return (side, side) if isinstance(side, int) else side

    @property
    def buckets(self) -> tuple[Size, ...]:
        """Sizes (height, width) of the aspect-ratio buckets; empty = a single size."""
        if self.aspect_ratio_buckets is None:
            return ()
        if self.aspect_ratio_buckets == AUTO:
            return automatic_buckets(self.size)
        return parse_buckets(self.aspect_ratio_buckets)

    @property
    def largest_size(self) -> Size:
        """The training size (height, width) with the most pixels."""
        return max(self.buckets or (self.size,), key=lambda size: size[0] * size[1])

    @property
    def latents_may_be_kept(self) -> bool:
        """Whether an image looks the same in most epochs, so that caching its latents pays."""
        return self.keep_latents and self.center_crop

    def _check_buckets(self) -> None:
        try:
            sizes = self.buckets
        except ValueError as error:
            raise ValueError(
                f"data.aspect_ratio_buckets is no list of sizes: {error}; write HEIGHT,WIDTH;HEIGHT,WIDTH, such as "
                '"512,512;448,576", or auto.'
            ) from None
        for side in (side for size in sizes for side in size):
            check_side("side of data.aspect_ratio_buckets", side)

    def _check_micro(self) -> None:
        self.count = self.count or MICRO_COUNT
        if self.size != (MICRO_SIDE, MICRO_SIDE) or self.buckets or self.random_flip or not self.center_crop:
            raise ValueError(
                f"The embedded scenes are {MICRO_SIDE}x{MICRO_SIDE} pixels and never cropped or flipped; do not set "
                "data.resolution, aspect_ratio_buckets, center_crop and random_flip, or choose other data."
            )

    def _check_name(self) -> None:
        if self.path is not None and self.name not in LOCAL_FORMATS:
            known = ", ".join(LOCAL_FORMATS)
            raise ValueError(f"data.path is for {known}; {self.name!r} takes no path, leave one of them out.")
        if self.name not in LOCAL_FORMATS and "/" not in self.name and not Path(self.name).exists():
            known = ", ".join(("micro", *LOCAL_FORMATS))
            raise ValueError(f"Unknown dataset {self.name!r}; choose {known}, or a hub id like USER/NAME.")

    def check_place(self) -> None:
        """Raise a ValueError unless ``path`` can be read. Separate from validation, as settings are also read on
        machines without the data."""
        if self.name in LOCAL_FORMATS and self.path is None:
            raise ValueError(f"data={self.name} needs data.path (--train_data_dir), the place of the data.")
        if self.path is None:
            return
        place = Path(self.path).expanduser()
        try:
            if not place.exists():
                raise ValueError(f"There is no data at {self.path}; check data.path.")
            if place.is_dir():
                os.listdir(place)
            elif self.name != "parquet":
                raise ValueError(f"{self.path} is a file; data={self.name} needs a folder, give its parent.")
        except OSError as error:
            raise ValueError(f"The data at {self.path} cannot be read ({error.strerror}); check data.path.") from None
