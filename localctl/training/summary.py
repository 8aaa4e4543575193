"""The first lines of a run: what it will do."""

from __future__ import annotations

from pathlib import Path

import torch

from localctl.bases import own_side
from localctl.data.config import DataConfig
from localctl.data.files import FileSource
from localctl.data.sample import Source
from localctl.distributed import processes
from localctl.threads import waiting_note
from localctl.training.checkpoints import free_space, free_space_clause
from localctl.training.data import has_own_masks
from localctl.training.encoded import EncodedSource, plain
from localctl.training.export import effective_batch, full_masks
from localctl.training.models import Models
from localctl.training.schedule import FIRST_LOCAL, schedule_notes
from localctl.training.settings import TrainSettings
from localctl.training.state import TrainState


def announcement(state: TrainState, source: Source, output_dir: Path, *, scored: bool) -> str:
    """Describe the run in lines: base, adapter, condition, loss, data, steps and output. scored: there is a scorer for
    early stopping."""
    settings, models, accelerator = state.settings, state.models, state.accelerator
    trained = sum(p.numel() for p in models.plain_adapter.parameters())
    frozen = sum(p.numel() for part in models.frozen.values() for p in part.parameters())
    terms = settings.loss
    loss = "denoising in the mask" if terms.mask_denoising else "denoising"
    if terms.denoising_weight != 1:
        loss = f"{terms.denoising_weight:g} x {loss}"
    if terms.filter != "none":
        loss += f" + {terms.weight:g} x {terms.filter} in the mask ({terms.schedule})"
        loss += f" after step {state.info[FIRST_LOCAL]}" if terms.start else ""
    batch = effective_batch(settings) * accelerator.num_processes
    on_cpu = accelerator.device.type == "cpu"
    threads = f", {torch.get_num_threads()} threads" if on_cpu else ""
    waiting = waiting_note() if on_cpu and torch.get_num_threads() > 1 else ""
    begin = f"from {state.step} " if state.step else ""
    steps = f"{begin}to {settings.max_train_steps}, {batch} samples each, on {accelerator.device}{threads}"
    if settings.early_stopping.every and not scored:
        steps += "; no score was given, so early stopping is off"
    elif settings.early_stopping.every:
        steps += f"; or until {settings.early_stopping.metric or 'the score'} gets no better"
    masks = ("the data's" if has_own_masks(source) else settings.mask.kind) + f" masks{full_masks(settings)}"
    return "\n".join(
        (
            f"base        {settings.base.name}, frozen ({frozen:,} parameters)",
            f"adapter     {models.plain_adapter.config['adapter_type']} ({trained:,} parameters, trained)",
            f"condition   {settings.condition.kind}, obeyed inside {masks} (white = controlled)",
            f"loss        {loss}",
            f"data        {describe_data(settings.data, source)}",
            f"data        {describe_encoding(models, source)}",
            *(f"data        {remark}" for remark in remarks(settings, source)),
            f"steps       {steps}",
            *([f"steps       {waiting}"] if waiting else []),
            *(f"steps       {note}" for note in schedule_notes(settings, len(source), accelerator.num_processes)),
            f"output      {output_dir}",
        )
    )


def describe_data(data: DataConfig, source: Source) -> str:
    """Describe the dataset in a few words."""
    if data.is_micro:
        return f"{len(source)} micro {data.profile} examples"
    place = f"{data.name} {data.path}" if data.path else data.name
    masks = f", masks from {data.mask_column!r}" if has_own_masks(source) else ""
    height, width = data.size
    size = f"{width}x{height}"
    source = plain(source)
    if isinstance(source, FileSource) and source.buckets is not None:
        size = f"{len(source.buckets.used())} sizes"
    return f"{len(source)} examples of {place} at {size}{masks}"


def describe_encoding(models: Models, source: Source) -> str:
    """Describe what is encoded once and what in every step."""
    if isinstance(source, EncodedSource):
        what = "images, conditions and captions" if source.stores.conditions else "images and captions"
        variants = f", {source.stores.variants} variants" if source.stores.variants > 1 else ""
        return f"{what} were encoded before, in {source.folder}{variants}"
    live = [name for name in ("images", "captions") if name not in models.kept]
    once = f"{' and '.join(models.kept)} are encoded once and kept in memory" if models.kept else ""
    return "; ".join(filter(None, (once, f"{' and '.join(live)} are encoded in every step" if live else "")))


def remarks(settings: TrainSettings, source: Source | None) -> list[str]:
    """Return notes on data that is not used as one might expect, a clause each."""
    source = plain(source) if source is not None else None
    if not isinstance(source, FileSource):
        return []
    notes = [source.note, size_note(settings.data, settings.base.name)]
    if source.buckets is not None:
        notes += source.buckets.remarks(settings.train_batch_size * processes()[1])
    return [*source.rows.remarks(), *filter(None, notes)]


def size_note(data: DataConfig, base: str) -> str:
    """Return a note if the image size is a mere default and not the base's own size; else an empty string."""
    own = own_side(base)
    if data.is_micro or data.resolution is not None or own is None or data.size == (own, own):
        return ""
    side = data.size[0]
    return f"{side}x{side} is only the default, and the base {base} makes images of {own}x{own}: --resolution {own}"


def disk_space_warning(state: TrainState, folder: Path) -> str:
    """Return a warning if the disk has too little space for what the run will write; else an empty string."""
    settings = state.settings
    adapter = sum(p.numel() * p.element_size() for p in state.models.plain_adapter.parameters())
    files = [adapter, adapter]  # as LocalAdapter and as T2IAdapter
    if settings.checkpointing_steps:
        files += [adapter, adapter // 2 if settings.use_8bit_adam else 2 * adapter, adapter if settings.use_ema else 0]
    free, largest = free_space(folder)
    if free >= sum(files) and largest >= max(files):
        return ""
    what = "the adapter and a checkpoint" if settings.checkpointing_steps else "the adapter"
    return (
        f"{what} need {sum(files) / 1e6:.1f} MB, {max(files) / 1e6:.1f} MB in one file, but there is less space in "
        f"{folder}{free_space_clause(folder)}"
    )
