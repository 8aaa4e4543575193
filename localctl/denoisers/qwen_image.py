"""The transformer of Qwen-Image (diffusers' ``QwenImageTransformer2DModel``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from localctl.denoisers.base import Arguments, Conditioning, argument, with_arguments
from localctl.denoisers.configs import Guidance
from localctl.denoisers.packed import Packed
from localctl.denoisers.trained import Original
from localctl.layout import Layout
from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_weights import Text
from localctl.tokens import token_positions

_MASK = "encoder_hidden_states_mask"


class QwenImage(Packed):
    """Blocks of two streams; the text is Qwen2.5-VL's, within a template whose first tokens are left out."""

    name = "Qwen-Image transformer"
    classes = ("QwenImageTransformer2DModel",)
    order = ("hidden_states", "encoder_hidden_states", _MASK, "timestep", "img_shapes")
    not_per_row = ("img_shapes",)
    longest_text = most_tokens = 1024
    fills_texts = True

    @classmethod
    def guidance(cls, config: Mapping[str, Any], index: Mapping[str, Any]) -> Guidance:
        """Return guidance by a second call, which needs a negative prompt, were it a blank."""
        return Guidance(1.0 if config.get("guidance_embeds") else None, "true_cfg_scale", 1.0, 4.0, " ")

    def grid_of(self, arguments: Arguments) -> tuple[int, int]:
        """Return (h, w) of the tokens by the shapes of the images."""
        (frames, height, width), *others = argument(arguments, self.order, "img_shapes")[0]
        if others or frames != 1:
            raise ValueError(
                "The Qwen-Image transformer was called with tokens of further images (QwenImageEditPipeline's, for "
                "example), among which controls cannot locate regions; use a pipeline that generates from text."
            )
        return height, width

    def places(self, size: tuple[int, int], rows: int, conditioning: Conditioning) -> dict[str, Any]:
        """Return the shapes of the images."""
        return {"img_shapes": [[(1, *size)]] * rows}

    def check_call(self, arguments: Mapping[str, Any], layouts: Sequence[Layout]) -> None:
        """Raise a ValueError for a guidance scale, which Qwen-Image ignores, and for a phrase after the tokens that the
        call reads."""
        if getattr(self.pipe, "_guidance_scale", None) is not None and not self.module.config.guidance_embeds:
            raise ValueError(
                "Qwen-Image ignores guidance_scale; pass true_cfg_scale, and a negative_prompt, in place of it."
            )
        self.check_phrases(arguments, layouts)

    def _positions(self, layout: Layout, limit: int) -> list[tuple[int, ...]]:
        before, after = self.pipe.prompt_template_encode.split("{}")
        dropped = self.pipe.prompt_template_encode_start_idx
        return token_positions(self.pipe.tokenizer, layout, limit=limit, around=(before, after), dropped=dropped)

    def join_texts(self, arguments: Arguments, texts: Tensor, hidden: Tensor | None) -> Arguments:
        """Return the arguments with texts of any length, filled up to the longest and masked."""
        own = self.read(*arguments).text[: -len(texts)]
        longest = max(own.shape[1], texts.shape[1])
        mask = arguments[1].get(_MASK)
        masks = [
            own.new_ones(own.shape[:2]) if mask is None else mask[: len(own)].to(own),
            own.new_ones(texts.shape[:2]) if hidden is None else (hidden[:, 0] == 0).to(own),
        ]
        joined, every = (
            torch.cat([pad(one, (0, 0) * (one.ndim - 2) + (0, longest - one.shape[1])) for one in pair])
            for pair in ([own, texts.to(own)], masks)
        )
        text = None if bool(every.all()) else every.bool()
        return with_arguments(self.write(arguments, text=joined), self.order, {_MASK: text})

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Return the embeddings (K, C) of each text, without padding."""
        options = {name: arguments[name] for name in ("device", "max_sequence_length")}
        states, mask = type(self.pipe).encode_prompt(self.pipe, self.without_weights(texts), **options)
        return list(states) if mask is None else [state[own.bool()] for state, own in zip(states, mask, strict=True)]

    def _encode(self, captions: list[str], **options: Any) -> PromptEmbeds:
        # One by one: the pipeline fills texts up to the longest of them, on which their last bits would depend.
        found = [self.pipe.encode_prompt(caption or " ", **options)[0] for caption in captions]
        return PromptEmbeds.join([PromptEmbeds(states, lengths=(states.shape[1],)) for states in found])

    def conditioning(
        self, texts: PromptEmbeds, size: tuple[int, int], originals: Sequence[Original | None]
    ) -> Conditioning:
        """Return the inputs, with the mask of padding, which is no longer than the longest of these texts needs."""
        assert texts.lengths is not None
        longest = max(texts.lengths)
        own = PromptEmbeds(texts.states[:, :longest], lengths=texts.lengths)
        filled = min(texts.lengths) < longest
        return Conditioning(own.states, {_MASK: own.mask(torch.bool) if filled else None}, 1.0)

    @torch.no_grad()
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning, with the mask of padding."""
        guided = guidance_scale > 1
        texts = [negative_prompt or " ", prompt] if guided else [prompt]
        text, mask = self.pipe.encode_prompt(texts, device=self.module.device)
        return Conditioning(text, {_MASK: mask}, guidance_scale)
