"""A training loop for a stretch of time: the learning rate follows the clock, a GPU runs each update as one graph."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from localctl.training.loop import NotFiniteError
from research.micro_base.loop import resume, save_tensors, update_average
from research.training_loop import DescentConfig, learning_rate_at

logger = logging.getLogger(__name__)
LOG_EVERY = 50  # updates
Inputs = TypeVar("Inputs")


@dataclass(kw_only=True)
class ClockConfig(DescentConfig):
    """Settings of a training that ends with its time.

    seconds: from the call to the last update. warmup: share of the time. save_seconds: between two files of weights.
    """

    seconds: float
    warmup: float = 0.02
    ema: float = 0.9995
    save_seconds: float = 60.0


class Gradients(Generic[Inputs]):
    """Computes the gradients of a loss, on a GPU as one CUDA graph, as launching a small model outlasts running it.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """

    def __init__(self, model: nn.Module, loss: Callable[[Inputs], dict[str, Tensor]], example: Inputs) -> None:
        """Capture the graph. ``example``: inputs, a record of tensors, whose shapes are those of all others."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._loss, self._inputs = loss, example
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.parameters[0].device.type == "cuda":
            self._warm_up()
            self._capture()

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        """Set the parameters' gradients; return the terms of the loss, which the next call may overwrite."""
        if self._graph is None:
            return self._compute(inputs)
        for field in fields(inputs):  # type: ignore[arg-type]
            getattr(self._inputs, field.name).copy_(getattr(inputs, field.name))
        self._graph.replay()
        return self._terms

    def _compute(self, inputs: Inputs) -> dict[str, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        terms = self._loss(inputs)
        terms["loss"].backward()
        return {name: term.detach() for name, term in terms.items()}

    def _warm_up(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._compute(self._inputs)
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._terms = self._compute(self._inputs)
        except RuntimeError as error:
            logger.warning(f"The update cannot be captured as a CUDA graph, and runs slower without: {error}")
            return
        self._graph = graph


class Weights:
    """Weights in float32, their optimizer, and their copy in the model that computes, which may be in bfloat16."""

    def __init__(self, model: nn.Module, working: nn.Module, config: ClockConfig) -> None:
        """``working``: ``model`` itself, or a copy in another dtype."""
        self._own = [p for p in model.parameters() if p.requires_grad]
        self._copies = [] if working is model else [p for p in working.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._own, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        if self._copies:
            for parameter in self._own:
                parameter.grad = torch.zeros_like(parameter)

    def update(self, rate: float) -> Tensor:
        """Make an update with the gradients of the model that computes; return their norm before clipping."""
        if self._copies:
            torch._foreach_copy_([p.grad for p in self._own], [p.grad for p in self._copies])
        norm = clip_grad_norm_(self._own, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.copy()
        return norm

    @torch.no_grad()
    def copy(self) -> None:
        """Give the model that computes the weights."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._own)


def train_by_clock(
    name: str,
    model: nn.Module,
    working: nn.Module,
    loss: Callable[[Inputs], dict[str, Tensor]],
    sample: Callable[[int], Inputs],
    config: ClockConfig,
    folder: Path,
) -> bool:
    """Minimise ``loss(sample(step))["loss"]``, which ``working`` computes, until the time is over; return True.

    It starts from ``folder/name.pt``, if that is there, with a learning rate of its own. The averaged weights, which
    ``model`` has afterwards, are in ``folder/name.safetensors`` in float16, written every minute. Random numbers are
    keyed by step, but the number of steps depends on the machine.

    Args:
        working: ``model`` itself, or a copy in bfloat16, then overwritten with its weights.

    Raises:
        NotFiniteError: the gradient was not finite; the file of weights is from before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = saved = time.monotonic()
    weights = Weights(model, working, config)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step = first = resume(folder / f"{name}.pt", model, weights.optimizer, average)
    weights.copy()
    working.train()
    compute = Gradients(working, loss, sample(first))
    with (folder / f"{name}.jsonl").open("a") as log, tqdm(desc=name, initial=first, mininterval=10) as bar:
        while step == first or time.monotonic() - started < config.seconds:
            terms = compute(sample(step))
            rate = _rate(config, time.monotonic() - started)
            norm = weights.update(rate)
            step += 1
            update_average(average, model, min(config.ema, (1 + step) / (10 + step)))
            bar.update()
            if (step - first) % LOG_EVERY == 1:
                line = {"step": step, "seconds": time.monotonic() - started, "rate": rate, "norm": norm, **terms}
                log.write(json.dumps(_finite(line, name, folder)) + "\n")
                log.flush()
                if time.monotonic() - saved > config.save_seconds:
                    _save_weights(folder / f"{name}.safetensors", average)
                    saved = time.monotonic()
    _finite({"step": step, "norm": norm}, name, folder)
    _save_weights(folder / f"{name}.safetensors", average)
    state = {"step": step, "model": model.state_dict(), "optimizer": weights.optimizer.state_dict(), "ema": average}
    save_tensors(folder / f"{name}.pt", state)
    model.load_state_dict(average)
    return True


def _rate(config: ClockConfig, seconds: float) -> float:
    """Return the learning rate after so many seconds, in steps of a millisecond."""
    whole = max(1, round(1000 * config.seconds))
    return learning_rate_at(
        round(1000 * seconds), config.learning_rate, whole, round(config.warmup * whole), config.final_fraction
    )


def _finite(line: dict[str, Any], name: str, folder: Path) -> dict[str, float]:
    """Return the numbers of a line of the log, which waits for the device."""
    numbers = {k: round(float(v), 6) for k, v in line.items()}
    if any(v != v or abs(v) == float("inf") for v in numbers.values()):
        raise NotFiniteError(
            f"The loss is not finite near step {line['step']}; the last weights of {name} are in {folder}."
        )
    return numbers


def _save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Save weights in float16; the file is complete, or not there."""
    half = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in weights.items()}
    temporary = path.with_suffix(".tmp")
    save_file(half, temporary)
    temporary.replace(path)
