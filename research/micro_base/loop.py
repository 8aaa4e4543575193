"""The training loop of every part of the base: random numbers keyed by step, EMA, atomic checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from research.training_loop import DescentConfig, learning_rate_at, updates


@dataclass(kw_only=True)
class LoopConfig(DescentConfig):
    """Settings of a part's training. steps: updates in all. minutes: stop the call after so many; 0 = never."""

    steps: int
    warmup: int = 100
    checkpoint_every: int = 200
    minutes: float = 0.0


LossFunction = Callable[[int, np.random.Generator], dict[str, Tensor]]


def train(name: str, model: nn.Module, loss_fn: LossFunction, config: LoopConfig, folder: Path) -> bool:
    """Minimise ``loss_fn(step, rng)["loss"]``, resuming from ``folder/name.pt``; return whether all steps are done.

    If ``config.ema`` is set, the model has the averaged weights afterwards.

    Raises:
        NotFiniteError: the gradient is not finite; the message names the last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()} if config.ema else {}
    step = first = resume(path, model, optimizer, average)

    def rate(step: int) -> float:
        return learning_rate_at(step, config.learning_rate, config.steps, config.warmup, config.final_fraction)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        terms = loss_fn(step, np.random.default_rng([config.seed, step]))
        return terms["loss"], terms

    advice = f"the last checkpoint of {name} is {path}"
    model.train()
    started, log = time.monotonic(), (folder / f"{name}.jsonl").open("a")
    with log, tqdm(total=config.steps, initial=step, desc=name, mininterval=10) as bar:
        for step, terms in updates(optimizer, range(first, config.steps), rate, loss, advice=advice):
            update_average(average, model, min(config.ema, (1 + step) / (10 + step)))
            bar.update()
            if step % 50 == 0:
                numbers = {k: round(float(v.detach()), 6) for k, v in terms.items()}
                log.write(json.dumps({"step": step, "seconds": round(time.monotonic() - started, 1)} | numbers) + "\n")
                log.flush()
                bar.set_postfix(numbers, refresh=False)
            out_of_time = bool(config.minutes) and time.monotonic() - started > 60 * config.minutes
            if step % config.checkpoint_every == 0 or step == config.steps or out_of_time:
                state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": average}
                save_tensors(path, state)
            if out_of_time:
                break
    if average:
        model.load_state_dict(average)
    return step >= config.steps


def update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move averaged weights towards those of the model, by a share 1 - decay; ``average`` may be empty."""
    if not average:
        return
    state = model.state_dict()
    floats = [k for k, v in average.items() if v.is_floating_point()]
    torch._foreach_lerp_([average[k] for k in floats], [state[k].detach() for k in floats], 1 - decay)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> int:
    """Load the checkpoint ``path`` into model, optimizer and average; return its step, 0 if there is none."""
    if not path.exists():
        return 0
    # A checkpoint of this program; safetensors cannot hold the optimizer's nested state.
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for key, value in state["ema"].items():
        average[key].copy_(value)
    return int(state["step"])


def digest(text: str, *modules: nn.Module) -> str:
    """Return a short hash of a text and of all weights."""
    found = hashlib.sha256(text.encode())
    for module in modules:
        for value in module.state_dict().values():
            found.update(value.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def save_tensors(path: Path, state: dict[str, object]) -> None:
    """Save ``state`` atomically: the file is complete, or not there."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the averaged weights of a checkpoint, else its plain ones; those of a .safetensors file in float32."""
    if path.suffix == ".safetensors":
        return {name: value.float() for name, value in load_file(path).items()}
    # --unet_init may name a file from anybody: unpickle nothing but tensors and numbers.
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state["ema"] or state["model"]
