"""What a step measures, gathered until the next row of the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from localctl.training.step import StepOutput

BUCKETS = 10
_TERMS = ("denoising", "local", "local_raw")
_GATHERED = ("timesteps", *_TERMS, "feature_mean", "feature_var")  # of each sample; the last two, and level


@dataclass
class StepStats:
    """Per-sample terms and times since the last row. Tensors stay where they are until a row is asked for, so that
    logging does not make a GPU wait at every step."""

    terms: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in _GATHERED})
    samples: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    def add(self, output: StepOutput) -> None:
        """Take in one micro-batch."""
        terms = output.terms
        measured = (terms.denoising, terms.local, terms.local_raw)
        values = (output.timesteps, *measured, output.feature_mean, output.feature_var)
        for name, value in zip(_GATHERED, values, strict=True):
            self.terms[name].append(value.detach())

    def add_time(self, samples: int, seconds: float, waiting: float) -> None:
        """``samples`` of all processes took ``seconds``, of which ``waiting`` for data. Whole steps only: pictures for
        validation and checkpoints are not counted."""
        self.samples += samples
        self.seconds += seconds
        self.waiting += waiting

    def row(self, num_train_timesteps: int, gather: Any) -> dict[str, Any]:
        """The row for the log, over the samples of all processes, which ``gather`` brings together; then empty.

        Means of the terms, the unweighted local term and the denoising term per tenth of the timesteps (None where no
        sample fell), mean and standard deviation of the adapter's features per level, before the mask, samples per
        second, and the share of time spent waiting for data.
        """
        terms = {name: gather(torch.cat(parts)).cpu().double() for name, parts in self.terms.items()}
        mean, var = terms["feature_mean"], terms["feature_var"]  # (n,levels)
        std = (var.mean(dim=0) + mean.var(dim=0, correction=0)).sqrt()  # within the samples, and between them
        buckets = terms["timesteps"].long() * BUCKETS // num_train_timesteps
        row = {
            "loss": (terms["denoising"] + terms["local"]).mean().item(),
            **{name: terms[name].mean().item() for name in _TERMS},
            "local_raw_by_timestep": bucket_means(terms["local_raw"], buckets),
            "denoising_by_timestep": bucket_means(terms["denoising"], buckets),
            "feature_mean_by_level": mean.mean(dim=0).tolist(),
            "feature_std_by_level": std.tolist(),
            "images_per_second": self.samples / self.seconds if self.seconds else None,
            "data_wait_share": self.waiting / self.seconds if self.seconds else None,
        }
        self.__init__()  # type: ignore[misc]
        return row

    def state_dict(self, gather: Any = lambda tensor: tensor) -> dict[str, Any]:
        """As plain numbers, exactly; of all processes, one after the other, which ``gather`` brings together."""
        terms = {name: gather(torch.cat(parts)).tolist() if parts else [] for name, parts in self.terms.items()}
        return {"terms": terms, "samples": self.samples, "seconds": self.seconds, "waiting": self.waiting}

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], device: torch.device | str = "cpu", *, rank: int = 0, world_size: int = 1
    ) -> StepStats:
        """The inverse of :meth:`state_dict`: the part of process ``rank`` of ``world_size``. Empty where there is no
        such part: after a change of the number of processes, or with what an earlier version gathered.

        ``device``: where the coming steps will leave theirs.
        """
        count = len(state["terms"]["timesteps"])
        known = all(len(state["terms"].get(name, ())) == count for name in _GATHERED)
        if count % world_size or not known:  # earlier versions did not gather all of it
            return cls()
        mine = slice(rank * count // world_size, (rank + 1) * count // world_size)
        terms: dict[str, list[Tensor]] = {name: [] for name in _GATHERED}
        for name, values in state["terms"].items():
            kind = torch.int64 if name == "timesteps" else torch.float32
            if values:
                terms[name].append(torch.tensor(values[mine], dtype=kind, device=device))
        return cls(terms, state["samples"], state["seconds"], state["waiting"])


def bucket_means(values: Tensor, buckets: Tensor) -> Sequence[float | None]:
    """Mean of ``values`` (n,) in each of the buckets (n,) int64; None for an empty one."""
    chosen = [values[buckets == bucket] for bucket in range(BUCKETS)]
    return [part.mean().item() if len(part) else None for part in chosen]
