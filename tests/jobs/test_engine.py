"""The engine that runs jobs: models are kept from job to job, and a job can be watched and cancelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_helpers import PLAIN, QUICK

import localctl.jobs.generate
from localctl.adapter import LocalAdapter
from localctl.cli.sample import parse
from localctl.jobs.generate import Cancelled, StepProgress, generate_job, load_models
from localctl.jobs.prepare import Job, prepare


def job_of(*flags: str) -> Job:
    return prepare(parse([*PLAIN, *flags]))


def images_of(job: Job, models: localctl.jobs.generate.JobModels) -> list[np.ndarray]:
    return [np.asarray(image) for _, output in generate_job(job, models) for image in output.images]


def test_progress_counts_all_variants_and_batches(base_here: Path) -> None:
    Path("scene.json").write_text('{"prompt": "a", "regions": [{"phrase": "a", "box": [0, 0, 0.5, 1]}]}')
    flags = ["--base", "base", "--layout", "scene.json", "--compare", "none", "bias", "--seeds", "0", "1", "2"]
    job = prepare(parse([*flags, "--batch_size", "2", *QUICK]))
    models, seen = load_models(job), list[StepProgress]()
    list(generate_job(job, models, seen.append))
    assert [(item.variant.label, item.step, item.of, item.image_count) for item in seen] == [
        (label, step, 2, count) for label in ("none", "bias") for count in (2, 1) for step in (1, 2)
    ]
    assert [round(item.done * 12) for item in seen] == [2, 4, 5, 6, 8, 10, 11, 12]


def test_a_cancelled_job_leaves_the_models_for_the_next(base_here: Path) -> None:
    job = job_of("--num_inference_steps", "4")
    models = load_models(job)
    expected, calls = images_of(job, models), 0

    def cancel(progress: StepProgress) -> None:
        nonlocal calls
        calls += 1
        raise Cancelled

    with pytest.raises(Cancelled):
        list(generate_job(job, models, cancel))
    assert calls == 1
    assert np.array_equal(images_of(job, load_models(job, models)), expected)


def test_equal_models_are_kept_and_others_loaded_anew(
    base_here: Path, make_adapter: Callable[..., LocalAdapter], sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save("edges.png")
    for seed, name in enumerate(("first", "second")):
        make_adapter(seed, base=str(sd_folder), condition={"kind": "canny"}).save_pretrained(name)
    with_adapter = ["--condition_image", "edges.png", "--adapter"]
    models = load_models(job_of(*with_adapter, "first"))
    pipe, adapter = models.pipe, models.adapters
    kept = load_models(job_of(*with_adapter, "first", "second", "--weight", "0.5"), models)
    assert kept.pipe is pipe and len(kept.adapters) == 2
    assert all(kept.adapters[place][1] is first for place, (_, first) in adapter.items())
    make_adapter(2, base=str(sd_folder), condition={"kind": "canny"}).save_pretrained("first")
    job = job_of(*with_adapter, "first")
    again = load_models(job, kept)
    assert again.pipe is pipe and len(again.adapters) == 1
    assert np.array_equal(images_of(job, again), images_of(job, load_models(job)))
    other = load_models(job_of("--dtype", "bfloat16"), again)
    assert other.pipe is not pipe and again.pipe is None and not other.adapters


def test_what_a_job_does_not_need_is_released_before_anything_is_loaded(
    base_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = load_models(job_of())
    assert models.preview

    def refuse(*args: object, **options: object) -> None:
        assert models.pipe is None and "preview" not in vars(models)
        raise ValueError("no such base")

    monkeypatch.setattr(localctl.jobs.generate, "load_pipeline", refuse)
    with pytest.raises(ValueError, match="no such base"):
        load_models(job_of("--dtype", "float16"), models)
