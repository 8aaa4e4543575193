"""Training on transformers through the command line: every family, kill and resume, caches, latents, large bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from families import FAMILIES
from file_data import write_imagefolder
from training_helpers import loss_log
from transformers import CLIPModel, CLIPTokenizer

from localctl.adapter import LocalAdapter
from localctl.bases import BASES, MICRO_WEIGHTS, BaseConfig
from localctl.cli.cache import main as cache
from localctl.cli.train import main as train
from localctl.control.image_controls import LocalAdapterControl
from localctl.denoisers import denoiser_of
from localctl.diffusion import flow_sigmas, x0_from_flow
from localctl.pipelines import load_pipeline
from localctl.sampling import generate
from localctl.training.cost import report
from localctl.training.models import load_models
from localctl.training.settings import AdapterConfig, TrainSettings
from research.micro_base.transformer import new_pipeline, new_transformer

pytest_plugins = ["families"]
CPU = torch.device("cpu")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "sd3"]
Folders = Callable[[str], Path]


def arguments(base: Path | str, output: Path, *more: str, steps: int = 2) -> list[str]:
    return [
        *(
            f"base={base}",
            f"output_dir={output}",
            f"max_train_steps={steps}",
            "adapter.token_width=8",
            "report_to=none",
        ),
        *("data.count=4", "train_batch_size=2", "lr_warmup_steps=1", "lr_scheduler=constant"),
        *("logging_steps=1", "validation_steps=0", "checkpointing_steps=1", "adapter.channels=[16, 16]", *more),
    ]


def exported(folder: Path) -> LocalAdapter:
    return LocalAdapter.from_pretrained(folder / "adapter")


def same(first: LocalAdapter, second: LocalAdapter) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def shape_of(name: str) -> tuple[str, ...]:
    """The tiny transformer of FLUX.2 has another width."""
    return ("adapter.channels=[32, 32]",) if name == "flux2" else ()


@pytest.mark.parametrize("name", ["sd3", *OTHERS])
def test_a_training_resumes_bit_for_bit_and_its_adapter_acts_inside_the_mask(
    name: str, family_folders: Folders, tmp_path: Path
) -> None:
    family, base, own = FAMILIES[name], family_folders(name), shape_of(name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    seen = ("validation_steps=3", "validation.count=1", "validation.num_inference_steps=1")
    assert train(arguments(base, whole, *own, *seen, steps=3)) == 0
    assert train(arguments(base, parts, *own, steps=1)) == 0
    assert train(arguments(base, parts, *own, "resume_from_checkpoint=latest", steps=3)) == 0
    assert loss_log(parts) == loss_log(whole) and same(exported(parts), exported(whole))
    assert (whole / "validation/step-000003.png").exists() and not (whole / "t2iadapter").exists()
    assert "T2I" not in (whole / "README.md").read_text()
    adapter = exported(whole)
    assert adapter.config["adapter_type"] == "token_adapter" and any(
        layer.weight.any() for layer in adapter.adapter.out
    )
    pipe, side = load_pipeline(str(base)), 32
    condition, mask = torch.ones(1, 1, side, side), torch.zeros(1, 1, side, side)
    guided = {"num_inference_steps": 1, "height": side, "width": side, "output_type": "np"} | family.call | family.plain
    plain, off, on = (
        generate(pipe, "a cat", controls, seeds=0, **guided).images[0]
        for controls in (
            [],
            [LocalAdapterControl(adapter, condition, mask)],
            [LocalAdapterControl(adapter, condition, mask + 1, weight=1e3)],
        )
    )
    assert (plain == off).all() and (plain != on).any()


@pytest.mark.parametrize("name", ["sd3", *OTHERS])
def test_a_training_from_a_cache_is_that_of_the_images(name: str, family_folders: Folders, tmp_path: Path) -> None:
    base, store = family_folders(name), f"data.encodings_dir={tmp_path / 'store'}"
    own = shape_of(name)
    assert cache(arguments(base, tmp_path, *own, store, "num_workers=0")) == 0
    assert train(arguments(base, tmp_path / "live", *own)) == 0
    assert train(arguments(base, tmp_path / "cached", *own, store)) == 0
    for first, second in zip(exported(tmp_path / "live").parameters(), exported(tmp_path / "cached").parameters(),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(first, second, rtol=0, atol=2e-5)


def test_a_cache_of_other_text_lengths_is_refused(
    family_folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, store = family_folders("sd3"), f"data.encodings_dir={tmp_path / 'store'}"
    assert cache(arguments(base, tmp_path, store, "num_workers=0", "max_sequence_length=8")) == 0
    assert train(arguments(base, tmp_path / "out", store)) == 2
    assert "tokens (8 in the cache, None here)" in capsys.readouterr().err
    assert cache(arguments(base, tmp_path, store, "num_workers=0", "max_sequence_length=513")) == 2
    assert "max_sequence_length is 513, but a StableDiffusion3Pipeline reads" in capsys.readouterr().err


@pytest.mark.slow
def test_the_small_transformer_of_the_embedded_scenes_is_a_base(tmp_path: Path) -> None:
    """Without T5, whose place may stay empty; its tokens are single latents."""
    clip = CLIPModel.from_pretrained(MICRO_WEIGHTS / "clip")
    vae = AutoencoderKL.from_pretrained(MICRO_WEIGHTS / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "tokenizer")
    new_pipeline(vae, clip, tokenizer, new_transformer()).save_pretrained(tmp_path / "base")
    seen = ("validation_steps=1", "validation.count=1", "validation.num_inference_steps=1", "max_sequence_length=0")
    own = [one for one in arguments(tmp_path / "base", tmp_path / "out", *seen, steps=1) if "channels" not in one]
    assert train(own) == 0
    config = exported(tmp_path / "out").config
    assert (config["downscale_factor"], list(config["channels"])) == (8, [160] * 6)


def test_files_of_a_size_of_their_own_are_trained_on_and_long_captions_are_counted(
    family_folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 x 32 pixels are 4 x 2 tokens; sizes that are no multiples of a token are refused."""
    data = write_imagefolder(tmp_path / "data")
    own = [f"data.path={data}", "data.mask_column=mask", "max_sequence_length=4", "num_train_epochs=1"]
    base, output = family_folders("sd3"), tmp_path / "out"
    assert train(arguments(base, output, *own, "data.resolution=64x32", steps=1)) == 0
    assert "captions seen were longer than 4 tokens and truncated" in capsys.readouterr().out
    assert train(arguments(base, output, *own, "data.resolution=40", "overwrite_output_dir=true")) == 2
    assert "needs multiples of 16" in capsys.readouterr().err


