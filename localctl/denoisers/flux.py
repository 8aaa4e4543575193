"""The transformers of FLUX.1 (diffusers' ``FluxTransformer2DModel``): dev, with distilled guidance, and schnell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from localctl.denoisers.base import Arguments, Conditioning, argument
from localctl.denoisers.configs import Guidance
from localctl.denoisers.packed import Packed
from localctl.denoisers.trained import Original
from localctl.layout import Layout
from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_weights import Text
from localctl.tokens import token_positions

_UNPLACED = ("ip_adapter_masks", "attention_mask")  # of joint_attention_kwargs: what would not place anything


class Flux(Packed):
    """Blocks of two streams, then blocks of one; the tokens of text are T5's, and CLIP gives a pooled embedding."""

    name = "FLUX transformer"
    classes = ("FluxTransformer2DModel",)
    order: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
    )
    not_per_row: ClassVar[tuple[str, ...]] = ("img_ids", "txt_ids")
    tokenizers: ClassVar = ("tokenizer_2",)
    most_tokens: ClassVar[int | None] = 512
    block_lists: ClassVar = ("transformer_blocks", "single_transformer_blocks")

    def __init__(self, module: Any, pipe: Any = None) -> None:
        super().__init__(module, pipe)
        self._ids: tuple[Tensor | None, tuple[int, int]] = (None, (0, 0))  # of the last call, and their grid

    @classmethod
    def guidance(cls, config: Mapping[str, Any], index: Mapping[str, Any]) -> Guidance:
        """Return distilled guidance, which schnell does not have; a negative prompt acts by a second call."""
        return Guidance(3.5 if config.get("guidance_embeds") else None, "true_cfg_scale", negative_prompt="")

    def grid_of(self, arguments: Arguments) -> tuple[int, int]:
        """Return (h, w) of the tokens by their places, which are read once as long as they are the same tensor."""
        ids = argument(arguments, self.order, "img_ids")
        if self._ids[0] is not ids:
            further, *last = map(int, ids[..., :3].reshape(-1, 3).amax(dim=0).tolist())
            height, width = (place + 1 for place in last)
            if further or height * width != ids.shape[-2]:
                raise ValueError(
                    f"The {self.name} was called with tokens of further images, as in FluxKontext, among which "
                    "controls cannot locate regions; use a pipeline that generates from text."
                )
            self._ids = ids, (height, width)
        return self._ids[1]

    def places(self, size: tuple[int, int], rows: int, conditioning: Conditioning) -> dict[str, Any]:
        """Return the places of the tokens of image and text."""
        text = conditioning.text
        from diffusers import FluxPipeline  # only now: importing it chooses the image processors

        own = FluxPipeline._prepare_latent_image_ids(rows, *size, text.device, text.dtype)
        return {"img_ids": own, "txt_ids": text.new_zeros(text.shape[1], 3)}

    def check_call(self, arguments: Mapping[str, Any], layouts: Sequence[Layout]) -> None:
        """Raise a ValueError for masks that FLUX ignores, or shares between its calls, and for a phrase after the
        tokens that the call reads."""
        # FLUX.1 and FLUX.2 name them differently.
        given = [getattr(self.pipe, name, None) or () for name in ("_joint_attention_kwargs", "_attention_kwargs")]
        for name in (name for name in _UNPLACED if any(name in one for one in given)):
            why = "ignores" if name == "ip_adapter_masks" else "shares between prompt and negative prompt"
            raise ValueError(
                f"The attention of FLUX {why} {name} in joint_attention_kwargs; leave it out, and place phrases by a "
                "layout with RegionBias."
            )
        self.check_phrases(arguments, layouts)

    def _positions(self, layout: Layout, limit: int) -> list[tuple[int, ...]]:
        tokenizer = self.pipe.tokenizer_2
        # Textual-inversion words of several vectors are expanded, by the pipelines that know them.
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return token_positions(tokenizer, layout, convert and partial(convert, tokenizer=tokenizer), limit=limit)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Return the embeddings (K, C) of each text; padding is not masked out by these pipelines."""
        options = {name: arguments[name] for name in ("device", "max_sequence_length", "lora_scale")}
        states, *_ = type(self.pipe).encode_prompt(self.pipe, self.without_weights(texts), None, **options)
        return list(states)

    def _encode(self, captions: list[str], **options: Any) -> PromptEmbeds:
        states, pooled, _ = self.pipe.encode_prompt(captions, None, **options)
        return PromptEmbeds(states, pooled)

    def conditioning(
        self, texts: PromptEmbeds, size: tuple[int, int], originals: Sequence[Original | None]
    ) -> Conditioning:
        """Return the inputs, with pooled embeddings and the scale of distilled guidance."""
        added: dict[str, Any] = {} if texts.pooled is None else {"pooled_projections": texts.pooled}
        if self.module.config.guidance_embeds:
            states = texts.states
            added["guidance"] = torch.full([len(texts)], self.distilled_guidance, device=states.device)
        return Conditioning(texts.states, added, 1.0)

    @torch.no_grad()
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning, with pooled embeddings and the scale of distilled guidance, which needs no row of a
        negative prompt."""
        if negative_prompt is not None:
            raise ValueError("FLUX's own guidance is distilled and has no negative prompt; leave it out.")
        text, pooled, _ = self.pipe.encode_prompt(prompt, None, device=self.module.device)
        added = {"pooled_projections": pooled}
        if self.module.config.guidance_embeds:
            added["guidance"] = torch.full([len(text)], guidance_scale, device=text.device)
        return Conditioning(text, added, 1.0)
