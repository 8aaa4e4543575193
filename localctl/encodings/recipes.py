"""What encodings depend on, besides the rows: geometry, condition and encoders. Trainings with the same recipe share
encodings; where recipes differ, the difference has a name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localctl.bases import BaseConfig, has_part, read_index, resolve_base
from localctl.condition_models import fingerprint
from localctl.data.config import DataConfig
from localctl.files import read_json, sha256, sha256_of_json
from localctl.settings import ConditionConfig

IMAGES, TEXTS, CONDITIONS = "images", "captions", "conditions"
ENCODERS = {IMAGES: ("vae",), TEXTS: ("text_encoder", "text_encoder_2", "text_encoder_3"), CONDITIONS: ()}
_VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "spiece.model")


@dataclass(frozen=True)
class Recipes:
    """The recipes for a base and a dataset.

    precision: dtype of the frozen parts, such as bfloat16. text_length: the most tokens of a caption that are read;
    None = as many as the pipeline reads.
    """

    base: BaseConfig
    data: DataConfig
    condition: ConditionConfig
    seed: int
    precision: str
    text_length: int | None = None

    @property
    def varies(self) -> bool:
        """Whether an image looks different from epoch to epoch."""
        return not self.data.center_crop or self.data.random_flip

    @property
    def _geometry(self) -> dict[str, Any]:
        data = self.data
        buckets = {"buckets": [list(size) for size in data.buckets], "max upscaling": data.max_upscaling}
        return {
            "size": list(data.size),
            **(buckets if data.buckets else {}),
            "crop": "center" if data.center_crop else "random",
            "flip": data.random_flip,
            "seed": self.seed if self.varies else None,
        }

    def of(self, kind: str) -> dict[str, Any]:
        """Return the recipe of ``images``, ``captions`` or ``conditions``. OSError if a file of the base is missing."""
        return {IMAGES: self._images, TEXTS: self._texts, CONDITIONS: self._conditions}[kind]()

    def _images(self) -> dict[str, Any]:
        vae = weights_of(self.base, "vae", self.precision)
        return {"kind": IMAGES, **self._geometry, "VAE": vae, "precision": self.precision}

    def _texts(self) -> dict[str, Any]:
        index = read_index(resolve_base(self.base.name), _where(self.base))
        parts = [name for name in ENCODERS[TEXTS] if has_part(index, name)]
        recipe: dict[str, Any] = {"kind": TEXTS, "precision": self.precision}
        if self.text_length is not None:
            recipe["tokens"] = self.text_length
        for part in parts:
            recipe[part.replace("_", " ")] = weights_of(self.base, part, self.precision)
            recipe[part.replace("text_encoder", "tokenizer").replace("_", " ")] = _vocabulary_of(self.base, part)
        if "force_zeros_for_empty_prompt" in index:
            recipe["zeros for the empty prompt"] = index["force_zeros_for_empty_prompt"]
        return recipe

    def _conditions(self) -> dict[str, Any]:
        data = self.data
        columns = (
            {}
            if self.condition.from_image
            else {
                "condition column": data.conditioning_image_column,
                "interpolation": data.conditioning_interpolation,
            }
        )
        condition = sha256_of_json(self.condition.recorded())[:12]
        model = {} if self.condition.model is None else {"condition model": fingerprint(self.condition)}
        return {
            "kind": CONDITIONS, **self._geometry, "condition": f"{self.condition.kind} {condition}", **model, **columns,
            "mask column": data.mask_column,
        }  # fmt: skip


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return a clause for each part of a recipe that differs."""
    names = dict.fromkeys([*stored, *wanted])
    return [
        f"{name} ({_short(stored.get(name))} in the cache, {_short(wanted.get(name))} here)"
        for name in names
        if stored.get(name) != wanted.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if isinstance(value, str) and len(text) == 64 else text


def weights_of(base: BaseConfig, part: str, precision: str) -> str:
    """Return the SHA-256 of the weights of a part, as it is loaded in ``precision``. OSError if they are not there."""
    name = "model" if part.startswith("text") else "diffusion_pytorch_model"
    place, folder, where, variant = _place_of(base, part, precision)
    wanted = f"{name}.{variant}.safetensors" if variant else f"{name}.safetensors"
    local = Path(place).expanduser() / folder
    if not local.is_dir():
        from huggingface_hub import hf_hub_download  # slow to import
        from huggingface_hub.errors import EntryNotFoundError

        inside = f"{folder}/" if folder else ""
        try:
            return sha256(Path(hf_hub_download(place, inside + wanted, **where)))
        except EntryNotFoundError:  # large models are in several files
            listed = read_json(Path(hf_hub_download(place, f"{inside}{wanted}.index.json", **where)), "The index")
            shards = sorted(set(listed["weight_map"].values()))
            return sha256("".join(sha256(Path(hf_hub_download(place, inside + one, **where))) for one in shards))
    files = [local / wanted] if (local / wanted).is_file() else sorted(local.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"There are no weights (*.safetensors) in {local}.")
    return sha256(files[0]) if len(files) == 1 else sha256("".join(map(sha256, files)))


def _place_of(base: BaseConfig, part: str, precision: str) -> tuple[str, str, dict[str, Any], str | None]:
    """Return folder or hub id, folder inside, options for the hub, and the variant of a part's weights."""
    spec = resolve_base(base.name)
    other = (base.vae or (spec.fp16_vae if precision == "float16" else None)) if part == "vae" else None
    if other is None:
        return spec.id_or_path, part, _where(base), base.variant
    inside = "vae" if (Path(other).expanduser() / "model_index.json").is_file() else ""
    return other, inside, {"local_files_only": base.local_files_only}, None


def _vocabulary_of(base: BaseConfig, part: str) -> str:
    """Return the SHA-256 of the files of the tokenizer of a text encoder."""
    folder, place = part.replace("text_encoder", "tokenizer"), resolve_base(base.name).id_or_path
    local = Path(place) / folder
    if local.is_dir():
        return sha256("".join(sha256(local / name) for name in _VOCABULARY if (local / name).is_file()))
    from huggingface_hub import hf_hub_download  # slow to import
    from huggingface_hub.errors import EntryNotFoundError

    for names in (_VOCABULARY[:2], _VOCABULARY[2:3], _VOCABULARY[-1:]):  # CLIP's and Qwen's, then T5's
        with suppress(EntryNotFoundError):
            paths = [Path(hf_hub_download(place, f"{folder}/{name}", **_where(base))) for name in names]
            return sha256("".join(map(sha256, paths)))
    raise FileNotFoundError(f"There is no vocabulary in {place}/{folder}.")


def _where(base: BaseConfig) -> dict[str, Any]:
    return {"revision": base.revision, "local_files_only": base.local_files_only}
