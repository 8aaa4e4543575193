"""Measure with a CLIP: embeddings of images and texts, and the CLIP score."""

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
from localctl.boxes import box_around
from localctl.files import first_line, sha256_of_folder
from localctl.layout import Layout
from localctl.messages import no_progress_bars
from localctl.metrics.per_sample import PerSample, rgb_batch
from localctl.metrics.regions import check_image
from localctl.metrics.weights import resize

_FEWEST_TOKENS = 10
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A ``CLIPModel`` with its tokenizer, from a folder or hub id, in float32 and eval mode.

    ValueError when it cannot be loaded.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        place = Path(folder)
        if not place.is_dir() and (place.is_absolute() or len(place.parts) != 2):  # not a hub id either
            raise ValueError(f"There is no CLIP at {folder}; give a folder with a CLIPModel, or a hub id.")
        try:
            # Not dtype="auto": half precision features make distances useless.
            options = {"dtype": torch.float32, "use_safetensors": True}
            with no_progress_bars() if place.is_dir() else nullcontext():  # downloads keep their progress bar
                model = CLIPModel.from_pretrained(folder, **options)
                self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        except Exception as error:  # missing, pickled, damaged and foreign files raise various types
            reason = first_line(error)
            if place.is_dir() and pickled_only(place):
                reason = "its .bin weights are pickles, which are not read; load it with transformers and save it again"
            raise ValueError(f"There is no CLIP at {folder} ({reason}); give a folder with a CLIPModel.") from error
        if len(self.tokenizer) < _FEWEST_TOKENS:  # transformers makes an empty tokenizer where it finds no file
            raise ValueError(f"The CLIP at {folder} has no tokenizer; copy tokenizer.json beside its config.json.")
        self.model = model.eval().requires_grad_(False).to(device)
        self.folder, self.device = folder, torch.device(device)
        self.side = int(self.model.config.vision_config.image_size)
        self.dim = int(self.model.config.projection_dim)
        self.mean, self.std = pixel_statistics(folder)

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights in the folder; for a hub id, the id itself."""
        return sha256_of_folder(self.folder)

    @torch.no_grad()
    def embed_images(self, images: np.ndarray | Tensor) -> Tensor:
        """Embed images (see :func:`rgb_batch`): embeddings (B, d) float32, not normalised, on the CPU."""
        return self._embed(resize(rgb_batch(images), self.side, self.device) / 255).cpu()

    def embed_pixels(self, pixels: Tensor, normalise: bool = True) -> Tensor:
        """Embed images with gradients to ``pixels``; otherwise the same as :meth:`embed_images`.

        Args:
            pixels: (B, 3, H, W) in [0, 1]; images that are not square are squeezed.
            normalise: subtract CLIP's pixel mean and divide by its standard deviation.

        Returns:
            Embeddings (B, d) float32, not normalised, on the CLIP's device.
        """
        pixels = pixels.to(self.device, torch.float32)
        size = (self.side, self.side)
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return self._embed(pixels, normalise)

    def _embed(self, pixels: Tensor, normalise: bool = True) -> Tensor:
        """Embed (B, 3, s, s) in [0, 1]: (B, d)."""
        if normalise:
            mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
            pixels = (pixels - mean) / std
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: embeddings (B, d) float32, not normalised, on the CPU.

        Longer texts are truncated to :attr:`length`. The end token stays, as the embedding is read at its position.
        """
        inputs = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return self.model.get_text_features(input_ids=inputs.input_ids.to(self.device)).pooler_output.cpu()

    @property
    def length(self) -> int:
        """The number of tokens that a text may have, including the start and end tokens."""
        return int(self.model.config.text_config.max_position_embeddings)

    def is_cut(self, text: str) -> bool:
        """Tell whether ``text`` is longer than the text encoder reads and will be truncated."""
        return len(self.tokenizer(text, verbose=False).input_ids) > self.length


def pixel_statistics(folder: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read the pixel mean and standard deviation of a CLIP's image processor; the published CLIP's where it has none.

    Only the configuration is read, because creating the processor may need torchvision.
    """
    try:
        found = ImageProcessingMixin.get_image_processor_dict(folder)[0]
    except OSError:  # the model has no processor
        found = {}
    return tuple(found.get("image_mean", CLIP_MEAN)), tuple(found.get("image_std", CLIP_STD))


class CLIPScore(PerSample):
    """100 * cosine similarity of the embeddings of an image and its caption, not clamped.

    Other tools use other scales: 2.5 * max(cos, 0) with the prefix "A photo depicts" (Hessel et al. 2021), or the mean
    clamped at 0 (torchmetrics). ``cut``: 1 where the caption was truncated for the text encoder, else 0.
    """

    columns = ("clip_score", "cut")
    higher_is_better = True

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    def update(self, images: np.ndarray | Tensor, captions: str | Sequence[str]) -> None:
        """Add images (see :func:`rgb_batch`) and one caption for each.

        ValueError when their numbers differ, when there are none, or when a caption is no text.
        """
        captions = [captions] if isinstance(captions, str) else list(captions or ())
        images = rgb_batch(images)
        if len(captions) != len(images) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"There are {len(captions)} captions for {len(images)} images; give one text for each.")
        self.add(*_scores(self.clip, images, captions))


def _scores(clip: Clip, images: np.ndarray | Tensor, captions: Sequence[str]) -> list[tuple[float, float]]:
    """Return (CLIP score, 1 where the caption was truncated) of each image."""
    pair = (clip.embed_images(images), clip.embed_texts(captions))
    cosine = F.cosine_similarity(*(x.double() for x in pair))  # (B,)
    return list(zip((100 * cosine).tolist(), (float(clip.is_cut(caption)) for caption in captions), strict=True))


class RegionCLIPScore(PerSample):
    """The CLIP score of each segment, the local CLIP score of DenseDiffusion (arXiv 2308.12964): the box around a
    region, cut out of the image, against its phrase. One row per region that has a phrase; ``cut`` as of
    :class:`CLIPScore`.
    """

    columns = CLIPScore.columns
    higher_is_better = True

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    def update(self, image: np.ndarray, layout: Layout) -> None:
        """Add the regions of one image, uint8 (H,W,3). ValueError for a layout without phrases, or one that
        hides a region."""
        check_image(image)
        masks = layout.masks(image.shape[:2])[:, 0].numpy()
        placed = [(item.phrase, mask) for item, mask in zip(layout.regions, masks, strict=True) if item.phrase]
        if not placed:
            raise ValueError("The layout has no region with a phrase to compare its image with; give one.")
        for phrase, mask in placed:
            left, top, right, bottom = map(int, box_around(mask))
            self.add(*_scores(self.clip, image[None, top:bottom, left:right], [phrase]))
