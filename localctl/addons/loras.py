"""LoRAs on a base: one or several at once, each with its own scale, other ones for other prompts."""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from localctl.addons.files import SavedWeights, find_weights
from localctl.architectures import BaseShape
from localctl.files import first_line
from localctl.messages import is_out_of_memory

KIND = "LoRA"
_NAME = re.compile(r"[\w-]+")  # PEFT allows no dots
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_OF_UNETS = ("down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block")
_DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")

Use = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class SavedLora:
    """A LoRA that was found, under the ``name`` by which prompts ask for it."""

    name: str
    weights: SavedWeights

    @property
    def place(self) -> str:
        """NAME=FILE, from which it is found again."""
        return f"{self.name}={self.weights.path}"

    def check(self, shape: BaseShape) -> None:
        """Raise a ValueError if it was made for a base of another kind: by its layers, its width of text, or SDXL."""
        of_unet = any(part in name for name in self.weights.shapes for part in _OF_UNETS)
        of_transformer = not of_unet and any(name.startswith("transformer.") for name in self.weights.shapes)
        if of_unet if shape.denoiser == "transformer" else of_transformer:
            kind = "U-Net" if of_unet else "transformer"
            raise ValueError(
                f"The LoRA {self.weights.name} is for a base with a {kind}, which this one does not have; choose one "
                "that was made for this kind of base."
            )
        if shape.denoiser == "transformer":
            self._check_layers(shape.build("transformer"))
        else:
            self._check_text(shape)

    def _check_layers(self, transformer: nn.Module) -> None:
        """Raise a ValueError for a layer that the transformer does not have, or that has other inputs there."""
        layers = dict(transformer.named_modules())
        for name, shape in self.weights.shapes.items():
            if not (name.startswith("transformer.") and name.endswith(".lora_A.weight")):
                continue  # of another format, whose layers are known when it is read
            layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            own = layers.get(layer)
            width = getattr(own, "in_features", getattr(own, "in_channels", None))  # of a convolution
            taken = shape[1] if len(shape) > 1 else None
            if width is None or width != taken:
                has = f"takes {width}" if width else "does not have"
                raise ValueError(
                    f"The LoRA {self.weights.name} changes {layer} for {taken} channels, which this base {has}; "
                    "choose one that was made for this kind of base."
                )

    def _check_text(self, shape: BaseShape) -> None:
        wide = self.weights.shape_of("attn2", "to_k", "down") or self.weights.shape_of("attn2", "to_k", "lora_A")
        own = shape.parts["unet"].get("cross_attention_dim")
        if wide is not None and wide[-1] != own:
            raise ValueError(
                f"The LoRA {self.weights.name} is for a base with text of width {wide[-1]} but this base has {own}; "
                "choose one that was made for this kind of base."
            )
        second = any(name.startswith(("text_encoder_2.", "lora_te2_")) for name in self.weights.shapes)
        if second and not shape.xl:
            raise ValueError(
                f"The LoRA {self.weights.name} changes a second text encoder, which this base does not have; choose "
                "one that was made for this kind of base."
            )