def settings_of(base: Path, tmp_path: Path, width: int = 16, **changes: Any) -> TrainSettings:
    adapter = AdapterConfig(channels=(width, width), token_width=8)
    return TrainSettings(
        base=BaseConfig(name=str(base)), adapter=adapter, output_dir=str(tmp_path), validation_steps=0, **changes
    )


def test_a_condition_may_be_given_as_latents(family_folders: Folders, tmp_path: Path) -> None:
    base = family_folders("sd3")
    assert train(arguments(base, tmp_path / "first", "adapter.condition_space=latents")) == 0
    adapter = exported(tmp_path / "first")
    assert (adapter.config["latent_channels"], adapter.config["latent_factor"]) == (4, 8)
    assert adapter.adapter.embed.in_channels == (4 + 64) * 4  # latents, and all pixels of the mask, of 2 x 2 cells
    continued = ("adapter_model_name_or_path=" + str(tmp_path / "first"), "adapter.channels=null")
    assert train(arguments(base, tmp_path / "second", *continued)) == 0
    assert exported(tmp_path / "second").config["latent_channels"] == 4
    pipe = load_pipeline(str(base))
    x = adapter.inputs(torch.rand(1, 1, 32, 32), torch.eye(32)[None, None], lambda pixels: torch.zeros(1, 4, 4, 4))
    masks = torch.nn.functional.avg_pool2d(torch.eye(32)[None, None], 16)
    for feature in adapter(x):
        assert (feature[masks.expand_as(feature) == 0] == 0).all() and feature.any()
    control = LocalAdapterControl(adapter, torch.rand(1, 1, 32, 32), torch.ones(1, 1, 32, 32), weight=1e3)
    sampling = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "np", "max_sequence_length": 8}
    steered, plain = (generate(pipe, "a cat", own, seeds=0, **sampling).images[0] for own in ([control], []))
    assert (steered != plain).any()
    with pytest.raises(ValueError, match="latents of 4 channels, 4x4, but the base's VAE makes 8, 4x4; use it on"):
        adapter.inputs(torch.rand(1, 1, 32, 32), torch.ones(1, 1, 32, 32), lambda pixels: torch.zeros(1, 8, 4, 4))


