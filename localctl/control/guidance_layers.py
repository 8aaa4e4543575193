"""Attention layers chosen by the part of the U-Net they are in and how much coarser than the latents they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from localctl.control.attention import Site, attention_sites

_LARGE = 1 << 12  # cells on a side of latents that halve evenly on every level
_SITE = re.compile(r"(down|mid|up)(?:/(\d+))?")


def choose_sites(unet: nn.Module, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the cross-attention layers meant, in the order they run.

    ``wanted``: ``mid``, ``up/4``, ``down/2`` ...: the part of the U-Net and, unless all of it is meant, how often a
    latent's side is its cells'; None: the middle block and the first up block with cross-attention.

    ValueError for a name that is none or that the U-Net does not have.
    """
    sites = [site for site, _ in attention_sites(unet, (_LARGE, _LARGE)) if site.cross]
    if wanted is None:
        first_up = next((_block(site) for site in sites if site.name.startswith("up_")), None)
        chosen = [site for site in sites if site.name.startswith("mid_") or _block(site) == first_up]
    else:
        for name in wanted:
            if not any(_means(name, site) for site in sites):
                there = ", ".join(dict.fromkeys(_name(site) for site in sites))
                raise ValueError(f"The U-Net has no cross-attention at {name!r}; choose among {there}.")
        chosen = [site for site in sites if any(_means(name, site) for name in wanted)]
    if not chosen:
        raise ValueError("Layout guidance needs at least one site to read attention at; name some in sites.")
    return tuple(site.name for site in chosen)


def _block(site: Site) -> str:
    return ".".join(site.name.split(".")[:2])


def _name(site: Site) -> str:
    return f"{site.name.partition('_')[0]}/{_LARGE // site.size[0]}"


def _means(name: str, site: Site) -> bool:
    match = _SITE.fullmatch(name)
    return bool(match) and (name == _name(site) or name == _name(site).partition("/")[0])