def find_lora(place: str | Path, local_files_only: bool = False) -> SavedLora:
    """Find a LoRA in the format of diffusers, PEFT or kohya.

    Args:
        place: FILE.safetensors, a folder with one, OWNER/NAME/FILE on the hub, or NAME=PLACE; without a name, it has
            that of the file.
        local_files_only: do not use the network.

    Raises:
        ValueError: PEFT is not installed, there is no such file, or it is not a LoRA.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("A LoRA needs PEFT, which is not installed; run: pip install 'localctl[peft]'.")
    name, equals, rest = str(place).partition("=")
    if not equals or not _NAME.fullmatch(name):
        name, rest = "", str(place)
    weights = find_weights(rest, KIND, local_files_only)
    kinds = {key.rpartition(".")[2] for key in weights.shapes}
    if "dora_scale" in kinds or any("lora_magnitude_vector" in key for key in weights.shapes):
        raise ValueError(f"The LoRA {rest} is a DoRA, whose magnitudes would be ignored; give a plain LoRA.")
    if not any(part in key for key in weights.shapes for part in _DOWN):
        first = next(iter(weights.shapes), "nothing")
        raise ValueError(f"{rest} is not a LoRA (it holds {first!r}); give the weights of one.")
    folder = weights.path.stem == "pytorch_lora_weights"
    return SavedLora(name or _plain(weights.path.parent.name if folder else weights.path.stem), weights)


def _plain(name: str) -> str:
    """Return a name of letters, digits, ``_`` and ``-``."""
    return re.sub(r"[^\w-]+", "_", name) or "lora"


def check_names(loras: Sequence[SavedLora]) -> None:
    """Raise a ValueError if two LoRAs have one name, or one has a word of :func:`parse_use`."""
    for name, count in Counter(lora.name for lora in loras).items():
        if count > 1 or name in ("all", "none"):
            raise ValueError(
                f"{count} LoRA{'s are' if count > 1 else ' is'} called {name!r}; give another name: NAME=FILE."
            )


def parse_use(text: str, known: Mapping[str, float]) -> dict[str, float]:
    """Return the scale of each LoRA that a prompt uses.

    Args:
        text: names joined by +, each with its own scale after a colon: "style:0.6+red"; "all" or "none".
        known: the names, and their scales unless given.

    Raises:
        ValueError: an unknown name, one that occurs twice, or a scale that is not a number.
    """
    if text in ("all", "none"):
        return dict(known) if text == "all" else {}
    used: dict[str, float] = {}
    for part in text.split("+"):
        name, colon, scale = part.strip().partition(":")
        if name in ("all", "none"):
            raise ValueError(f"The word {name!r} stands alone, not as in {text!r}; give it alone, or name the LoRAs.")
        if name not in known:
            raise ValueError(f"There is no LoRA {name!r}; choose among {', '.join(known)}, all and none.")
        if name in used:
            raise ValueError(f"The LoRA {name!r} occurs twice in {text!r}; give it once.")
        try:
            used[name] = float(scale) if colon else known[name]
        except ValueError:
            used[name] = math.nan
        if not math.isfinite(used[name]):
            raise ValueError(f"The scale of the LoRA {part!r} is not a finite number; write NAME:SCALE.")
    return used


@contextmanager
def with_loras(pipe: Any, loras: Sequence[SavedLora | str | Path]) -> Iterator[Use]:
    """Put LoRAs on the denoiser and the text encoders of ``pipe`` for a while.

    Yields:
        A function that sets which of them act: it takes the scale of each by name. Before its first call, and with no
        names, the base is as it was.

    Raises:
        ValueError: LoRAs that are already loaded, weights that do not fit the base, or as for :func:`find_lora`.
    """
    found = [lora if isinstance(lora, SavedLora) else find_lora(lora) for lora in loras]
    check_names(found)
    parts = [part for name in (_denoiser(pipe), *_TEXT_ENCODERS) if (part := getattr(pipe, name, None)) is not None]
    if found and any(hasattr(part, "peft_config") for part in parts):
        raise ValueError("The pipeline has LoRAs already; call pipe.unload_lora_weights() first.")
    try:
        for lora in found:
            _load(pipe, lora)
        use = _switch(parts, [lora.name for lora in found])
        use({})
        yield use
    finally:
        for part in parts if found else ():
            _unload(part)


def _denoiser(pipe: Any) -> str:
    return "transformer" if getattr(pipe, "unet", None) is None else "unet"


def _switch(parts: Sequence[nn.Module], names: Sequence[str]) -> Use:
    def use(scales: Mapping[str, float]) -> None:
        for name in scales:
            if name not in names:
                raise ValueError(f"There is no LoRA {name!r}; loaded are {', '.join(names) or 'none'}.")
        for part in parts:
            for layer in _layers(part):
                active = [name for name in scales if scales[name] and name in layer.r]
                layer.enable_adapters(bool(active))
                if active:
                    layer.set_adapter(active)
                for name in active:
                    layer.set_scale(name, scales[name])
                    for factor in (layer.lora_A[name], layer.lora_B[name]):
                        factor.requires_grad_(False)  # set_adapter turned them on

    return use


def _layers(module: nn.Module) -> list[Any]:
    """Return the layers of a module that have LoRAs."""
    if not hasattr(module, "peft_config"):
        return []
    from peft.tuners.lora import LoraLayer  # slow to import

    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def _load(pipe: Any, lora: SavedLora) -> None:
    """Load a LoRA. ValueError when a weight finds no place in the base, or has another shape."""
    try:
        for part, factors in _read(pipe, lora).items():
            _inject(getattr(pipe, part), factors, lora.name)
    except Exception as error:  # another shape may raise any error
        if is_out_of_memory(error):  # another LoRA would not help
            raise
        raise ValueError(
            f"The LoRA {lora.weights.name} does not fit this base ({first_line(error)}); choose one that was made for "
            "this kind of base."
        ) from error


def _read(pipe: Any, lora: SavedLora) -> dict[str, dict[str, list[Tensor]]]:
    """Read a LoRA: for each part of the pipeline the factors [A, B] of each layer, with the scale of the file in B.

    ValueError for other weights, or layers that the base does not have.
    """
    # All formats become that of diffusers.
    of_unet = {"unet_config": pipe.unet.config} if _denoiser(pipe) == "unet" else {}
    of_flux = {"return_alphas": True} if "return_alphas" in signature(pipe.lora_state_dict).parameters else {}
    state, *alphas, metadata = pipe.lora_state_dict(
        str(lora.weights.path), use_safetensors=True, return_lora_metadata=True, **of_unet, **of_flux
    )

    factors: dict[str, dict[str, list[Tensor]]] = {}
    weights = _by_layer(pipe, state)
    scales = {(part, layer): value for (part, layer, _), value in _by_layer(pipe, *alphas).items()}
    for part, layer, rest in weights:
        if rest not in ("A.weight", "B.weight") or (part, layer, "A.weight") not in weights:
            raise ValueError(f"unknown weight {layer}.lora_{rest}")
        down, up = weights[part, layer, "A.weight"], weights[part, layer, "B.weight"]
        alpha = scales.get((part, layer), _recorded_alpha(metadata or {}, part, layer, down.shape[0]))
        factors.setdefault(part, {})[layer] = [down, up.float() * (alpha / down.shape[0])]
    for part, layers in factors.items():
        known = {name for name, _ in getattr(pipe, part).named_modules()}
        if missing := sorted(set(layers) - known):
            raise ValueError(f"it changes {len(layers)} layers of the {part}, of which {len(missing)} are not there")
    return factors


def _by_layer(pipe: Any, found: Mapping[str, Any] | None = None) -> dict[tuple[str, str, str], Any]:
    """Return the entries of a file by part of the pipeline, layer, and what follows it: ``A.weight``."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    entries = {}
    for name, value in (found or {}).items():
        part = next((one for one in _TEXT_ENCODERS if name.startswith(f"{one}.")), _denoiser(pipe))
        inside = {name.removeprefix(f"{part}."): value}
        if part not in _TEXT_ENCODERS:
            inside = convert_unet_state_dict_to_peft(inside)
        else:
            inside = convert_state_dict_to_peft(inside, StateDictType.DIFFUSERS_OLD)
        layer, _, rest = next(iter(inside)).removesuffix(".alpha").partition(".lora_")
        if part in _TEXT_ENCODERS and not hasattr(getattr(pipe, part), "text_model"):
            layer = layer.removeprefix("text_model.")  # newer releases of transformers have no such part
        entries[part, layer, rest] = value
    return entries


