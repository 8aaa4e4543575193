"""The trainings and scores behind ``research.benchmarks.command_one``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from localctl.adapter import LocalAdapter
from localctl.api import train, train_settings
from localctl.diffusion import round_trip
from localctl.masks import MaskConfig
from localctl.metrics.bootstrap import bootstrap
from localctl.pipelines import BaseConfig, load_pipeline, resolve_base, set_scheduler
from research.control_share.study import cases, f1_inside, sample_all
from research.page import signed, table

SPLIT = "val"
BATCH = 25  # images generated at once


def floor_scores(count: int, steps: int) -> dict[str, Any]:
    """Return, per validation scene, the F1 of the base's image and of the scene through the VAE."""
    pipe, chosen = _pipe(), cases(count, MaskConfig(kind="box"), split=SPLIT)
    base = sample_all(pipe, chosen, None, _sampling(steps))
    ceiling = round_trip(pipe.vae, np.stack([case.item.image for case in chosen]))
    return {"f1": f1_inside(chosen, base).tolist(), "f1_ceiling": f1_inside(chosen, ceiling).tolist()}


def trained_scores(settings: Sequence[str], count: int, steps: int) -> dict[str, Any]:
    """Train with ``settings``; return them, the seconds, and the F1 of the adapter's image per validation scene."""
    quiet = ("report_to=none", "validation_steps=0", "checkpointing_steps=0", "overwrite_output_dir=true")
    with tempfile.TemporaryDirectory() as folder:
        whole = train_settings(*quiet, *settings, f"output_dir={folder}")
        start = time.perf_counter()
        result = train(whole)
        seconds = time.perf_counter() - start
        pipe = _pipe()
        adapter = LocalAdapter.from_pretrained(result.output_dir / "adapter").to(pipe.device)
    chosen = cases(count, MaskConfig(kind="box"), split=SPLIT)
    f1 = f1_inside(chosen, sample_all(pipe, chosen, adapter, _sampling(steps), "adapter")).tolist()
    images = whole.steps * whole.train_batch_size
    return {"settings": list(settings), "images": images, "seconds": seconds, "device": str(pipe.device), "f1": f1}


def _pipe() -> DiffusionPipeline:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(BaseConfig(name="micro"), device=device)
    set_scheduler(pipe, "ddim")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sampling(steps: int) -> dict[str, Any]:
    guidance = resolve_base("micro").guidance_scale
    return {"num_inference_steps": steps, "guidance_scale": guidance, "batch_size": BATCH}


def table_of(floor: Mapping[str, Any], measured: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str) -> list[str]:
    """Return the table of the variants: means over seeds, with intervals over scenes."""
    ends = np.array([floor["f1"], floor["f1_ceiling"]]).T  # (n,2)
    scores = {name: np.mean([row["f1"] for row in rows], axis=0) for name, rows in measured.items()}

    def control(rows: np.ndarray) -> float:
        low, high, reached = rows.mean(axis=0)
        return float((reached - low) / (high - low))

    def gain(rows: np.ndarray) -> float:
        low, high, reached, before = rows.mean(axis=0)
        return float((reached - before) / (high - low))

    lines = []
    for name, rows in measured.items():
        known = np.column_stack([ends, scores[name]])
        cells = [str(bootstrap(known, control))]
        compared = name != baseline and baseline in scores
        cells.append(signed(bootstrap(np.column_stack([known, scores[baseline]]), gain)) if compared else "")
        seeds = ", ".join(f"{control(np.column_stack([ends, row['f1']])):.3f}" for row in rows)
        share = rows[0]["images"] / measured[baseline][0]["images"] if baseline in measured else float("nan")
        lines.append((name, [*cells, seeds, f"{share:.2f}", f"{np.median([row['seconds'] for row in rows]):.0f}"]))
    columns = ("control", "difference", "each seed", "images, of the baseline", "seconds")
    return table(columns, lines, f"{len(ends)} validation scenes")
