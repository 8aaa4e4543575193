import pytest
import torch
from training_helpers import tiny_settings

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
    assert list(config.channels) == list(first.unet.config.block_out_channels)
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
    assert models.alphas_cumprod.dtype == torch.float32


def test_a_fit_is_demanded(sd_folder, sdxl_folder, tmp_path):
    for options in ({"channels": (8, 8)}, {"downscale_factor": 16}, {"channels": (8, 16, 16, 24, 24)}):
        with pytest.raises(ValueError, match=r"the adapter would make .* takes .*adapter\.channels"):
            load_models(tiny_settings(sd_folder, tmp_path, adapter=AdapterConfig(**options)), CPU, None)
    load_models(tiny_settings(sd_folder, tmp_path, adapter=AdapterConfig(channels=(8, 16))), CPU, None)
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline"):
        load_models(tiny_settings(sdxl_folder, tmp_path), CPU, None)


def test_trainable_and_updated_must_be_the_same(sd_folder, tmp_path):
    models = load_models(tiny_settings(sd_folder, tmp_path), CPU, None)
    modules = {"adapter": models.plain_adapter, **models.frozen}
    adapter = list(models.plain_adapter.parameters())
    check_trainable(torch.optim.SGD(adapter, lr=1), modules)
    with pytest.raises(AssertionError, match="differ"):
        check_trainable(torch.optim.SGD(adapter[1:], lr=1), modules)
    models.unet.conv_in.weight.requires_grad_(True)
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
    assert chosen == []
    set_cpu_threads(None, 1, launched)
    set_cpu_threads(None, 4, launched)
    set_cpu_threads(3, 1, {})
    assert chosen == [8, 2, 3]
