"""The U-Nets of Stable Diffusion 1.x, 2.x and XL (diffusers' ``UNet2DConditionModel``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from localctl.denoisers.base import (
    Arguments,
    AttentionLayer,
    Changes,
    Conditioning,
    Denoiser,
    DenoiserInputs,
    add_residuals,
    argument,
    check_changes,
    with_arguments,
)
from localctl.denoisers.trained import Original
from localctl.devices import send
from localctl.layout import Layout
from localctl.pipelines import encode_captions, encode_prompts, is_xl
from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_weights import Text
from localctl.tokens import positions_of

_NAMES = ("sample", "timestep", "encoder_hidden_states")  # the arguments that may be passed by position
_WITHIN = "down_intrablock_additional_residuals"
_SKIPS, _MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
_GROUP = re.compile(r"(down|mid|up)(?:/(\d+))?")
_IMAGES = "image_embeds"
TOKENS = 77  # that CLIP reads
_LARGE = 1 << 12  # a side of latents that halves evenly at every level


class UNet(Denoiser):
    """A U-Net: down, middle and up blocks, text by cross-attention, [negative; positive] rows with guidance."""

    name = "U-Net"
    attribute = "unet"
    not_per_row = ("cross_attention_kwargs",)  # masks of an IP-Adapter belong to its images
    groups = ("down", "mid", "up")
    weighs_prompts = True

    def _level_sizes(self, latent_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (h, w) within each down block and, last, the middle block; halving rounds up."""
        sizes = [latent_size]
        for block in self.module.down_blocks:
            height, width = sizes[-1]
            shrinks = getattr(block, "downsamplers", None) is not None
            sizes.append(((height + 1) // 2, (width + 1) // 2) if shrinks else (height, width))
        return sizes

    def attention_layers(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Attention]]:
        """Return the self- and cross-attention layers of the transformer blocks."""
        unet, (*down, middle) = self.module, self._level_sizes(latent_size)
        parts = [(f"down_blocks.{i}", *part) for i, part in enumerate(zip(unet.down_blocks, down, strict=True))]
        parts.append(("mid_block", unet.mid_block, middle))
        parts += [(f"up_blocks.{i}", *part) for i, part in enumerate(zip(unet.up_blocks, down[::-1], strict=True))]
        return [
            (AttentionLayer(f"{prefix}.{name}", module.is_cross_attention, size), module)
            for prefix, block, size in parts
            if block is not None
            for name, module in block.named_modules()
            if isinstance(module, Attention) and name.rpartition(".")[2] in ("attn1", "attn2")
        ]

    def choose_layers(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Choose by the part of the U-Net and how much coarser than the latents the layers are.

        ``wanted``: ``mid``, ``up/4``, ``down/2`` ...: the part and, unless the whole part is meant, the side of the
        latents divided by that of the layer's grid; None: the middle block and the first up block with cross-attention.

        Raises:
            ValueError: an invalid name, a group that the U-Net does not have, or no layer at all.
        """
        layers = [layer for layer, _ in self.attention_layers((_LARGE, _LARGE)) if layer.cross]
        if wanted is None:
            first_up = next((_block(layer) for layer in layers if layer.name.startswith("up_")), None)
            chosen = [layer for layer in layers if layer.name.startswith("mid_") or _block(layer) == first_up]
        else:
            for name in wanted:
                if not any(_matches(name, layer) for layer in layers):
                    groups = ", ".join(dict.fromkeys(_group(layer) for layer in layers))
                    raise ValueError(f"The U-Net has no cross-attention at {name!r}; choose among {groups}.")
            chosen = [layer for layer in layers if any(_matches(name, layer) for name in wanted)]
        if not chosen:
            raise ValueError("Layout guidance needs at least one attention layer to read; name some in sites.")
        return tuple(layer.name for layer in chosen)

    def residual_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        """Return (c, h, w) of the residual that each down block and, last, the middle block takes.

        Blocks with cross-attention take it before they downsample, other blocks after.
        """
        unet, sizes = self.module, self._level_sizes(latent_size)
        shapes: list[tuple[int, ...]] = []
        for index, (block, channels) in enumerate(zip(unet.down_blocks, unet.config.block_out_channels, strict=True)):
            attends = getattr(block, "has_cross_attention", False)
            shapes.append((channels, *sizes[index if attends else index + 1]))
        return [*shapes, (unet.config.block_out_channels[-1], *sizes[-1])]

    def is_block(self, module: nn.Module, name: str) -> bool:
        """Return True for the U-Net, its blocks and their attention layers."""
        return isinstance(module, Attention) or bool(re.fullmatch(r"((down|up)_blocks\.\d+|mid_block)?", name))

    def check_controlnet(self, config: Mapping[str, Any]) -> None:
        """Raise a ValueError unless the width of the text and the channels are this U-Net's."""
        for name in ("cross_attention_dim", "block_out_channels"):
            own, base = config[name], self.module.config[name]
            if own != base and list(_as_sequence(own)) != list(_as_sequence(base)):
                raise ValueError(
                    f"The ControlNet has {name} {own} but the base has {base}; use a ControlNet made for this base."
                )

    @property
    def image_adapters(self) -> int:
        """The number of IP-Adapters that diffusers has loaded."""
        return len(getattr(self.module.encoder_hid_proj, "image_projection_layers", ()))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserInputs:
        """Return the inputs; sample, timestep and text may be passed by position."""
        sample, timestep, text = (argument((args, kwargs), _NAMES, name) for name in _NAMES)
        latents = sample[:, : self.pipe.vae.config.latent_channels]  # with inpainting, mask and image channels follow
        return DenoiserInputs(sample, latents, timestep, text, kwargs.get("added_cond_kwargs") or {})

    def write(self, arguments: Arguments, **changes: Unpack[Changes]) -> Arguments:
        """Return the changed arguments; ``residuals`` go into the down blocks, ``skips`` to the skip connections and
        the middle block, ``images`` beside SDXL's further inputs."""
        check_changes(changes)
        changed: dict[str, Any] = {}
        if (text := changes.get("text")) is not None:
            changed["encoder_hidden_states"] = text
        if (latents := changes.get("latents")) is not None:
            own = self.read(*arguments).sample
            changed["sample"] = torch.cat([latents.to(own.dtype), own[:, latents.shape[1] :]], dim=1)
        args, kwargs = with_arguments(arguments, _NAMES, changed)
        kwargs = dict(kwargs)
        if (residuals := changes.get("residuals")) is not None:
            kwargs[_WITHIN] = add_residuals(kwargs.get(_WITHIN), residuals)
        if (skips := changes.get("skips")) is not None:
            middle = kwargs.get(_MIDDLE)
            kwargs[_SKIPS] = add_residuals(kwargs.get(_SKIPS), skips.down)
            kwargs[_MIDDLE] = skips.middle if middle is None else middle + skips.middle
        if (images := changes.get("images")) is not None:
            kwargs["added_cond_kwargs"] = {**(kwargs.get("added_cond_kwargs") or {}), _IMAGES: images}
        return args, kwargs

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the model output; the scheduler scales the latents for the U-Net."""
        rows = torch.cat([latents] * len(conditioning.text))
        output = self.module(
            self.pipe.scheduler.scale_model_input(rows, timestep),
            timestep,
            encoder_hidden_states=conditioning.text,
            added_cond_kwargs=conditioning.added,
            return_dict=False,
        )[0]
        return conditioning.combined(output)

    def output(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, features: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return the model output for latents as the scheduler would scale them."""
        arguments: dict[str, Any] = {"encoder_hidden_states": conditioning.text}
        if conditioning.added is not None:
            arguments["added_cond_kwargs"] = conditioning.added
        if features is not None:
            arguments[_WITHIN] = list(features)  # the U-Net takes them out
        return self.module(noisy, timesteps, **arguments).sample

    # Text

    def encode_captions(self, captions: Sequence[str]) -> PromptEmbeds:
        """Encode captions in one call of each text encoder."""
        return encode_captions(self.pipe, captions)

    def empty_caption(self) -> PromptEmbeds:
        """Encode an empty caption; of SDXL, zeros where its config says so."""
        pipe = self.pipe
        embeds, negative = encode_prompts(pipe, "", guided=is_xl(pipe), call={"device": pipe.text_encoder.device})
        return negative or embeds

    def blank_texts(self) -> PromptEmbeds:
        """Return embeddings of one caption without values: 77 tokens."""
        config, pooled = self.module.config, None
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            pooled = torch.empty(1, width, device="meta")
        return PromptEmbeds(torch.empty(1, TOKENS, config.cross_attention_dim, device="meta"), pooled)

    @property
    def caption_tokens(self) -> tuple[Any, int]:
        """CLIP's tokenizer, and its 77 tokens."""
        return self.pipe.tokenizer, self.pipe.tokenizer.model_max_length

    def conditioning(
        self, texts: PromptEmbeds, size: tuple[int, int], originals: Sequence[Original | None]
    ) -> Conditioning:
        """Return the inputs, for SDXL with pooled embeddings and sizes: those of the images, or uncropped."""
        if texts.pooled is None:
            return Conditioning(texts.states, None, 1.0)
        # Sizes stay float32: half precision cannot represent every number of pixels.
        ids = torch.tensor([[*(four or (*size, 0, 0)), *size] for four in originals], dtype=torch.float32)
        return Conditioning(
            texts.states, {"text_embeds": texts.pooled, "time_ids": send(ids, texts.states.device)}, 1.0
        )

    def token_positions(self, layout: Layout) -> list[tuple[int, ...]]:
        """Return the positions of each phrase; with two CLIP tokenizers (SDXL), those of both."""
        return positions_of(self.pipe, layout)

    def encode_texts(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> Tensor:
        """Return the embeddings (n, K, C) of the texts, without rows of guidance."""
        return encode_prompts(self.pipe, list(texts), call=arguments)[0].states

    @torch.no_grad()
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning; for SDXL with pooled embeddings and sizes."""
        pipe = self.pipe
        embeds, negative = encode_prompts(pipe, prompt, negative_prompt, guided=guidance_scale > 1)
        rows = embeds if negative is None else PromptEmbeds.join([negative, embeds])
        text, added = rows.states, None
        if rows.pooled is not None:  # SDXL
            projection = pipe.text_encoder_2.config.projection_dim
            times = pipe._get_add_time_ids(size, (0, 0), size, dtype=text.dtype, text_encoder_projection_dim=projection)
            added = {"text_embeds": rows.pooled, "time_ids": times.to(text.device).repeat(len(text), 1)}
        return Conditioning(text, added, guidance_scale)


def _block(layer: AttentionLayer) -> str:
    return ".".join(layer.name.split(".")[:2])


def _group(layer: AttentionLayer) -> str:
    return f"{layer.name.partition('_')[0]}/{_LARGE // layer.size[0]}"


def _matches(name: str, layer: AttentionLayer) -> bool:
    match = _GROUP.fullmatch(name)
    return bool(match) and (name == _group(layer) or name == _group(layer).partition("/")[0])


def _as_sequence(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value
