"""What training needs of a denoiser: captions encoded as its pipeline does, and its output without a pipeline.

Symbols in shapes: R rows of a batch, K tokens, c latent channels, (h, w) the latents' grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from localctl.prompt_embeds import PromptEmbeds

Original = tuple[int, int, int, int]  # height and width of an image before its crop, top and left of the crop
TYPICAL_TEXT = 128  # tokens of a caption
DISTILLED_GUIDANCE = 3.5  # of images of FLUX.1 dev, as its authors suggest


@dataclass(frozen=True)
class Conditioning:
    """The inputs of the denoiser other than latents and timestep.

    text: prompt embeddings (R, K, C), with guidance the negative prompt's row first. added: further inputs by name (of
    SDXL's U-Net, or the arguments of a transformer), or None. guidance_scale: of classifier-free guidance; there is
    guidance above 1.
    """

    text: Tensor
    added: dict[str, Any] | None
    guidance_scale: float

    @property
    def guided(self) -> bool:
        """Return whether there is a row of the negative prompt."""
        return self.guidance_scale > 1

    def combined(self, output: Tensor) -> Tensor:
        """Return the model output after guidance for that of the rows."""
        if not self.guided:
            return output
        negative, positive = output.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def rows(self, rows: slice) -> Conditioning:
        """Return the inputs of some rows."""
        return Conditioning(self.text[rows], self.added and _rows_of(self.added, rows), self.guidance_scale)


def _rows_of(named: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Return inputs by name, nested or not, for some rows of the batch."""
    return {
        name: _rows_of(value, rows) if isinstance(value, dict) else value[rows] if isinstance(value, Tensor) else value
        for name, value in named.items()
    }


class Trained(ABC):
    """The part of a denoiser's protocol that training uses; gradients pass through :meth:`output`.

    text_length: the most tokens of a caption that are read; None = as many as by default. distilled_guidance: the
    guidance scale that is an input of the network, for bases that have one.
    """

    in_halves: ClassVar[bool] = True  # whether two threads may run the network at once
    by_flow: ClassVar[bool] = False  # whether bases of this family are trained by flow matching
    text_length: int | None = None
    distilled_guidance: float = DISTILLED_GUIDANCE

    @abstractmethod
    def encode_captions(self, captions: Sequence[str]) -> PromptEmbeds:
        """Encode captions, none of them empty, as the pipeline encodes prompts.

        A row depends neither on the others nor on its place, as long as their number is the same. The ends of captions
        that are too long are cut off silently.
        """

    @abstractmethod
    def empty_caption(self) -> PromptEmbeds:
        """Encode an empty caption, one row, as the pipeline encodes an empty negative prompt."""

    @property
    @abstractmethod
    def caption_tokens(self) -> tuple[Any, int]:
        """The tokenizer by which captions are cut, and how many of its tokens are read."""

    @abstractmethod
    def blank_texts(self) -> PromptEmbeds:
        """Return embeddings of one caption, without values on the meta device: of the length that a call reads, or
        where that is the caption's own, of ``TYPICAL_TEXT`` tokens."""

    @abstractmethod
    def conditioning(
        self, texts: PromptEmbeds, size: tuple[int, int], originals: Sequence[Original | None]
    ) -> Conditioning:
        """Return the inputs for images of ``size`` = (H, W) with these captions, without guidance.

        originals: where each image was cropped from; None where that is not known.
        """

    @abstractmethod
    def output(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, features: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return the model output (R, c, h, w) without guidance, for ``noisy`` (R, c, h, w) at the times ``timesteps``
        (R,), with the ``features`` of an adapter."""

    def times(self, timesteps: Tensor, table: Tensor) -> Tensor:
        """Return what the module takes as the times of ``timesteps`` (R,) int64, by the ``table`` (T,) of the noise."""
        return timesteps
