"""What the families of transformers share: a grid of tokens, blocks in a row, residuals added between the blocks."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from localctl.denoisers.base import (
    RESIDUALS,
    Arguments,
    Changes,
    Conditioning,
    Denoiser,
    DenoiserInputs,
    add_residuals,
    argument,
    check_changes,
    with_arguments,
)
from localctl.denoisers.trained import TYPICAL_TEXT
from localctl.diffusion import FLOW, latent_channels
from localctl.layout import Layout
from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_weights import Text
from localctl.sizes import shown
from localctl.tokens import token_positions

_TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "cap_feat_dim")
_THIRDS = ("early", "middle", "late")


class Transformer(Denoiser):
    """A transformer on tokens, each a patch of the latents; with guidance, [negative; positive] rows.

    A family names the arguments of ``forward`` that may be passed by position, and where its blocks are.
    """

    name = "transformer"
    attribute = "transformer"
    groups = _THIRDS
    # The last is for cross-attention alone; joint attention takes other texts by ``mixture``.
    absent_hooks: ClassVar[tuple[str, ...]] = ("block_residuals", "image_embeds", "image_masks", "mix_attention")
    order: ClassVar[tuple[str, ...]]  # the first arguments of the module's forward
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)  # in the order they run
    in_halves = False  # residuals are added by hooks
    by_flow = True
    longest_text: ClassVar[int] = 512  # tokens that are read by default
    further_tokens: ClassVar[int] = 0  # of CLIP, beside them
    fills_texts: ClassVar[bool] = False  # whether shorter texts have fewer tokens
    latents_of_token: ClassVar[int | None] = None  # the side of a token; None: as the config says

    @classmethod
    def multiple_of(cls, config: Mapping[str, Any], factor: int) -> int:
        """Return the side of a token in pixels."""
        return factor * (cls.latents_of_token or config["patch_size"])

    # Layers and grids

    @property
    def blocks(self) -> list[tuple[str, Any]]:
        """The name and module of each block, in the order they run."""
        return [(f"{name}.{index}", block) for name in self.block_lists for index, block in enumerate(self._part(name))]

    def _part(self, name: str) -> Any:
        return getattr(self.module, name)

    @property
    def patch(self) -> int:
        """The side of a token in latents."""
        return self.latents_of_token or self.module.config.patch_size  # type: ignore[union-attr, return-value]

    @property
    def width(self) -> int:
        """The channels of a token between the blocks."""
        return self.module.inner_dim  # type: ignore[return-value]

    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Return (h, w) of the tokens."""
        return latent_size[0] // self.patch, latent_size[1] // self.patch

    def choose_layers(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Choose by the place of their blocks.

        ``wanted``: ``early``, ``middle``, ``late`` (thirds of the blocks), or the number of a block, from 0; None: the
        middle third. ValueError for anything else, or for no name at all.
        """
        if wanted is not None and not wanted:
            raise ValueError("A control of attention needs at least one layer; name some in sites.")
        blocks = [name for name, _ in self.blocks]
        chosen: set[str] = set()
        for one in ("middle",) if wanted is None else wanted:
            chosen |= set(self._named(one, blocks))
        layers = [layer.name for layer, _ in self.attention_layers((self.patch,) * 2) if layer.cross]
        return tuple(name for name in layers if any(name.startswith(f"{block}.") for block in chosen))

    def _named(self, wanted: str, blocks: Sequence[str]) -> Sequence[str]:
        count = len(blocks)
        if wanted in _THIRDS:
            third = _THIRDS.index(wanted)
            return blocks[third * count // 3 : (third + 1) * count // 3]
        if wanted.isdecimal() and int(wanted) < count:
            return [blocks[int(wanted)]]
        raise ValueError(
            f"The {self.name} has no attention at {wanted!r}; choose among {', '.join(_THIRDS)} and the numbers of its "
            f"blocks, 0 to {count - 1}."
        )

    def residual_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        """Return (c, h, w) of the residual that can be added to the image's tokens after each block."""
        return [(self.width, *self.grid(latent_size))] * len(self.blocks)

    def placed(self, features: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the residual of each block: those of the features, in blocks at even distances from the first on."""
        residuals: list[Tensor | None] = [None] * len(self.blocks)
        for index, feature in enumerate(features):
            residuals[index * len(residuals) // len(features)] = feature
        return residuals

    def is_block(self, module: nn.Module, name: str) -> bool:
        """Return True for the transformer, its blocks and their attention layers."""
        lists = "|".join(map(re.escape, self.block_lists))
        return hasattr(module, "processor") or bool(re.fullmatch(rf"(({lists})\.\d+)?", name))

    def check_controlnet(self, config: Mapping[str, Any]) -> None:
        """Raise a ValueError: these ControlNets are networks for U-Nets."""
        raise ValueError(
            f"The ControlNet was made for a U-Net, and the base has a {self.name}; use a LocalAdapter trained for it."
        )

    @property
    def image_adapters(self) -> int:
        """None: raise a ValueError, since masks of IP-Adapters would be ignored."""
        raise ValueError(
            f"Image prompts with masks act on Stable Diffusion 1.x, 2.x and XL only, not on a {self.name}, which "
            "ignores their masks; leave IPAdapterControl out."
        )

    # One call

    @property
    @abstractmethod
    def image_output(self) -> int | None:
        """The place of the image's tokens in what a block returns; None if it returns one tensor."""

    @contextmanager
    def running(self, arguments: Arguments) -> Iterator[Arguments]:
        """Context of one run; while it lasts, the blocks' outputs grow by the residuals among the arguments."""
        kwargs = dict(arguments[1])
        residuals = kwargs.pop(RESIDUALS, None) or ()
        hooks = [
            block.register_forward_hook(self._adder(residual))
            for (_, block), residual in zip(self.blocks, residuals, strict=False)
            if residual is not None
        ]
        try:
            yield arguments[0], kwargs
        finally:
            for hook in hooks:
                hook.remove()

    def _adder(self, residual: Tensor) -> Any:
        """Return a forward hook that adds a residual (R, c, h, w) to the image's tokens of a block's output."""
        tokens = residual.flatten(2).mT  # (R,Q,c)
        place = self.image_output

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            if place is None or isinstance(output, Tensor):
                return self.add_tokens(output, tokens)
            return tuple(self.add_tokens(one, tokens) if at == place else one for at, one in enumerate(output))

        return add

    def add_tokens(self, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        """Return a block's ``hidden_states`` (R, S, c) with ``tokens`` (R, Q, c) added to those of the image."""
        return hidden_states + tokens

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserInputs:
        """Return the inputs, by position or by name."""
        sample, text, timestep = (
            argument((args, kwargs), self.order, name)
            for name in ("hidden_states", "encoder_hidden_states", "timestep")
        )
        latents = sample[:, : latent_channels(self.pipe.vae)]  # with inpainting, further channels may follow
        return DenoiserInputs(sample, latents, timestep, text, {})

    def write(self, arguments: Arguments, **changes: Unpack[Changes]) -> Arguments:
        """Return the changed arguments; ``residuals`` are for :meth:`running`. A transformer has no ``skips``."""
        check_changes(changes)
        assert changes.get("skips") is None and changes.get("images") is None, "refused when controls are bound"
        changed: dict[str, Any] = {}
        if (latents := changes.get("latents")) is not None:
            own = argument(arguments, self.order, "hidden_states")
            changed["hidden_states"] = torch.cat([latents.to(own.dtype), own[:, latents.shape[1] :]], dim=1)
        if (text := changes.get("text")) is not None:
            changed["encoder_hidden_states"] = text
        if (residuals := changes.get("residuals")) is not None:
            changed[RESIDUALS] = add_residuals(arguments[1].get(RESIDUALS), residuals)
        return with_arguments(arguments, self.order, changed)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the model output; learned variances are left out."""
        rows = torch.cat([latents] * len(conditioning.text))
        scale = getattr(self.pipe.scheduler, "scale_model_input", lambda sample, timestep: sample)
        return conditioning.combined(self.output(scale(rows, timestep), timestep.expand(len(rows)), conditioning))

    def times(self, timesteps: Tensor, table: Tensor) -> Tensor:
        """Return what the module takes as the times of ``timesteps`` (R,) int64, by the ``table`` (T,) of the noise."""
        return table.to(timesteps.device)[timesteps] * len(table) if self.prediction_type == FLOW else timesteps

    def output(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the model output (R, c, h, w) without guidance, for ``noisy`` (R, c, h, w) at ``timesteps`` (R,), with
        the ``features`` of an adapter; learned variances are left out."""
        named = {"encoder_hidden_states": conditioning.text, "timestep": timesteps, **(conditioning.added or {})}
        arguments = self.write(
            ((), {"hidden_states": noisy, **named, "return_dict": False}),
            residuals=None if features is None else self.placed(features),
        )
        with self.running(arguments) as (args, kwargs):
            return self.module(*args, **kwargs)[0][:, : noisy.shape[1]]

    # Captions

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> PromptEmbeds:
        """Encode captions by the pipeline."""
        encoder = self.pipe.text_encoder
        options = {} if self.text_length is None else {"max_sequence_length": self.text_length}
        with torch.autocast(encoder.device.type, enabled=False):  # on a GPU, it would return float32
            return self._encode(list(captions), device=encoder.device, **options)

    def empty_caption(self) -> PromptEmbeds:
        """Encode an empty caption."""
        return self.encode_captions([""])

    @abstractmethod
    def _encode(self, captions: list[str], **options: Any) -> PromptEmbeds:
        """Encode captions by the pipeline's ``encode_prompt`` with these options."""

    def blank_texts(self) -> PromptEmbeds:
        """Return embeddings of one caption without values."""
        config, length = self.module.config, self.text_length
        width = next(getattr(config, name) for name in _TEXT_WIDTHS if hasattr(config, name))
        tokens = (self.longest_text if length is None else length) + self.further_tokens
        if self.fills_texts:
            tokens = min(tokens, TYPICAL_TEXT)
        pooled = getattr(config, "pooled_projection_dim", None)
        return PromptEmbeds(
            torch.empty(1, tokens, width, device="meta"),
            None if pooled is None else torch.empty(1, pooled, device="meta"),
            (tokens,),
        )

    @property
    def caption_tokens(self) -> tuple[Any, int]:
        """The tokenizer of the text encoder that reads most of a caption, and how many of its tokens are read."""
        tokenizer = next(one for name in self.tokenizers if (one := getattr(self.pipe, name)) is not None)
        return tokenizer, min(self.text_length or self.longest_text, tokenizer.model_max_length)

    # Text

    def check_phrases(self, arguments: Mapping[str, Any], layouts: Sequence[Layout]) -> None:
        """Raise a ValueError for a phrase after the tokens that a call reads; ``arguments``: of its encode_prompt."""
        if arguments["prompt"] is not None and has_phrases(layouts):
            for layout in layouts:
                self._positions(layout, arguments["max_sequence_length"])

    def token_positions(self, layout: Layout) -> list[tuple[int, ...]]:
        """Return the positions of each phrase among the tokens of the text, however many of them a call reads."""
        return self._positions(layout, UNLIMITED)

    @abstractmethod
    def _positions(self, layout: Layout, limit: int) -> list[tuple[int, ...]]:
        """Return the same; ValueError for a phrase after the first ``limit`` tokens."""

    def without_weights(self, texts: Sequence[Text]) -> list[str]:
        """Return texts as these pipelines take them: weights are no part of them."""
        return [text if isinstance(text, str) else text.text for text in texts]


_MARK = "\x1a"  # in place of a prompt, in no template
UNLIMITED = 1 << 30  # tokens: how many of them the pipeline reads is known once it is called


def chat_positions(tokenizer: Any, layout: Layout, limit: int, **options: Any) -> list[tuple[int, ...]]:
    """Return the positions of each phrase among the tokens of a chat template, in which the prompt is the user's."""

    def templated(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    before, after = templated(_MARK).split(_MARK)
    if templated(layout.prompt) != layout.prompt.join((before, after)):
        raise ValueError(
            f"The base's chat template changes the prompt {shown(layout.prompt)}; give it without blanks around it."
        )
    return token_positions(tokenizer, layout, limit=limit, around=(before, after))


def has_phrases(layouts: Sequence[Layout]) -> bool:
    """Return whether a region of the layouts has a phrase, which is to be found in the prompt."""
    return any(region.phrase for layout in layouts for region in layout.regions)