def gradients(base: Path, tmp_path: Path, again: bool = True, **changes: Any) -> list[torch.Tensor]:
    """Of every tensor of an adapter whose residuals are not 0, for one random batch. again: whether checkpointing
    may compute blocks again."""
    models = load_models(settings_of(base, tmp_path, **changes), CPU, None)
    if not again:
        models.network.disable_gradient_checkpointing()
    torch.manual_seed(0)
    for layer in models.plain_adapter.adapter.out:
        torch.nn.init.normal_(layer.weight)
    condition, mask, noisy = torch.rand(1, 1, 32, 32), torch.ones(1, 1, 32, 32), torch.randn(1, 4, 4, 4)
    texts = models.text_states(["a cat"])
    conditioning = models.denoiser.conditioning(texts, (32, 32), [None])
    times = models.denoiser.times(torch.tensor([500]), models.noise_table((32, 32)))
    output = models.output(noisy, times, conditioning, models.adapter(models.adapter_inputs(condition, mask)))
    output.square().mean().backward()
    return [parameter.grad for parameter in models.plain_adapter.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["sd3", *OTHERS])
def test_gradients_are_the_same_with_checkpointing_and_with_weights_that_are_away(
    name: str, family_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, gradients from weights that were moved away would be an error; here, such weights become NaN."""
    from diffusers.hooks.group_offloading import ModuleGroup

    base, changes = family_folders(name), {"width": 32 if name == "flux2" else 16}
    stored: dict[torch.nn.Parameter, torch.Tensor] = {}  # by identity; while it is here, no other has its place
    onload, moves, here = ModuleGroup.onload_, [], set()

    def leave(group: Any) -> None:
        here.discard(id(group))
        for module in group.modules:
            for parameter in module.parameters():
                stored.setdefault(parameter, parameter.data)
                parameter.data = torch.full_like(parameter.data, torch.nan)

    def come(group: Any) -> None:
        onload(group)
        for module in group.modules:
            for parameter in module.parameters():
                parameter.data = stored.get(parameter, parameter.data)
        here.add(id(group))
        moves.append(len(here))

    plain = gradients(base, tmp_path, **changes)
    repeated = gradients(base, tmp_path, gradient_checkpointing=True, **changes)
    monkeypatch.setattr(ModuleGroup, "offload_", leave)
    monkeypatch.setattr(ModuleGroup, "onload_", come)
    away = gradients(base, tmp_path, gradient_checkpointing=True, offload_base=True, **changes)
    assert moves and max(moves) <= 2  # a block, and what is outside of the blocks
    assert len(plain) == len(repeated) == len(away)
    for first, second, third in zip(plain, repeated, away, strict=True):
        assert first.isfinite().all() and torch.equal(first, second) and torch.equal(first, third)
    if name in ("sd3", "flux"):  # whose blocks have norms with weights: what is kept without checkpointing is lost
        lost = gradients(base, tmp_path, False, gradient_checkpointing=True, offload_base=True, **changes)
        assert not all(gradient.isfinite().all() for gradient in lost)


def test_noise_levels_and_times_are_those_of_the_base(family_folders: Folders, tmp_path: Path) -> None:
    """SD3 has one shift, FLUX one for each size; a setting takes precedence."""
    sd3, flux = (load_models(settings_of(family_folders(name), tmp_path), CPU, None) for name in ("sd3", "flux"))
    assert torch.equal(sd3.noise_table((32, 32)), flow_sigmas(1000, 3.0))
    small, large = flux.noise_table((256, 256)), flux.noise_table((1024, 1024))
    assert (small < large)[:-1].all() and small[-1] == large[-1] == 1
    scheduler = flux.pipe.scheduler
    scheduler.set_timesteps(sigmas=[0.5], mu=1.15)  # of 4,096 tokens
    assert float(large[499]) == pytest.approx(float(scheduler.sigmas[0]), rel=1e-5)
    chosen = load_models(settings_of(family_folders("sd3"), tmp_path, flow_shift=1.5), CPU, None)
    assert torch.equal(chosen.noise_table((32, 32)), flow_sigmas(1000, 1.5))
    noisy, velocity = torch.randn(2, 1, 4, 4, 4)
    x0 = x0_from_flow(noisy, velocity, chosen.noise_table((32, 32))[:1])
    torch.testing.assert_close(x0, noisy - flow_sigmas(1000, 1.5)[0] * velocity)


def test_flux_is_trained_at_a_distilled_guidance(family_folders: Folders, tmp_path: Path) -> None:
    for value, changes in ((3.5, {}), (1.0, {"distilled_guidance": 1.0})):
        models = load_models(settings_of(family_folders("flux"), tmp_path, **changes), CPU, None)
        conditioning = models.denoiser.conditioning(models.text_states(["a", ""]), (32, 32), [None, None])
        assert conditioning.added["guidance"].tolist() == [value, value]
        assert conditioning.rows(slice(1, 2)).added["pooled_projections"].shape[0] == 1


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "flux2"])
def test_captions_are_encoded_as_the_pipeline_encodes_prompts(name: str, family_folders: Folders) -> None:
    """In a batch, filled up and masked, the output is that of each caption alone."""
    denoiser: Any = denoiser_of(load_pipeline(str(family_folders(name))))
    captions = ["a cat", "dogs and a cat"]
    both = denoiser.conditioning(denoiser.encode_captions(captions), (32, 32), [None, None])
    noisy, times = torch.randn(1, 4, 4, 4).expand(2, -1, -1, -1), torch.tensor([400, 400])
    with torch.no_grad():
        found = denoiser.output(noisy, times, both)
        for row, caption in enumerate(captions):
            scale = 0.0 if name == "z_image" else 3.5 if name == "flux" else 1.0
            alone = denoiser.condition(caption, (32, 32), scale, None)
            torch.testing.assert_close(
                found[row], denoiser.output(noisy[:1], times[:1], alone)[0], rtol=1e-4, atol=1e-5
            )
    assert len(denoiser.empty_caption()) == 1


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "qwen_image", "z_image"])
def test_a_preset_has_defaults_of_its_own_and_its_cost_is_counted_from_shapes(name: str) -> None:
    settings = TrainSettings(base=BaseConfig(name=name, dtype="bfloat16", local_files_only=True), train_batch_size=1)
    flow = name != "pixart"
    assert settings.timestep_sampling == ("logit_normal" if flow else "uniform")
    assert settings.validation.scheduler == ("euler" if flow else "ddim")
    assert settings.validation.guidance_scale == BASES[name].guidance_scale


def test_what_fits_is_said_of_transformers(family_folders: Folders, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("localctl.training.cost.SIZES", {})
    text = report(settings_of(family_folders("flux"), tmp_path, gradient_checkpointing=False))
    assert "--quantization bitsandbytes_4bit" in text and "--offload_base" in text and "frozen transformer" in text


@pytest.mark.slow
def test_the_cost_of_flux_is_counted_without_weights() -> None:
    text = report(TrainSettings(base=BaseConfig(name="flux", local_files_only=True), train_batch_size=1))
    row = next(line for line in text.splitlines() if line.split()[:2] == ["flux", "1024x1024"])
    assert float(row.split()[4]) == pytest.approx(23.0, abs=0.1)  # million parameters of the adapter
    assert float(row.split()[5]) == pytest.approx(16_871, rel=1e-3)  # and of transformer, encoders and VAE


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["adapter.adapter_type=full_adapter"], "adapter.adapter_type=full_adapter does not fit"),
        (["compile=true"], "compile=true compiles the blocks of a U-Net"),
        (["distilled_guidance=3"], "distilled_guidance=3.0 is for bases that take it"),
        (["offload_base=true"], "set gradient_checkpointing, too"),
        (["validation_steps=1", "validation.scheduler=dpmpp_2m"], "which the scheduler dpmpp_2m is not for"),
        (["max_sequence_length=513"], "max_sequence_length is 513, but a StableDiffusion3Pipeline reads at most 512"),
        (["adapter.downscale_factor=8"], "but the base's SD3 transformer takes"),
        (["adapter.condition_space=latents", "adapter.mask_condition=true"], "mask_condition blanks pixels"),
    ],
)
def test_what_does_not_fit_a_transformer_is_refused_in_a_sentence(
    more: list[str], message: str, family_folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(arguments(family_folders("sd3"), tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting", ["flow_shift=2", "max_sequence_length=8", "adapter.token_width=8", "quantization=torchao_int8"]
)
def test_settings_of_transformers_are_refused_on_a_unet(
    setting: str, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([f"base={sd_folder}", f"output_dir={tmp_path / 'out'}", "data.count=4", setting]) == 2
    assert "is for" in (text := capsys.readouterr().err) and setting.partition("=")[0] in text


@pytest.mark.parametrize("kind", ["bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8"])
def test_a_quantised_transformer_needs_its_package(
    kind: str, family_folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("localctl.training.large_bases.find_spec", lambda name: None)
    assert train(arguments(family_folders("sd3"), tmp_path / "out", f"quantization={kind}")) == 2
    assert f"needs the package {kind.partition('_')[0]}, which is not installed" in capsys.readouterr().err
