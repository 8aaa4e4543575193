"""What is sampled for an update of the U-Net, its loss, and a training that follows the clock."""

import copy
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from localctl.training.loop import NotFiniteError
from research.micro_base import clock, data
from research.micro_base.__main__ import main
from research.micro_base.clock import ClockConfig, train_by_clock
from research.micro_base.data import scene_cache
from research.micro_base.focus import Focus
from research.micro_base.loop import read_weights
from research.micro_base.unet import UNET, new_unet, train_denoiser
from research.micro_base.unet_loss import LatentCache, Recipe, Sampled, Sampler, UNetLoss, sample_timesteps, to

SCENES = 12


@pytest.fixture
def cache() -> LatentCache:
    random = torch.Generator().manual_seed(0)
    latents, states = (torch.randn(*shape, generator=random).half() for shape in ((SCENES, 4, 16, 16), (3, 77, 128)))
    return LatentCache(latents, states, torch.tensor([1, 9, 12]), torch.arange(SCENES) % 2 + 1)


@pytest.fixture
def focus() -> Focus:
    masks = torch.zeros(SCENES, 3, 16, 16)
    masks[:, 0, 4:9, 4:9] = 1
    tokens = torch.tensor([[2, -1, -1]]).expand(SCENES, -1)
    odds = torch.full((SCENES,), 1 / SCENES, dtype=torch.float64)
    return Focus(masks.half(), masks.amax(1).half(), tokens, torch.full((SCENES,), -1), odds, torch.zeros(0))


def test_blocks_of_several_processes_are_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = scene_cache(tmp_path / "alone", "basic", 5, "val", workers=1)
    monkeypatch.setattr(data, "BLOCK", 2)
    together = scene_cache(tmp_path / "together", "basic", 5, "val", workers=2)
    assert np.array_equal(alone.images, together.images)
    assert (alone.captions, alone.centers) == (together.captions, together.centers)


@pytest.mark.parametrize("noisy", [0.22, 0.4])
def test_a_share_of_the_timesteps_is_where_objects_are_placed(noisy: float) -> None:
    t = sample_timesteps(1000, np.random.default_rng(0), noisy)
    assert (t >= 700).mean() == pytest.approx(noisy, abs=0.002)
    assert (t < 190).mean() == pytest.approx(0.06, abs=0.002)
    assert t.min() >= 0 and t.max() == 999


def test_an_update_is_sampled_by_its_step_alone(focus: Focus) -> None:
    sampler = Sampler((SCENES, 4, 16, 16), focus.odds.cumsum(0), 8, Recipe(empty=0.5), 0, torch.device("cpu"))
    first, other, again = sampler.on_device(3), sampler.on_device(4), sampler.on_device(3)
    for name in ("scenes", "is_empty", "noise", "timesteps", "bare"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name)) or name in ("is_empty", "bare")
    assert first.noise.shape == (8, 4, 16, 16) and 0.7 < float(first.noise.std()) < 1.3


def test_the_loss_stays_on_one_device_and_reads_no_value_back(cache: LatentCache, focus: Focus) -> None:
    """Tensors without values stand for those of a GPU, where both would break a graph."""
    device = torch.device("meta")
    unet = new_unet().to(device).to(torch.bfloat16)
    focus = replace(focus, relations=torch.full((SCENES,), 4), expected=cache.latents + 1)
    loss = UNetLoss(unet, to(cache, device), torch.rand(1000, device=device), Recipe(), to(focus, device))
    sampler = Sampler((SCENES, 4, 16, 16), None, 4, Recipe(), 0, torch.device("cpu"))
    terms = loss(to(sampler(np.random.default_rng(0)), device))
    terms["loss"].backward()
    assert {term.device for term in terms.values()} == {device}
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_a_unet_is_trained_by_the_clock_in_bfloat16(tmp_path: Path, cache: LatentCache, focus: Focus) -> None:
    initial = new_unet().state_dict()
    config = ClockConfig(seconds=1.0, learning_rate=1e-3, ema=0.5)
    unet, _ = train_denoiser(UNET, cache, config, tmp_path, 4, initial=initial, focus=focus, bf16=True)
    weights = unet.state_dict()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    assert max(float((weights[name] - initial[name]).abs().max()) for name in weights) > 0
    half, whole = load_file(tmp_path / "unet.safetensors"), read_weights(tmp_path / "unet.pt")
    assert all(torch.equal(half[name], value.half()) for name, value in weights.items())
    assert all(torch.equal(whole[name], value) for name, value in weights.items())
    assert json.loads((tmp_path / "unet.jsonl").read_text().splitlines()[0])["step"] == 1