def _recorded_alpha(metadata: Mapping[str, Any], part: str, layer: str, rank: int) -> float:
    """Return the alpha of a layer in the metadata that PEFT writes; by default the rank, which scales by 1."""
    alpha = metadata.get(f"{part}.alpha_pattern", {}).get(layer, metadata.get(f"{part}.lora_alpha", rank))
    return alpha * rank**0.5 if metadata.get(f"{part}.use_rslora") else alpha


def _inject(part: nn.Module, factors: Mapping[str, Sequence[Tensor]], name: str) -> None:
    """Put the factors on the layers by PEFT itself: some releases of transformers and PEFT refuse each other."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    ranks = {layer: down.shape[0] for layer, (down, _) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {layer: rank for layer, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=others, alpha_pattern=dict(others), target_modules=list(factors)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, part, adapter_name=name)
    state = {
        f"{layer}.lora_{end}.weight": value
        for layer, pair in factors.items()
        for end, value in zip("AB", pair, strict=True)
    }
    found: Any = set_peft_model_state_dict(part, state, adapter_name=name)
    placed = sum(name in layer.r for layer in _layers(part))
    if found.unexpected_keys or placed != len(factors):
        raise ValueError(f"{len(factors)} layers are changed, {placed} were found")
    for layer in _layers(part):
        if name in layer.r:
            weight = layer.get_base_layer().weight
            for factor in (layer.lora_A[name], layer.lora_B[name]):
                factor.to(weight.device, weight.dtype).requires_grad_(False)


def _unload(part: nn.Module) -> None:
    """Remove all LoRAs of a part of the pipeline."""
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(part)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        with suppress(AttributeError):
            delattr(part, name)
