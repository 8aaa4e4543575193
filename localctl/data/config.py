"""Which data to train on, and how a picture of any size becomes one of the size to train at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from localctl.records import Positive, Share, record
from localctl.sizes import PHOTO_PIXELS, check_side, typed_size

MICRO_COUNT, MICRO_SIDE, FILE_SIDE = 3000, 128, 512
LOCAL_FORMATS = ("imagefolder", "parquet", "folder")
Interpolation = Literal["bilinear", "nearest"]
Profile = Literal["basic", "rich"]  # of the embedded scenes
PROFILES: tuple[str, ...] = get_args(Profile)
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)
MOST_PIXELS = 178_956_970  # beyond which Pillow opens nothing


def _size(value: Any) -> Any:
    """[height, width] of a size as people type it, WIDTHxHEIGHT."""
    if not isinstance(value, str) or value.strip().isdecimal():
        return value
    if (size := typed_size(value)) is None:
        raise PydanticCustomError("size", "a number, WIDTHxHEIGHT like 512x768, or [height, width]")
    return size


@record("data")
@dataclass(kw_only=True)
class DataConfig:
    """Which examples; ValueError for settings that make no sense. ``docs/data.md`` describes the formats.

    name: ``micro`` the embedded scenes; ``imagefolder`` pictures with a metadata.jsonl (or .csv, .parquet);
        ``parquet``; ``folder`` a folder per example (original.jpg, <condition>.png, caption.txt); or a data set of the
        Hugging Face hub.
    path: of imagefolder, parquet, folder. A path alone means ``imagefolder``, as in diffusers.
    split: which split to train on. Folders and files named ``train``, ``val2017``, ``Testing`` ... are splits as
        `datasets` knows them.
    validation_split: which split is held out; null sets ``validation_share`` of the examples apart, chosen by a hash of
        each example's key, so that none changes sides when the data grows; at least one example.
    dataset_config_name: of a hub data set with several configurations, as for ``datasets.load_dataset``.
    revision: of a hub data set: a branch, tag or commit.
    cache_dir: where a hub data set is kept; null = the usual cache.
    image_column: name of the column of images.
    conditioning_image_column: name of the column of condition images; null = ``conditioning_image``, or in a ``folder``
        the file named like the condition.
    mask_column: name of the column of masks; it may be missing in the data, then masks are drawn.
    caption_column: name of the column of captions; null = no captions, every prompt is empty.
    key_column: names each example for ever; null: the path of its picture, or else its row number.
    resolution: pixels to train at: a number, WIDTHxHEIGHT, or [height, width]; multiples of 8; null: 512, or the
        scenes' own 128. A picture is scaled to cover it, then cropped.
    center_crop: false crops at a place drawn for every visit.
    random_flip: mirrors half of the visits; off because it makes captions with "left" and "right" wrong.
    conditioning_interpolation: how condition images are resized, ``bilinear`` or ``nearest``; null: nearest for
        segmentation.
    validation_share: share of the examples that is held out where the data has no split for it.
    max_pixels: larger images are bad rows, judged before they are decoded. Those over 16 million are read smaller, down
        to twice the resolution, JPEGs without ever being decoded whole.
    max_bad_fraction: a run stops when more than this share of the examples, and more than one, turned out unusable;
        0: at the first.
    profile: which of the embedded scenes: ``basic``, or ``rich`` with textures, overlap and more objects.
    count: at most so many examples; null = all, of the embedded scenes 3000.
    keep_latents: keep what the VAE's encoder says of each picture in memory, so that it runs once per picture; for
        few small pictures (8 kB each at 128 px, 131 kB at 512 px). Never with random crops.
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
    center_crop: bool = True
    random_flip: bool = False
    conditioning_interpolation: Interpolation | None = None
    validation_share: Share = 0.05
    max_pixels: Annotated[int, Field(ge=1, le=MOST_PIXELS)] = PHOTO_PIXELS
    max_bad_fraction: Share = 0.01
    profile: Profile = "basic"
    count: Positive | None = None
    keep_latents: bool = True

    def __post_init__(self) -> None:
        if self.path is not None and self.name == "micro":
            self.name = "imagefolder"
        for side in (self.resolution,) if isinstance(self.resolution, int) else self.resolution or ():
            check_side("data.resolution", side)
        self._check_micro() if self.is_micro else self._check_name()

    @property
    def is_micro(self) -> bool:
        """Whether these are the embedded scenes."""
        return self.name == "micro"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels to train at."""
        side = self.resolution or (MICRO_SIDE if self.is_micro else FILE_SIDE)
        return (side, side) if isinstance(side, int) else side

    @property
    def latents_may_be_kept(self) -> bool:
        """Whether a picture looks the same at most visits, so that keeping its latents is worth memory."""
        return self.keep_latents and self.center_crop

    def _check_micro(self) -> None:
        self.count = self.count or MICRO_COUNT
        if self.size != (MICRO_SIDE, MICRO_SIDE) or self.random_flip or not self.center_crop:
            raise ValueError(
                f"The embedded scenes are {MICRO_SIDE}x{MICRO_SIDE} pixels and never cropped or flipped; leave "
                "data.resolution, center_crop and random_flip alone or choose other data."
            )

    def _check_name(self) -> None:
        if self.path is not None and self.name not in LOCAL_FORMATS:
            known = ", ".join(LOCAL_FORMATS)
            raise ValueError(f"data.path belongs to {known}; {self.name!r} is found by its name alone, drop one.")
        if self.name not in LOCAL_FORMATS and "/" not in self.name and not Path(self.name).exists():
            known = ", ".join(("micro", *LOCAL_FORMATS))
            raise ValueError(f"Unknown data set {self.name!r}; choose {known}, or one of the hub like USER/NAME.")

    def check_place(self) -> None:
        """ValueError unless there is something where the data should lie. Not part of making the settings, which may be
        read where the data is not."""
        if self.name in LOCAL_FORMATS and self.path is None:
            raise ValueError(f"data={self.name} needs data.path, where it lies (--train_data_dir).")
        if self.path is None:
            return
        place = Path(self.path).expanduser()
        try:
            if not place.exists():
                raise ValueError(f"There is no data at {self.path}; check data.path.")
            if place.is_dir():
                os.listdir(place)
            elif self.name != "parquet":
                raise ValueError(f"{self.path} is a file; data={self.name} needs the folder that it lies in.")
        except OSError as error:
            raise ValueError(f"The data at {self.path} cannot be read ({error.strerror}); check data.path.") from None
