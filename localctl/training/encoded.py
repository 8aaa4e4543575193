"""Train from encodings on disk: find those of a run, and say what is wrong with them before anything slow happens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from localctl.architectures import CLASS, TEXT_PARTS, read_shape
from localctl.bases import not_loaded
from localctl.data.bad_rows import BadRow
from localctl.data.files import FileSource
from localctl.data.fingerprint import sample
from localctl.data.rows import captions_of
from localctl.data.sample import Source
from localctl.encodings.captions import captions_of_all
from localctl.encodings.recipes import CONDITIONS, IMAGES, TEXTS, Recipes, differences
from localctl.encodings.source import (
    EncodedSource,
    Stores,
    caption_id,
    content_of,
    files_of,
    image_id,
    image_ids,
    key_of,
)
from localctl.encodings.store import MANIFEST, Store, folder_of, recipes_in
from localctl.labels import shorten
from localctl.training.adapter_plan import plan_adapter
from localctl.training.frozen import dtype_name
from localctl.training.settings import TrainSettings

WAY_OUT = (
    "run `localctl cache` with the flags of this training, or leave data.encodings_dir out to encode while training"
)
Item = TypeVar("Item")
_NAMED = 3
_AT_ONCE = 65_536
_LOOKED_AT = 8  # scenes, which have no files to compare


def recipes_of(settings: TrainSettings) -> Recipes:
    """Return the recipes of the encodings that a training with ``settings`` reads."""
    precision = dtype_name(settings, settings.precision)
    length = settings.max_sequence_length
    return Recipes(settings.base, settings.data, settings.condition, settings.seed, precision, length)


def recipe_of(recipes: Recipes, kind: str) -> dict[str, Any]:
    """Return the recipe of a kind. ValueError if the base cannot be read."""
    try:
        return recipes.of(kind)
    except OSError as error:
        raise not_loaded(recipes.base, error) from error


def with_encodings(source: Source, settings: TrainSettings) -> EncodedSource:
    """Return the examples of ``source`` with their encodings in ``data.encodings_dir``.

    ValueError naming what differs if these are of another VAE, text encoder, geometry or precision, or of other rows.
    """
    assert settings.data.encodings_dir is not None
    root, recipes = Path(settings.data.encodings_dir).expanduser(), recipes_of(settings)
    images = _open(root, recipe_of(recipes, IMAGES))
    captions = _open(root, recipe_of(recipes, TEXTS))
    conditions = folder_of(root, recipe_of(recipes, CONDITIONS))
    stores = Stores(images, captions, Store(conditions) if (conditions / MANIFEST).exists() else None)
    variants = range(stores.variants if recipes.varies else 1)
    for store in filter(None, (images, stores.conditions)):
        _check_rows(store, source, variants)
    _check_captions(captions, source, settings.seed, stores.variants)
    return EncodedSource(source, stores, recipes.varies)


def _open(root: Path, recipe: dict[str, Any]) -> Store:
    folder = folder_of(root, recipe)
    if (folder / MANIFEST).exists():
        return Store(folder)
    kind = recipe["kind"]
    others = [differences(stored, recipe) for stored in recipes_in(root, kind)]
    if not others:
        raise ValueError(f"There are no encodings of {kind} in {root}; {WAY_OUT}.")
    fewest: list[str] = min(others, key=len)
    raise ValueError(f"The encodings of {kind} in {root} do not fit this training: {', '.join(fewest)}; {WAY_OUT}.")


def _check_rows(store: Store, source: Source, variants: Sequence[int]) -> None:
    """Raise a ValueError if images of ``source`` are not in ``store``, or some of those looked at have changed."""
    unusable = {problem.key for problem in store.manifest.problems}
    lacking: dict[str, None] = {}
    for part in _parts(image_ids(source, variants)):
        there = store.has([id for id, _, _ in part])
        lacking |= dict.fromkeys(key_of(source, part[place][1]) for place in (~there).nonzero()[0])
    missing = [key for key in lacking if key not in unusable]
    if missing:
        raise ValueError(f"{_named(missing, len(source))} not in the encodings {store.folder}; {WAY_OUT}.")
    changed = [key for key in _changed(store, source, variants[0]) if key not in unusable]
    if changed:
        raise ValueError(f"{_named(changed, len(source))} other than when {store.folder} was encoded; {WAY_OUT}.")


def _parts(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield many items at a time; all of them at once may not fit in memory."""
    rest = iter(items)
    while part := list(islice(rest, _AT_ONCE)):
        yield part


