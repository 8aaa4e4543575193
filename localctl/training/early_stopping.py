"""A score every so many steps, and stopping when it no longer gets better. Which score is the caller's business."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from localctl.messages import warning
from localctl.training.checkpoints import write_folders
from localctl.training.models import Models
from localctl.training.settings import EarlyStoppingConfig


class Scorer(Protocol):
    """Scores the adapter as it is now, for example by FID.

    Called on every process at the same step, so it may share the work; it must return the same number on each. It may
    use the models, but must leave weights and the global random state as they were.
    """

    def __call__(self, models: Models, step: int) -> float: ...


@dataclass
class EarlyStopping:
    """What has been seen of the score: ``best`` at ``best_step``, and how many scores since were ``worse``."""

    config: EarlyStoppingConfig
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    last_step: int = 0

    def due(self, step: int) -> bool:
        """Whether the score is to be taken after ``step`` steps; only once for each."""
        return self.config.every > 0 and step % self.config.every == 0 and step > self.last_step

    def update(self, step: int, score: float) -> bool:
        """Take in the score after ``step`` steps; True if it is the best so far. One that is not finite never is."""
        assert step > self.last_step
        self.last_step = step
        better = math.isfinite(score) and (self.best is None or self._gain(score) > self.config.min_delta)
        if better:
            self.best, self.best_step, self.worse = score, step, 0
        else:
            self.worse += 1
        return better

    @property
    def stopped(self) -> bool:
        """Whether ``patience`` scores in a row were no better than the best."""
        return self.config.every > 0 and self.worse >= self.config.patience

    def _gain(self, score: float) -> float:
        assert self.best is not None
        return self.best - score if self.config.lower_is_better else score - self.best

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON."""
        seen = {name: getattr(self, name) for name in ("best", "best_step", "worse", "last_step")}
        return {**seen, "metric": self.config.metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; patience and the rest are those of the present settings. The best under
        another metric says nothing of this one, and is forgotten."""
        self.last_step = state["last_step"]
        if state.get("metric") == self.config.metric:
            self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]


def take_score(
    stopping: EarlyStopping,
    score: float,
    models: Models,
    step: int,
    best_folder: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Take in the score after ``step`` steps and keep the adapter in ``best_folder`` if it is the best so far (None:
    this process writes nothing); a disk that takes no more is said. Returns the row for the log."""
    if stopping.update(step, score) and best_folder is not None:
        try:
            write_folders(best_folder.parent, {best_folder.name: models.plain_adapter.save_pretrained})
        except OSError as error:
            say(warning(f"step {step}: the best adapter so far is not kept, {error}; the training goes on."))
    return {"score": score, "score/best": stopping.best, "score/best_step": stopping.best_step}
