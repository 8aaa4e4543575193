from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from training_helpers import tiny_settings

from localctl.data import MaskedSamples, MicroScenes, SampleRef, collate
from localctl.masks import MaskConfig
from localctl.pipelines import BaseConfig
from localctl.sampling import generate
from localctl.training.adapter_plan import plan_adapter
from localctl.training.models import load_models
from localctl.training.settings import AdapterConfig
from localctl.training.state import check_trainable, set_cpu_threads

CPU = torch.device("cpu")


def test_the_adapter_fits_the_unet_and_is_made_from_the_seed(sd_folder, tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load_models(tiny_settings(sd_folder, tmp_path), CPU, None)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    second = load_models(tiny_settings(sd_folder, tmp_path), CPU, None)
    other = load_models(tiny_settings(sd_folder, tmp_path, seed=1), CPU, None)
    weights = [list(models.plain_adapter.parameters()) for models in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
    config = first.plain_adapter.config
    assert list(config.channels) == list(first.network.config.block_out_channels)
    assert config.condition["kind"] == "canny" and config.base == str(sd_folder)
    assert first.prediction_type == "epsilon" and first.num_train_timesteps == 1000


def test_an_adapter_finds_the_folder_of_its_base_from_anywhere(sd_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(sd_folder.parent)
    models = load_models(tiny_settings(sd_folder.name, tmp_path), CPU, None)
    assert models.plain_adapter.config.base == str(sd_folder.resolve())


def test_half_precision_bases_leave_the_adapter_float32(sd_folder, tmp_path):
    models = load_models(tiny_settings(sd_folder, tmp_path), CPU, torch.bfloat16)
    assert models.dtype == models.vae.dtype == torch.bfloat16
    assert {p.dtype for p in models.plain_adapter.parameters()} == {torch.float32}
    assert models.noise_table((64, 64)).dtype == torch.float32


def test_a_fit_is_demanded_before_any_weights_are_read(sd_folder, sdxl_folder, tmp_path, monkeypatch):
    load_models(tiny_settings(sd_folder, tmp_path, adapter=AdapterConfig(channels=(8, 16))), CPU, None)
    monkeypatch.setattr("localctl.training.frozen.load_pipeline", None)
    for base, options in (
        (sd_folder, {"channels": (8, 8)}),
        (sd_folder, {"downscale_factor": 16}),
        (sd_folder, {"channels": (8, 16, 16, 24, 24)}),
        (sd_folder, {"adapter_type": "full_adapter_xl"}),
        (sdxl_folder, {"adapter_type": "full_adapter"}),
        (sdxl_folder, {"downscale_factor": 8}),
    ):
        with pytest.raises(ValueError, match=r"the adapter would make .* takes .*adapter=auto"):
            load_models(tiny_settings(base, tmp_path, adapter=AdapterConfig(**options)), CPU, None)


def test_the_shape_that_each_base_wants(sd_folder, sdxl_folder, tmp_path):
    sd = plan_adapter(tiny_settings(sd_folder, tmp_path)).options
    xl = plan_adapter(tiny_settings(sdxl_folder, tmp_path)).options
    assert (sd["adapter_type"], sd["channels"], sd["downscale_factor"]) == ("full_adapter", [8, 16, 16, 24], 8)
    assert (xl["adapter_type"], xl["channels"], xl["downscale_factor"]) == ("full_adapter_xl", [8, 16, 16, 16], 16)
    for base, kind, channels in (
        ("sd15", "full_adapter", [320, 640, 1280, 1280]),
        ("sd21", "light_adapter", [320, 640, 1280]),
        ("sdxl", "full_adapter_xl", [320, 640, 1280, 1280]),
    ):
        settings = tiny_settings(base, tmp_path, adapter=AdapterConfig(adapter_type=kind))
        assert plan_adapter(settings).options["channels"] == channels


def test_half_precision_sdxl_keeps_its_vae_in_float32(sdxl_folder, tmp_path):
    models = load_models(tiny_settings(sdxl_folder, tmp_path), CPU, torch.bfloat16)
    assert models.dtype == torch.bfloat16 and models.vae.dtype == torch.float32
    seen = []
    models.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    image = generate(models.pipe, "a b", seeds=[0], height=64, width=96, num_inference_steps=2).images[0]
    assert seen == [torch.float32] and image.size == (96, 64)
    batch = collate([MaskedSamples(MicroScenes(count=1), MaskConfig(), 0)[SampleRef(0, 0)]])
    shape = models.latent_shape(128, 128)
    with torch.autocast("cpu", torch.bfloat16):
        latents = models.encode(batch, torch.zeros(1, *shape))
    exact = models.vae.encode(batch.pixels).latent_dist.mean * models.vae.config.scaling_factor
    assert torch.equal(latents, exact)


def test_another_vae_by_name(sd_folder, sdxl_folder, tmp_path):
    for place in (sdxl_folder / "vae", sdxl_folder):
        settings = replace(tiny_settings(sd_folder, tmp_path), base=BaseConfig(name=str(sd_folder), vae=str(place)))
        vae = load_models(settings, CPU, None).vae
        other = AutoencoderKL.from_pretrained(sdxl_folder / "vae")
        assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="The VAE '.*nowhere' could not be loaded .*; give a folder"):
        load_models(replace(settings, base=BaseConfig(name=str(sd_folder), vae=str(tmp_path / "nowhere"))), CPU, None)


def test_trainable_and_updated_must_be_the_same(sd_folder, tmp_path):
    models = load_models(tiny_settings(sd_folder, tmp_path), CPU, None)
    modules = {"adapter": models.plain_adapter, **models.frozen}
    adapter = list(models.plain_adapter.parameters())
    check_trainable(torch.optim.SGD(adapter, lr=1), modules)
    with pytest.raises(AssertionError, match="differ"):
        check_trainable(torch.optim.SGD(adapter[1:], lr=1), modules)
    models.network.conv_in.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="unet"):
        check_trainable(torch.optim.SGD(adapter, lr=1), modules)


def test_all_cores_where_the_launcher_left_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
    set_cpu_threads(None, 1, {})
    set_cpu_threads(None, 1, {"OMP_NUM_THREADS": "1"})
    set_cpu_threads(None, 1, launched | {"OMP_NUM_THREADS": "4"})
    set_cpu_threads(None, 1, launched, ["PATH", "OMP_NUM_THREADS"])  # set by the user, not by the launcher
    assert chosen == []
    set_cpu_threads(None, 1, launched)
    set_cpu_threads(None, 4, launched)
    set_cpu_threads(3, 1, {})
    assert chosen == [8, 2, 3]