def _changed(store: Store, source: Source, variant: int) -> list[str]:
    """Return the keys of images, among a few looked at, that are not those which were encoded."""
    looked_at = list(sample(len(source))) if isinstance(source, FileSource) else range(min(_LOOKED_AT, len(source)))
    keys = [key_of(source, index) for index in looked_at]
    stored = store.contents([image_id(key, variant) for key in keys])
    return [key for key, index, old in zip(keys, looked_at, stored, strict=True) if _now(store, source, index) != old]


def _now(store: Store, source: Source, index: int) -> bytes | None:
    try:
        if store.manifest.recipe["kind"] == CONDITIONS:
            assert isinstance(source, FileSource)
            return files_of(source, index)
        return content_of(source, index)
    except (BadRow, OSError):
        return None


def _check_captions(store: Store, source: Source, seed: int, variants: int) -> None:
    """Raise a ValueError if captions are not in ``store``: all of those in a table, some of those in files."""
    captions: Iterator[str]
    if isinstance(source, FileSource) and source.rows.captions() is None:
        captions = (caption for index in sample(len(source)) for caption in _captions(source, index)[:1])
    elif isinstance(source, FileSource):
        captions = captions_of_all(source, seed, variants, store.folder)
    else:
        captions = (source[index].caption for index in range(min(_LOOKED_AT, len(source))))
    count = 0
    lacking: dict[str, None] = {}
    for part in _parts(captions):
        count += len(part)
        there = store.has([caption_id(caption) for caption in part])
        lacking |= dict.fromkeys(part[place] for place in (~there).nonzero()[0])
    if lacking:
        named = _named(list(lacking), count, "captions")
        raise ValueError(f"{named} not in the encodings {store.folder}; {WAY_OUT}.")


def _captions(source: FileSource, index: int) -> Sequence[str]:
    try:
        return captions_of(source.rows[int(source.indices[index])].captions)
    except (BadRow, OSError):
        return ()


def _named(keys: Sequence[str], count: int, what: str = "images") -> str:
    first = ", ".join(repr(shorten(key)) for key in keys[:_NAMED])
    more = ", ..." if len(keys) > _NAMED else ""
    return f"{len(keys)} of {count} {what} ({first}{more}) {'is' if len(keys) == 1 else 'are'}"


def plain(source: Source) -> Source:
    """Return the dataset itself, without encodings."""
    return source.inner if isinstance(source, EncodedSource) else source


def not_needed(source: Source, settings: TrainSettings) -> Collection[str]:
    """Return the parts of the base that a run does not use: its encoders, if all is encoded and no image generated. The
    VAE is used for edges in decoded images, for conditions as latents, and to scale the latents of FLUX.2, by
    statistics among its weights."""
    if not isinstance(source, EncodedSource) or settings.generates_images:
        return ()
    encodes = plan_adapter(settings).options.get("latent_channels") or settings.loss.filter == "edges"
    scales = read_shape(settings.base).parts["vae"].get(CLASS) == "AutoencoderKLFlux2"
    return TEXT_PARTS if scales or encodes else ("vae", *TEXT_PARTS)


def describe_encoded(info: dict[str, Any], source: Source, absent: Collection[str]) -> None:
    """Complete what the manifest of a checkpoint records of its run (``resume.describe``): encoders that are not
    loaded, and variants, which change what training sees."""
    if not isinstance(source, EncodedSource):
        return
    stores = source.stores
    if stores.variants > 1 or source.varies:
        info["data"]["variants"] = stores.variants
    if absent:
        info["base"] |= stores.images.manifest.facts | stores.captions.manifest.facts
