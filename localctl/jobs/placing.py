"""Addons on the base while jobs run: loaded when a job needs them, kept for the next one, and taken off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localctl.addons.embeddings import with_embeddings
from localctl.addons.ip_adapters import with_ip_adapters
from localctl.addons.loras import Use, with_loras
from localctl.control.base import Control
from localctl.control.image_controls import MaskedControlNet
from localctl.control.ip_adapter import ImagePrompt, IPAdapterControl
from localctl.jobs.addons import Addons


class PlacedAddons:
    """What is on the base of the running process, and the ControlNets in memory."""

    def __init__(self) -> None:
        self._key: object = ()  # of what is on the base
        self._stack = ExitStack()
        self._use: Use | None = None
        self._nets: dict[str, tuple[object, Any]] = {}

    def keep(self, addons: Addons) -> None:
        """Take off what a job with these addons does not need."""
        if self._key != _key(addons):
            self._key, self._use = (), None
            self._stack.close()
        states = {net.place: file_state(Path(net.place)) for net in addons.nets}
        self._nets = {place: kept for place, kept in self._nets.items() if states.get(place) == kept[0]}

    def place(self, addons: Addons, pipe: Any, device: torch.device) -> None:
        """Load what is not there yet onto ``pipe``. ValueError when weights are damaged or do not fit; nothing of them
        stays on the base then."""
        for net in addons.nets:
            if net.place not in self._nets:
                self._nets[net.place] = file_state(Path(net.place)), net.load().to(device, pipe.dtype)
        if self._key == _key(addons):
            return
        with ExitStack() as stack:
            stack.enter_context(with_embeddings(pipe, addons.embeddings))
            use = stack.enter_context(with_loras(pipe, addons.loras)) if addons.loras else None
            stack.enter_context(with_ip_adapters(pipe, addons.ip_adapters))
            self._stack, self._use, self._key = stack.pop_all(), use, _key(addons)

    def use(self, scales: Mapping[str, float]) -> None:
        """Let these LoRAs act, each with its scale."""
        if self._use is not None:
            self._use(scales)

    def controls(self, addons: Addons, layouts: Sequence[int]) -> list[Control]:
        """Return the ControlNets and the images of the IP-Adapters as controls of some of the job's layouts."""
        controls: list[Control] = [
            MaskedControlNet(
                self._nets[item.saved.place][1],
                item.condition,
                _rows(item.mask, layouts),
                _number(item.weight),
                item.start,
                item.end,
                guess_mode=addons.guess_mode,
            )
            for item in addons.controlnets
        ]
        prompts = [
            ImagePrompt(item.image, _rows(item.mask, layouts), item.scale, item.start, item.end, item.adapter)
            for item in addons.images
        ]
        return [*controls, IPAdapterControl(prompts)] if prompts else controls


def _number(weight: float | tuple[float, ...]) -> float:
    assert not isinstance(weight, tuple), "levels are of adapters"
    return weight


def _rows(mask: Tensor | None, layouts: Sequence[int]) -> Any:
    """Return the rows of a mask for these layouts, if it has one for each."""
    return mask[list(layouts)] if mask is not None and mask.ndim == 4 and len(mask) > 1 else mask


def _key(addons: Addons) -> object:
    """Return what is on the base, () for nothing, with the state of its files."""
    items: list[Any] = [*addons.embeddings, *addons.loras, *addons.ip_adapters]
    return tuple((item.place, getattr(item, "encoder", None), file_state(item.weights.path)) for item in items)


def file_state(path: Path) -> object:
    """Return what changes when files are written anew."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    return [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
