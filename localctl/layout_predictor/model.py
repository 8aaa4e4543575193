"""The layout predictor: a small transformer from the words of a prompt to a density over each object's place and size.

As in arXiv 2304.03869, the centre of each object has a Gaussian mixture, here over (x, y) in [0, 1]; the box size is
log-normal. Objects are placed one after the other, and the boxes already placed are part of the input, so that a
layout is sampled from the joint density p(layout) = prod_i p(object i | prompt, objects before i).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from localctl.files import first_line
from localctl.layout import Layout, Region
from localctl.layout_predictor.arranging import arrange, box_sizes
from localctl.layout_predictor.encoding import Encoded, encode
from localctl.layout_predictor.parsing import PromptObject, parse
from localctl.layout_predictor.placing import PlaceDensity, Placement, place
from localctl.layout_predictor.reading import read
from localctl.seeding import generator
from localctl.sizes import check_side, shown

WEIGHTS = Path(__file__).parent / "weights"
_SMALLEST_SIGMA = 0.02  # of the image's side
_MOST_OBJECTS = 32
_VARIED = 0.7  # a sampled size is at least e^-0.7 of the likeliest one
_LARGEST, _MOST_LAYERS, _MOST_WEIGHTS = 1_000_000, 64, 100_000_000  # the packaged one has 4 layers and 7e5 weights


class _Block(nn.Module):
    """Pre-norm self-attention with a learned bias per head and distance between words, then an MLP."""

    def __init__(self, width: int, heads: int, hidden: int, reach: int) -> None:
        super().__init__()
        self.heads, self.reach = heads, reach
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.distance = nn.Parameter(_initial_bias(heads, reach))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Apply the block: x (B, L, width), words (B, L) bool -> (B, L, width)."""
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm_1(x)).reshape(shape).permute(2, 0, 3, 1, 4)  # (B,heads,L,width/heads)
        place = torch.arange(length, device=x.device)
        distance = (place[None] - place[:, None]).clamp(-self.reach, self.reach) + self.reach
        bias = self.distance[:, distance].to(q.dtype)  # (heads,L,L)
        bias = bias.masked_fill(~words[:, None, None], -torch.inf)  # (B,heads,L,L)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


