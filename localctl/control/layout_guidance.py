"""Layout guidance: move the latents along the gradient of an energy of the attention maps.

The method of arXiv 2304.03373. With A_uk the cross-attention of cell u to token k, for each head of each layer,

    E = mean over sites, heads, regions r and their tokens k of (1 - sum_{u in r} A_uk / sum_u A_uk)^2,

and up to five times before each of the first steps, in variance-exploding coordinates x = z / sqrt(abar),

    x <- x - scale * sigma^2 * grad_x E,   which is   z <- z - scale * (1 - abar) * grad_z E.

With flow matching, z = (1 - s) z0 + s eps and x = z / (1 - s), that is z <- z - scale * s^2 * grad_z E.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.control.attention import Scores
from localctl.control.base import BoundControl, CallContext, EndOfRun, RunDenoiser, check_strength
from localctl.control.regions import BoundRegionControl, BoundRegions, RegionControl
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout


@dataclass(frozen=True)
class LayoutGuidance(RegionControl):
    """Move the latents down the gradient of the energy of the regions' phrases.

    Args:
        scale: factor of the energy's gradient.
        iterations: at most this many moves before each step.
        threshold: the latents of an image are not moved (again) once its energy is at most this.
        recheck: compare the energy with the threshold anew in every step. False, as published: an image whose energy
            once reaches the threshold, also after the last move of a step, is not moved for the rest of the call.
        start, end: active in the outer steps from start up to, not including, end (fractions of the steps); by default
            the first 10 of 50. Each region's own window applies within it; its strength weights its part of the energy.
        sites: the layers whose attention gives the energy, by the part of the denoiser and how much coarser than the
            latents they are: ``mid``, ``up/4``, ``down/2`` ...; of a transformer ``early``, ``middle``, ``late`` or the
            number of a block. None: the middle block and the first up block with cross-attention; of a transformer the
            middle third. :mod:`localctl.control.presets` has the sites of the known bases.
        mask_resize: how regions are resized to each layer's grid; ``floor`` is the published form for boxes, which
            moves them by up to a cell.
        early_exit: end each run of the denoiser after the last layer that is needed.

    Raises:
        ValueError: a number out of range or an invalid window; when attached, sites that the denoiser does not have,
            weights that let no gradients pass, a scheduler that cannot be guided, or as for
            :func:`localctl.tokens.token_positions`.
    """

    scale: float = 30.0
    iterations: int = 5
    threshold: float = 0.2
    start: float = 0.0
    end: float = 0.2
    sites: tuple[str, ...] | None = None
    mask_resize: str = "area"
    early_exit: bool = True
    recheck: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "threshold"):
            check_strength(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"The {name} of LayoutGuidance must be at least 0, not {getattr(self, name)}.")
        if not isinstance(self.iterations, int) or self.iterations < 0:
            raise ValueError(
                f"The iterations of LayoutGuidance must be a whole number from 0, not {self.iterations!r}."
            )

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        regions = BoundRegions(pipe, layouts, self.mask_resize)
        return BoundGuidance(self, regions, regions.denoiser.choose_layers(self.sites))


class BoundGuidance(BoundRegionControl[LayoutGuidance]):
    moves_latents = True
    takes_gradients = True

    def __init__(self, control: LayoutGuidance, regions: BoundRegions, layers: Sequence[str]) -> None:
        super().__init__(control, regions)
        self.layers = tuple(layers)
        self._done: set[int] = set()  # images that are not moved for the rest of this call

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        super().begin_call(arguments)
        self._done = set()

    def shift_latents(self, context: CallContext, latents: Tensor, run: RunDenoiser) -> Tensor | None:
        control = self.control
        if not self.within(context) or not control.scale:
            return None
        wanted = [row for row, layout in enumerate(context.guided_layouts) if any(self.weights(layout, context))]
        left = [row for row in wanted if row not in self._done]
        # x -= scale * sigma^2 * grad_x, in the coordinates of the denoiser's input
        size = control.scale * context.sigma**2 / context.growth
        moved, any_move = latents.clone(), False
        for _ in range(control.iterations):
            if not left:
                break
            gradient, left = self._gradient(moved, left, run)
            if left:
                every = len(left) == len(moved)  # indices would be one more copy to the device
                moved[slice(None) if every else left] -= size * gradient
                any_move = True
            left = [row for row in left if row not in self._done]
        return moved - latents if any_move else None

    def _gradient(self, latents: Tensor, images: Sequence[int], run: RunDenoiser) -> tuple[Tensor, list[int]]:
        """Return the energy's gradient (m, c, h, w) for the images to move, and their numbers.

        These are the images above the threshold; without ``recheck`` also, once more, those that have just reached it.
        """
        with torch.inference_mode(False):
            point = latents[list(images)].detach().requires_grad_()
        reader = EnergyReader(self)
        with run(point, images, reader):
            energy = reader.energy()  # (m,)
            if self.control.recheck and not bool(((energy > self.control.threshold) | energy.isnan()).any()):
                return point.detach()[:0], []
            # Scaling the energy keeps more digits of the gradient in half precision.
            scale = max(self.control.scale, 1.0)
            gradient = torch.autograd.grad(energy.sum() * scale, point)[0].float() / scale
        is_finite = energy.isfinite() & gradient.flatten(1).isfinite().all(dim=1)
        # Read at once: each reading waits for the GPU.
        finite, above = torch.stack([is_finite, energy > self.control.threshold]).tolist()
        lost = [image for image, good in zip(images, finite, strict=True) if not good]
        if lost:
            warnings.warn(
                f"Layout guidance skipped a move of image {', '.join(map(str, lost))} of this batch because the "
                "gradient is not finite; try float32 or a smaller scale.",
                RuntimeWarning,
                stacklevel=2,
            )
        if not self.control.recheck:
            reached = zip(images, finite, above, strict=True)
            self._done |= {image for image, good, high in reached if good and not high}
            above = [True] * len(images)
        chosen = [row for row, good in enumerate(finite) if good and above[row]]
        moved = gradient if len(chosen) == len(images) else gradient[chosen]
        return moved, [images[row] for row in chosen]

    def weights(self, layout: int, context: CallContext) -> tuple[float, ...]:
        """Return the weight of each region's energy in this step: its strength / (number of active regions)."""
        active = self.regions.phrase_strengths(layout, context)
        count = sum(bool(strength) for strength in active)
        return tuple(strength / max(1, count) for strength in active)


