import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from tolerances import rounding

from localctl import diffusion as d

SHAPE = (3, 4, 6, 5)
FEW = rounding(5)  # a conversion is roots, two products, a sum and a quotient


@pytest.fixture
def alphas() -> torch.Tensor:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def draw(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(SHAPE, generator=g, dtype=dtype) for _ in range(2))
    return latents, noise, torch.tensor([0, 400, 999])


def test_round_trips_float64(alphas: torch.Tensor) -> None:
    latents, noise, t = draw()
    alphas = alphas.double()
    sample = d.add_noise(latents, noise, t, alphas)
    a = d.gather_alpha_bar(alphas, t)
    v = d.velocity(latents, noise, a)
    torch.testing.assert_close(d.x0_from_eps(sample.noisy, noise, a), latents, rtol=0, atol=1e-11)
    torch.testing.assert_close(d.x0_from_v(sample.noisy, v, a), latents, rtol=0, atol=1e-11)


def test_alpha_bar_may_be_one_number_and_half_stays_half() -> None:
    latents, noise, _ = draw()
    a = torch.tensor(0.3, dtype=torch.float64)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    torch.testing.assert_close(d.x0_from_eps(noisy, noise, a), latents)
    half = d.x0_from_eps(noisy.half(), noise.half(), a)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), latents, rtol=0, atol=1e-2)


def test_add_noise_equals_the_scheduler(alphas: torch.Tensor) -> None:
    latents, noise, t = draw(torch.float32)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sample = d.add_noise(latents, noise, t, alphas)
    atol = FEW * float(latents.abs().max() + noise.abs().max())
    torch.testing.assert_close(sample.noisy, scheduler.add_noise(latents, noise, t), rtol=0, atol=atol)
    assert sample.latents is latents and sample.noise is noise and sample.timesteps is t


