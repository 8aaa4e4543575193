"""The transformers of PixArt-alpha and PixArt-Sigma (diffusers' ``PixArtTransformer2DModel``)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from localctl.denoisers.base import AttentionLayer, Conditioning
from localctl.denoisers.configs import Guidance
from localctl.denoisers.trained import Original
from localctl.denoisers.transformer import Transformer, has_phrases
from localctl.devices import send
from localctl.layout import Layout
from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_weights import Text
from localctl.sizes import shown
from localctl.tokens import token_positions

_LONGEST = 300  # tokens that Sigma reads; alpha reads 120


class PixArt(Transformer):
    """A transformer with text by cross-attention, as a U-Net; the text is T5's, and its padding is masked out."""

    name = "PixArt transformer"
    classes = ("PixArtTransformer2DModel",)
    order = ("hidden_states", "encoder_hidden_states", "timestep")
    image_output = None
    by_flow = False
    absent_hooks = Transformer.absent_hooks[:-1]
    # Binning would generate other sizes than the layouts'; cleaning depends on which packages are installed.
    own_arguments: ClassVar = {"use_resolution_binning": False, "clean_caption": False}

    @classmethod
    def guidance(cls, config: Mapping[str, Any], index: Mapping[str, Any]) -> Guidance:
        """Return that of these pipelines."""
        return Guidance(4.5)

    def attention_layers(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Any]]:
        """Return self- and cross-attention of each block."""
        size = self.grid(latent_size)
        return [
            (AttentionLayer(f"{name}.{attn}", attn == "attn2", size), getattr(block, attn))
            for name, block in self.blocks
            for attn in ("attn1", "attn2")
        ]

    def check_call(self, arguments: Mapping[str, Any], layouts: Sequence[Layout]) -> None:
        """Raise a ValueError for a prompt that the pipeline rewrites, or cuts before a phrase."""
        if arguments["prompt"] is None:
            return
        for layout in layouts if has_phrases(layouts) else ():
            self._positions(layout, arguments["max_sequence_length"])
            cleaned = arguments["clean_caption"] and self.pipe._text_preprocessing(layout.prompt, True)[0]
            if cleaned and cleaned != layout.prompt.lower().strip():
                raise ValueError(
                    f"The pipeline rewrites the prompt to {shown(cleaned)}, in which phrases cannot be located; pass "
                    "clean_caption=False."
                )

    def _positions(self, layout: Layout, limit: int) -> list[tuple[int, ...]]:
        # The pipeline lowers and strips the prompt.
        return token_positions(self.pipe.tokenizer, layout, str.lower, stripped=True, limit=limit)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Return the embeddings (K, C) of each text up to its end token."""
        options = {name: arguments[name] for name in ("device", "clean_caption", "max_sequence_length")}
        states, mask, *_ = type(self.pipe).encode_prompt(self.pipe, self.without_weights(texts), False, **options)
        return [state[own.bool()] for state, own in zip(states, mask, strict=True)]

    def text_in_layers(self, text: Tensor) -> Tensor:
        """Return texts as the projection of captions makes them."""
        projection: Any = self.module.caption_projection
        return text if projection is None else projection(text)

    @property
    def longest_text(self) -> int:  # type: ignore[override]
        """The number of tokens that the pipeline reads by default, which differs between alpha and Sigma."""
        if self.pipe is None:
            return _LONGEST
        return inspect.signature(self.pipe.encode_prompt).parameters["max_sequence_length"].default

    def _encode(self, captions: list[str], **options: Any) -> PromptEmbeds:
        states, mask, *_ = self.pipe.encode_prompt(captions, False, **options)
        return PromptEmbeds(states, lengths=tuple(mask.sum(dim=1).tolist()))

    def conditioning(
        self, texts: PromptEmbeds, size: tuple[int, int], originals: Sequence[Original | None]
    ) -> Conditioning:
        """Return the inputs, with masks of padding and, for PixArt-alpha at 1,024 pixels, the size."""
        states = texts.states
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.module.use_additional_conditions:
            rows = torch.tensor([[*size, size[0] / size[1]]] * len(texts))
            of_rows = send(rows, states.device).to(states)
            sizes = {"resolution": of_rows[:, :2], "aspect_ratio": of_rows[:, 2:]}
        added = {"encoder_attention_mask": texts.mask(states.dtype), "added_cond_kwargs": sizes}
        return Conditioning(states, added, 1.0)

    @torch.no_grad()
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning, with the masks of padding."""
        guided = guidance_scale > 1
        text, mask, negative, negative_mask = self.pipe.encode_prompt(
            prompt, guided, negative_prompt=negative_prompt or "", device=self.module.device
        )
        if guided:
            text, mask = torch.cat([negative, text]), torch.cat([negative_mask, mask])
        added = {"encoder_attention_mask": mask, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return Conditioning(text, added, guidance_scale)
