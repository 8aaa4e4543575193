"""The first lines of a run: what it is going to do."""

from __future__ import annotations

from pathlib import Path

import torch

from localctl.data.sample import Source
from localctl.training.data_watch import announced, brings_masks, remarks
from localctl.training.export import effective_batch
from localctl.training.state import TrainState


def announcement(state: TrainState, source: Source, output_dir: Path, *, scored: bool) -> str:
    """What is about to be trained, on what, for how long. scored: whether early stopping has a score to go by."""
    settings, models, accelerator = state.settings, state.models, state.accelerator
    trained = sum(p.numel() for p in models.plain_adapter.parameters())
    frozen = sum(p.numel() for part in models.frozen.values() for p in part.parameters())
    loss = "denoising"
    if settings.loss.filter != "none":
        loss += f" + {settings.loss.weight:g} x {settings.loss.filter} in the mask ({settings.loss.schedule})"
    batch = effective_batch(settings) * accelerator.num_processes
    threads = f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    begin = f"from {state.step} " if state.step else ""
    steps = f"{begin}to {settings.max_train_steps}, {batch} samples each, on {accelerator.device}{threads}"
    if settings.early_stopping.every and not scored:
        steps += "; no score was given, so early stopping is off"
    elif settings.early_stopping.every:
        steps += f"; or until {settings.early_stopping.metric or 'the score'} gets no better"
    masks = "the data's masks" if brings_masks(source) else f"{settings.mask.kind} masks"
    return "\n".join(
        (
            f"base        {settings.base.name}, frozen ({frozen:,} parameters)",
            f"adapter     {models.plain_adapter.config['adapter_type']} ({trained:,} parameters, trained)",
            f"condition   {settings.condition.kind}, obeyed inside {masks} (white = controlled)",
            f"loss        {loss}",
            f"data        {announced(settings.data, source)}",
            *(f"data        {remark}" for remark in remarks(settings, source)),
            f"steps       {steps}",
            f"output      {output_dir}",
        )
    )
