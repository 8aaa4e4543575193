"""The updates of the weights: clip the gradients, leave out what is not finite, average.

On a GPU the optimizer itself leaves out an update that is not finite, and the host learns of it while the next step is
running. To ask earlier, it would have to wait until the device has nothing left to do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor

from localctl.devices import Readback
from localctl.training.state import TrainState
from localctl.training.step import StepOutput

logger = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """A loss or gradient is not finite, and the settings do not allow skipping the update."""


@dataclass(frozen=True)
class _Update:
    """The update of ``step``, from the samples ``keys`` with these losses (B,) by micro-batch. bad: whether it is not
    finite, as soon as the device knows."""

    step: int
    keys: list[str]
    losses: list[Tensor]
    bad: Readback


class Updates:
    """Applies the gradients of each step to the weights of a training.

    late: the host reads whether an update was finite one step later, or when :meth:`settle` is called.
    """

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.late = state.accelerator.scaler is None and all(
            group.get("fused") for group in state.optimizer.param_groups
        )
        self._pending: _Update | None = None

    def apply(self, keys: list[str], outputs: Sequence[StepOutput]) -> Tensor:
        """Update the weights by the gradients of a step, from samples ``keys``; return the gradient's norm, ().

        Raises:
            NotFiniteError: this update or the one before is not finite, and none may be skipped any more. The weights
                are those before it.
        """
        state, accelerator, settings = self.state, self.state.accelerator, self.state.settings
        limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
        norm = torch.as_tensor(accelerator.clip_grad_norm_(state.models.plain_adapter.parameters(), limit))
        losses = [output.terms.total.detach() for output in outputs]
        # A scaler skips steps whose gradient overflowed because of its own factor, but it cannot repair a loss.
        watched = norm if accelerator.scaler is None else torch.cat(losses).sum()
        bad = ~torch.isfinite(watched)
        self.settle()
        self._pending = _Update(state.step + 1, keys, losses, Readback(bad))
        if self.late:
            optimizer = state.optimizer.optimizer  # within accelerate's wrapper
            optimizer.found_inf = bad.float()
            state.optimizer.step()
            del optimizer.found_inf
        elif self.settle():
            state.optimizer.step()
            state.update_ema()
        return norm

    def settle(self) -> bool:
        """Wait until the result of the last update is known, and act on it; return whether it is finite. All processes
        call this together, as their gradients are the same. NotFiniteError as from :meth:`apply`."""
        update, self._pending = self._pending, None
        if update is None:
            return True
        bad = bool(update.bad.read())
        if self.state.accelerator.scaler is not None:  # the losses of the processes differ
            bad = any(self.state.agree(bad))
        if bad:
            self._skip(update)
        elif self.late:
            self.state.update_ema()
        return not bad

    def _skip(self, update: _Update) -> None:
        """Name the samples of an update that is not finite; NotFiniteError unless one more may be skipped."""
        state = self.state
        finite = torch.isfinite(torch.cat(update.losses)).tolist()
        culprits = gather_object([key for key, fine in zip(update.keys, finite, strict=True) if not fine])
        what, names = ("loss", culprits) if culprits else ("gradient", gather_object(update.keys))
        found = f"The {what} is not finite at step {update.step} (samples {', '.join(names)})"
        if state.skipped >= state.settings.max_nonfinite_steps:
            state.step = update.step - 1
            raise NotFiniteError(
                f"{found}; the adapter was not changed by it. Check these samples, or lower the learning rate or the "
                "loss weight, and resume from the last checkpoint."
            )
        state.skipped += 1
        if state.accelerator.scaler is not None:
            state.accelerator.scaler.update()  # it has seen these gradients, and expects others next
        logger.info(f"{found}; this update is skipped, {state.skipped} so far.")
