import math
from dataclasses import replace

import pytest
import torch
from diffusers.optimization import get_scheduler

from localctl.bases import BASES, BaseConfig
from localctl.data import DataConfig
from localctl.settings import ConditionConfig, LossConfig
from localctl.training.schedule import bound_steps, learning_rate_at, schedule_notes
from localctl.training.settings import LR_SCHEDULERS, AdapterConfig, TrainSettings, ValidationConfig


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rates_are_those_of_diffusers(name, warmup):
    settings = TrainSettings(
        lr_scheduler=name,
        lr_warmup_steps=warmup,
        max_train_steps=30,
        learning_rate=0.5,
        lr_num_cycles=3,
        lr_power=2.0,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=30, num_cycles=3, power=2.0)
    for step in range(30):
        assert learning_rate_at(settings, step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("epochs", "steps", "samples", "processes", "expected"),
    [
        (None, 900, 5, 1, 900),
        (10, None, 100, 1, 125),  # 8 samples per step
        (10, None, 103, 1, 128),  # 1030 / 8: not one sample more than ten times
        (10, 50, 100, 1, 50),
        (10, 500, 100, 1, 125),
        (10, None, 100, 2, 62),
        (1, None, 3, 1, 1),
    ],
)
def test_the_smaller_of_epochs_and_steps(epochs, steps, samples, processes, expected):
    settings = TrainSettings(
        num_train_epochs=epochs, max_train_steps=steps, train_batch_size=4, gradient_accumulation_steps=2
    )
    bounded = bound_steps(settings, samples, processes)
    assert bounded.steps == expected and bound_steps(bounded, samples, processes) == bounded


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"train_batch_size": 0}, "train_batch_size"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"adam_beta2": 1.0}, "adam_beta2"),
        ({"proportion_empty_prompts": 1.5}, "proportion_empty_prompts"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler"),
        ({"timestep_sampling": "linear"}, "timestep_sampling"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
        ({"report_to": "paper"}, "report_to"),
        ({"checkpoints_total_limit": 1}, "checkpoints_total_limit"),
        ({"validation_steps": -1}, "validation_steps"),
        ({"cpu_threads": 0}, "cpu_threads"),
        ({"num_train_epochs": 0}, "num_train_epochs"),
        ({"max_train_steps": None}, "no end; set max_train_steps or num_train_epochs"),
        ({"lr_num_cycles": 0}, "lr_num_cycles"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, "polynomial"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"timestep_range": (0.6, 0.4)}, "low < high"),
        ({"timestep_range": (0.0, 1.5)}, "timestep_range"),
        ({"timestep_sampling": "uniform", "logit_mean": 1.0}, "of timestep_sampling=logit_normal, not uniform"),
        ({"timestep_sampling": "logit_normal", "logit_std": 0.0}, "logit_std"),
        ({"validation": ValidationConfig(unconditional_scale=0, guidance_scale=1)}, "does nothing without guidance"),
        ({"validation": ValidationConfig(unconditional_scale=0.5, control_guidance_scale=3)}, "give one of the two"),
        ({"loss": LossConfig(filter="edges"), "condition": ConditionConfig(kind="palette")}, "no condition=palette"),
    ],
)
def test_settings_that_make_no_sense(changes, word):
    with pytest.raises(ValueError, match=word):
        TrainSettings(**changes)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: DataConfig(name="imagenet"), "imagenet"),
        (lambda: DataConfig(profile="poor"), "poor"),
        (lambda: DataConfig(count=0), "data.count"),
        (lambda: AdapterConfig(adapter_type="full"), "full"),
        (lambda: AdapterConfig(channels=()), "channels"),
        (lambda: AdapterConfig(mask_resize="bilinear"), "bilinear"),
        (lambda: LossConfig(filter="none", start=0.5), "loss.start is of a local term, and loss.filter=none has none"),
        (lambda: LossConfig(start=1.0), "loss.start"),
        (lambda: LossConfig(denoising_weight=0.0, start=0.5), "Before loss.start, only the denoising term counts"),
        (lambda: ValidationConfig(scheduler="ddimm"), "ddimm"),
        (lambda: ValidationConfig(count=0), "validation.count"),
    ],
)
def test_sections_that_make_no_sense(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_no_clipping_is_null_or_infinity_and_zero_is_refused():
    assert TrainSettings(max_grad_norm=None).max_grad_norm is None
    assert TrainSettings(max_grad_norm=math.inf).max_grad_norm is None
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="use null for no clipping"):
            TrainSettings(max_grad_norm=value)


def test_which_of_steps_and_epochs_sets_the_end_is_said_with_the_numbers():
    def notes(samples=8, **changes):
        settings = TrainSettings(train_batch_size=2, lr_scheduler="constant", **changes)
        return schedule_notes(bound_steps(settings, samples), samples)

    assert notes() == []
    (binding,) = notes(num_train_epochs=1000)
    assert binding.startswith(
        "max_train_steps=700 sets the end: num_train_epochs=1000 of 8 examples would be 4000 steps"
    )
    assert notes(num_train_epochs=2) == ["num_train_epochs=2 of 8 examples set the end: 8 steps"]
    assert notes(num_train_epochs=5, max_train_steps=None) == ["num_train_epochs=5 of 8 examples set the end: 20 steps"]
    assert notes(num_train_epochs=1, max_train_steps=4) == ["num_train_epochs=1 of 8 examples set the end: 4 steps"]


@pytest.mark.parametrize(("warmup", "steps", "said"), [(500, 4, True), (4, 4, True), (3, 4, False), (0, 1, False)])
def test_a_warm_up_longer_than_the_run_is_said(warmup, steps, said):
    settings = TrainSettings(lr_warmup_steps=warmup, max_train_steps=steps)
    (note,) = schedule_notes(settings, 8) or [""]
    assert said == note.startswith(f"warning: lr_warmup_steps={warmup} is not less than the {steps} steps")
    assert not said or f"{(steps - 1) / warmup:.1%} of learning_rate=0.003" in note
    assert schedule_notes(TrainSettings(lr_warmup_steps=500, max_train_steps=4, lr_scheduler="constant"), 8) == []


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 1, 0), (2, 1, 1), (4, 1, 3), (64, 1, 4), (8, 4, 1)])
def test_files_are_read_by_the_cores_that_are_left(cores, processes, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    files = TrainSettings(data=DataConfig(path="photos"))
    assert files.workers == workers
    assert replace(files, dataloader_num_workers=0).workers == 0
    assert replace(files, dataloader_num_workers=7).workers == 7
    assert TrainSettings().workers == 0  # the embedded scenes stay in memory


def test_timesteps_are_sampled_as_suits_the_base_unless_the_user_says_how():
    found = {name: TrainSettings(base=BaseConfig(name=name)).timestep_sampling for name in (*BASES, "owner/other")}
    flows = dict.fromkeys(("sd3", "flux", "flux2", "qwen_image", "z_image"), "logit_normal")
    cubic = dict.fromkeys(("sd15", "sd21", "sdxl"), "cubic")
    # That of a base whose files are not here yet follows from its index, once that can be read.
    assert found == {"micro": "uniform", "pixart": "uniform", **cubic, **flows, "owner/other": None}
    assert (
        TrainSettings(base=BaseConfig(name="owner/other", local_files_only=True)).completed().timestep_sampling
        == "cubic"
    )
    assert TrainSettings(timestep_sampling="cubic").timestep_sampling == "cubic"