@pytest.mark.parametrize("scheduler_type", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("prediction_type", d.PREDICTION_TYPES)
def test_equals_pred_original_sample_of_the_scheduler(scheduler_type: type, prediction_type: str) -> None:
    scheduler = scheduler_type(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
    )
    scheduler.set_timesteps(1000)
    noisy, output, t = draw(torch.float32)
    ours = d.predict_x0(noisy, output, t, scheduler.alphas_cumprod, prediction_type)
    for i in range(len(t)):  # schedulers step one timestep at a time
        theirs = scheduler.step(output[i : i + 1], int(t[i]), noisy[i : i + 1]).pred_original_sample
        # The difference of two numbers, which may be much larger, over the root of abar.
        terms = float(noisy[i].abs().max() + output[i].abs().max()) / float(scheduler.alphas_cumprod[t[i]]) ** 0.5
        torch.testing.assert_close(ours[i : i + 1], theirs, rtol=0, atol=FEW * terms)


@pytest.mark.parametrize("prediction_type", d.PREDICTION_TYPES)
def test_the_training_target_predicts_the_clean_latents(alphas: torch.Tensor, prediction_type: str) -> None:
    latents, noise, t = draw()
    sample = d.add_noise(latents, noise, t, alphas.double())
    target = d.training_target(sample, alphas.double(), prediction_type)
    predicted = d.predict_x0(sample.noisy, target, t, alphas.double(), prediction_type)
    torch.testing.assert_close(predicted, latents, rtol=0, atol=1e-11)


def test_velocity_equals_the_scheduler() -> None:
    latents, noise, t = draw(torch.float32)
    scheduler = DDPMScheduler()
    sample = d.add_noise(latents, noise, t, scheduler.alphas_cumprod)
    ours = d.training_target(sample, scheduler.alphas_cumprod, "v_prediction")
    atol = FEW * float(latents.abs().max() + noise.abs().max())
    torch.testing.assert_close(ours, scheduler.get_velocity(latents, noise, t), rtol=0, atol=atol)


def test_unknown_prediction_type_is_named() -> None:
    latents, noise, t = draw()
    alphas = torch.linspace(0.99, 0.01, 1000)
    with pytest.raises(ValueError, match="'eps'.*epsilon, v_prediction, sample"):
        d.predict_x0(latents, noise, t, alphas, "eps")
    with pytest.raises(ValueError, match="'eps'"):
        d.training_target(d.add_noise(latents, noise, t, alphas), alphas, "eps")


def test_zero_terminal_snr_needs_v_prediction() -> None:
    alphas: torch.Tensor = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod  # type: ignore[attr-defined]
    assert alphas[-1] == 0
    with pytest.raises(ValueError, match="v_prediction"):
        d.check_schedule(alphas, "epsilon")
    d.check_schedule(alphas, "v_prediction")
    d.check_schedule(DDPMScheduler().alphas_cumprod, "epsilon")
    noisy, v, t = draw()
    assert torch.isfinite(d.predict_x0(noisy, v, t, alphas, "v_prediction")).all()


def test_timesteps() -> None:
    ends = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert d.timesteps_from_uniform(ends, 1000).tolist() == [0, 500, 999]
    assert d.timesteps_from_uniform(ends, 1000, "cubic").tolist() == [999, 875, 0]
    u = (torch.arange(100_000) + 0.5) / 100_000
    uniform, cubic = d.timesteps_from_uniform(u, 1000), d.timesteps_from_uniform(u, 1000, "cubic")
    assert uniform.dtype == torch.int64
    assert torch.bincount(uniform, minlength=1000).unique().tolist() == [100]
    assert cubic.min() >= 0 and cubic.max() == 999 and cubic.double().mean() == pytest.approx(749.5, abs=1)
    with pytest.raises(ValueError, match="'linear'.*uniform, cubic"):
        d.timesteps_from_uniform(u, 1000, "linear")
    middle = d.timesteps_from_uniform(u, 1000, "logit_normal")
    assert d.timesteps_from_uniform(ends, 1000, "logit_normal").tolist()[:2] == [0, 500]
    assert abs(float(middle.float().median()) - 500) < 25 and float(middle.float().std()) < float(uniform.float().std())
    high = d.timesteps_from_uniform(u, 1000, "logit_normal", 1.0, 0.5, (0.2, 0.8))
    assert high.min() >= 200 and high.max() < 800
    assert abs(float(high.float().median()) - (200 + 600 * 0.731)) < 25  # sigmoid(1)


def test_latent_size_rounds_up() -> None:
    assert d.latent_size(512, 768) == (64, 96)
    assert d.latent_size(513, 1) == (65, 1)
    assert d.latent_size(9, 9, factor=4) == (3, 3)


def tiny_vae(**scale: object) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=2, scaling_factor=0.5, **scale)
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "scale", [{}, {"shift_factor": 0.25}, {"latents_mean": [0.5, -1.0], "latents_std": [2.0, 4.0]}]
)
def test_the_codec_scales_as_the_config_says(scale: dict) -> None:
    """As the SDXL and SD3 pipelines scale their latents; and back by the decoder, with a gradient."""
    vae = tiny_vae(**scale)
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean = vae.encode(pixels).latent_dist.mean
    centre = torch.tensor(scale.get("latents_mean", [scale.get("shift_factor", 0.0)] * 2)).view(1, 2, 1, 1)
    width = torch.tensor(scale.get("latents_std", [1.0, 1.0])).view(1, 2, 1, 1)
    latents = d.encode(vae, pixels).requires_grad_(True)
    assert torch.equal(latents, (mean - centre) * 0.5 / width) and latents.dtype == torch.float32
    decoded = d.decode(vae, latents)
    torch.testing.assert_close(decoded, vae.decode(mean).sample, rtol=0, atol=1e-5)
    assert torch.autograd.grad(decoded.sum(), latents)[0].abs().sum() > 0


def test_the_codec_keeps_to_the_dtype_of_the_vae() -> None:
    vae = tiny_vae().to(torch.bfloat16)
    pixels = torch.zeros(1, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        mean, std = d.posterior(vae, pixels)
    assert mean.dtype == std.dtype == torch.float32 and torch.equal(mean, vae.encode(pixels.bfloat16())[0].mean.float())
    assert d.decode(vae, d.encode(vae, pixels)).dtype == d.reconstruct(vae, pixels).dtype == torch.bfloat16


def test_a_round_trip_of_images_is_that_of_each() -> None:
    vae, images = tiny_vae(), np.random.default_rng(0).integers(0, 256, (18, 4, 4, 3), dtype=np.uint8)
    decoded = d.round_trip(vae, images)
    assert decoded.dtype == np.uint8 and decoded.shape == images.shape
    pixels = torch.from_numpy(images[17:]).permute(0, 3, 1, 2) / 127.5 - 1
    alone = (d.reconstruct(vae, pixels).clamp(-1, 1) + 1) * 127.5
    assert np.abs(alone[0].permute(1, 2, 0).numpy() - decoded[17]).max() <= 0.51
