"""The model side of training on transformers: noise, targets, z0' and steps of an adapter, which resume bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from families import SIDE, Family, token_adapter
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.latents import Schedule, outer_step, sigma_at
from localctl.denoisers import denoiser_of
from localctl.diffusion import (
    FLOW,
    add_noise,
    flow_alpha_bar,
    flow_shift,
    flow_sigmas,
    predict_x0,
    timesteps_from_uniform,
)
from localctl.losses import local_control_loss
from localctl.settings import LossConfig

pytest_plugins = ["families"]


def table_of(pipe: Any) -> Tensor:
    """alphas_cumprod, or sigma of flow matching, as training uses them."""
    scheduler = pipe.scheduler
    if denoiser_of(pipe).prediction_type != FLOW:
        return scheduler.alphas_cumprod
    return flow_sigmas(scheduler.config.num_train_timesteps, flow_shift(scheduler, 4))


def steps(pipe: Any, adapter: LocalAdapter, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    """Train on random latents, conditions and masks, each keyed by the number of its step; return the losses."""
    denoiser: Any = denoiser_of(pipe)
    table = table_of(pipe)
    conditioning = denoiser.condition("a cat", (SIDE, SIDE), 1.0, None)
    losses = []
    for number in numbers:
        rng = torch.Generator().manual_seed(number)
        latents, noise = torch.randn(2, 1, 4, 4, 4, generator=rng)
        x = torch.rand(1, 2, SIDE, SIDE, generator=rng)
        timesteps = timesteps_from_uniform(
            torch.rand(1, generator=rng, dtype=torch.float64), len(table), "logit_normal"
        )
        sample = add_noise(latents, noise, timesteps, table, denoiser.prediction_type)
        times = denoiser.times(timesteps, table)
        output = denoiser.output(sample.noisy, times, conditioning, adapter(x))
        terms = local_control_loss(sample, output, x[:, 1:], table, denoiser.prediction_type, LossConfig())
        optimizer.zero_grad()
        terms.total.mean().backward()
        optimizer.step()
        losses.append(float(terms.total.detach()))
    return losses


def fresh(pipe: Any) -> tuple[LocalAdapter, torch.optim.Optimizer]:
    adapter = token_adapter(pipe).requires_grad_(True).train()
    for layer in adapter.adapter.out:  # as a new adapter begins
        torch.nn.init.zeros_(layer.weight)
    return adapter, torch.optim.AdamW(adapter.parameters(), lr=1e-3)


def test_twenty_steps_are_finite_reach_every_tensor_and_resume_bit_for_bit(
    family: Family, dit: Any, tmp_path: Path
) -> None:
    adapter, optimizer = fresh(dit)
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    losses = steps(dit, adapter, optimizer, range(10))
    adapter.save_pretrained(tmp_path)
    state = optimizer.state_dict()
    again = LocalAdapter.from_pretrained(tmp_path).requires_grad_(True).train()
    other = torch.optim.AdamW(again.parameters(), lr=1e-3)
    other.load_state_dict(torch.load(_saved(state, tmp_path), weights_only=True))
    losses += steps(dit, adapter, optimizer, range(10, 20))
    steps(dit, again, other, range(10, 20))
    assert torch.tensor(losses).isfinite().all()
    for name, first, parameter, same in zip(
        dict(adapter.named_parameters()), before, adapter.parameters(), again.parameters(), strict=True
    ):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert (parameter - first).abs().max() > 0 and torch.equal(parameter, same), name
    assert all(parameter.grad is None for parameter in dit.transformer.parameters())


def _saved(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "optimizer.pt")
    return folder / "optimizer.pt"


def test_a_new_adapter_begins_at_the_base_s_own_output(family: Family, dit: Any) -> None:
    denoiser: Any = denoiser_of(dit)
    conditioning = denoiser.condition("a cat", (SIDE, SIDE), 1.0, None)
    noisy, times = torch.randn(1, 4, 4, 4), torch.tensor([500.0])
    adapter, _ = fresh(dit)
    features = adapter(torch.rand(1, 2, SIDE, SIDE))
    assert torch.equal(
        denoiser.output(noisy, times, conditioning, features), denoiser.output(noisy, times, conditioning)
    )


def test_the_clean_image_is_the_scheduler_s_own_prediction(family: Family, dit: Any) -> None:
    """Stepping from z_t with the model output ends, in one step to no noise, at z0'."""
    denoiser = denoiser_of(dit)
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=rng)
    table = table_of(dit)
    timesteps = torch.tensor([999, 600, 20])
    sample = add_noise(latents, noise, timesteps, table, denoiser.prediction_type)
    found = predict_x0(sample.noisy, sample.noisy.sin(), timesteps, table, denoiser.prediction_type)
    for row, timestep in enumerate(timesteps):
        if denoiser.prediction_type == FLOW:
            scheduler = dit.scheduler
            scheduler.set_timesteps(sigmas=[float(table[timestep])], mu=0.0)
            # set_timesteps shifts what it is given
            scheduler.sigmas[0] = table[timestep]
            expected = scheduler.step(sample.noisy[row].sin(), scheduler.timesteps[0], sample.noisy[row]).prev_sample
            noised = scheduler.scale_noise(latents[row : row + 1], scheduler.timesteps[:1], noise[row : row + 1])
            torch.testing.assert_close(sample.noisy[row], noised[0], rtol=1e-5, atol=1e-5)
        else:
            scheduler = DDIMScheduler.from_config(dit.scheduler.config, clip_sample=False)
            scheduler.set_timesteps(1000)
            step = scheduler.step(sample.noisy[row].sin(), timestep, sample.noisy[row])
            expected = step.pred_original_sample
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_sigma_is_the_ratio_of_noise_to_image_and_timesteps_may_be_rounded() -> None:
    """At the first step there is no image; pipelines pass timesteps in the denoiser's dtype."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    schedule = Schedule()
    for step, exact in enumerate(scheduler.timesteps):
        given = exact.to(torch.bfloat16).float()[None]
        time = schedule.time(scheduler, given)
        share = float(scheduler.sigmas[step])
        assert time == float(exact) and outer_step(scheduler, time) == (step, 4)
        assert sigma_at(scheduler, time) == pytest.approx(min(share / max(1 - share, 1e-9), 4096))
        scheduler.step(torch.zeros(1, 1), exact, torch.zeros(1, 1))
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="called at timestep 500.0, which is not on the pipeline's schedule"):
        schedule.time(scheduler, torch.tensor([500.0]))


def test_flow_timesteps_favour_the_middle_and_shift_with_the_resolution() -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    times = timesteps_from_uniform(u, 1000, "logit_normal").double() / 1000
    logits = (times.clamp(0.0005, 0.9995) + 0.0005).logit()
    assert abs(float(logits.mean())) < 0.01 and abs(float(logits.std()) - 1) < 0.02
    fixed = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert flow_shift(fixed, 1024) == 3
    torch.testing.assert_close(flow_sigmas(1000, 3.0).flip(0), fixed.sigmas, rtol=1e-5, atol=1e-6)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=[0.5], mu=0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256))
    assert float(dynamic.sigmas[0]) == pytest.approx(float(flow_sigmas(1000, flow_shift(dynamic, 1024))[499]), rel=1e-5)
    assert flow_shift(dynamic, 4096) > flow_shift(dynamic, 256)
    abar = flow_alpha_bar(torch.tensor([0.5, 1.0]))
    assert abar.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 8192])
def test_flux_2_is_trained_with_the_shift_of_200_steps(tokens: int) -> None:
    """The limit of many steps; with fewer of them, the pipeline moves noise levels of smaller images further."""
    config = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}  # as published
    scheduler = FlowMatchEulerDiscreteScheduler(**config, base_image_seq_len=256, max_image_seq_len=4096)
    assert flow_shift(scheduler, tokens) == pytest.approx(math.exp(compute_empirical_mu(tokens, 200)), rel=1e-3)
    assert (compute_empirical_mu(tokens, 28) > compute_empirical_mu(tokens, 200)) == (tokens <= 4300)
