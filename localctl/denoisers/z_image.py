"""The transformer of Z-Image (diffusers' ``ZImageTransformer2DModel``)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from localctl.denoisers.base import (
    RESIDUALS,
    Arguments,
    AttentionLayer,
    Changes,
    Conditioning,
    DenoiserInputs,
    add_residuals,
    check_changes,
)
from localctl.denoisers.configs import Guidance
from localctl.denoisers.joint import Joint, check_dispatch, dispatched
from localctl.denoisers.trained import Original
from localctl.denoisers.transformer import Transformer, chat_positions
from localctl.denoisers.two_calls import noted
from localctl.layout import Layout
from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_weights import Text

_SCALE = 1000  # of the scheduler's timesteps
_MULTIPLE = 32  # tokens of image and text are filled up to
_LENGTHS = "localctl_lengths"  # of the texts, among the arguments of a call


class ZImage(Transformer):
    """Blocks of one stream, image first; the text is Qwen3's, within its chat template.

    The module takes a list of images and one of texts, with guidance first those of the prompts, then those of the
    negative prompts. Controls see tensors of all rows: :meth:`write` makes them, and :meth:`running` the lists again.
    """

    name = "Z-Image transformer"
    classes = ("ZImageTransformer2DModel",)
    order = ("x", "t", "cap_feats")
    block_lists: ClassVar = ("layers",)
    image_output = None
    latents_of_token, latents_of_side = 2, 128
    encodes_always = False
    fills_texts = True
    guides_in_one_call = False  # it adds its scale times the difference to the output with the prompt

    def __init__(self, module: Any, pipe: Any = None) -> None:
        super().__init__(module, pipe)
        self._images = 0  # of the running call of the pipeline

    @classmethod
    def guidance(cls, config: Mapping[str, Any], index: Mapping[str, Any]) -> Guidance:
        """Return that of these pipelines, which is on above 0; bases in few steps are made for 0."""
        return Guidance(5.0, above=0.0)

    @classmethod
    def text_limit(cls, config: Mapping[str, Any]) -> int | None:
        """Return how many filled up tokens there are places for, before the one of the image."""
        places = config.get("axes_lens", (1024,))[0]  # the default of the transformer's class
        return (places - 2) // _MULTIPLE * _MULTIPLE

    # Layers and grids

    @property
    def width(self) -> int:
        """The channels of a token between the blocks."""
        return self.module.dim  # type: ignore[return-value]

    def attention_layers(self, latent_size: tuple[int, int]) -> list[tuple[AttentionLayer, Any]]:
        """Return the joint attention of each block; not those that refine image and text by themselves before."""
        size, joint = self.grid(latent_size), Joint(dispatched, text_first=False, multiple=_MULTIPLE)
        return [
            (AttentionLayer(f"{name}.attention", True, size, joint), block.attention) for name, block in self.blocks
        ]

    def check_attention(self) -> None:
        """Raise a ValueError for a processor, or a backend, that takes no bias."""
        for name, block in self.blocks:
            check_dispatch(block.attention, f"The attention {name}.attention of the {self.name}")

    # One call

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which the number of images of a call is noted, by a wrapper of ``prepare_latents``."""
        signature = inspect.signature(self.pipe.prepare_latents)

        def note(*args: Any, **kwargs: Any) -> None:
            self._images = signature.bind(*args, **kwargs).arguments["batch_size"]

        with noted(self.pipe, "prepare_latents", note):
            yield

    def begins_call(self) -> bool:
        self._images = 0
        return True

    def copied(self, layouts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the layout of each image: this pipeline copies the prompts after their encoding."""
        copies = max(1, self._images // len(layouts))
        return tuple(layout for layout in layouts for _ in range(copies))

    def conditional(self, rows: int, images: int) -> tuple[bool, ...]:
        """Return for each row whether it carries the prompt; with guidance, these come first."""
        if rows not in (images, 2 * images):
            raise self.wrong_rows(rows, images)
        return (True,) * images + (False,) * (rows - images)

    def has_negative(self, conditional: Sequence[bool]) -> bool:
        """Return whether the call of the pipeline has a negative prompt, also in steps where it is left out."""
        return super().has_negative(conditional) or bool(getattr(self.pipe, "do_classifier_free_guidance", False))

    def _opened(self, arguments: Arguments) -> dict[str, Any]:
        """Return the arguments by name, with tensors of all rows in place of lists."""
        args, kwargs = arguments
        named = {**dict(zip(self.order, args, strict=False)), **kwargs}
        if isinstance(named["x"], Tensor):
            return named
        if isinstance(named["x"][0], list):
            raise ValueError(
                "The Z-Image transformer was called with further images (ZImageOmniPipeline's), among which controls "
                "cannot locate regions; use a pipeline that generates from text."
            )
        named["x"] = torch.stack(named["x"]).squeeze(2)
        named[_LENGTHS] = torch.tensor([len(text) for text in named["cap_feats"]])
        named["cap_feats"] = pad_sequence(named["cap_feats"], batch_first=True)
        return named

    @contextmanager
    def running(self, arguments: Arguments) -> Iterator[Arguments]:
        """Context of one run, with lists again."""
        with super().running(arguments) as (args, kwargs):
            if isinstance(kwargs.get("x"), Tensor):
                lengths = kwargs.pop(_LENGTHS).tolist()
                texts = [text[:length] for text, length in zip(kwargs["cap_feats"], lengths, strict=True)]
                kwargs = {**kwargs, "x": list(kwargs["x"].unsqueeze(2).unbind()), "cap_feats": texts}
            yield args, kwargs

    def add_tokens(self, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        """Return ``hidden_states`` (R, S, c), whose first entries are the image's, with ``tokens`` (R, Q, c) added."""
        return hidden_states + pad(tokens, (0, 0, 0, hidden_states.shape[1] - tokens.shape[1]))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserInputs:
        """Return the inputs, with the timestep of the scheduler."""
        named = self._opened((args, dict(kwargs)))
        return DenoiserInputs(named["x"], named["x"], _SCALE - _SCALE * named["t"], named["cap_feats"], {})

    def write(self, arguments: Arguments, **changes: Unpack[Changes]) -> Arguments:
        """Return the changed arguments, by name and as tensors of all rows."""
        check_changes(changes)
        assert changes.get("skips") is None and changes.get("images") is None, "refused when controls are bound"
        named = dict(self._opened(arguments))
        if (latents := changes.get("latents")) is not None:
            named["x"] = latents.to(named["x"].dtype)
        if (text := changes.get("text")) is not None:
            named["cap_feats"] = text
        if (residuals := changes.get("residuals")) is not None:
            named[RESIDUALS] = add_residuals(named.get(RESIDUALS), residuals)
        return (), named

    def join_texts(self, arguments: Arguments, texts: Tensor, hidden: Tensor | None) -> Arguments:
        """Return the arguments with texts of any length."""
        _, named = self.write(arguments)
        count, (pairs, keys, _) = len(named["cap_feats"]) - len(texts), texts.shape
        own = named["cap_feats"][:count]
        joined = pad_sequence([*own, *texts.to(own)], batch_first=True)
        lengths = torch.full((pairs,), keys) if hidden is None else (hidden[:, 0] == 0).sum(dim=1).cpu()
        return (), {**named, "cap_feats": joined, _LENGTHS: torch.cat([named[_LENGTHS][:count], lengths])}

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the model output, by the guidance of these pipelines."""
        rows = torch.cat([latents] * len(conditioning.text))
        positive, *negative = self.output(rows, timestep.expand(len(rows)), conditioning).chunk(len(rows))
        return positive + conditioning.guidance_scale * (positive - negative[0]) if negative else positive

    def output(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the model output (R, c, h, w), as other transformers do; the module's own is its negative."""
        given = {"x": noisy, "t": 1 - timesteps / _SCALE, "cap_feats": conditioning.text, "return_dict": False}
        arguments = self.write(
            ((), {**given, **(conditioning.added or {})}), residuals=None if features is None else self.placed(features)
        )
        with self.running(arguments) as (args, kwargs):
            return -torch.stack(self.module(*args, **kwargs)[0]).squeeze(2)

    # Text

    def check_call(self, arguments: Mapping[str, Any], layouts: Sequence[Layout]) -> None:
        """Raise a ValueError for a phrase after the tokens that the call reads."""
        self.check_phrases(arguments, layouts)

    def _positions(self, layout: Layout, limit: int) -> list[tuple[int, ...]]:
        return chat_positions(self.pipe.tokenizer, layout, limit, enable_thinking=True)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Return the embeddings (K, C) of each text, without padding."""
        options = {name: arguments[name] for name in ("device", "max_sequence_length")}
        plain = self.without_weights(texts)
        return type(self.pipe).encode_prompt(self.pipe, plain, do_classifier_free_guidance=False, **options)[0]

    def _encode(self, captions: list[str], **options: Any) -> PromptEmbeds:
        found, _ = self.pipe.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return PromptEmbeds(pad_sequence(found, batch_first=True), lengths=tuple(map(len, found)))

    def conditioning(
        self, texts: PromptEmbeds, size: tuple[int, int], originals: Sequence[Original | None]
    ) -> Conditioning:
        """Return the inputs, with the lengths of the texts."""
        return Conditioning(texts.states, {_LENGTHS: torch.tensor(texts.lengths)}, 1.0)

    @torch.no_grad()
    def condition(
        self, prompt: str, size: tuple[int, int], guidance_scale: float, negative_prompt: str | None
    ) -> Conditioning:
        """Return the conditioning, the row of the prompt first. There is guidance above 0."""
        own, negative = self.pipe.encode_prompt(
            prompt, self.module.device, guidance_scale > 0, negative_prompt=negative_prompt
        )
        texts = [*own, *negative]
        lengths = torch.tensor([len(text) for text in texts])
        return Conditioning(pad_sequence(texts, batch_first=True), {_LENGTHS: lengths}, guidance_scale)