def _initial_bias(heads: int, reach: int) -> Tensor:
    """Return the initial bias (heads, 2 reach + 1): half of the heads attend to earlier words, half to later ones, at
    different ranges. Without it, training needs thousands of steps to learn on which side of a word another one is."""
    distance = torch.arange(-reach, reach + 1).float()
    bias = torch.empty(heads, 2 * reach + 1)
    for head in range(heads):
        side = -1.0 if head % 2 else 1.0
        slope = 0.6 * 0.4 ** (head // 2)
        bias[head] = -slope * distance.abs() - 3.0 * (side * distance < 0)
    return bias


class LayoutPredictor(ModelMixin, ConfigMixin):
    """Predicts a :class:`PlaceDensity` from the words of prompts and the spans of their objects.

    Args:
        width, layers, heads, hidden: sizes of the transformer.
        buckets: number of buckets for the pieces of words (see ``encoding``).
        components: number K of Gaussians in the mixture of each centre.
        max_words: length of the longest prompt, including punctuation marks.
        reach: largest distance between two words with a bias of its own; longer distances share it.
        trained_on: name of the training data, for the record.
        sizes: width and height by noun, as shares of the image's sides, as measured in the training data; None = none.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        width: int = 96,
        layers: int = 4,
        heads: int = 4,
        hidden: int = 192,
        buckets: int = 4096,
        components: int = 6,
        max_words: int = 128,
        reach: int = 12,
        trained_on: str | None = None,
        sizes: dict[str, list[float]] | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(
            width=width,
            layers=layers,
            heads=heads,
            hidden=hidden,
            buckets=buckets,
            components=components,
            max_words=max_words,
            reach=reach,
        )
        _check_noun_sizes(sizes)
        if width % heads:
            raise ValueError(f"The width {width} is not a multiple of the {heads} heads; choose another.")
        self.pieces = nn.Embedding(buckets, width, padding_idx=0)
        self.role = nn.Embedding(2, width)  # whether a word is outside or inside the phrase of an object
        self.known = nn.Linear(5, width)  # centre, size, and whether they are known
        self.blocks = nn.ModuleList(_Block(width, heads, hidden, reach) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, components * 5 + 4)
        self._initialise(components)

    @torch.no_grad()
    def _initialise(self, components: int) -> None:
        """Initialise with larger weights than torch's defaults, with which training needs thousands of steps until
        prepositions have an effect."""
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        nn.init.normal_(self.pieces.weight)
        nn.init.normal_(self.role.weight, std=0.1)
        self.pieces.weight[0] = 0
        self.head.weight.mul_(0.3)
        self.head.bias.copy_(self._initial_density(components))

    @staticmethod
    def _initial_density(components: int) -> Tensor:
        """Return a bias of the head for a uniform mixture spread over the image, and boxes of a third of its side."""
        angle = torch.arange(components) * (2 * math.pi / components)
        means = torch.stack([angle.cos(), angle.sin()], dim=-1)
        parts = [torch.zeros(components), means.flatten(), torch.full((2 * components,), -1.5)]
        return torch.cat([*parts, torch.full((2,), math.log(0.3)), torch.full((2,), -1.0)])

    def forward(self, text: Encoded, boxes: Tensor, known: Tensor) -> PlaceDensity:
        """Predict the densities of all objects, given the boxes that are known.

        Args:
            text: B prompts with up to N objects, see ``encoding``.
            boxes: (B, N, 4) centre x, y, width, height in [0, 1]; arbitrary where not known.
            known: (B, N) bool, whether an object is placed already.
        """
        inside = text.owner >= 0
        owner = text.owner.clamp(min=0)
        counts = (text.pieces > 0).sum(dim=-1, keepdim=True).clamp(min=1)
        x = self.pieces(text.pieces).sum(dim=2) / counts.sqrt() + self.role(inside.long())  # (B,L,width)
        given = torch.cat([boxes * 2 - 1, torch.ones_like(boxes[..., :1])], dim=-1) * known[..., None]  # (B,N,5)
        given = torch.gather(given, 1, owner[..., None].expand(-1, -1, 5)) * inside[..., None]
        x = x + self.known(given.to(x.dtype))
        for block in self.blocks:
            x = block(x, text.words)
        x = self.norm(x)
        members = F.one_hot(owner, known.shape[1]).to(x.dtype) * inside[..., None]  # (B,L,N)
        members = members / members.sum(dim=1, keepdim=True).clamp(min=1)
        return self._density(self.head(torch.einsum("bln,blw->bnw", members, x)))

    def _density(self, raw: Tensor) -> PlaceDensity:
        k = self.config["components"]
        weights, means, sigmas, size, size_sigma = raw.float().split([k, 2 * k, 2 * k, 2, 2], dim=-1)
        shape = (*raw.shape[:-1], k, 2)
        return PlaceDensity(
            weights.log_softmax(dim=-1),
            means.reshape(shape).sigmoid(),
            F.softplus(sigmas.reshape(shape)) + _SMALLEST_SIGMA,
            size,
            F.softplus(size_sigma) + _SMALLEST_SIGMA,
        )

    def encode(self, prompts: list[str], spans: list[list[tuple[int, int]]]) -> Encoded:
        """Encode prompts for :meth:`forward`; ``spans``: the [first, last) characters of the objects of each."""
        return encode(prompts, spans, self.config["buckets"], self.config["max_words"])

    @torch.no_grad()
    def place_objects(
        self, prompt: str, objects: tuple[PromptObject, ...], seed: int | None = None
    ) -> list[list[Placement]]:
        """Return the boxes of each object, ``count`` of them; see :meth:`predict`. ValueError for too many objects."""
        total = sum(item.count for item in objects)
        if total > _MOST_OBJECTS:
            raise ValueError(f"The prompt has {total} objects, more than {_MOST_OBJECTS}; name fewer.")
        text = self.encode([prompt], [[item.span for item in objects]]).to(self.device)
        boxes = torch.zeros(1, len(objects), 4, device=self.device)
        known = torch.zeros(1, len(objects), dtype=torch.bool, device=self.device)
        likeliest = self(text, boxes, known).of(0)
        plan = arrange(objects, read(prompt, objects), box_sizes(objects, likeliest, self.config["sizes"]))
        if seed is not None:
            noise = torch.randn(len(plan.sides), 2, generator=generator(seed, "layout sizes", prompt))
            plan.sides = plan.sides * (likeliest.log_size_sigma[plan.owners] * noise).clamp(-_VARIED, 0).exp()
        placed: list[Placement] = []
        for index, item in enumerate(objects):
            density = self(text, boxes, known).of(0, index)
            first = len(placed)
            for copy in range(item.count):
                frame = plan.frame(placed)
                box, placed = place(density, placed, None if seed is None else (seed, prompt, index, copy), frame)
                placed.append(box)
            # Condition the next objects as in training: on one box per object, before it was shrunk.
            boxes[0, index] = torch.tensor([placed[first].x, placed[first].y, *plan.sides[first].tolist()])
            known[0, index] = True
        owners = plan.owners
        return [
            [box for box, owner in zip(placed, owners, strict=True) if owner == index] for index in range(len(objects))
        ]

    def predict(
        self,
        prompt: str,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        chunker: str = "auto",
    ) -> Layout:
        """Predict the layout of ``prompt``: a region for each object, with as many boxes as it has copies ("two dogs").

        Boxes lie inside the image and do not overlap.

        Args:
            seed: None = the most likely box of each object in turn; else a layout sampled with this seed.
            height, width: of the layout in pixels, multiples of 8.
            chunker: as for :func:`localctl.layout_predictor.parse`.

        Raises:
            ValueError: a prompt without objects, with too many of them, or too long; an invalid height or width.
        """
        for name, side in (("height", height), ("width", width)):
            check_side(name, side)
        objects = parse(prompt, chunker)
        placed = self.place_objects(prompt, objects, seed)
        regions = tuple(
            Region(item.phrase, box=[box.corners for box in own], occurrence=item.occurrence, prompt=item.description)
            for item, own in zip(objects, placed, strict=True)
        )
        return Layout(prompt, height, width, regions)


def _check_sizes(**sizes: Any) -> None:
    """Raise a ValueError for invalid or huge sizes, before memory is allocated: a config may come from anywhere."""
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise ValueError(
                f"{name} of a layout predictor must be a whole number from 1 to {_LARGEST}, not {shown(value)}."
            )
    blocks = sizes["layers"] * (4 * sizes["width"] + 2 * sizes["hidden"] + sizes["heads"] * 2 * sizes["reach"])
    weights = sizes["width"] * (sizes["buckets"] + blocks + 5 * sizes["components"])
    if weights > _MOST_WEIGHTS or sizes["layers"] > _MOST_LAYERS:
        raise ValueError(
            f"A layout predictor of {sizes} has too many weights (about {weights:.1e}); use a smaller one."
        )


def _check_noun_sizes(sizes: Any) -> None:
    """Raise a ValueError unless ``sizes`` is None or holds a width and height in (0, 1] by noun."""
    pairs = sizes.values() if isinstance(sizes, dict) else () if sizes is None else (sizes,)
    for pair in pairs:
        numbers = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(x) in (int, float) for x in pair)
        if not numbers or not all(0 < x <= 1 for x in pair):
            raise ValueError(f"sizes of a layout predictor must be widths and heights in (0, 1], not {shown(pair)}.")


def load_predictor(place_of_weights: str | Path | None = None) -> LayoutPredictor:
    """Load a trained predictor in float32 and eval mode: the packaged one, or that of a folder or hub id.

    ValueError when it does not exist or is damaged.
    """
    source = WEIGHTS if place_of_weights is None else Path(place_of_weights).expanduser()
    if (source / "predictor").is_dir():  # the folder of a training run
        source = source / "predictor"
    is_hub_id = not source.exists() and not source.is_absolute() and len(source.parts) == 2
    if not (source / "config.json").is_file() and not is_hub_id:
        raise ValueError(f"There is no layout predictor in {source}; give the folder that training saved.")
    try:
        found, report = LayoutPredictor.from_pretrained(
            str(source), torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
            raise ValueError("its weights do not fit its config.json")
        if not all(bool(weights.isfinite().all()) for weights in found.parameters()):
            raise ValueError("its weights hold NaN or infinity")
    except Exception as error:  # missing or cut files and foreign shapes each raise their own kind
        reason = first_line(error)
        raise ValueError(f"The layout predictor in {source} cannot be loaded ({reason}); save it again.") from error
    return found.eval().requires_grad_(False)
