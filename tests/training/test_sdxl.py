"""Special features of SDXL: two encoders, pooled texts, sizes, its own kind of adapter."""

from dataclasses import replace

import pytest
import torch
from depth import depth
from diffusers import DDIMScheduler
from tolerances import rounding
from training_helpers import tiny_settings

from localctl.adapter import LocalAdapter
from localctl.control.image_controls import LocalAdapterControl
from localctl.data import Example, MaskedSamples, SampleRef, collate
from localctl.denoisers.unet import UNet
from localctl.masks import MaskConfig
from localctl.prompt_embeds import PromptEmbeds
from localctl.sampling import generate
from localctl.training.models import load_models
from localctl.training.step import sample_noise, training_step

HEIGHT, WIDTH = 64, 96


class Noise:
    """Make a batch of two images that are not square; the second has its original size and crop."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        pixels = torch.rand(3, HEIGHT, WIDTH, generator=generator) * 2 - 1
        condition = (torch.rand(1, HEIGHT, WIDTH, generator=generator) > 0.5).float()
        return Example(f"noise-{index}", pixels, condition, f"text {index}", original=(None, (200, 300, 8, 4))[index])


@pytest.fixture(scope="module")
def settings(sdxl_folder, tmp_path_factory):
    return tiny_settings(sdxl_folder, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def models(settings):
    return load_models(settings, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def batch():
    samples = MaskedSamples(Noise(), MaskConfig(), 0)
    return collate([samples[SampleRef(0, 0)], samples[SampleRef(1, 0)]])


def test_the_step_is_the_pipelines_own_arithmetic(batch, settings, models):
    sampled = replace(
        sample_noise(batch, models.latent_shape(HEIGHT, WIDTH), settings), empty_prompt=torch.tensor([False, True])
    )
    output = training_step(batch, models, settings, sampled)
    pipe = models.pipe
    with torch.no_grad():
        posterior = models.vae.encode(batch.pixels).latent_dist
        z0 = (posterior.mean + posterior.std * sampled.posterior) * models.vae.config.scaling_factor
        steps = ((1 - sampled.uniform**3) * 1000).long()
        noisy = DDIMScheduler.from_config(pipe.scheduler.config).add_noise(z0, sampled.noise, steps)
        # With guidance the pipeline returns the text and, as no negative prompt is given, what it guides away from.
        states, empty, pooled, empty_pooled = pipe.encode_prompt("text 0", device="cpu")
        ids = torch.cat(
            [
                pipe._get_add_time_ids((HEIGHT, WIDTH), (0, 0), (HEIGHT, WIDTH), torch.float32, 16),
                pipe._get_add_time_ids((200, 300), (8, 4), (HEIGHT, WIDTH), torch.float32, 16),
            ]
        )
        features = models.plain_adapter(torch.cat([batch.condition, batch.mask], dim=1))
        predicted = models.network(
            noisy,
            steps,
            torch.cat([states, empty]),
            added_cond_kwargs={"text_embeds": torch.cat([pooled, empty_pooled]), "time_ids": ids},
            down_intrablock_additional_residuals=features,
        ).sample
    expected = (predicted - sampled.noise).square().mean(dim=(1, 2, 3))
    texts = (pipe.text_encoder, pipe.text_encoder_2)
    passed = depth(models.vae.encoder, *texts, models.plain_adapter, models.network)
    assert torch.allclose(output.terms.denoising, expected, rtol=rounding(passed))
    output.loss.backward()
    for name, parameter in models.plain_adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    models.plain_adapter.zero_grad()


def test_texts_and_sizes_matter(batch, settings, models):
    sampled = sample_noise(batch, models.latent_shape(HEIGHT, WIDTH), settings)
    with torch.no_grad():
        plain, moved, other = (
            training_step(b, models, settings, sampled).terms.denoising
            for b in (
                batch,
                replace(batch, sizes=(None, (200, 300, 8, 40))),
                replace(batch, captions=("another text", batch.captions[1])),
            )
        )
    assert torch.equal(plain[:1], moved[:1]) and not torch.equal(plain[1:], moved[1:])
    assert torch.equal(plain[1:], other[1:]) and not torch.equal(plain[:1], other[:1])


def test_the_empty_text_is_what_the_pipeline_guides_away_from(models):
    empty = models.denoiser.empty_caption()
    assert not empty.states.any() and not empty.pooled.any()
    assert empty.states.shape == models.denoiser.encode_captions(["a"]).states.shape
    models.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        assert models.denoiser.empty_caption().states.any()
    finally:
        models.pipe.register_to_config(force_zeros_for_empty_prompt=True)


def test_time_ids_are_original_crop_and_target():
    texts = PromptEmbeds(torch.zeros(2, 1, 8), torch.zeros(2, 8))
    ids = UNet(torch.nn.Module()).conditioning(texts, (64, 96), [None, (1000, 1001, 3, 4)]).added["time_ids"]
    assert ids.tolist() == [[64, 96, 0, 0, 64, 96], [1000, 1001, 3, 4, 64, 96]] and ids.dtype == torch.float32


def test_a_trained_adapter_generates_with_the_pipeline(batch, settings, models, tmp_path):
    sampled = sample_noise(batch, models.latent_shape(HEIGHT, WIDTH), settings)
    optimizer = torch.optim.SGD(models.plain_adapter.parameters(), lr=1e-2)
    training_step(batch, models, settings, sampled).loss.backward()
    optimizer.step()
    models.plain_adapter.save_pretrained(tmp_path)
    adapter = LocalAdapter.from_pretrained(tmp_path)
    assert adapter.config.adapter_type == "full_adapter_xl" and adapter.size_multiple == 16
    plain, zero, steered = (
        generate(models.pipe, "text 0", controls, seeds=[0], num_inference_steps=2, height=HEIGHT, width=WIDTH)
        for controls in (
            [],
            [LocalAdapterControl(adapter, batch.condition[:1], torch.zeros_like(batch.mask[:1]))],
            [LocalAdapterControl(adapter, batch.condition[:1], batch.mask[:1])],
        )
    )
    assert plain.images[0].tobytes() == zero.images[0].tobytes() != steered.images[0].tobytes()


def test_sizes_that_the_adapter_cannot_take_are_named(models):
    models.check_size(64, 96)
    with pytest.raises(ValueError, match="88x64 pixels .* multiples of 16; choose another resolution"):
        models.check_size(64, 88)
