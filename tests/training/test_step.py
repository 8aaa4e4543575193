import threading
from dataclasses import replace

import pytest
import torch
from depth import depth
from diffusers import DDIMScheduler
from tolerances import rounding
from training_helpers import tiny_settings

from localctl.data import MaskedSamples, MicroScenes, SampleRef, collate
from localctl.diffusion import decode, posterior
from localctl.losses import edge_loss, soft_edges
from localctl.masks import MaskConfig
from localctl.prompt_embeds import PromptEmbeds
from localctl.training.halves import in_halves
from localctl.training.models import load_models
from localctl.training.step import StepNoise, sample_noise, training_step

SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def settings(sd_folder, tmp_path_factory):
    return tiny_settings(sd_folder, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def models(settings):
    return load_models(settings, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def samples():
    return MaskedSamples(MicroScenes(count=4), MaskConfig(), 0)


def batch_of(samples, *refs):
    return collate([samples[SampleRef(*ref)] for ref in refs])


def rows(sampled, *index):
    return StepNoise(
        *(getattr(sampled, name)[list(index)] for name in ("posterior", "noise", "uniform", "empty_prompt"))
    )


def assert_same(a, b):
    for name in ("posterior", "noise", "uniform", "empty_prompt"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_noise_depends_on_seed_epoch_and_sample_not_on_the_batch(samples, settings):
    both = sample_noise(batch_of(samples, (0, 0), (1, 3)), SHAPE, settings)
    torch.rand(5)
    assert_same(rows(both, 1), sample_noise(batch_of(samples, (1, 3)), SHAPE, settings))
    assert_same(rows(both, 1, 0), sample_noise(batch_of(samples, (1, 3), (0, 0)), SHAPE, settings))
    for other in (
        sample_noise(batch_of(samples, (1, 2)), SHAPE, settings),
        sample_noise(batch_of(samples, (1, 3)), SHAPE, replace(settings, seed=1)),
    ):
        assert not torch.equal(other.noise, both.noise[1:]) and not torch.equal(other.uniform, both.uniform[1:])


def test_the_random_values_of_one_sample_are_independent_of_each_other(samples, settings):
    sampled = sample_noise(batch_of(samples, (0, 0)), SHAPE, settings)
    assert abs(torch.corrcoef(torch.stack([sampled.noise.flatten(), sampled.posterior.flatten()]))[0, 1]) < 0.15


def test_the_share_of_empty_prompts(samples, settings):
    refs = [(i % 4, i) for i in range(400)]
    keys = [f"basic-train-{i}" for i, _ in refs]
    one = batch_of(samples, (0, 0))
    many = replace(one, keys=tuple(keys), epochs=tuple(e for _, e in refs))
    share = sample_noise(many, (1, 1, 1), replace(settings, proportion_empty_prompts=0.3)).empty_prompt.double().mean()
    assert 0.22 < share < 0.38
    assert not sample_noise(many, (1, 1, 1), replace(settings, proportion_empty_prompts=0.0)).empty_prompt.any()
    assert sample_noise(many, (1, 1, 1), replace(settings, proportion_empty_prompts=1.0)).empty_prompt.all()


def test_the_step_is_the_diffusion_loss_with_the_adapter_in_the_unet(samples, settings, models):
    """The reference is computed with diffusers' scheduler and the pipeline's encoders."""
    batch = batch_of(samples, (0, 0), (1, 0))
    sampled = replace(sample_noise(batch, SHAPE, settings), empty_prompt=torch.tensor([False, True]))
    output = training_step(batch, models, settings, sampled)
    with torch.no_grad():
        posterior = models.vae.encode(batch.pixels).latent_dist
        z0 = (posterior.mean + posterior.std * sampled.posterior) * models.vae.config.scaling_factor
        steps = ((1 - sampled.uniform**3) * 1000).long()
        scheduler = DDIMScheduler.from_config(models.pipe.scheduler.config)
        noisy = scheduler.add_noise(z0, sampled.noise, steps)
        states, _ = models.pipe.encode_prompt([batch.captions[0], ""], "cpu", 1, False)
        features = models.plain_adapter(torch.cat([batch.condition, batch.mask], dim=1))
        predicted = models.network(noisy, steps, states, down_intrablock_additional_residuals=features).sample
    expected = (predicted - sampled.noise).square().mean(dim=(1, 2, 3))
    assert torch.equal(output.timesteps, steps)
    passed = depth(models.vae.encoder, models.pipe.text_encoder, models.plain_adapter, models.network)
    assert torch.allclose(output.terms.denoising, expected, rtol=rounding(passed))
    assert torch.allclose(output.loss, (output.terms.denoising + output.terms.local).mean())
    assert (output.terms.local > 0).all()


def test_without_a_mask_the_adapter_has_no_say(samples, settings, models):
    batch = replace(batch_of(samples, (0, 0)), mask=torch.zeros(1, 1, 128, 128))
    sampled = sample_noise(batch, SHAPE, settings)
    output = training_step(batch, models, settings, sampled)
    with torch.no_grad():
        other = training_step(replace(batch, condition=1 - batch.condition), models, settings, sampled)
    assert torch.equal(output.terms.denoising, other.terms.denoising)
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in models.plain_adapter.parameters())
    models.plain_adapter.zero_grad()


def test_the_gradient_passes_the_frozen_parts_and_stays_out_of_them(samples, settings, models):
    batch = batch_of(samples, (0, 0), (1, 0))
    training_step(batch, models, settings, sample_noise(batch, SHAPE, settings)).loss.backward()
    for name, parameter in models.plain_adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(p.grad is None for part in models.frozen.values() for p in part.parameters())
    assert not any(part.training for part in models.frozen.values())
    models.plain_adapter.zero_grad()


def test_the_loss_settings_reach_the_loss(samples, settings, models):
    batch = batch_of(samples, (0, 0))
    sampled = sample_noise(batch, SHAPE, settings)
    heavy = replace(settings, loss=replace(settings.loss, weight=1000 * settings.loss.weight))
    plain = replace(settings, loss=replace(settings.loss, filter="none"))
    with torch.no_grad():
        base, much, none = (training_step(batch, models, s, sampled).terms for s in (settings, heavy, plain))
    assert torch.allclose(much.local, base.local * 1000) and not none.local.any()


EDGES = {"filter": "edges", "schedule": "constant", "weight": 0.5, "normalise": "mask"}


def test_edges_of_the_decoded_image_are_compared_with_the_condition(samples, settings, models):
    """In halves as well, and through the frozen VAE, which gets no gradient."""
    batch = batch_of(samples, (0, 0), (1, 0))
    edges = replace(settings, loss=replace(settings.loss, **EDGES), timestep_sampling="uniform")
    output, gradients = step_and_gradients(batch, models, edges)
    pixels = decode(models.vae, output.terms.predicted_x0)
    expected = edge_loss(soft_edges(pixels, edges.condition), batch.condition, batch.mask, (1, 2, 4))
    torch.testing.assert_close(output.terms.local_raw, expected)
    _, without = step_and_gradients(batch, models, replace(edges, loss=replace(edges.loss, weight=0.0)))
    assert any(not torch.equal(a, b) for a, b in zip(gradients, without, strict=True))
    assert all(p.grad is None for p in models.vae.parameters())
    torch.set_num_threads(2)
    halves, _ = step_and_gradients(batch, models, edges)
    assert torch.allclose(halves.terms.local, output.terms.local, rtol=1e-3)
    other = replace(batch, condition=batch.condition.flip(-1))
    assert not torch.equal(step_and_gradients(other, models, edges)[0].terms.local, halves.terms.local)


def test_timesteps_are_sampled_as_the_settings_say(samples, settings, models):
    batch = batch_of(samples, *((index % 4, index // 4) for index in range(8)))
    sampled = sample_noise(batch, SHAPE, settings)

    def times(**changes):
        with torch.no_grad():
            return training_step(batch, models, replace(settings, **changes), sampled).timesteps

    uniform = times(timestep_sampling="uniform")
    assert torch.equal(times(timestep_sampling="uniform", timestep_range=(0.0, 1.0)), uniform)
    inside = times(timestep_sampling="uniform", timestep_range=(0.4, 0.6))
    assert torch.equal(inside, ((0.4 + (0.6 - 0.4) * sampled.uniform) * 1000).long())
    narrow = times(timestep_sampling="logit_normal", logit_mean=0.5, logit_std=0.01)
    assert ((narrow - 622).abs() <= 10).all()  # 1000 / (1 + exp(-0.5))


def cached(batch, models):
    """The batch as it comes from a cache: its moments and the embeddings of its captions with it."""
    mean, std = posterior(models.vae, batch.pixels)
    texts = PromptEmbeds.join([models.denoiser.encode_captions([caption]) for caption in batch.captions])
    return replace(batch, moments=torch.cat([mean, std], dim=1), texts=texts)


def test_edges_are_compared_alike_from_a_cache(samples, settings, models):
    """The decoder is used though nothing is encoded, and only where noise is low."""
    loss = replace(settings.loss, **EDGES | {"schedule": "low_noise", "snr_min": 0.25})
    edges = replace(settings, loss=loss, timestep_sampling="uniform")
    batch = batch_of(samples, (0, 0), (1, 0), (2, 3))
    made = replace(sample_noise(batch, SHAPE, settings), uniform=torch.tensor([0.1, 0.99, 0.2], dtype=torch.float64))
    with torch.no_grad():
        live, ready = (training_step(one, models, edges, made).terms for one in (batch, cached(batch, models)))
    torch.testing.assert_close(ready.local, live.local, rtol=1e-4, atol=1e-6)
    assert (live.local > 0).tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_was_encoded_before_is_not_encoded_again(kind, samples, request, tmp_path, monkeypatch):
    settings = tiny_settings(request.getfixturevalue(f"{kind}_folder"), tmp_path)
    models = load_models(settings, torch.device("cpu"), None)
    batch = batch_of(samples, (0, 0), (1, 0), (2, 3))
    made = sample_noise(batch, models.latent_shape(128, 128), settings)
    made = replace(made, empty_prompt=torch.tensor([False, True, False]))
    live = training_step(batch, models, settings, made).terms.total
    ready = cached(batch, models)
    empty = models.denoiser.empty_caption()
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if hasattr(models.pipe, part):
            monkeypatch.setattr(getattr(models.pipe, part), "forward", None)
    monkeypatch.setattr(models.vae, "encode", None)
    models.empty_text = empty
    torch.testing.assert_close(training_step(ready, models, settings, made).terms.total, live, rtol=1e-5, atol=1e-6)
    alone = replace(made, empty_prompt=torch.tensor([False, False, False]))
    assert not torch.equal(training_step(ready, models, settings, alone).terms.total, live)


def test_examples_bring_their_encodings_and_leave_their_pixels_behind(samples):
    first, second = (samples[SampleRef(i, 0)] for i in (0, 1))
    text = PromptEmbeds(torch.rand(1, 77, 16), torch.rand(1, 16))
    with_both = [replace(e, moments=torch.rand(8, 16, 16), text=text) for e in (first, second)]
    batch = collate(with_both)
    assert batch.moments.shape == (2, 8, 16, 16) and len(batch.texts) == 2 and batch.texts.pooled.shape == (2, 16)
    moved = batch.to("meta")
    assert moved.pixels.device.type == "cpu"
    assert {t.device.type for t in (moved.moments, moved.condition, moved.mask, moved.texts.states)} == {"meta"}
    part = collate([with_both[0], second]).to("meta")
    assert part.moments is part.texts is None and part.pixels.device.type == "cpu"  # the VAE fetches them


def test_feature_statistics_are_those_before_the_mask(samples, settings, models):
    batch = batch_of(samples, (0, 0), (1, 3))
    output = training_step(batch, models, settings, sample_noise(batch, SHAPE, settings))
    features = models.plain_adapter.adapter(batch.condition)
    assert output.feature_mean.shape == output.feature_var.shape == (2, len(features))
    assert not output.feature_mean.requires_grad
    for level, feature in enumerate(features):
        flat = feature.detach().flatten(1)
        torch.testing.assert_close(output.feature_mean[:, level], flat.mean(dim=1))
        torch.testing.assert_close(output.feature_var[:, level], flat.var(dim=1, correction=0))
    assert not models.plain_adapter.adapter._forward_hooks


def step_and_gradients(batch, models, settings):
    output = training_step(batch, models, settings, sample_noise(batch, SHAPE, settings))
    return output, torch.autograd.grad(output.loss / 2, list(models.plain_adapter.parameters()))


def test_halves_at_once_give_the_loss_and_the_gradients_of_the_whole_batch(samples, settings, models):
    batch = batch_of(samples, (0, 0), (1, 0), (2, 0))  # an odd number
    whole, gradients = step_and_gradients(batch, models, settings)
    assert torch.get_num_threads() == 1 and whole.terms.denoising.requires_grad
    torch.set_num_threads(2)
    halves, their_gradients = step_and_gradients(batch, models, settings)
    assert not halves.terms.denoising.requires_grad and torch.get_num_threads() == 2
    passed = depth(models.vae.encoder, models.pipe.text_encoder, models.plain_adapter, models.network)
    for name in ("denoising", "local", "local_raw"):
        assert torch.allclose(getattr(halves.terms, name), getattr(whole.terms, name), rtol=rounding(passed)), name
    assert halves.loss.item() == pytest.approx(whole.loss.item(), rel=rounding(passed))
    for half, one in zip(their_gradients, gradients, strict=True):
        assert torch.allclose(half, one, rtol=0, atol=one.abs().max().item() * rounding(2 * passed))
    again, same = step_and_gradients(batch, models, settings)
    assert torch.equal(halves.terms.total, again.terms.total)
    assert all(torch.equal(a, b) for a, b in zip(their_gradients, same, strict=True))


def test_halves_at_once_share_the_threads(samples, settings, models, monkeypatch):
    torch.set_num_threads(2)
    seen = []
    forward = models.network.forward

    def watched(sample, *arguments, **options):
        seen.append((threading.get_ident(), torch.get_num_threads(), len(sample)))
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(models.network, "forward", watched)
    batch = batch_of(samples, (0, 0), (1, 0), (2, 0), (3, 0))
    with torch.no_grad():
        assert not training_step(batch, models, settings, sample_noise(batch, SHAPE, settings)).loss.requires_grad
    assert len({thread for thread, _, _ in seen}) == 2 and [rest for _, *rest in seen] == [[1, 2]] * 2


def test_images_are_encoded_in_halves_without_gradients_and_as_alone(samples, models, monkeypatch):
    torch.set_num_threads(2)
    batch = batch_of(samples, (0, 0), (1, 0), (2, 0))
    sizes, encode = [], models.vae.encode
    monkeypatch.setattr(models.vae, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    noise = torch.zeros(3, *SHAPE)
    latents = models.encode(batch, noise)
    assert sizes == [2, 2] and not latents.requires_grad  # equal halves: bits do not depend on the place in the batch
    torch.set_num_threads(1)
    whole = models.encode(batch, noise)
    assert sizes[2:] == [3]
    assert torch.allclose(latents, whole, rtol=0, atol=whole.abs().max().item() * rounding(depth(models.vae.encoder)))


@pytest.mark.parametrize("threads", [1, 2])
def test_no_block_is_larger_than_asked_and_all_have_one_size(threads):
    torch.set_num_threads(threads)
    for count in range(1, 12):
        rows = torch.arange(count, dtype=torch.float32)[:, None]
        for most in (1, 2, 3, 5, 12):
            sizes = []
            found = in_halves(lambda block, sizes=sizes: sizes.append(len(block)) or block * 2, rows, most)
            assert torch.equal(found, rows * 2)
            assert len(set(sizes)) == 1 and sizes[0] <= most and sum(sizes) < count + sizes[0]
            assert threads == 1 or count == 1 or len(sizes) > 1


def test_a_cpu_encodes_large_images_in_blocks(samples, models, monkeypatch):
    torch.set_num_threads(1)
    batch = batch_of(samples, *((index, epoch) for index in range(3) for epoch in range(3)))
    sizes, encode = [], models.vae.encode
    monkeypatch.setattr(models.vae, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    models.encode(batch, torch.zeros(9, *SHAPE))
    assert sizes == [5, 5]  # 9 images of 128 px do not fit in a block


def test_an_error_in_a_half_is_raised_and_threads_are_restored(samples, settings, models, monkeypatch):
    torch.set_num_threads(2)
    main = threading.get_ident()

    def broken(*arguments, **options):
        if threading.get_ident() != main:
            raise MemoryError("in the second half")
        return forward(*arguments, **options)

    forward = models.network.forward
    monkeypatch.setattr(models.network, "forward", broken)
    batch = batch_of(samples, (0, 0), (1, 0))
    with pytest.raises(MemoryError, match="in the second half"):
        training_step(batch, models, settings, sample_noise(batch, SHAPE, settings))
    assert torch.get_num_threads() == 2
