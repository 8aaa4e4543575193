"""The transformers of FLUX.2 (diffusers' ``Flux2Transformer2DModel``): Klein; and dev, without phrases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor
from torch.nn.functional import pad

from localctl.denoisers.base import Conditioning
from localctl.denoisers.configs import Guidance
from localctl.denoisers.flux import Flux
from localctl.denoisers.transformer import chat_positions
from localctl.layout import Layout
from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_weights import Text


class Flux2(Flux):
    """As FLUX.1, but blocks of one stream return text and image in one sequence, and the text is Qwen3's (Klein)."""

    name = "FLUX.2 transformer"
    classes = ("Flux2Transformer2DModel",)
    order = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids")
    not_per_row = ()
    most_tokens = None
    no_phrases, tokenizers = ("Flux2Pipeline",), ("tokenizer",)

    @classmethod
    def guidance(cls, config: Mapping[str, Any], index: Mapping[str, Any]) -> Guidance:
        """Return that of these pipelines: distilled in dev, by a second call in Klein, none in a distilled Klein."""
        if index.get("is_distilled"):
            return Guidance(None, None)
        return Guidance(4.0, "guidance_scale" if "Klein" in str(index.get("_class_name")) else None)

    def add_tokens(self, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        """Return ``hidden_states`` (R, S, c), whose last entries are the image's, with ``tokens`` (R, Q, c) added."""
        return hidden_states + pad(tokens, (0, 0, hidden_states.shape[1] - tokens.shape[1], 0))

    def places(self, size: tuple[int, int], rows: int, conditioning: Conditioning) -> dict[str, Any]:
        """Return the places of the tokens of image and text."""
        text = conditioning.text
        image = Flux2KleinPipeline._prepare_latent_ids(torch.empty(rows, 1, *size))
        return {
            "img_ids": image.to(text.device),
            "txt_ids": Flux2KleinPipeline._prepare_text_ids(text).to(text.device),
            "guidance": (conditioning.added or {}).get("guidance"),
        }

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents that the pipeline takes for one image: those of each token as channels."""
        side = self.pipe.vae_scale_factor * self.patch
        return 1, self.channels * self.patch**2, height // side, width // side

    def _positions(self, layout: Layout, limit: int) -> list[tuple[int, ...]]:
        if not layout.regions or not any(region.phrase for region in layout.regions):
            return [()] * len(layout.regions)
        self.check_located(type(self.pipe).__name__)
        return chat_positions(self.pipe.tokenizer, layout, limit, enable_thinking=False)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[Text], arguments: Any) -> list[Tensor]:
        """Return the embeddings (K, C) of each text; padding is not masked out by these pipelines."""
        options = {name: arguments[name] for name in ("device", "max_sequence_length", "text_encoder_out_layers")}
        return list(type(self.pipe).encode_prompt(self.pipe, self.without_weights(texts), **options)[0])

    def _encode(self, captions: list[str], **options: Any) -> PromptEmbeds:
        return PromptEmbeds(self.pipe.encode_prompt(captions, **options)[0])

    @torch.no_grad()
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning; with guidance, the negative prompt is empty."""
        if negative_prompt:
            raise ValueError("FLUX.2's pipelines have no negative prompt; leave it out.")
        texts = ["", prompt] if guidance_scale > 1 else [prompt]
        text, _ = self.pipe.encode_prompt(texts, device=self.module.device)
        return Conditioning(text, None, guidance_scale)
