"""IP-Adapters on a base (arXiv 2308.06721): images as prompts, in regions. Loaded by diffusers, without a trace."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localctl.addons.files import SavedWeights, find_weights
from localctl.architectures import BaseShape
from localctl.bases import HUB_ID, check_weights
from localctl.files import first_line, read_json
from localctl.messages import is_out_of_memory
from localctl.pipelines import choose_pil_processors

KIND = "IP-Adapter"
_FOLDER = "image_encoder"
_KINDS = ("proj.weight", "proj.3.weight", "latents")  # of the image projection: plain, full-face, plus


@dataclass(frozen=True)
class SavedIPAdapter:
    """An IP-Adapter that was found, and the folder of its CLIP image encoder with the config there."""

    weights: SavedWeights
    encoder: str
    encoder_config: Mapping[str, Any]
    local_files_only: bool = False

    @property
    def place(self) -> str:
        """The file, from which it is found again."""
        return str(self.weights.path)

    def check(self, shape: BaseShape) -> None:
        """Raise a ValueError if it was made for a base of another kind, or for another image encoder."""
        wide, own = self.weights.shape_of("to_k_ip.weight"), shape.parts["unet"].get("cross_attention_dim")
        if wide is not None and wide[-1] != own:
            raise ValueError(
                f"The IP-Adapter {self.weights.name} is for a base with text of width {wide[-1]} but this base has "
                f"{own}; choose one that was made for this kind of base."
            )
        shapes = self.weights.shapes
        plain = shapes.get("image_proj.proj.weight")
        reads, name = (
            (plain, "projection_dim")
            if plain
            else (
                shapes.get("image_proj.proj_in.weight") or shapes.get("image_proj.proj.0.weight"),
                "hidden_size",
            )
        )
        given = self.encoder_config.get(name)
        if reads is not None and given is not None and reads[-1] != given:
            raise ValueError(
                f"The IP-Adapter {self.weights.name} reads image features of width {reads[-1]} but the image encoder "
                f"{self.encoder} makes {given}; give the encoder that belongs to it."
            )


def find_ip_adapter(
    place: str | Path, encoder: str | Path | None = None, local_files_only: bool = False
) -> SavedIPAdapter:
    """Find an IP-Adapter and its image encoder.

    Args:
        place: FILE.safetensors, a folder with one, or OWNER/NAME/FILE on the hub.
        encoder: folder or hub id of a ``CLIPVisionModelWithProjection``; by default the folder ``image_encoder``
            beside the file or in the folder above.
        local_files_only: do not use the network.

    Raises:
        ValueError: there is no such file or encoder, or the file is something else, such as a FaceID adapter.
    """
    weights = find_weights(place, KIND, local_files_only)
    names = list(weights.shapes)
    if not all(any(name.startswith(f"{part}.") for name in names) for part in ("image_proj", "ip_adapter")):
        raise ValueError(
            f"{weights.name} is not an IP-Adapter (it holds {next(iter(names), 'nothing')!r}); give the weights of one."
        )
    if not any(f"image_proj.{name}" in weights.shapes for name in _KINDS) or any(
        "perceiver_resampler" in n for n in names
    ):
        raise ValueError(
            f"{weights.name} is a FaceID adapter, which reads the faces that another program finds; give a plain, plus "
            "or full-face IP-Adapter."
        )
    folder = _encoder_folder(weights, encoder)
    config = _encoder_config(folder, weights, local_files_only)
    return SavedIPAdapter(weights, folder, config, local_files_only)


def _encoder_folder(weights: SavedWeights, encoder: str | Path | None) -> str:
    if encoder is not None:
        path = Path(encoder).expanduser()
        return str(path.resolve()) if path.is_dir() else str(encoder)
    for folder in (weights.path.parent, weights.path.parent.parent):
        if (folder / _FOLDER / "config.json").is_file():
            return str(folder / _FOLDER)
    raise ValueError(
        f"There is no folder {_FOLDER} beside the IP-Adapter {weights.path} or above it; give the image encoder that "
        "belongs to it."
    )


def _encoder_config(folder: str, weights: SavedWeights, local_files_only: bool) -> dict[str, Any]:
    try:
        path = Path(folder, "config.json")
        if not path.is_file():
            if not HUB_ID.fullmatch(folder) or Path(folder).exists():
                raise ValueError("no config.json there")
            from huggingface_hub import hf_hub_download  # slow to import

            path = Path(hf_hub_download(folder, "config.json", local_files_only=local_files_only))
        config = read_json(path, "The config")
        if not isinstance(config, dict) or "CLIPVisionModelWithProjection" not in config.get("architectures", ()):
            raise ValueError("it is not a CLIPVisionModelWithProjection")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The image encoder {folder} of the IP-Adapter {weights.name} cannot be used ({first_line(error)}); give "
            "a folder or hub id of a CLIPVisionModelWithProjection."
        ) from error
    return config


@contextmanager
def with_ip_adapters(pipe: Any, adapters: Sequence[SavedIPAdapter | str | Path]) -> Iterator[None]:
    """Put IP-Adapters on the U-Net of ``pipe`` for a while, for :class:`localctl.IPAdapterControl` or the pipeline's
    own arguments; all share one image encoder.

    ValueError for weights that do not fit, encoders that differ, an IP-Adapter that is already loaded, or as for
    :func:`find_ip_adapter`.
    """
    found = [item if isinstance(item, SavedIPAdapter) else find_ip_adapter(item) for item in adapters]
    if not found:
        yield
        return
    check_one_encoder(found)
    unet = pipe.unet
    if unet.encoder_hid_proj is not None:
        raise ValueError("The pipeline has an IP-Adapter already; call pipe.unload_ip_adapter() first.")
    processors, kind = dict(unet.attn_processors), unet.config.encoder_hid_dim_type
    parts = {"image_encoder": pipe.image_encoder, "feature_extractor": pipe.feature_extractor}
    try:
        _load(pipe, found)
        yield
    finally:
        unet.encoder_hid_proj = None
        unet.register_to_config(encoder_hid_dim_type=kind)
        unet.set_attn_processor(processors)
        pipe.register_modules(**parts)


def check_one_encoder(adapters: Sequence[SavedIPAdapter]) -> None:
    """Raise a ValueError if IP-Adapters need different image encoders; a pipeline has one."""
    encoders = list(dict.fromkeys(item.encoder for item in adapters))
    if len(encoders) > 1:
        raise ValueError(
            f"The IP-Adapters have the image encoders {' and '.join(encoders)}, of which a pipeline takes one; use "
            "adapters that share one, or name it."
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Context without the warning that diffusers gives itself, for a U-Net whose dtype it sets to what it is."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(pipe: Any, found: Sequence[SavedIPAdapter]) -> None:
    from transformers import CLIPVisionModelWithProjection  # slow to import

    choose_pil_processors()
    try:
        if Path(found[0].encoder).is_dir():
            check_weights(Path(found[0].encoder))
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            found[0].encoder,
            use_safetensors=True,
            local_files_only=found[0].local_files_only,
            dtype=pipe.unet.dtype,
        )
        pipe.register_modules(image_encoder=encoder.to(pipe.unet.device).eval().requires_grad_(False))
        # One image processor for this encoder, whatever the pipeline has for its safety checker.
        pipe.feature_extractor = None
        with _quietly():
            pipe.load_ip_adapter(
                [str(item.weights.path.parent) for item in found],
                subfolder="",
                weight_name=[item.weights.path.name for item in found],
                image_encoder_folder=None,
            )
        pipe.unet.eval().requires_grad_(False)
    except Exception as error:  # another shape or a missing weight may raise any error
        if is_out_of_memory(error):  # another IP-Adapter would not help
            raise
        names = ", ".join(item.weights.name for item in found)
        raise ValueError(
            f"The IP-Adapter {names} cannot be loaded on this base ({first_line(error)}); choose one that was made for "
            "this kind of base."
        ) from error
