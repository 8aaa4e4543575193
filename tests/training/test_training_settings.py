import pytest
import torch
from diffusers.optimization import get_scheduler

from localctl.data import DataConfig
from localctl.training.settings import LR_SCHEDULERS, AdapterConfig, TrainSettings, ValidationConfig


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rates_are_those_of_diffusers(name, warmup):
    settings = TrainSettings(lr_scheduler=name, lr_warmup_steps=warmup, max_train_steps=30, learning_rate=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=30)
    for step in range(30):
        assert settings.learning_rate_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


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
        (lambda: ValidationConfig(scheduler="ddimm"), "ddimm"),
        (lambda: ValidationConfig(count=0), "validation.count"),
    ],
)
def test_sections_that_make_no_sense(make, word):
    with pytest.raises(ValueError, match=word):
        make()
