"""A CLIP as a measuring instrument: embeddings of images and texts, and the CLIP score."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from localctl.bases import pickled_only
from localctl.files import first_line
from localctl.metrics.per_sample import PerSample, rgb_batch
from localctl.metrics.weights import resize, sha256_of_folder
from localctl.quiet import no_progress_bars

_FEWEST_TOKENS = 10
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A ``CLIPModel`` folder or hub id with its tokenizer, in float32 and eval mode.

    ValueError when it cannot be loaded.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        place = Path(folder)
        if not place.is_dir() and (place.is_absolute() or len(place.parts) != 2):  # nor a hub id to be looked up
            raise ValueError(f"There is no CLIP at {folder}; give a folder with a CLIPModel, or a hub id.")
        try:
            # Not dtype="auto": half precision features make distances useless.
            options = {"dtype": torch.float32, "use_safetensors": True}
            with no_progress_bars() if place.is_dir() else nullcontext():  # a download shows how far it is
                model = CLIPModel.from_pretrained(folder, **options)
                self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        except Exception as error:  # missing, pickled, damaged and foreign files each raise their own kind
            reason = first_line(error)
            if place.is_dir() and pickled_only(place):
                reason = "its .bin weights are pickles, which are not read; load it with transformers and save it again"
            raise ValueError(f"There is no CLIP at {folder} ({reason}); give a folder with a CLIPModel.") from error
        if len(self.tokenizer) < _FEWEST_TOKENS:  # transformers makes an empty one where nothing is found
            raise ValueError(f"The CLIP at {folder} has no tokenizer; copy tokenizer.json beside its config.json.")
        self.model = model.eval().requires_grad_(False).to(device)
        self.folder, self.device = folder, torch.device(device)
        self.side = int(self.model.config.vision_config.image_size)
        self.dim = int(self.model.config.projection_dim)
        self.mean, self.std = pixel_statistics(folder)

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights in the folder; the id where they are not in one."""
        return sha256_of_folder(self.folder)

    @torch.no_grad()
    def embed_images(self, images: np.ndarray | Tensor) -> Tensor:
        """Embed images as for :func:`rgb_batch` -> embeddings (B, d) float32, not normalised, on the CPU."""
        return self._embed(resize(rgb_batch(images), self.side, self.device) / 255).cpu()

    def embed_pixels(self, pixels: Tensor, normalise: bool = True) -> Tensor:
        """Embed (B, 3, H, W) in [0, 1] -> embeddings (B, d) float32, not normalised, where the CLIP is: the same as
        :meth:`embed_images`, with gradients to ``pixels``. What is not square is squeezed. normalise: take mean and
        deviation off, as CLIP was trained."""
        pixels = pixels.to(self.device, torch.float32)
        size = (self.side, self.side)
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return self._embed(pixels, normalise)

    def _embed(self, pixels: Tensor, normalise: bool = True) -> Tensor:
        """(B, 3, s, s) in [0, 1] -> (B, d)."""
        if normalise:
            mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
            pixels = (pixels - mean) / std
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts -> embeddings (B, d) float32, not normalised. What exceeds the text encoder's length is cut
        before the end token, which stays: CLIP reads its embedding there."""
        inputs = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return self.model.get_text_features(input_ids=inputs.input_ids.to(self.device)).pooler_output.cpu()

    @property
    def length(self) -> int:
        """How many tokens a text may have, with its start and end."""
        return int(self.model.config.text_config.max_position_embeddings)

    def is_cut(self, text: str) -> bool:
        """Tell whether ``text`` is longer than the text encoder reads."""
        return len(self.tokenizer(text, verbose=False).input_ids) > self.length


def pixel_statistics(folder: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and standard deviation that a CLIP's image processor takes off; CLIP's own where it has none. The
    folder or hub id is only read: no processor, which may need torchvision, is made."""
    try:
        found = ImageProcessingMixin.get_image_processor_dict(folder)[0]
    except OSError:  # no processor is kept beside the model
        found = {}
    return tuple(found.get("image_mean", CLIP_MEAN)), tuple(found.get("image_std", CLIP_STD))


class CLIPScore(PerSample):
    """100 * cosine of an image's and its caption's embeddings, with no clamp.

    Other tools print other scales: 2.5 * max(cos, 0) with the prefix "A photo depicts" (Hessel et al. 2021), or the
    mean clamped at 0 (torchmetrics). ``cut``: 1 where the caption was longer than the text encoder reads, as a share.
    """

    columns = ("clip_score", "cut")
    higher_is_better = True

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    def update(self, images: np.ndarray | Tensor, captions: str | Sequence[str]) -> None:
        """Add images as for :func:`rgb_batch`, and a caption for each. ValueError when they do not match, for captions
        that are no texts, and for none."""
        captions = [captions] if isinstance(captions, str) else list(captions or ())
        images = rgb_batch(images)
        if len(captions) != len(images) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"There are {len(captions)} captions for {len(images)} images; give one text for each.")
        pair = (self.clip.embed_images(images), self.clip.embed_texts(captions))
        cosine = torch.nn.functional.cosine_similarity(*(x.double() for x in pair))  # (B,)
        cut = [float(self.clip.is_cut(caption)) for caption in captions]
        self.add(*zip((100 * cosine).tolist(), cut, strict=True))
