"""The transformers of Stable Diffusion 3 and 3.5 (diffusers' ``SD3Transformer2DModel``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from localctl.bases import has_part
from localctl.denoisers.base import AttentionLayer, Conditioning, DenoiserInputs
from localctl.denoisers.configs import Guidance
from localctl.denoisers.joint import Attend, Joint
from localctl.denoisers.trained import Original
from localctl.denoisers.transformer import UNLIMITED, Transformer
from localctl.layout import Layout
from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_weights import Text
from localctl.tokens import token_positions

_KNOWN = ("scale", "ip_adapter_image_embeds")  # of joint_attention_kwargs: what the transformer itself takes out


class SD3(Transformer):
    """A transformer with joint attention; the text is that of two CLIPs, joined along channels, and then T5's."""

    name = "SD3 transformer"
    classes = ("SD3Transformer2DModel",)
    order = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    image_output = 1
    tokenizers = ("tokenizer_3", "tokenizer")
    longest_text, most_tokens = 256, 512
    further_tokens = 77

    @classmethod
    def guidance(cls, config: Mapping[str, Any], index: Mapping[str, Any]) -> Guidance:
        """Return that of these pipelines."""
        return Guidance(7.0)

    @classmethod
    def fewest_tokens(cls, index: Mapping[str, Any]) -> int:
        """Return 0 for a base without T5, of whose tokens this is the number; CLIP's are always read."""
        return int(has_part(index, "text_encoder_3"))

    def attention_layers(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Any]]:
        """Return the joint attention of each block, and in some blocks of SD3.5 a second one of the image alone."""
        size, joint, layers = self.grid(latent_size), Joint(joint_attention, text_first=False), []
        for name, block in self.blocks:
            layers.append((AttentionLayer(f"{name}.attn", True, size, joint), block.attn))
            if block.attn2 is not None:
                layers.append((AttentionLayer(f"{name}.attn2", False, size, joint), block.attn2))
        return layers

    def check_attention(self) -> None:
        """Raise a ValueError for a processor other than the stock one."""
        for name, attn in self.module.named_modules():
            if hasattr(attn, "processor"):
                _check_processor(attn.processor, name)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserInputs:
        """Return the inputs, and note whether the call is that of skip-layer guidance."""
        self.repeats = bool(kwargs.get("skip_layers"))
        return super().read(args, kwargs)

    def has_negative(self, conditional: Sequence[bool]) -> bool:
        """Return whether the call has a negative prompt; that of skip-layer guidance follows one that has."""
        return self.repeats or super().has_negative(conditional)

    def check_call(self, arguments: Mapping[str, Any], layouts: Sequence[Layout]) -> None:
        """Raise a ValueError for a phrase after the tokens that the call reads, or for settings of attention that the
        stock processor would ignore."""
        ignored = sorted(set(getattr(self.pipe, "joint_attention_kwargs", None) or ()) - set(_KNOWN))
        if ignored:
            raise ValueError(
                f"The attention of SD3 ignores {ignored[0]} in joint_attention_kwargs; leave it out, and place phrases "
                "by a layout with RegionBias."
            )
        self.check_phrases(arguments, layouts)

    def _positions(self, layout: Layout, limit: int) -> list[tuple[int, ...]]:
        pipe = self.pipe
        length = pipe.tokenizer_max_length
        clips = [
            token_positions(tokenizer, layout, limit=UNLIMITED) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
        ]
        last: list[tuple[int, ...]]
        if pipe.text_encoder_3 is None:  # then the tokens after CLIP's are zeros
            whole = token_positions(pipe.tokenizer, layout)
            clips, last = [whole, *clips[1:]], [()] * len(whole)
        else:
            last = token_positions(pipe.tokenizer_3, layout, limit=UNLIMITED)
            if any(not _fits(own, limit) and not _fits(clip, length) for own, clip in zip(last, clips[0], strict=True)):
                token_positions(pipe.tokenizer_3, layout, limit=limit)  # which raises the error
        found = []
        for own, *several in zip(last, *clips, strict=True):
            places = {place for clip in several if _fits(clip, length) for place in clip}
            found.append(tuple(sorted(places | {length + place for place in own if _fits(own, limit)})))
        return found

    def same_tokens(self, first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
        """Return pairs of positions, those of CLIP's tokens and those of T5's apart: a text may have one part alone."""
        length, pairs = self.pipe.tokenizer_max_length, []
        for of_clip in (True, False):
            parts = ([place for place in places if (place < length) is of_clip] for places in (first, second))
            pairs += super().same_tokens(*parts)
        return pairs

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Return the embeddings (K, C) of each text; padding is not masked out by these pipelines."""
        options = {name: arguments[name] for name in ("device", "clip_skip", "max_sequence_length", "lora_scale")}
        plain = self.without_weights(texts)
        encode = type(self.pipe).encode_prompt
        states, *_ = encode(self.pipe, plain, None, None, do_classifier_free_guidance=False, **options)
        return list(states)

    def _encode(self, captions: list[str], **options: Any) -> PromptEmbeds:
        states, _, pooled, _ = self.pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, **options
        )
        return PromptEmbeds(states, pooled)

    def conditioning(
        self, texts: PromptEmbeds, size: tuple[int, int], originals: Sequence[Original | None]
    ) -> Conditioning:
        """Return the inputs, with pooled embeddings."""
        return Conditioning(texts.states, {"pooled_projections": texts.pooled}, 1.0)

    @torch.no_grad()
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning, with pooled embeddings."""
        guided = guidance_scale > 1
        text, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt,
            None,
            None,
            device=self.module.device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt,
        )
        if guided:
            text, pooled = torch.cat([negative, text]), torch.cat([negative_pooled, pooled])
        return Conditioning(text, {"pooled_projections": pooled}, guidance_scale)


def _fits(places: Sequence[int], limit: int) -> bool:
    """Return whether all tokens at these places come before the end token of a text that is cut to ``limit``."""
    return all(place < limit - 1 for place in places)


def _check_processor(processor: Any, name: str) -> None:
    if type(processor) is JointAttnProcessor2_0:
        return
    kind = type(processor).__name__
    way_out = "call pipe.transformer.unfuse_qkv_projections() first" if "Fused" in kind else "load the base without it"
    raise ValueError(
        f"The attention {name} of the SD3 transformer has a {kind}, which takes no attention bias from controls; "
        f"{way_out}."
    )


def joint_attention(
    inner: Any,
    attend: Attend,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a layer as ``JointAttnProcessor2_0`` does, which has no place for a bias: image first, then text."""
    _check_processor(inner, "layer")
    assert attention_mask is None and not kwargs
    parts = [_heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))]
    if encoder_hidden_states is not None:
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        parts.append(_heads(attn, encoder_hidden_states, added, (attn.norm_added_q, attn.norm_added_k)))
    query, key, value = (torch.cat(column, dim=2) for column in zip(*parts, strict=True))
    core = attend(query, key, value, None, _stock).transpose(1, 2).flatten(2).to(query.dtype)
    linear, dropout = attn.to_out
    image = hidden_states.shape[1]
    output = dropout(linear(core[:, :image]))
    if encoder_hidden_states is None:
        return output
    text = core[:, image:]
    return output, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(
    attn: Any, states: Tensor, projections: Sequence[nn.Module], norms: Sequence[nn.Module | None]
) -> list[Tensor]:
    """Return queries, keys and values (R, H, S, d) of ``states`` (R, S, C)."""
    found = [project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for project in projections]
    return [one if norm is None else norm(one) for one, norm in zip(found, (*norms, None), strict=True)]


def _stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