class EnergyReader(BoundControl):
    """Computes the energy over the layers of one run of the denoiser, and ends the run after the last one."""

    def __init__(self, guidance: BoundGuidance) -> None:
        self.guidance = guidance
        # By layer, for each part of its queries: the attention inside the regions and everywhere.
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._energies: dict[str, Tensor] = {}

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        return layer.cross and layer.name in self.guidance.layers

    def read_attention(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice, bias: Tensor | None
    ) -> None:
        # Under gradient checkpointing, layers run twice. The second run must compute the same but must not be counted.
        again = layer.name in self._energies
        regions, keys = self.guidance.regions, scores.keys
        masks = regions.per_row(context, ("masks", layer.size), lambda layout: self._masks(layout, layer))  # (n,r,Q)
        assert masks is not None
        probabilities = scores.probabilities(queries, bias)  # (n,H,q,K)
        inside = masks[:, None, :, queries] @ probabilities  # (n,H,r,K)
        everywhere = probabilities.sum(dim=2, keepdim=True)  # (n,H,1,K)
        parts = self._parts.setdefault(layer.name, [])
        parts.append((inside, everywhere))
        if queries.stop is not None and queries.stop < layer.cells:
            return
        del self._parts[layer.name]
        inside, everywhere = (torch.stack(column).sum(dim=0) for column in zip(*parts, strict=True))
        weights = self._weights(context, keys)
        # Where attention is sharp, that to some tokens is 0 everywhere, and 0 / 0 would spoil the sum even at weight 0.
        everywhere = everywhere.clamp_min(torch.finfo(everywhere.dtype).tiny)
        energy = ((1 - inside / everywhere).square().mean(dim=1) * weights).sum(dim=(1, 2))  # (n,)
        if not again:
            self._energies[layer.name] = energy
            if self.guidance.control.early_exit and len(self._energies) == len(self.guidance.layers):
                raise EndOfRun

    def energy(self) -> Tensor:
        """Return the energy (n,) of each image, the mean over the layers."""
        assert len(self._energies) == len(self.guidance.layers)
        return torch.stack(list(self._energies.values())).mean(dim=0)

    def _masks(self, layout: int, layer: AttentionLayer) -> Tensor:
        """Return the regions' masks (r,Q); r: the largest number of regions of a layout."""
        regions = self.guidance.regions
        masks = torch.zeros(regions.most, layer.cells)
        own = regions.masks(layout, layer)
        masks[: len(own)] = own
        return masks

    def _weights(self, context: CallContext, keys: int) -> Tensor:
        """Return the weight (n,r,K) of each region's and token's part of the energy; tokens share a region's weight."""
        regions = self.guidance.regions
        active = tuple(self.guidance.weights(layout, context) for layout in context.guided_layouts)

        def make(layout: int) -> Tensor:
            weights = torch.zeros(regions.most, keys)
            for index, weight in enumerate(self.guidance.weights(layout, context)):
                tokens = regions.tokens(layout, index, keys)
                weights[index, tokens] = weight / max(1, len(tokens))
            return weights

        result = regions.per_row(context, ("weights", keys, active), make)
        assert result is not None
        return result
