"""Training in aspect-ratio buckets: the promises of a single size hold, over processes and resumes too."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from caching_helpers import cache_settings, data_with
from log_helpers import logged
from PIL import Image
from process_helpers import (
    checkpoint_contents,
    difference,
    finish,
    record_samples,
    sample_lines,
    start,
    start_ranks,
    wait_for,
)
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.caching.cache import cache
from localctl.conditions import ConditionConfig
from localctl.data import DataConfig
from localctl.distributed import leave
from localctl.encodings.source import EncodedSource
from localctl.training import loop
from localctl.training.checkpoints import list_checkpoints

sys.path.append(str(Path(__file__).parents[1] / "data"))
from file_data import write_imagefolder

DEPTH = ConditionConfig(kind="depth")
SHAPES = ((64, 64), (64, 96), (96, 64))


def write_data(root: Path, count: int = 10) -> Path:
    write_imagefolder(root, count, sizes=SHAPES)
    rng = np.random.default_rng(0)
    for file in sorted(root.glob("*/*.png")):  # something to see
        size = Image.open(file).size
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file)
    return root


@pytest.fixture
def folder(tmp_path):
    return write_data(tmp_path / "data")


def settings_for(base, folder, output_dir, **changes):
    options = {
        "data": DataConfig(
            path=str(folder), aspect_ratio_buckets="64,64;64,96;96,64", validation_share=0, max_upscaling=1.5
        ),
        "condition": DEPTH,
        "train_batch_size": 2,
        "max_train_steps": 6,
        "gradient_accumulation_steps": 2,
    }
    return tiny_settings(base, output_dir, **(options | changes))


@pytest.mark.parametrize("base", ["sd_folder", pytest.param("sdxl_folder", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_bit_for_bit(base, folder, tmp_path, request):
    settings = settings_for(request.getfixturevalue(base), folder, tmp_path / "whole", checkpointing_steps=6)
    said = logged()
    silent_run(settings).train()
    assert "10 examples of imagefolder" in said[0] and " at 3 sizes" in said[0]
    assert "buckets (width x height): 64x64: 4, 96x64: 3, 64x96: 3" in said[0]
    parts = replace(settings, output_dir=str(tmp_path / "parts"), dataloader_num_workers=2)
    silent_run(parts).train(stop=lambda step: step == 2)
    (tmp_path / "parts" / "image_sizes.npz").unlink()  # nothing is restored from it
    silent_run(replace(parts, resume_from_checkpoint="latest", dataloader_num_workers=0)).train()
    assert loss_log(tmp_path / "parts") == loss_log(tmp_path / "whole")
    last = [checkpoint_contents(list_checkpoints(tmp_path / part)[6]) for part in ("whole", "parts")]
    assert difference(*last) == []


def train(settings, lines):
    record_samples(lines)
    silent_run(settings).train()


def test_a_run_from_encodings_in_buckets_is_the_same_after_a_kill(sd_folder, folder, tmp_path):
    settings = settings_for(sd_folder, folder, tmp_path / "whole", checkpointing_steps=2, logging_steps=3)
    result = cache(cache_settings(sd_folder, tmp_path / "encodings", settings.data, condition=DEPTH))
    assert result.rows["images"] == 10
    settings = replace(settings, data=data_with(settings.data, tmp_path / "encodings"))
    run = silent_run(settings)
    run.train()
    assert isinstance(run.train_source, EncodedSource)
    parts, lines = (
        replace(settings, output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest"),
        tmp_path / "x",
    )
    process = start(train, parts, lines)
    wait_for(lambda: len(sample_lines(lines)) >= 7, process)  # in the fourth step, of two micro-batches each
    process.kill()
    assert finish(process) == -9
    again = silent_run(parts)
    assert 0 < again.state.step < 4
    again.train()
    assert loss_log(tmp_path / "parts") == loss_log(tmp_path / "whole")
    last = [checkpoint_contents(list_checkpoints(tmp_path / part)[6]) for part in ("whole", "parts")]
    assert difference(*last) == []


def test_other_buckets_are_noticed_on_resuming(sd_folder, folder, tmp_path):
    settings = settings_for(sd_folder, folder, tmp_path / "out")
    silent_run(settings).train(stop=lambda step: step == 1)
    again = replace(settings, resume_from_checkpoint="latest")
    fewer = replace(settings.data, aspect_ratio_buckets="64,64")
    with pytest.raises(ValueError, match="aspect_ratio_buckets: 64,64;64,96;96,64 -> 64,64"):
        silent_run(replace(again, data=fewer))
    Image.new("RGB", (96, 64)).save(folder / "images" / "000.png")
    with pytest.raises(ValueError, match="aspect-ratio buckets: "):
        silent_run(again)


def test_validation_is_at_the_single_size_and_sizes_fit_the_adapter(sd_folder, sdxl_folder, folder, tmp_path):
    settings = settings_for(sd_folder, folder, tmp_path / "out", max_train_steps=1, validation_steps=1)
    held = replace(settings.data, validation_share=0.4)
    assert silent_run(replace(settings, data=held)).train().fidelity is not None
    odd = replace(settings.data, aspect_ratio_buckets="64,64;64,88")
    with pytest.raises(ValueError, match="images are 88x64 pixels .* multiples of 16"):
        silent_run(settings_for(sdxl_folder, folder, tmp_path / "b", data=odd))


def each_of_two(base: Path, folder: Path, output_dir: Path) -> int:
    """Train on one of two processes and record keys, epochs and sizes."""
    settings = settings_for(base, folder, output_dir / "run", max_train_steps=30, gradient_accumulation_steps=1)
    run = silent_run(settings)
    rank = run.state.accelerator.process_index
    record_samples(output_dir / f"samples_{rank}")
    step = loop.training_step

    def sized(batch, *arguments):
        with (output_dir / f"sizes_{rank}").open("a") as file:
            file.write(json.dumps(list(batch.pixels.shape)) + "\n")
        return step(batch, *arguments)

    loop.training_step = sized
    run.train()
    leave()
    return 0


@pytest.mark.slow
def test_two_processes_see_each_image_once_per_epoch_and_one_size_at_a_time(sd_folder, folder, tmp_path):
    ranks = start_ranks(2, each_of_two, sd_folder, folder, tmp_path)
    assert [finish(process) for process in ranks] == [0, 0]
    sizes = [(tmp_path / f"sizes_{rank}").read_text().splitlines() for rank in range(2)]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 30 and len(set(sizes[0])) == 3
    visits = Counter(
        tuple(visit) for rank in range(2) for b in sample_lines(tmp_path / f"samples_{rank}") for visit in b
    )
    assert sum(visits.values()) == 120 and set(visits.values()) == {1}
    names = {key for key, _ in visits}
    assert len(names) == 10
    for name in names:  # each epoch in order, none skipped
        epochs = sorted(epoch for key, epoch in visits if key == name)
        assert epochs == list(range(len(epochs))) and abs(len(epochs) - 12) <= 2