class Line(nn.Module):
    """A linear model, with a loss of a record that has only noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1, bias=False)

    def loss(self, sampled: Sampled) -> dict[str, torch.Tensor]:
        x = sampled.noise.to(self.layer.weight.dtype)
        wanted = x @ torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=x.dtype)
        return {"loss": (self.layer(x)[:, 0] - wanted).square().mean()}


def sampled(step: int, value: float = 1.0) -> Sampled:
    empty = torch.zeros(0)
    noise = value * torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return Sampled(empty, empty, noise, empty, empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clock_learns_logs_and_starts_from_the_last_weights(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = SimpleNamespace(monotonic=partial(next, itertools.count(0, 0.0005)))  # as many steps on every machine
    monkeypatch.setattr(clock, "time", ticks)
    model = Line()
    working = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    config = ClockConfig(seconds=0.6, learning_rate=0.2, ema=0.9, weight_decay=0.0)
    assert train_by_clock("line", model, working, working.loss, sampled, config, tmp_path)
    assert (model.layer.weight[0] - torch.tensor([1.0, -2.0, 0.5, 3.0])).abs().max() < 0.1
    rows = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"] and rows[-1]["rate"] < 0.5 * max(row["rate"] for row in rows)

    other = Line()
    config = ClockConfig(seconds=1e-9, learning_rate=1e-9, ema=0.9, weight_decay=0.0)
    train_by_clock("line", other, other, other.loss, sampled, config, tmp_path)
    assert torch.load(tmp_path / "line.pt", weights_only=True)["step"] > rows[-1]["step"] + 1 >= 2
    assert torch.allclose(other.layer.weight, model.layer.weight, atol=0.05)


def test_weights_before_a_gradient_that_is_not_finite_stay(tmp_path: Path) -> None:
    model = Line()
    config = ClockConfig(seconds=5.0, learning_rate=0.01, save_seconds=0.0)

    def explodes(step: int) -> Sampled:
        return sampled(step, 1.0 if step < 20 else 1e30)

    with pytest.raises(NotFiniteError, match="not finite near step 51; the last weights of line"):
        train_by_clock("line", model, model, model.loss, explodes, config, tmp_path)
    assert load_file(tmp_path / "line.safetensors")["layer.weight"].isfinite().all()


def test_the_loops_by_steps_and_by_the_clock_sample_the_same_scenes(focus: Focus) -> None:
    sampler = Sampler((SCENES, 4, 16, 16), focus.odds.cumsum(0), 8, Recipe(), 0, torch.device("cpu"))
    by_step = sampler(np.random.default_rng([0, 5]))
    assert torch.equal(by_step.scenes, sampler.on_device(5).scenes)
    assert not torch.equal(by_step.noise, sampler.on_device(5).noise)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--unet_mix", "0.5", "0.5", "0.5"], "add up to at most 1"),
        (["--unet_noisy", "1"], "between 0 and 0.9"),
        (["--unet_prefer", "-1"], "0 or more"),
        (["--unet_prefer", "1"], "needs weights to start from"),
        (["--unet_prefer", "1", "--unet_relations", "0.1"], "does not go together"),
        (["--unet_init", "nowhere.pt"], "no file nowhere.pt"),
    ],
)
def test_bad_flags_are_one_sentence(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert sentence in capsys.readouterr().err
